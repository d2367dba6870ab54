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
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turret.cache import cache_folder, open_private, private_folder

# --- compiler ---------------------------------------------------------------------------------------------------------
# The command that compiles the kernels, and the processors that the wheel has libraries for.
#
# Standard library only: the package's own build (hatch_build.py) reads this file without importing turret.


SOURCES = (
    *("kernels.c", "operations.inc.c", "products.inc.c", "attention.inc.c", "low_rank.inc.c", "step.inc.c"),
    *("layer.inc.c", "lora.inc.c", "int8.inc.c"),
)
# No -ffast-math: it would make the whole process flush denormal numbers, and assume that there are no NaNs.
FLAGS = (
    *("-O3", "-mprefer-vector-width=512", "-fopenmp", "-fPIC", "-std=gnu11"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
)
NATIVE = ("-march=native",)
# For the wheel. Without a tuning, GCC 12 copies small chunks slowly, and activations take 2x longer.
TUNE = "-mtune=znver3"
SECONDS = 600  # limit of one compiler run; long, because the machine may be busy


class CompilerError(Exception):
    """A compiler that is missing or failed, in one line."""


@dataclass(frozen=True)
class Level:
    """The processors that one library supports."""

    name: str  # also of the file: kernels-NAME.so
    title: str
    flags: tuple[str, ...]  # of the compiler
    features: frozenset[str]  # as /proc/cpuinfo spells them


def _levels() -> tuple[Level, ...]:
    levels: list[Level] = []
    flags: tuple[str, ...] = ()
    features: frozenset[str] = frozenset()
    for name, title, more, needed in (
        ("avx2", "AVX2", "-march=x86-64-v3", "avx avx2 bmi1 bmi2 f16c fma abm movbe"),
        ("avx512", "AVX-512", "-march=x86-64-v4", "avx512f avx512bw avx512cd avx512dq avx512vl"),
        ("avx512_vnni", "AVX-512 with VNNI", "-mavx512vnni", "avx512_vnni"),
        ("avx512_bf16", "AVX-512 with bfloat16", "-mavx512bf16", "avx512_bf16"),
        ("amx", "matrix tiles", "-mamx-tile -mamx-bf16", "amx_tile amx_bf16"),
    ):
        own = tuple(more.split())
        flags = (TUNE, *own) if own[0].startswith("-march") else flags + own
        features |= frozenset(needed.split())
        levels.append(Level(name, title, flags, features))
    return tuple(reversed(levels))


LEVELS = _levels()  # the best first; each has all features of the next one


def compile_library(compiler: str, sources: Path, target: Path, flags: Sequence[str] = NATIVE) -> None:
    """Compile the kernels for this machine into the file `target`. Raises CompilerError."""
    run([compiler, *FLAGS, *flags, "-shared", "-o", str(target), str(sources / SOURCES[0]), "-lm"])


def compile_portable(compiler: str, sources: Path, target: Path, level: Level) -> None:
    """Compile the kernels for all processors of a level. Raises CompilerError.

    The library does not link OpenMP, so it uses the one that torch has loaded.
    """
    compiled = target.with_suffix(".o")
    run([compiler, *FLAGS, *level.flags, "-c", "-o", str(compiled), str(sources / SOURCES[0])])
    run([compiler, "-shared", "-s", "-o", str(target), str(compiled), "-lm"])
    compiled.unlink()


def run(command: list[str]) -> bytes:
    """The standard output of a compiler. Raises CompilerError."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]} did not run: {error}") from None
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise CompilerError(f"{command[0]} failed: {lines[0] if lines else f'status {done.returncode}'}")
    return done.stdout


# --- build ------------------------------------------------------------------------------------------------------------


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
        return (None if choice == "compile" else shipped(SHIPPED, features())) or _compiled()
    except CompilerError as error:
        raise NotBuilt(str(error)) from None
    except OSError as error:  # the system does not load the library
        raise NotBuilt(f"cannot load the kernels: {error}") from None


def features() -> frozenset[str]:
    """The processor's features, as Linux lists them in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def shipped(folder: Path, features: frozenset[str]) -> tuple[ctypes.CDLL, str] | None:
    """The best library of the wheel for a processor with these features, and a message; or None. Raises OSError."""
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
    known.update(" ".join(sorted(features())).encode() or platform.processor().encode())
    return known.hexdigest()[:32]


def _compile(compiler: str, folder: Path, name: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as own:
        for source in SOURCES:
            (Path(own) / source).write_bytes((FOLDER / source).read_bytes())
        target = Path(own) / name
        compile_library(compiler, Path(own), target)
        target.chmod(0o700)
        os.replace(target, folder / name)
