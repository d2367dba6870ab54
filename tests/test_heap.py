"""What the C library does with memory between the steps of a training, and between the passes of an engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")

FAULTS = """
import resource, torch
from turret import heap
from turret.train import memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): torch.empty(6 << 20).fill_(1.0), torch.empty(6 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
"""  # pages that the system had to clear anew, of 24 MB taken and freed again and again


def said_by(script: str) -> list[str]:
    """What it prints in a process of its own."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", FAULTS + script],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    return done.stdout.split()


def test_memory_that_a_step_frees_is_kept_for_the_next_one_and_given_back_behind_the_last() -> None:
    before, within, returned = said_by("""
with heap.kept():
    faults()
    within = faults()
held = memory.resident()
heap.give_back()
print(before, within, held - memory.resident() > 16 << 20)
""")
    assert int(before) > 10_000 > 100 > int(within)
    assert returned == "True"


def test_an_engine_keeps_what_a_pass_frees() -> None:
    before, within = said_by("""
from shelf import Shelf
shelf = Shelf("bert")
shelf.put("a")
with shelf.engine() as engine:
    engine.classify(["a great film"], "a")
    faults()
    within = faults()
print(before, within)
""")
    assert int(before) > 10_000 > 100 > int(within)
