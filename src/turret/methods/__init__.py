"""What can be trained on a frozen base: one class a method, in PEFT's words, and the table of them. Loads no torch.

A method is a file or a small package: `spec.py` has its settings, rates and checks, `numbers.py` its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turret.errors import RecipeError, shown
from turret.methods.full import Full
from turret.methods.head import Head
from turret.methods.lora import LoRA
from turret.methods.method import Method
from turret.methods.peft import Peft
from turret.methods.prefix import Prefix

METHODS: dict[str, type[Method]] = {"lora": LoRA, "prefix": Prefix, "head": Head, "full": Full, "peft": Peft}

__all__ = ["METHODS", "Full", "Head", "LoRA", "Method", "Peft", "Prefix", "method_class", "method_named"]


def method_class(value: Any) -> type[Method]:
    """The class of what a `[method]` table says. Raises RecipeError for a kind that is not in the table."""
    kind = value.get("kind") if isinstance(value, Mapping) else value
    if not isinstance(kind, str) or kind not in METHODS:
        given = "none given" if kind is None else f"given {shown(kind)}"
        raise RecipeError(f"method.kind: expected {', '.join(METHODS)}, {given}")
    return METHODS[kind]


def method_named(kind: object) -> type[Method]:
    """The class of that kind; the protocol itself where no method is called so, as for a base."""
    return METHODS.get(str(kind), Method)
