"""The method `head`, with the protocol's settings, rates and checks."""

from __future__ import annotations

from typing import ClassVar, Literal

from turret.families.family import Family
from turret.methods.method import Method, Operation


class Head(Method):
    """Only the task's head is trained, from the linear solution on. A lower bound in a comparison."""

    head_alone: ClassVar[bool] = True

    kind: Literal["head"] = "head"

    def refusal(self, operation: Operation, family: Family, generates: bool) -> str | None:
        return 'a base that generates text has no head to train alone: use method.kind = "lora"' if generates else None
