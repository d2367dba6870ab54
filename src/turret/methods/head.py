"""The method `head`, with the protocol's settings, rates and checks."""

from __future__ import annotations

from typing import ClassVar, Literal

from turret.methods.method import Method


class Head(Method):
    """Only the task's head: a logistic regression on frozen features, and the baseline of a comparison."""

    head_alone: ClassVar[bool] = True

    kind: Literal["head"] = "head"
