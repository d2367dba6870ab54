"""Turret holds many small trained adapters on one frozen base. This module is only the list of public names.

It loads nothing until a name is used: `import turret` and `turret --help` must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turret.adapters import attach, detach, save
    from turret.client import AsyncClient
    from turret.errors import TurretError
    from turret.methods import Full, Head, LoRA, Peft, Prefix
    from turret.recipe import Recipe
    from turret.workspace import Workspace

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Full",
    "Head",
    "LoRA",
    "Peft",
    "Prefix",
    "Recipe",
    "TurretError",
    "Workspace",
    "__version__",
    "attach",
    "detach",
    "save",
]

_HOMES = {
    "AsyncClient": "turret.client",
    "Full": "turret.methods",
    "Head": "turret.methods",
    "LoRA": "turret.methods",
    "Peft": "turret.methods",
    "Prefix": "turret.methods",
    "Recipe": "turret.recipe",
    "TurretError": "turret.errors",
    "Workspace": "turret.workspace",
    "attach": "turret.adapters",
    "detach": "turret.adapters",
    "save": "turret.adapters",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'turret' has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
