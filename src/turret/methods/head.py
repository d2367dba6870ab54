"""The method `head`: its settings, rates and checks are the protocol's."""

from __future__ import annotations

from typing import ClassVar, Literal

from turret.methods.method import Method


class Head(Method):
    """Only the task's head, a logistic regression on frozen features; the floor of a comparison."""

    head_alone: ClassVar[bool] = True

    kind: Literal["head"] = "head"
