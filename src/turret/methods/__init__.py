"""The axis of methods: one class for each method, named as in PEFT, and a table of them. Loads no torch.

A method is a file or a small package: `spec.py` has its settings, rates and checks, `numbers.py` its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

from turret.errors import RecipeError, shown
from turret.json_types import JsonValue
from turret.methods.full import Full
from turret.methods.head import Head
from turret.methods.lora import LoRA
from turret.methods.method import Method
from turret.methods.peft import Peft
from turret.methods.prefix import Prefix

METHODS: dict[str, type[Method]] = {"lora": LoRA, "prefix": Prefix, "head": Head, "full": Full, "peft": Peft}

__all__ = ["METHODS", "Full", "Head", "LoRA", "Method", "Peft", "Prefix", "method_class", "method_named"]


def method_class(value: JsonValue) -> type[Method]:
    """The method class of a `[method]` table or of a kind. Raises RecipeError for an unknown kind."""
    kind = value.get("kind") if isinstance(value, Mapping) else value
    if not isinstance(kind, str) or kind not in METHODS:
        given = "none given" if kind is None else f"given {shown(kind)}"
        raise RecipeError(f"method.kind: expected {', '.join(METHODS)}, {given}")
    return METHODS[kind]


def method_named(kind: str | None) -> type[Method]:
    """The method class of that kind. `Method` itself for an unknown kind, such as the base of a comparison."""
    return METHODS.get(str(kind), Method)
