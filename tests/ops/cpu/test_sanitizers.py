"""The kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer compiled into the kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
# Compiles for the processor KIND, with the edit of the source that PLANT is.
COMPILER = """#!/bin/bash
[ "$1" = --version ] && exec echo "$0"
for each; do case $each in */kernels.c) sed -i 'PLANT' "${each%/*}"/*.c;; esac; done
exec gcc "${@/-march=native/-march=KIND}" FLAGS
"""


def runtimes() -> str | None:
    """The libraries of both sanitizers, which must be loaded first; None if GCC has none."""
    gcc = shutil.which("gcc") if sys.platform == "linux" else None
    if gcc is None or shutil.which("bash") is None:
        return None
    names = ("libasan.so", "libubsan.so")
    found = [subprocess.check_output([gcc, f"-print-file-name={name}"], text=True).strip() for name in names]
    return " ".join(found) if all(os.path.isabs(each) for each in found) else None


def sanitized(folder: Path, kind: str, plant: str, *tests: str) -> subprocess.CompletedProcess[str]:
    compiler = folder / "gcc-sanitized"
    compiler.write_text(COMPILER.replace("PLANT", plant).replace("KIND", kind).replace("FLAGS", FLAGS))
    compiler.chmod(0o700)
    settings = {"CC": compiler, "TURRET_CACHE": folder / "cache", "TURRET_KERNELS": "compile"}
    settings |= {"LD_PRELOAD": runtimes(), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:xdist", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "-p", "no:faulthandler", "-m", "not slow", *(str(HERE / test) for test in tests)],
        env=os.environ | {name: str(value) for name, value in settings.items()}, capture_output=True, text=True,
        timeout=1500, check=False, cwd=HERE.parents[2],
    )  # fmt: skip


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(runtimes() is None, reason="no GCC with its sanitizers on this machine"),
]
NUMBERS = sorted(
    path.name for path in HERE.glob("test_*.py") if path.name not in ("test_library.py", Path(__file__).name)
)


@pytest.mark.parametrize("kind", ["native", "haswell"])
def test_no_kernel_overflows_or_leaves_its_memory(kind: str, tmp_path: Path) -> None:
    if kind == "haswell" and not torch.cpu.get_capabilities().get("avx2"):
        pytest.skip("this processor has no AVX2")
    done = sanitized(tmp_path, kind, "", *NUMBERS)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert "runtime error" not in done.stdout + done.stderr
    assert len([*(tmp_path / "cache").rglob("*.so")]) == 1  # the tests used these kernels


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        ("s/(uint32_t)((int32_t)n + 127) << 23/((int32_t)n + 127) << 25/", "runtime error: left shift of"),
        ("s/for (; i < n; i++) to/for (; i <= n; i++) to/", "AddressSanitizer: heap-buffer-overflow"),
    ],
)
def test_a_planted_mistake_is_found(plant: str, found: str, tmp_path: Path) -> None:
    done = sanitized(tmp_path, "native", plant, "test_operations.py")
    assert done.returncode != 0
    assert found in done.stdout + done.stderr, (done.stdout + done.stderr)[-5000:]
