"""Load a script of `release` or `benchmarks`, which belongs to no package."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def load(script: Path, name: str | None = None) -> ModuleType:
    """The module of a script.

    Args:
        name: in `sys.modules`; default: the file's.
    """
    spec = spec_from_file_location(name or script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
