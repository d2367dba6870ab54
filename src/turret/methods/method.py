"""The protocol of a method: its settings, default learning rate and steps, checks in a plan, errors. Loads no torch.

The defaults here are those of `head`; a method overrides what differs.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, ValidationInfo, model_validator

from turret.errors import RecipeError, join_sentences, quote
from turret.families.family import Family
from turret.json_types import JsonObject, Plain
from turret.manifest import AdapterConfig, MethodSpec

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# --- a row of a plan --------------------------------------------------------------------------------------------------
# One row of a plan: the check, its result and a remedy. Loads no torch.


Level = Literal["ok", "warn", "refuse"]


@dataclass(frozen=True)
class Check:
    """One row of a plan."""

    name: str
    level: Level
    text: str
    remedy: str | None = None

    def to_json(self) -> JsonObject:
        return asdict(self)

    def __str__(self) -> str:
        return self.text if self.remedy is None else f"{self.text}: {self.remedy}"


# --- methods ----------------------------------------------------------------------------------------------------------


LARGE_BASE = 1_000_000_000  # parameters; the published LoRA rates hold from here on, the measured ones below
CLASSIFY = "classify"  # a request that a head answers
MANY_OUTPUTS = 10  # a classifier with more may need more steps
FEWEST_STEPS = 20  # no method learns much in fewer
FEWEST_EPOCHS, MOST_EPOCHS = 3, 20
Operation = Literal["train", "mix", "import", "export"]
AS_GIVEN = {"errors": "as given"}  # context of a validation whose caller writes the sentences of its errors


def refuse_places(model: type[BaseModel], places: tuple[object, ...]) -> None:
    """Raise RecipeError for settings without a name, such as `LoRA(8)`."""
    if places:
        first = next(name for name in model.model_fields if name != "kind" or len(model.model_fields) == 1)
        raise RecipeError(
            f"{model.__name__} takes its settings by name, such as {model.__name__}({first}=...), given "
            f"{quote(places[0])}: name it"
        )


def epochs_for(steps: int, examples: int, batch_size: int) -> int:
    """The fewest epochs that give so many steps."""
    return math.ceil(steps / math.ceil(examples / batch_size))


def usual_epochs(steps: int, examples: int, batch_size: int) -> int:
    """The epochs that give a method's steps on so many training examples, within bounds."""
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, epochs_for(steps, max(1, examples), batch_size)))


@dataclass(frozen=True)
class Defaults:
    """The settings that a method trains with if the recipe sets none.

    `benchmarks/defaults.py` chose the numbers on validation splits; `docs/measured.md` has the results.
    """

    lr: float
    steps: int  # with fewer, training stops before the loss levels off
    head_lr_ratio: float | None = None  # learning rate of a classifier's head over `lr`; None: 1


