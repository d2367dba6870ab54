"""The settings, rates and checks of full fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from turret.families.family import Family
from turret.methods.method import Method, Operation

UNMIXED = (
    "full fine-tuning replaces every weight, so its base cannot serve other adapters: export it merged and serve it as "
    "a base"
)


class Full(Method):
    """Full fine-tuning: every weight is trained, on a copy of the base. The usual baseline of a comparison."""

    tuner_at: ClassVar[str] = "turret.adapters.tuners.full:FullTuner"
    trained: ClassVar[str] = "every weight, on a copy"
    unsharded: ClassVar[str | None] = "trains a copy of every weight"
    every_weight: ClassVar[bool] = True
    shares_base: ClassVar[bool] = False
    not_quantized: ClassVar[str | None] = "trains the weights themselves"
    high_rate: ClassVar[tuple[int, str]] = (10, "wipes out what the base has learned")

    kind: Literal["full"] = "full"

    def refusal(self, operation: Operation, family: Family, generates: bool) -> str | None:
        return UNMIXED if operation == "mix" else None

    def why_unanswered(self, family: Family, generates: bool) -> str | None:
        return None  # on a base with its weights

    def rate(self, family_kind: str, large: bool) -> float:
        """1e-4, and 2e-5 for a large base.

        Devlin et al. (2019) take 2e-5 to 5e-5 for BERT, and far more steps.
        """
        return 2e-5 if large else 1e-4
