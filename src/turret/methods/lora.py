"""The settings, rates and checks of LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field

from turret.json_types import Plain
from turret.manifest import AdapterConfig
from turret.methods.method import Method

# `turret merge --how` -> PEFT's `combination_type`, and whether it prunes and so takes a density.
COMBINATIONS = {
    "linear": ("linear", False),
    "svd": ("svd", False),
    "cat": ("cat", False),
    "ties": ("ties", True),
    "dare": ("dare_linear", True),
    "dare-ties": ("dare_ties", True),
}


FROM_DATA = ("eva", "corda", "lora_ga")  # PEFT's names of starts that it computes from a pass over the data


def require_no_data(value: Plain) -> Plain:
    """The value of `init_lora_weights`. Raises ValueError for a start that needs a pass over the data."""
    if value in FROM_DATA:
        raise ValueError(f'expected an initialization without a pass over the data, given "{value}": leave it out')
    return value


def lora_scaling(alpha: float, r: float, use_rslora: bool) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` with rsLoRA: the factor of `B A`.

    Source: Hu et al. 2021; Kalajdzievski 2023 for rsLoRA.
    """
    return alpha / (r**0.5 if use_rslora else r)


class LoRA(Method):
    """Low-rank adaptation: `y = W x + scaling * B A dropout(x)`, A: (R, D_in), B: (D_out, R) (Hu et al. 2021).

    Args:
        r: rank
        lora_alpha: the scaling is `lora_alpha / r`
        lora_dropout: dropout on the input of A during training
        target_modules: layers to adapt; a name matches the end of a path (default: the family's own, mostly
            query and value)
        use_rslora: the scaling is `lora_alpha / sqrt(r)` (Kalajdzievski 2023)
        lora_plus_ratio: LoRA+: the learning rate of B divided by that of A (Hayou et al. 2024; default: none)
        init_lora_weights: true: Kaiming A and zero B; `"pissa"`: the principal singular vectors of W;
            `"loftq"`: those of what 4 bits lose of W
    """

    tuner_at: ClassVar[str] = "turret.adapters.tuners.lora:LoRATuner"
    title: ClassVar[str] = "LoRA"
    trained: ClassVar[str] = "low-rank changes of linear layers"
    peft_name: ClassVar[str | None] = "LORA"
    claimed: ClassVar[bool] = True
    low_rate: ClassVar[str | None] = (
        "LoRA stays near chance with it (three epochs on 2,000 reviews of IMDB: accuracy 0.53, and 0.87 by default)"
    )
    classify_steps: ClassVar[int] = 500  # on pairs of sentences the loss still falls after 375
    many_outputs_steps: ClassVar[int | None] = 1000  # measured: gains with 12 to 150 classes, not with two

    kind: Literal["lora"] = "lora"
    r: int = Field(default=8, ge=1, le=1024)
    lora_alpha: float = Field(default=32, gt=0, le=65536)
    lora_dropout: float = Field(default=0.1, ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] | None = None
    use_rslora: bool = False
    lora_plus_ratio: float | None = Field(default=None, gt=0, le=1000)
    init_lora_weights: Annotated[bool | Literal["gaussian", "pissa", "loftq"], BeforeValidator(require_no_data)] = True

    @property
    def scaling(self) -> float:
        return lora_scaling(self.lora_alpha, self.r, self.use_rslora)

    def rate(self, family_kind: str, large: bool) -> float:
        """1e-3, and 2e-4 for a large base.

        1e-3 measured best below a billion weights, where Hu et al. (2021) use 2e-4 to 5e-4. 2e-4 is the rate of QLoRA
        (Dettmers et al. 2023) for 7B and 13B.
        """
        return 2e-4 if large else 1e-3

    @property
    def not_sharded(self) -> str | None:
        start = self.init_lora_weights
        return f"with init_lora_weights = {start} starts from whole weights" if start in ("pissa", "loftq") else None

    @property
    def head_lr_ratio(self) -> float | None:
        """10: at LoRA's rate, a new head for twelve classes needs hundreds of steps to grow large enough.

        Until then little of the gradient reaches LoRA.
        """
        return 10.0

    @property
    def vllm_rank(self) -> int | None:
        return self.r

    @property
    def gguf_alpha(self) -> float | None:
        return self.scaling * self.r

    @classmethod
    def from_peft(cls, config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        names = ("r", "lora_alpha", "lora_dropout", "use_rslora")
        return cls.model_validate({name: config[name] for name in names if name in config})

    def of_tensors(self, names: Iterable[str]) -> Self:
        """A copy whose `target_modules`, if unset, are the last parts of the adapted layers' names."""
        if self.target_modules is not None:
            return self
        layers = {name.rsplit(".lora_", 1)[0].rpartition(".")[2] for name in names}
        return self.model_copy(update={"target_modules": tuple(sorted(layers))})
