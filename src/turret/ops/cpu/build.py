"""Load the kernels' library: from the wheel, or compiled on this machine and cached.

The name of a cached library is a digest of source, compiler and processor, so it is never used on another machine.
A cache folder that other users can write to is not used.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import tempfile
from pathlib import Path

from turret.disk import cache_folder, open_private, private_folder
from turret.ops.cpu.compiler import FLAGS, LEVELS, NATIVE, SOURCES, CompilerError, compile_library, run

SWITCH = "TURRET_KERNELS"  # environment variable: "off" for no kernels, "compile" to ignore those in the wheel
FOLDER = Path(__file__).parent  # of the source
SHIPPED = FOLDER / "shipped"  # made when the wheel is built; a source checkout has none

_log = logging.getLogger(__name__)


class NotBuilt(Exception):
    """Why there is no library. Not an error for the user: Turret then computes in torch."""


def load() -> tuple[ctypes.CDLL, str]:
    """The library for this machine, and a message about its origin. Raises NotBuilt."""
    choice = os.environ.get(SWITCH, "").lower()
    if choice in ("off", "0", "no"):
        raise NotBuilt(f"switched off by {SWITCH}")
    if platform.system() != "Linux":
        raise NotBuilt(f"no kernels for {platform.system()} yet")
    try:
        return (None if choice == "compile" else load_shipped(SHIPPED, cpu_features())) or _load_compiled()
    except CompilerError as error:
        raise NotBuilt(str(error)) from None
    except OSError as error:  # the system does not load the library
        raise NotBuilt(f"cannot load the kernels: {error}") from None


def cpu_features() -> frozenset[str]:
    """The processor's features, as Linux lists them in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def load_shipped(folder: Path, features: frozenset[str]) -> tuple[ctypes.CDLL, str] | None:
    """The best library of the wheel for a processor with these features, and a message; or None. Raises OSError."""
    for level in LEVELS:
        place = folder / f"kernels-{level.name}.so"
        if level.features <= features and place.exists():
            loaded = ctypes.CDLL(str(place))
            if loaded.ready():
                return loaded, f"shipped for {level.title}"
    return None


def _load_compiled() -> tuple[ctypes.CDLL, str]:
    compiler = _compiler()
    name = f"{_digest(compiler)}.so"
    try:
        folder = private_folder(cache_folder() / "kernels")
        if not (folder / name).exists():
            _compile(compiler, folder, name)
        return _load(folder / name), f"compiled as {name}"
    except OSError as error:
        reason = _reason(error)
    with tempfile.TemporaryDirectory(prefix="turret-") as own:
        try:
            folder = private_folder(Path(own))
            _compile(compiler, folder, name)
            loaded = _load(folder / name)
        except OSError as error:
            raise NotBuilt(f"{reason}; and {_reason(error)}") from None
    _log.warning("kernels are compiled in every process, because their cache is not used: %s", reason)
    return loaded, f"compiled for this process only, because the cache is not used: {reason}"


def _reason(error: OSError) -> str:
    return f"{error.filename} {error.strerror}" if error.filename else str(error)


def _load(place: Path) -> ctypes.CDLL:
    """Load the file that was checked, even if its name points to another file by then."""
    descriptor = open_private(place)
    try:
        loaded = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    if not loaded.ready():
        raise NotBuilt("the system does not permit the processor's matrix tiles (AMX)")
    return loaded


def _compiler() -> str:
    named = os.environ.get("CC")
    for name in [named] if named else ["cc", "gcc", "clang"]:
        if found := shutil.which(name):
            return found
    raise NotBuilt(f"no C compiler: {named or 'cc, gcc and clang'} not found")


def _digest(compiler: str) -> str:
    known = hashlib.sha256(" ".join((*FLAGS, *NATIVE)).encode())
    for name in SOURCES:
        known.update((FOLDER / name).read_bytes())
    known.update(run([compiler, "--version"]))
    known.update(" ".join(sorted(cpu_features())).encode() or platform.processor().encode())
    return known.hexdigest()[:32]


def _compile(compiler: str, folder: Path, name: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as own:
        for source in SOURCES:
            (Path(own) / source).write_bytes((FOLDER / source).read_bytes())
        target = Path(own) / name
        compile_library(compiler, Path(own), target, NATIVE)
        target.chmod(0o700)
        os.replace(target, folder / name)
