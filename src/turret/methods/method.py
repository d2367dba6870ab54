"""The protocol of a method: its settings, its usual rate and steps, and its checks in a plan. Loads no torch.

The answers here hold for every method that does not give its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from turret.plan_check import Check

LARGE_BASE = 1_000_000_000  # parameters; from here on the published LoRA rates hold, below it the measured ones
FEWEST_STEPS = 20  # with fewer little can be learnt, whatever the method


@dataclass(frozen=True)
class Defaults:
    """What a method trains with on a base where the recipe names nothing.

    `benchmarks/defaults.py` chose the numbers on validation splits; `docs/measured.md` has what they give.
    """

    lr: float
    steps: int  # with fewer it is not trained out
    head_lr_ratio: float | None = None  # how many times the rate a classifier's head moves at; None: once


class Method(BaseModel):
    """What can be trained on a frozen base: a frozen value whose fields are the keys of a recipe's `[method]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    section: ClassVar[str] = "method"  # of a recipe
    kind: str

    numbers_at: ClassVar[str] = "turret.methods.numbers:MethodNumbers"  # module:class of what it does with tensors
    title: ClassVar[str] = ""  # how its kind is spelled at the beginning of a sentence; empty: with a capital
    every_weight: ClassVar[bool] = False  # it trains a copy of every weight of the base
    head_alone: ClassVar[bool] = False  # it trains only the task's head: the floor of a comparison
    wraps_modules: ClassVar[bool] = False  # it wraps the base's modules itself: no other may stand in their place
    shares_base: ClassVar[bool] = True  # one base carries it beside other adapters
    claimed: ClassVar[bool] = False  # a comparison holds the common claims about adapters against it
    peft_name: ClassVar[str | None] = None  # PEFT's `peft_type`; None: PEFT has no such method
    peft_cannot: ClassVar[Mapping[str, str]] = {}  # by PEFT's task_type: what PEFT does not do with it
    open_settings: ClassVar[bool] = False  # its keys are those of a library, which judges them when it is loaded
    named_by: ClassVar[str | None] = None  # the setting that `compare --methods` takes alone, as in peft:IA3
    named_as: ClassVar[str] = ""  # what that setting is
    not_int8: ClassVar[str | None] = None  # why `train.int8` changes nothing
    low_rate: ClassVar[str | None] = None  # what a rate for full fine-tuning gave
    high_rate: ClassVar[tuple[int, str]] = (20, "is likely to diverge")  # times the usual, and what that does
    classify_steps: ClassVar[int] = 100  # a classifier is not trained out with fewer

    @property
    def summary(self) -> str:
        """What is trained, as a plan says it."""
        return "only the head"

    def on(self, family_kind: str) -> Self:
        """The method with every setting filled in that depends on the kind of base."""
        return self

    def rate(self, family_kind: str, large: bool) -> float:
        """The usual learning rate. large: the base has `LARGE_BASE` parameters or more."""
        return 1e-3

    @property
    def head_lr_ratio(self) -> float | None:
        """How many times that rate a new classifier's head moves at; None: once."""
        return None

    def defaults(self, family_kind: str, *, classify: bool, parameters: int = 0) -> Defaults:
        """For a task on an encoder, a decoder or an encoder-decoder of so many parameters."""
        steps = self.classify_steps if classify else FEWEST_STEPS
        ratio = self.head_lr_ratio if classify else None
        return Defaults(self.rate(family_kind, parameters >= LARGE_BASE), steps, ratio)

    def rate_check(self, rate: float, usual: float) -> Check:
        """Rates that are usual for another method; what they cost was measured."""
        keep = f"leave train.lr out (this method's own is {usual:g})"
        times, harm = self.high_rate
        if self.low_rate is not None and rate <= usual / 10:
            text = f"train.lr = {rate:g} is a rate for full fine-tuning: {self.low_rate}"
            return Check("learning rate", "warn", text, keep)
        if rate >= times * usual:
            text = f"train.lr = {rate:g} is {rate / usual:.0f} times the usual and {harm}"
            return Check("learning rate", "warn", text, keep)
        return Check("learning rate", "ok", f"{rate:g}, where this method's own is {usual:g}")

    def checks(self, family_kind: str) -> Iterator[Check]:
        """Further rows of a plan."""
        yield from ()

    def starting_text(self, instruction: str) -> str | None:
        """The words that it starts from, if it starts from words. instruction: what the task would say."""
        return None

    @property
    def vllm_rank(self) -> int | None:
        """The rank that vLLM must make room for; None: vLLM does not take it."""
        return None

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """The method of a plain PEFT folder: its settings by PEFT's names. shapes: of the tensors, by name."""
        return cls(**{name: config[name] for name in cls.model_fields if name in config})

    def of_tensors(self, names: Iterable[str]) -> Self:
        """The method of an adapter from outside with what only the names of its tensors tell."""
        return self
