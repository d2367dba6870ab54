"""What can be trained on a frozen base: one frozen configuration class a method, in PEFT's words. Loads no torch.

Refuses to know models and tensors: `adapters` turns these words into numbers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class _Method(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoRA(_Method):
    """Low-rank adaptation: `y = W x + scaling * B A dropout(x)`, A: (R, D_in), B: (D_out, R) (Hu et al. 2021)."""

    kind: Literal["lora"] = "lora"
    r: int = Field(default=8, ge=1, le=1024)  # rank
    lora_alpha: float = Field(default=32, gt=0, le=65536)  # scaling = lora_alpha / r
    lora_dropout: float = Field(default=0.1, ge=0, lt=1)  # on the input of A, while training
    target_modules: tuple[str, ...] | Literal["all-linear"] | None = None  # None: the family's own (query and value)
    use_rslora: bool = False  # scaling = lora_alpha / sqrt(r) (Kalajdzievski 2023)
    init_lora_weights: bool | Literal["gaussian", "pissa"] = True  # True: Kaiming A, zero B

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


class Prefix(_Method):
    """Prefix tuning: P trained keys and values in front of every attention layer (Li & Liang 2021)."""

    kind: Literal["prefix"] = "prefix"
    num_virtual_tokens: int = Field(default=20, ge=1, le=4096)  # P
    init_text: str | None = None  # its activations start the prefix; None: the task's own words
    reparametrize: bool | None = None  # train an MLP over a small embedding, fold it away at save; None: see `on`
    encoder_hidden_size: int = Field(default=512, ge=1, le=16384)  # width of that MLP
    encoder: bool = True  # of an encoder-decoder: also the encoder and the cross-attention (False: PEFT's shape)

    def on(self, family_kind: str) -> Prefix:
        """The method with `reparametrize` filled in: through the MLP an encoder's prefix does not learn."""
        chosen = family_kind != "encoder" if self.reparametrize is None else self.reparametrize
        return self.model_copy(update={"reparametrize": chosen})


class Head(_Method):
    """Only the task's head; the floor of a comparison."""

    kind: Literal["head"] = "head"


class Full(_Method):
    """Every weight, on a copy; the yardstick of a comparison."""

    kind: Literal["full"] = "full"


class Peft(_Method):
    """Any other method of PEFT: `peft_type` is PEFT's name of it, every further key one of PEFT's configuration.

    Which keys there are is PEFT's to say, when the method is put on a base; here they are plain values.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: Literal["peft"] = "peft"
    peft_type: str = Field(min_length=1, max_length=60)  # IA3, DORA, VERA, PROMPT_TUNING, ...

    @model_validator(mode="before")
    @classmethod
    def _said(cls, value: Any) -> Any:
        """Without keys that say nothing, and with lists for whatever is listed."""
        if not isinstance(value, dict):
            return value
        return {key: _listed(each) for key, each in value.items() if each is not None}

    @field_validator("peft_type")
    @classmethod
    def _capital(cls, value: str) -> str:
        return value.strip().upper().replace("-", "_")

    @property
    def options(self) -> dict[str, Any]:
        """PEFT's own settings, those that were said."""
        return dict(self.model_extra or {})

    def with_options(self, options: dict[str, Any]) -> Peft:
        return Peft(peft_type=self.peft_type, **options)


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(each) for key, each in value.items()}
    return [_listed(each) for each in value] if isinstance(value, (list, tuple)) else value


Method = Annotated[LoRA | Prefix | Head | Full | Peft, Field(discriminator="kind")]
