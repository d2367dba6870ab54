"""The command that compiles the kernels, and the processors that the wheel has libraries for.

Standard library only: the package's own build (hatch_build.py) reads this file without importing turret.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = (
    *("kernels.c", "operations.inc.c", "products.inc.c", "attention.inc.c", "low_rank.inc.c", "step.inc.c"),
    *("layer.inc.c", "lora.inc.c"),
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
