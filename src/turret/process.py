"""What a fresh process of this Python gets to see: where things lie, and how torch computes, and nothing else.

Refuses to know what the process does. Leaves out what torchrun set: the process is alone.
"""

from __future__ import annotations

import os

KEPT = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "USERPROFILE", "VIRTUAL_ENV")
KEPT_BEGINNINGS = ("HF_", "XDG_", "TURRET_", "OMP_", "MKL_", "CUDA_", "LD_LIBRARY", "PYTHONPATH", "PYTHONHOME")


def environment() -> dict[str, str]:
    """The variables that are handed on."""
    return {name: value for name, value in os.environ.items() if name in KEPT or name.startswith(KEPT_BEGINNINGS)}