class Method(BaseModel):
    """A way to adapt a frozen base. The fields are the keys of a recipe's `[method]`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    section: ClassVar[str] = "method"  # of a recipe
    kind: str

    if not TYPE_CHECKING:

        def __new__(cls, *places, **_settings):
            refuse_places(cls, places)
            return super().__new__(cls)

    @model_validator(mode="wrap")
    @classmethod
    def _one_line_error(cls, value: Plain, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Turn an invalid setting into a RecipeError of one line."""
        try:
            return handler(value)
        except ValidationError as error:
            if info.context == AS_GIVEN:
                raise
            methods = {each.model_fields["kind"].default: each for each in _subclasses(Method)}
            keys = [*(f"{cls.section}.{name}" for name in cls.model_fields), "train.lr"]  # which many take for one
            raise RecipeError(join_sentences(list(error_sentences(cls, error, lambda kind: keys, methods)))) from None

    tuner_at: ClassVar[str] = "turret.adapters.tuners.tuner:Tuner"  # module:class of its tensors
    title: ClassVar[str] = ""  # its kind at the beginning of a sentence; empty: the kind with a capital
    trained: ClassVar[str] = "only the head"  # what is trained, in the words of a plan
    every_weight: ClassVar[bool] = False  # it trains a copy of every weight of the base
    head_alone: ClassVar[bool] = False  # it trains only the task's head: the baseline of a comparison
    wraps_modules: ClassVar[bool] = False  # PEFT wraps the base's modules: Turret must not replace them
    shares_base: ClassVar[bool] = True  # one base can serve it together with other adapters
    claimed: ClassVar[bool] = False  # a comparison tests the common claims about adapters on it
    peft_name: ClassVar[str | None] = None  # PEFT's `peft_type`; None: PEFT has no such method
    peft_cannot: ClassVar[Mapping[str, str]] = {}  # by PEFT's task_type: why PEFT does not run it
    peft_generate: ClassVar[str | None] = None  # why PEFT's `generate()` gives other texts than the adapter
    open_settings: ClassVar[bool] = False  # a library defines its keys, and checks them when it is loaded
    named_by: ClassVar[str | None] = None  # the setting that `compare --methods` takes after a colon, as in peft:IA3
    named_as: ClassVar[str] = ""  # a description of that setting
    not_quantized: ClassVar[str | None] = None  # why it does not train on a base in 4 bits
    unsharded: ClassVar[str | None] = None  # why it does not train on a base in parts (`train.shard`)
    low_rate: ClassVar[str | None] = None  # measured: the result with a rate for full fine-tuning
    high_rate: ClassVar[tuple[int, str]] = (20, "is likely to diverge")  # (times the default, what happens from there)
    classify_steps: ClassVar[int] = 250  # steps until the loss of a classifier levels off
    many_outputs_steps: ClassVar[int | None] = None  # if it has more than MANY_OUTPUTS outputs; None: as many

    @property
    def summary(self) -> str:
        """`trained`, with what the settings change of it."""
        return self.trained

    def on(self, family_kind: str) -> Self:
        """A copy with the settings filled in that depend on the kind of base."""
        return self

    def rate(self, family_kind: str, large: bool) -> float:
        """The default learning rate. large: the base has `LARGE_BASE` parameters or more."""
        return 1e-3

    @property
    def not_sharded(self) -> str | None:
        """`unsharded`, with what the settings change of it; None: it trains on a base in parts."""
        return self.unsharded

    @property
    def head_lr_ratio(self) -> float | None:
        """The learning rate of a new classifier's head over `rate`; None: 1."""
        return None

    def defaults(self, family_kind: str, request: str, *, parameters: int = 0, outputs: int = 1) -> Defaults:
        """The defaults on an encoder, a decoder or an encoder-decoder with that many parameters.

        Args:
            request: what the base is asked for, as `Task.request`.
            outputs: of the head.
        """
        ratio = self.head_lr_ratio if request == CLASSIFY else None
        return Defaults(self.rate(family_kind, parameters >= LARGE_BASE), self.steps(request, outputs), ratio)

    def steps(self, request: str, outputs: int) -> int:
        """Steps until the loss levels off. outputs: of the head."""
        if request != CLASSIFY:
            return FEWEST_STEPS
        if outputs > MANY_OUTPUTS and self.many_outputs_steps is not None:
            return self.many_outputs_steps
        return self.classify_steps

    def rate_check(self, rate: float, default: float) -> Check:
        """A warning for rates that suit another method; what they cost was measured."""
        remedy = f"leave train.lr out (this method's own is {default:g})"
        times, harm = self.high_rate
        if self.low_rate is not None and rate <= default / 10:
            text = f"train.lr = {rate:g} is a rate for full fine-tuning: {self.low_rate}"
            return Check("learning rate", "warn", text, remedy)
        if rate >= times * default:
            text = f"train.lr = {rate:g} is {rate / default:.0f} times this method's own and {harm}"
            return Check("learning rate", "warn", text, remedy)
        return Check("learning rate", "ok", f"{rate:g} (this method's own is {default:g})")

    def checks(self, family_kind: str) -> Iterator[Check]:
        """Further rows of a plan."""
        yield from ()

    def refusal(self, operation: Operation, family: Family, generates: bool) -> str | None:
        """Why an operation is not possible on bases of a family, in one line with a remedy; None if it is.

        Args:
            operation: train; mix with other adapters in one batch; import from a folder; export to one.
            generates: the task generates text, and has no head.
        """
        return None

    def why_unanswered(self, family: Family, generates: bool) -> str | None:
        """Why no engine answers with it, not even with it alone on its base, in one line; None if one does."""
        return self.refusal("mix", family, generates)

    def starting_text(self, instruction: str) -> str | None:
        """The text that it starts from, if it starts from a text. instruction: the task's own."""
        return None

    @property
    def vllm_rank(self) -> int | None:
        """The rank that vLLM must be configured for; None: vLLM does not serve it."""
        return None

    @property
    def gguf_alpha(self) -> float | None:
        """The scaling times the rank, for the GGUF file of a LoRA; None: llama.cpp has no such method."""
        return None

    @classmethod
    def reads(cls, config: AdapterConfig, names: Iterable[str] = ()) -> bool:
        """Whether an `adapter_config.json` of PEFT describes this method. names: of its tensors, if known."""
        return cls.peft_name is not None and config.get("peft_type") == cls.peft_name

    @classmethod
    def mixes(cls, settings: MethodSpec) -> bool:
        """Whether an adapter of these settings shares a base with others."""
        return cls.shares_base

    @classmethod
    def from_peft(cls, config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """The method of a plain PEFT folder.

        Args:
            config: the settings by PEFT's names.
            shapes: the tensors' shapes by name.
        """
        return cls.model_validate({name: config[name] for name in cls.model_fields if name in config})

    def of_tensors(self, names: Iterable[str]) -> Self:
        """A copy with the settings that only the names of an imported adapter's tensors show."""
        return self


def _subclasses(model: type[Method]) -> Iterator[type[Method]]:
    for each in model.__subclasses__():
        yield each
        yield from _subclasses(each)


# --- error messages ---------------------------------------------------------------------------------------------------
# Pydantic's validation errors of recipes and methods as sentences of one-line errors, with the nearest known key.


KnownKeys = Callable[[str], Iterable[str]]  # kind of method -> every key of a recipe with that method, "train.lr"
Methods = Mapping[str, type[BaseModel]]  # the class of each kind of method

_OTHER_NAMES = {  # other tools' names for our keys
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rank": "r",
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "gradient_clip",
    "early_stopping_patience": "early_stopping",
    "patience": "early_stopping",
    "precision": "dtype",
    "max_length": "max_tokens",
    "max_source_length": "max_tokens",
    "max_target_length": "max_target_tokens",
    "prefix": "prefix_text",
    "source_prefix": "prefix_text",
    "model": "base",
    "dataset": "data",
}
_TYPE_NAMES = {"string": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
_TYPE_NAMES |= {"int_from_float": "a whole number", **dict.fromkeys(("model_attributes", "model", "dict"), "a table")}


def error_sentences(
    model: type[BaseModel], error: ValidationError, known: KnownKeys, methods: Methods
) -> Iterator[str]:
    """One sentence per wrong key.

    A key whose type is a union has an error per member. Only the errors with the deepest location are shown: their
    member of the union came closest to the value.
    """
    groups: dict[str, list[ErrorDetails]] = {}
    for item in error.errors(include_url=False):
        path = ".".join(filter(None, [getattr(model, "section", ""), *map(str, item["loc"][:1])]))
        groups.setdefault(path, []).append(item)
    if "data" in groups:
        groups.pop("name", None)  # it is made from the data
    for path, items in groups.items():
        depth = max(len(item["loc"]) for item in items)
        items = [item for item in items if len(item["loc"]) == depth]
        kind = items[0]["type"]
        if kind == "extra_forbidden":
            own = next((kind for kind, each in methods.items() if each is model), "lora")
            yield unknown_key(path, own, known, methods)
        elif kind == "missing":
            yield f"{path} is missing: {_missing_remedy(path)}"
        elif kind == "sentences":  # raised by the validator of `method`
            yield from items[0]["ctx"]["sentences"]
        else:
            yield f"{path}: {key_error(items)}"


def key_error(errors: Sequence[ErrorDetails]) -> str:
    """What is wrong with one key: "expected a whole number, given 'x'".

    Args:
        errors: pydantic's errors for that key, one per member of its union.
    """
    texts: list[str] = []
    for error in errors:
        text = error["msg"].removeprefix("Value error, ")
        kind = error["type"].removesuffix("_type").removesuffix("_parsing")
        text = f"expected {_TYPE_NAMES[kind]}" if kind in _TYPE_NAMES else text[:1].lower() + text[1:]
        text = text.replace("input should be", "expected")
        texts.append(text if not texts else text.removeprefix("expected "))
    text = " or ".join(dict.fromkeys(texts))
    return text if "given" in text or "bad adapter name" in text else f"{text}, given {quote(errors[0].get('input'))}"


def unknown_key(key: str, method: str, known: KnownKeys, methods: Methods) -> str:
    """The sentence for an unknown key, with the key that was probably meant.

    Args:
        method: the kind of the recipe's method.
    """
    every, (section, _, leaf) = list(known(method)), key.rpartition(".")
    siblings = [k for k in every if k.rpartition(".")[0] == section]
    owners = [kind for kind, model in methods.items() if section == "method" and leaf in model.model_fields]
    own_name = _OTHER_NAMES.get(leaf, leaf)
    meant = [k for k in siblings or every if k.rpartition(".")[2] == own_name]
    meant += [k for k in every if k.rpartition(".")[2] == own_name]  # `lr` alone means `train.lr`
    leaves = {k.rpartition(".")[2]: k for k in siblings or every}
    others = {other: leaves[own] for other, own in _OTHER_NAMES.items() if own in leaves}
    meant += [(leaves | others)[near] for near in difflib.get_close_matches(leaf, [*leaves, *others], n=1)]
    meant += difflib.get_close_matches(key, every, n=1)
    if owners:
        remedy = f'it belongs to method.kind = "{owners[0]}", this method is "{method}"'
    elif meant:
        remedy = f"did you mean {meant[0]!r}?"
    else:
        in_table = bool(siblings and section)
        names = leaves if in_table else dict.fromkeys(k.partition(".")[0] for k in every)
        remedy = f"known {f'in [{section}] ' if in_table else ''}are {', '.join(names)}"
    return f"unknown key {quote(key)}: {remedy}"


def _missing_remedy(key: str) -> str:
    return {
        "data": "add a [data] table with a source",
        "data.source": "say where the examples are: a file, a folder, a Hub id or a pypi: package",
    }.get(key, "add it")
