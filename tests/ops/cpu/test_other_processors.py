"""The same tests with kernels that are compiled for older processors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled_kernels import COMPILER, needed

HERE = Path(__file__).parent
KINDS = {
    "haswell": "avx2",
    "skylake-avx512": "avx512_f",
    "x86-64": "sse4_1",
}  # the feature that this machine must have, as torch names it


@needed
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_of_an_older_processor_pass_the_same_tests(kind: str, tmp_path: Path) -> None:
    have = torch.cpu.get_capabilities()
    if not have.get(KINDS[kind]) or COMPILER is None or shutil.which("bash") is None:
        pytest.skip(f"this processor cannot run what is made for {kind}")
    compiler = tmp_path / "cc"
    compiler.write_text(
        f'#!/bin/bash\n[ "$1" = --version ] && echo {kind}\nexec {COMPILER} "${{@/-march=native/-march={kind}}}"\n',
        encoding="utf-8",
    )
    compiler.chmod(0o700)
    settings = {"CC": str(compiler), "TURRET_CACHE": str(tmp_path / "cache"), "TURRET_KERNELS": "compile"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not slow"]
    done = subprocess.run(
        [*command, str(HERE), "--ignore", __file__], env=os.environ | settings, capture_output=True, text=True,
        timeout=600, check=False, cwd=HERE.parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    made = [*(tmp_path / "cache").rglob("*.so")]
    assert len(made) == 1  # no test used the kernels of this processor
