"""The old path of `turret.engine.Engine`; it leaves with 0.2."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turret.engine.core import Engine


def __getattr__(name: str) -> type[Engine]:
    if name != "Engine":
        raise AttributeError(f"module 'turret.engine.engine' has no attribute {name!r}")
    warnings.warn(
        "turret.engine.engine leaves with 0.2: import it from turret.engine", DeprecationWarning, stacklevel=2
    )
    from turret.engine.core import Engine

    return Engine
