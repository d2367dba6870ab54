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
    *("layer.inc.c", "lora.inc.c", "int8.inc.c"),
)
# No -ffast-math: it would have the library set the whole process to flush small numbers, and assume there are no NaNs.
FLAGS = (
    *("-O3", "-mprefer-vector-width=512", "-fopenmp", "-fPIC", "-std=gnu11"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
)
NATIVE = ("-march=native",)
# Of the wheel's libraries. Tuned for no processor, GCC 12 copies small chunks slowly: activations take twice as long.
TUNE = "-mtune=znver3"
SECONDS = 600  # that a compiler may take, on a machine that is busy with other things


class CompilerError(Exception):
    """A compiler that is missing or failed, in one line."""


@dataclass(frozen=True)
class Level:
    """Processors that one library is for."""

    name: str  # of the file too: kernels-NAME.so
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


LEVELS = _levels()  # the best first; each has all that the next one has


def compile_library(compiler: str, sources: Path, target: Path, flags: Sequence[str] = NATIVE) -> None:
    """Compile the kernels to `target`, whose folder is the caller's own. Raises CompilerError."""
    run([compiler, *FLAGS, *flags, "-shared", "-o", str(target), str(sources / SOURCES[0]), "-lm"])


def compile_portable(compiler: str, sources: Path, target: Path, level: Level) -> None:
    """The same for other machines: OpenMP is left open, to be the one that torch has loaded. Raises CompilerError."""
    compiled = target.with_suffix(".o")
    run([compiler, *FLAGS, *level.flags, "-c", "-o", str(compiled), str(sources / SOURCES[0])])
    run([compiler, "-shared", "-s", "-o", str(target), str(compiled), "-lm"])
    compiled.unlink()


def run(command: list[str]) -> bytes:
    """What a compiler says on stdout. Raises CompilerError."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]} did not run: {error}") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise CompilerError(f"{command[0]} failed: {said[0] if said else f'status {done.returncode}'}")
    return done.stdout
