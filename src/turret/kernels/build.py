"""The compiled kernels as a shared library: built once a machine by its own C compiler, kept in the user's cache.

The file's name holds a digest of the source, the compiler and the processor, so a library is never used where it was
not made for. Refuses to know what a kernel computes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

from turret.cache import cache_folder

SOURCES = (
    *("kernels.c", "operations.inc.c", "products.inc.c", "attention.inc.c", "low_rank.inc.c", "step.inc.c"),
    *("layer.inc.c", "lora.inc.c", "int8.inc.c"),
)
# No -ffast-math: it would have the library set the whole process to flush small numbers, and assume there are no NaNs.
FLAGS = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-fPIC", "-shared", "-std=gnu11"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
)
SECONDS = 120  # that a compiler may take
SWITCH = "TURRET_KERNELS"  # "off" in the environment: the plain path


class NotBuilt(Exception):
    """Why there is no library; never an error for a user, who gets the plain path."""


def library_path() -> Path:
    """The library for this machine, built now if it is not there. Raises NotBuilt."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no"):
        raise NotBuilt(f"switched off by {SWITCH}")
    if os.name != "posix" or platform.system() != "Linux":
        raise NotBuilt(f"no kernels for {platform.system()} yet")
    compiler = _compiler()
    place = cache_folder() / "kernels" / f"{_digest(compiler)}.so"
    try:
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(compiler, place)
        if place.stat().st_uid != os.getuid():
            raise NotBuilt(f"{place} belongs to another user")
    except OSError as error:
        raise NotBuilt(f"cannot write {place}: {error.strerror}") from None
    return place


def _compiler() -> str:
    named = os.environ.get("CC")
    for name in [named] if named else ["cc", "gcc", "clang"]:
        if found := shutil.which(name):
            return found
    raise NotBuilt(f"no C compiler: {named or 'cc, gcc and clang'} not found")


def _digest(compiler: str) -> str:
    known = hashlib.sha256(" ".join(FLAGS).encode())
    for name in SOURCES:
        known.update((files("turret.kernels") / name).read_bytes())
    known.update(_asked([compiler, "--version"]))
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text("utf-8", "replace").splitlines() if cpu.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    known.update(features.encode())
    return known.hexdigest()[:32]


def _compile(compiler: str, place: Path) -> None:
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".partial-") as folder:
        for name in SOURCES:
            (Path(folder) / name).write_bytes((files("turret.kernels") / name).read_bytes())
        made = Path(folder) / "kernels.so"
        _asked([compiler, *FLAGS, "-o", str(made), str(Path(folder) / SOURCES[0]), "-lm"])
        os.replace(made, place)


def _asked(command: list[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{command[0]} did not run: {error}") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise NotBuilt(f"{command[0]} failed: {said[0] if said else f'status {done.returncode}'}")
    return done.stdout
