"""The old path of `turret.engine.Engine`; it leaves with 0.2."""

import warnings


def __getattr__(name: str) -> object:
    if name != "Engine":
        raise AttributeError(f"module 'turret.engine.engine' has no attribute {name!r}")
    warnings.warn(
        "turret.engine.engine leaves with 0.2: import it from turret.engine", DeprecationWarning, stacklevel=2
    )
    from turret.engine.core import Engine

    return Engine
