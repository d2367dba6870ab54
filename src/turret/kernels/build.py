"""The compiled kernels as a loaded library: one that ships in the wheel, else one compiled here and kept in the cache.

A cached library's name holds a digest of the source, the compiler and the processor, so a library is never used where
it was not made for. A cache that somebody else could write to is never loaded from.
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

from turret.cache import cache_folder, open_private, private_folder
from turret.kernels.compiler import FLAGS, LEVELS, NATIVE, SOURCES, CompilerError, compile_library, run

SWITCH = "TURRET_KERNELS"  # in the environment: "off" for the plain path, "compile" to pass over those in the wheel
FOLDER = Path(__file__).parent  # of the source
SHIPPED = FOLDER / "shipped"  # made by the package's build; a source checkout has none

_log = logging.getLogger(__name__)


class NotBuilt(Exception):
    """Why there is no library; never an error for a user, who gets the plain path."""


def load() -> tuple[ctypes.CDLL, str]:
    """The library for this machine, and where it came from. Raises NotBuilt."""
    choice = os.environ.get(SWITCH, "").lower()
    if choice in ("off", "0", "no"):
        raise NotBuilt(f"switched off by {SWITCH}")
    if platform.system() != "Linux":
        raise NotBuilt(f"no kernels for {platform.system()} yet")
    try:
        return (None if choice == "compile" else shipped(SHIPPED, features())) or _compiled()
    except CompilerError as error:
        raise NotBuilt(str(error)) from None
    except OSError as error:  # a library that the system does not load
        raise NotBuilt(f"cannot load the kernels: {error}") from None


def features() -> frozenset[str]:
    """What Linux says that this processor can do, and lets it do."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def shipped(folder: Path, features: frozenset[str]) -> tuple[ctypes.CDLL, str] | None:
    """The best library of the wheel for a processor with these features, or None. Raises OSError."""
    for level in LEVELS:
        place = folder / f"kernels-{level.name}.so"
        if level.features <= features and place.exists():
            loaded = ctypes.CDLL(str(place))
            if loaded.ready():
                return loaded, f"shipped for {level.title}"
    return None


def _compiled() -> tuple[ctypes.CDLL, str]:
    compiler = _compiler()
    name = f"{_digest(compiler)}.so"
    try:
        folder = private_folder(cache_folder() / "kernels")
        if not (folder / name).exists():
            _compile(compiler, folder, name)
        return _load(folder / name), f"compiled as {name}"
    except OSError as error:
        reason = _said(error)
    with tempfile.TemporaryDirectory(prefix="turret-") as own:
        try:
            folder = private_folder(Path(own))
            _compile(compiler, folder, name)
            loaded = _load(folder / name)
        except OSError as error:
            raise NotBuilt(f"{reason}; and {_said(error)}") from None
    _log.warning("kernels are compiled anew in every process, their cache is not used: %s", reason)
    return loaded, f"compiled for this process alone, the cache is not used: {reason}"


def _said(error: OSError) -> str:
    return f"{error.filename} {error.strerror}" if error.filename else str(error)


def _load(place: Path) -> ctypes.CDLL:
    """Load the very file that was checked, whatever its name leads to by then."""
    descriptor = open_private(place)
    try:
        loaded = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    if not loaded.ready():
        raise NotBuilt("the system does not grant the processor's matrix tiles")
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
    known.update(" ".join(sorted(features())).encode() or platform.processor().encode())
    return known.hexdigest()[:32]


def _compile(compiler: str, folder: Path, name: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as own:
        for source in SOURCES:
            (Path(own) / source).write_bytes((FOLDER / source).read_bytes())
        made = Path(own) / name
        compile_library(compiler, Path(own), made)
        made.chmod(0o700)
        os.replace(made, folder / name)
