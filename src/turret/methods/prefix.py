"""The settings, rates and checks of prefix tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field

from turret.errors import BundleError
from turret.families.family import Family
from turret.manifest import AdapterConfig
from turret.methods.method import Check, Method, Operation

MLP_WIDTH = 512


class Prefix(Method):
    """Prefix tuning: P trained keys and values in front of every attention layer (Li & Liang 2021).

    Args:
        num_virtual_tokens: length of the prefix
        init_text: initialise the prefix from the keys and values of this text (default: the task's own words)
        reparametrize: train an MLP over a small embedding, and fold it into the prefix at the end (default:
            false for an encoder, else true)
        encoder_hidden_size: width of that MLP
        encoder: encoder-decoder: a prefix in the encoder and the cross-attention too; false is PEFT's shape
    """

    tuner_at: ClassVar[str] = "turret.adapters.tuners.prefix:PrefixTuner"
    trained: ClassVar[str] = "a prefix in every attention layer"
    peft_name: ClassVar[str | None] = "PREFIX_TUNING"
    peft_cannot: ClassVar[Mapping[str, str]] = {  # in PEFT 0.21
        "SEQ_CLS": "PEFT does not run a prefix on a classifier.",
        "SEQ_2_SEQ_LM": "PEFT loads only the decoder's part of the prefix and gives other outputs.",
    }
    peft_generate: ClassVar[str | None] = (
        "PEFT's generate() leaves the prefix out and gives other texts (PEFT 0.21 with transformers 5.24): "
        "call the model token by token, as the code of the model card does, or use Turret"
    )
    claimed: ClassVar[bool] = True
    low_rate: ClassVar[str | None] = (
        "a prefix hardly moves with it (headlines by SmolLM2: loss 5.4 at the start, 3.07 after 80 steps at 1e-3)"
    )
    classify_steps: ClassVar[int] = 600

    kind: Literal["prefix"] = "prefix"
    num_virtual_tokens: int = Field(default=20, ge=1, le=4096)
    init_text: str | None = None
    reparametrize: bool | None = None
    encoder_hidden_size: int = Field(default=MLP_WIDTH, ge=1, le=16384)
    encoder: bool = True

    def on(self, family_kind: str) -> Self:
        """A copy with `reparametrize` filled in: off for an encoder, whose prefix does not learn through the MLP."""
        chosen = family_kind != "encoder" if self.reparametrize is None else self.reparametrize
        return self.model_copy(update={"reparametrize": chosen})

    def rate(self, family_kind: str, large: bool) -> float:
        """1e-3 through the MLP. Without it 3e-2 on an encoder, else 1e-2.

        One step of Adam moves a weight by about the rate. A key or value that the MLP computes is a sum over its hidden
        units, so it moves up to `encoder_hidden_size` times further, and all virtual tokens move together.
        """
        if self.on(family_kind).reparametrize:
            return 1e-3
        return 3e-2 if family_kind == "encoder" else 1e-2

    def checks(self, family_kind: str) -> Iterator[Check]:
        """Whether a width is set and there is no MLP, and whether an encoder's prefix is trained through one.

        There a step moves all keys and values too far.
        """
        width = self.encoder_hidden_size
        if not self.reparametrize and width != MLP_WIDTH:
            yield Check(
                "encoder_hidden_size",
                "warn",
                f"{width} is the width of an MLP that is not there",
                "set method.reparametrize = true, or leave method.encoder_hidden_size out",
            )
        if family_kind != "encoder":
            return
        if not self.reparametrize:
            text = "an encoder's prefix trails LoRA and full fine-tuning, most on pairs of texts (docs/measured.md)"
            yield Check("prefix", "ok", text)
        else:
            yield Check(
                "reparametrize",
                "warn",
                "through the MLP, an encoder's prefix often stays at chance on texts that are hard to tell apart",
                "leave method.reparametrize and train.lr out",
            )

    @classmethod
    def from_peft(cls, config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        if "prompt_embeddings" not in shapes:
            raise BundleError("the prefix has no tensor 'prompt_embeddings': save it again with PEFT")
        return cls(num_virtual_tokens=shapes["prompt_embeddings"][0], encoder=False, reparametrize=False)

    def refusal(self, operation: Operation, family: Family, generates: bool) -> str | None:
        if not family.rows_alone:
            return None
        return (
            f"{family.name} computes its attention itself, so a prefix cannot stand in front of it: "
            'use method.kind = "lora" on this base, or a base of another family'
        )

    def starting_text(self, instruction: str) -> str | None:
        return self.init_text or instruction
