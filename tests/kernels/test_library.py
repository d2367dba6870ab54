"""Every way to have no kernels, the check at their first use, and the threads that help them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiled_kernels import COMPILER, needed

from turret.kernels.build import SWITCH, NotBuilt, library_path


@needed
def test_the_check_at_the_first_use_works_inside_inference_mode() -> None:
    code = (
        "import torch; from turret import kernels\nwith torch.inference_mode(): assert kernels.library(), kernels.why()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("word", ["off", "0", "No"])
def test_the_switch_takes_the_plain_path_and_says_so(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, word)
    with pytest.raises(NotBuilt, match=f"switched off by {SWITCH}"):
        library_path()


@pytest.mark.skipif(sys.platform != "linux", reason="no kernels elsewhere")
@pytest.mark.parametrize(("compiler", "expected"), [("no-such-compiler", "not found"), ("false", "failed: status 1")])
def test_without_a_working_compiler_there_is_a_reason_and_no_half_library(
    compiler: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("TURRET_CACHE", str(tmp_path))
    with pytest.raises(NotBuilt, match=expected):
        library_path()
    assert not list(tmp_path.rglob("*.so"))


@needed
def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").write_text("in the way")
    monkeypatch.setenv("TURRET_CACHE", str(tmp_path))
    with pytest.raises(NotBuilt, match="cannot write"):
        library_path()


@needed
def test_processes_that_build_at_once_end_with_one_library(tmp_path: Path) -> None:
    code = "from turret.kernels.build import library_path; print(library_path())"
    compiler = tmp_path / "quick"
    compiler.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
    compiler.chmod(0o700)
    environment = {**os.environ, "TURRET_CACHE": str(tmp_path), "CC": str(compiler)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = {each.communicate(timeout=120)[0].strip() for each in started}
    assert [each.returncode for each in started] == [0, 0, 0]
    assert len(said) == 1
    assert [str(path) for path in (tmp_path / "kernels").iterdir()] == list(said)


@needed
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted where Linux tells them")
def test_a_thread_that_rests_has_no_helpers_and_another_keeps_its_own() -> None:
    script = """
import os, threading, torch
from turret import kernels
torch.set_num_threads(2)
def count(): return len(os.listdir("/proc/self/task"))
def work(): torch.randn(600, 600) @ torch.randn(600, 600); kernels.library().gelu(torch.randn(100_000))
before = count()
work()
mine = count()
done, go = threading.Event(), threading.Event()
def other():
    work(); done.set(); go.wait(); work()
thread = threading.Thread(target=other)
thread.start(); done.wait()
both = count()
kernels.rest(); kernels.rest()
left = count()
go.set(); thread.join()
work()
print(mine - before, both - mine, left - both)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert said == ["1", "2", "-1"]


@needed
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2 if sys.platform == "linux" else True, reason="one processor")
def test_helpers_that_are_woken_have_a_processor_of_their_own_and_may_move_as_before() -> None:
    script = """
import os, time, torch
from turret import kernels
torch.set_num_threads(2)
kernels.library()
tasks = lambda: {int(each) for each in os.listdir("/proc/self/task")}
processor = lambda task: open(f"/proc/self/task/{task}/stat").read().rpartition(")")[2].split()[36]
kernels.rest()
before, allowed, apart = tasks(), os.sched_getaffinity(0), 0
for turn in range(20):
    time.sleep(0.02)
    kernels.wake()
    (helper,) = tasks() - before
    apart += processor(helper) != processor(os.getpid())
    assert os.sched_getaffinity(helper) == os.sched_getaffinity(0) == allowed
    kernels.rest()
print(apart)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(said) >= 10
