"""Hatchling's build hook: compile the C kernels into the wheel, one library per instruction set.

Only a wheel for Linux on x86-64 contains kernels; its platform tag says so. On other systems, or without a GNU C
compiler, the wheel is pure Python, and Turret compiles the kernels at run time or works without them.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

GLIBC = (2, 28)  # the oldest glibc that torch's own wheels support


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds turret/ops/cpu/shipped/*.so to a wheel and sets its platform tag."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or sys.platform != "linux" or platform.machine() != "x86_64":
            return
        compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "gcc", "cc"))), None)
        if compiler is None:
            self.app.display_warning("no C compiler: the wheel has no compiled kernels")
            return
        self._folder = tempfile.TemporaryDirectory(prefix="turret-kernels-")
        libraries = self._compile(compiler, Path(self._folder.name))
        if not libraries:
            return
        for library in libraries:
            build_data["force_include"][str(library)] = f"turret/ops/cpu/shipped/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform(libraries)}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if folder := getattr(self, "_folder", None):
            folder.cleanup()

    def _compile(self, compiler: str, folder: Path) -> list[Path]:
        kernels = Path(self.root) / "src" / "turret" / "ops" / "cpu"
        recipe = _read(kernels / "compiler.py")

        def library(level: Any) -> Path | None:
            target = folder / f"kernels-{level.name}.so"
            try:
                recipe.compile_portable(compiler, kernels, target, level)
            except recipe.CompilerError as error:  # an old compiler lacks the newest instruction sets
                self.app.display_warning(f"no kernels for {level.title}: {error}")
                return None
            if b"GOMP_parallel" not in target.read_bytes():
                self.app.display_warning(f"no kernels for {level.title}: {compiler} has another OpenMP than torch")
                return None
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [made for made in pool.map(library, recipe.LEVELS) if made]


def _platform(libraries: list[Path]) -> str:
    """The platform tag: manylinux if no library needs a newer glibc than `GLIBC`."""
    needed = {found for each in libraries for found in re.findall(rb"GLIBC_(\d+)\.(\d+)", each.read_bytes())}
    newest = max((int(major), int(minor)) for major, minor in needed)
    return f"manylinux_{GLIBC[0]}_{GLIBC[1]}_x86_64" if newest <= GLIBC else "linux_x86_64"


def _read(path: Path) -> ModuleType:
    """Import one file of the package without importing the package."""
    spec = spec_from_file_location("turret_kernels_compiler", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module
