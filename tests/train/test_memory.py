"""What the C library does with memory between the steps."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_memory_that_a_step_frees_is_kept_for_the_next_one_and_given_back_behind_the_last() -> None:
    """Pages that the system had to clear anew, of 24 MB taken and freed again and again in a process of its own."""
    script = """
import resource, torch
from turret.train import memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): torch.empty(6 << 20).fill_(1.0), torch.empty(6 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
with memory.kept():
    faults()
    within = faults()
held = memory.resident()
memory.give_back()
print(before, within, held - memory.resident() > 16 << 20)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    before, within, returned = said
    assert int(before) > 10_000 > 100 > int(within), said
    assert returned == "True"
