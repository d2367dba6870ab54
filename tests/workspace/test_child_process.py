"""A child process that hangs, in whatever way, is killed with all that it started; one that works is not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from turret.location import Location
from turret.workspace.child_process import Failure, run_child

WORDS = """
import json, os, re, signal, subprocess, sys, time
print(json.dumps({"stage": str(os.getpid())}), flush=True)
"""
HANGS = {
    "sleeping": "time.sleep(600)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "holding Python's lock": "re.match('(a+)+$', 'a' * 64 + 'b')",
    "deaf": "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
}
WITH_ANOTHER = "other = subprocess.Popen(['sleep', '600']); print(json.dumps({'stage': str(other.pid)}), flush=True)\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a child with this code. Returns how it ended, its lines, and the seconds that it took."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(code: str, stop_after: float = 1e9, **limits: float) -> tuple[Failure | None, list[str], float]:
        (tmp_path / "a_child.py").write_text(WORDS + code)
        lines, began = list[str](), time.monotonic()
        stop = lambda: bool(lines) and time.monotonic() - began > stop_after
        ended = run_child("a_child", "", tmp_path / "errors", lines.append, Location.parse(tmp_path), stop, **limits)
        return ended, lines, time.monotonic() - began

    return run


def is_there(number: str) -> bool:
    """Whether a process still lives; one that was just killed gets a few seconds to end."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state in "ZX":
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("code", HANGS.values(), ids=HANGS)
def test_a_child_that_is_silent_is_killed_with_what_it_started(run, code) -> None:
    ended, lines, seconds = run(WITH_ANOTHER + code, silent=0.5)
    assert ended is not None
    assert "was silent for 0.5 s, and was killed" in ended.text
    assert ended.status is None
    assert seconds < 10
    assert len(lines) == 2
    assert not any(is_there(number) for number in lines)


@pytest.mark.parametrize("code", HANGS.values(), ids=HANGS)
def test_a_child_that_is_told_to_stop_and_does_not_is_killed(run, code) -> None:
    ended, (number,), seconds = run(code, stopping=0.3, stop_after=0)
    assert ended is None
    assert seconds < 10
    assert not is_there(number)


def test_a_child_that_gives_signs_of_life_lives(run) -> None:
    """The control."""
    code = "for _ in range(8):\n    time.sleep(0.2)\n    print(json.dumps({'alive': True}), flush=True)\n"
    ended, _, seconds = run(code, silent=1.2, stopping=0.3)
    assert ended is None
    assert seconds > 1.5


def test_a_child_that_stops_in_time_is_not_killed(run) -> None:
    code = (
        "def end(*_):\n    time.sleep(0.3); print(json.dumps({'stage': 'saved'}), flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\nprint(json.dumps({'stage': 'ready'}), flush=True)\ntime.sleep(600)"
    )
    ended, lines, _ = run(code, stopping=20.0, stop_after=0.5)
    assert ended is None
    assert lines[1:] == ["ready", "saved"]


ORPHAN = """
import re, sys
from turret.workspace.child_process import Alive, stop_with_parent
stop_with_parent(0.3)
if sys.argv[1] == "hangs":
    Alive(0.5)
    re.match("(a+)+$", "a" * 64 + "b")
else:
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["hangs", "is deaf"])
def test_a_child_without_a_parent_that_hangs_ends_itself(how) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", ORPHAN, how]
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    assert child.stdout is not None
    assert child.stdout.readline() in ("ready\n", '{"alive": true}\n')
    began = time.monotonic()
    try:
        child.communicate("", timeout=20)
    finally:
        child.kill()
    # Its watch ends it by SIGTERM if it gets Python's lock before the expression takes it; a deaf one ignores that.
    assert child.returncode in ((1, -9, -15) if how == "hangs" else (1, -9))
    assert time.monotonic() - began < 10
