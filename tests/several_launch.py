"""Two processes under torchrun, and how they ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def launch(*arguments: str) -> subprocess.Popen[str]:
    """Two processes of these arguments under torchrun."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    # MKL's product of a few rows depends on where they lie in memory, but in this mode
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(launched: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    """(status, stdout, stderr), at the latest after so many seconds."""
    try:
        out, err = launched.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        launched.terminate()  # not kill: torchrun ends its processes
        out, err = launched.communicate()
        pytest.fail(f"still there after {seconds} s: {err}")
    return launched.returncode, out, err
