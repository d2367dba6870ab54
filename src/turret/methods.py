"""What can be trained on a frozen base: one frozen configuration class a method, in PEFT's words. Loads no torch.

Refuses to know models and tensors: `adapters` turns these words into numbers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


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
    reparametrize: bool = True  # train an MLP over a small embedding, fold it away at save
    encoder_hidden_size: int = Field(default=512, ge=1, le=16384)  # width of that MLP
    encoder: bool = True  # of an encoder-decoder: also the encoder and the cross-attention (False: PEFT's shape)


class Head(_Method):
    """Only the task's head; the floor of a comparison."""

    kind: Literal["head"] = "head"


class Full(_Method):
    """Every weight, on a copy; the yardstick of a comparison."""

    kind: Literal["full"] = "full"


Method = Annotated[LoRA | Prefix | Head | Full, Field(discriminator="kind")]
