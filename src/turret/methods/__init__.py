"""The axis of methods: one class for each method, named as in PEFT, and a table of them. Loads no torch.

A method is two files: its settings, rates and checks here, its tensors in `turret/adapters/tuners/`.
"""

from __future__ import annotations

from collections.abc import Mapping

from turret.errors import RecipeError, quote
from turret.json_types import Plain
from turret.manifest import MethodSpec
from turret.methods.full import Full
from turret.methods.head import Head
from turret.methods.lora import LoRA
from turret.methods.method import Method
from turret.methods.peft import Peft
from turret.methods.prefix import Prefix

METHODS: dict[str, type[Method]] = {"lora": LoRA, "prefix": Prefix, "head": Head, "full": Full, "peft": Peft}

ALWAYS = ("r", "lora_alpha", "num_virtual_tokens")  # settings that are said even at their defaults

__all__ = [
    "METHODS",
    "Full",
    "Head",
    "LoRA",
    "Method",
    "Peft",
    "Prefix",
    "by_name",
    "describe_method",
    "method_class",
    "method_named",
]


def method_class(value: Plain) -> type[Method]:
    """The method class of a `[method]` table or of a kind. Raises RecipeError for an unknown kind."""
    kind = value.get("kind") if isinstance(value, Mapping) else value
    if not isinstance(kind, str) or kind not in METHODS:
        given = "none given" if kind is None else f"given {quote(kind)}"
        raise RecipeError(f"method.kind: expected {', '.join(METHODS)}, {given}")
    return METHODS[kind]


def describe_method(method: MethodSpec) -> tuple[str, dict[str, str]]:
    """The name of a stored method, and its settings in the order of the class: the size, and what is not a default."""
    kind = str(method.get("kind", "?"))
    fields = method_named(kind).model_fields
    settings = {}
    for key in sorted(method, key=lambda key: list(fields).index(key) if key in fields else len(fields)):
        value = method[key]
        usual = value is None or value is False or (key in fields and value == fields[key].default)
        many = isinstance(value, (list, tuple)) and len(value) > 4
        if key != "kind" and not many and not isinstance(value, Mapping) and (key in ALWAYS or not usual):
            settings[key] = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else f"{value}"
    return kind, settings


def by_name(name: str) -> Method:
    """A method with its defaults: "lora", "prefix", "head", "full" or "peft:IA3". Raises RecipeError."""
    kind, _, value = name.partition(":")
    found = method_class(kind)
    if not value:
        return found.model_validate({"kind": kind})
    if found.named_by is None:
        raise RecipeError(f"method {quote(name)}: {kind} takes nothing after a colon; give {kind} alone")
    return found.model_validate({"kind": kind, found.named_by: value})


def method_named(kind: Plain) -> type[Method]:
    """The method class of that kind. `Method` itself for an unknown kind, such as the base of a comparison."""
    return METHODS.get(str(kind), Method)


# --- examples ---------------------------------------------------------------------------------------------------------
# The methods that the reference and `turret doctor --base` show: one of each kind, and some of PEFT's.


_OF_PEFT = ("DORA", "IA3", "VERA", "LN_TUNING", "LOHA", "OFT", "PROMPT_TUNING")
_NAMES = ("lora", "prefix", "head", "full", *(f"peft:{kind}" for kind in _OF_PEFT))  # as of `compare --methods`
SHOWN = {name: by_name(name) for name in _NAMES}
