"""glibc keeps freed memory between training steps and engine passes, and returns it afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")

SCRIPT = """
import resource, torch
from shelf import Shelf
from turret import process
from turret.train import memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): torch.empty(6 << 20).fill_(1.0), torch.empty(6 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
shelf = Shelf("bert")
shelf.put("a")
with shelf.engine() as engine:
    engine.classify(["a great film"], "a")
    faults()
    passes = faults()
with process.keep_freed():
    faults()
    steps = faults()
held = memory.resident_bytes()
process.release_memory()
print(before, passes, steps, held - memory.resident_bytes())
"""  # page faults while 24 MB are allocated and freed repeatedly


@pytest.mark.slow
def test_memory_that_a_pass_or_a_step_frees_is_kept_for_the_next_one_and_given_back_behind_the_last() -> None:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    before, passes, steps, returned = map(int, done.stdout.split())
    assert before > 10_000
    assert passes < 100
    assert steps < 100
    assert returned > 16 << 20


THREADS = """
import threading
import numpy
from turret import process
process.use_one_heap()
trim = process.Trim()
def work():
    kept = [numpy.ones(1 << 20, numpy.uint8) for _ in range(96)]
    ends.wait()
    kept.clear()
before = process._resident()
with process.keep_freed():
    ends = threading.Barrier(4)
    threads = [threading.Thread(target=work) for _ in range(4)]
    [each.start() for each in threads]
    [each.join() for each in threads]
    held = process._resident() - before
    trim()
    returned = process._resident() - before
    trim()
print(held, returned)
"""  # four threads, as those of a server, allocate 96 MiB each, and free it


def test_memory_that_threads_free_while_an_engine_keeps_its_own_is_returned_too() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    held, returned = map(int, done.stdout.split())
    assert held > 192 << 20, "the control: without the trim it stays"
    assert returned < 48 << 20


NESTED = """
import resource, sys, torch
from turret import process
def faults(blocks):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): [torch.empty(6 << 20).fill_(1.0) for _ in range(blocks)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with process.keep_freed():
    with process.keep_freed():
        faults(5)
    process.release_memory()
    faults(5)
    print(faults(5))
process.release_memory()
faults(15)
print(faults(15))
"""  # an engine's thread, in which a training begins and ends. More blocks at the end than fit into a hole of the heap


@pytest.mark.slow
def test_memory_is_kept_until_the_last_of_those_who_keep_it_has_ended() -> None:
    done = subprocess.run([sys.executable, "-c", NESTED], capture_output=True, text=True, check=True)
    kept, after = map(int, done.stdout.split())
    assert kept < 100
    assert after > 10_000, "the control: nobody keeps it"
