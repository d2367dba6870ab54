"""A child process that hangs, in whatever way, is killed with all that it started; one that works is not."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from turret.store import JobQueue, Store
from turret.workspace.child_process import MACHINE, Failure
from turret.workspace.progress import Say
from turret.workspace.queue_worker import WorkerLimits, WorkerProcess

WORDS = """
import json, os, re, signal, subprocess, sys, time
run = json.loads(sys.stdin.readline())["start"]["id"]
say = lambda **words: print(json.dumps({"run": run, **words}), flush=True)
say(stage=str(os.getpid()))
"""
HANGS = {
    "sleeping": "time.sleep(600)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "holding Python's lock": "re.match('(a+)+$', 'a' * 64 + 'b')",
    "deaf": "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
}
WITH_ANOTHER = "other = subprocess.Popen(['sleep', '600']); say(stage=str(other.pid))\n"
Ends = Callable[..., Failure | None]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ends:
    """Does a job in a child with this code. Returns how it ended."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    store = Store(tmp_path / "store")
    queue = JobQueue.of(store, make=True)
    queue.submit("a", "")
    taken = queue.take()
    assert taken is not None

    def start(
        code: str, say: Say, stop: Callable[[], bool] = lambda: False, recipe: str = "", **limits: float
    ) -> Failure | None:
        (tmp_path / "a_child.py").write_text(code)
        allowed = WorkerLimits(**{f"{name}_seconds": seconds for name, seconds in limits.items()})
        with closing(WorkerProcess(store, queue, allowed, threading.Event(), "a_child")) as child:
            return child.run(replace(taken, recipe=recipe), say, stop)

    return start


@pytest.fixture
def run(start: Ends):
    """Runs a child with this code. Returns how it ended, its lines, and the seconds that it took."""

    def run(code: str, stop_after: float = 1e9, **limits: float) -> tuple[Failure | None, list[str], float]:
        lines, began = list[str](), time.monotonic()
        stop = lambda: bool(lines) and time.monotonic() - began > stop_after
        ended = start(WORDS + code, lines.append, stop, **limits)
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


def test_a_child_that_is_told_to_stop_and_is_silent_has_failed(run) -> None:
    ended, (number,), _ = run("time.sleep(600)", silent=1.0, stop_after=0)
    assert ended is not None
    assert "was silent for 1 s, and was killed" in ended.text
    assert not is_there(number)


def test_a_child_that_gives_signs_of_life_lives(run) -> None:
    """The control."""
    code = "for _ in range(8):\n    time.sleep(0.2)\n    say()\nsay(status=0, text=None)"
    ended, _, seconds = run(code, silent=1.2, stopping=0.3)
    assert ended is None
    assert seconds > 1.5


def test_a_child_that_stops_in_time_is_not_killed(run) -> None:
    code = (
        "say(stage='ready')\nif json.loads(sys.stdin.readline()) == {'stop': run}:\n"
        "    time.sleep(0.3)\n    say(stage='saved')\n    say(status=130, text=None)"
    )
    ended, lines, _ = run(code, stopping=20.0, stop_after=0.5)
    assert ended is None
    assert lines[1:] == ["ready", "saved"]


def job(code: str) -> str:
    """Code of a process that does its job by this code."""
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    return f"""
import atexit, json, os, pathlib, signal, sys, time
from turret.workspace.child_process import Ended, do_request
def do(asked, store, taken, say):
{lines}
do_request(sys.argv[1], do)
"""


def test_a_job_that_is_told_to_stop_gets_sigterm_and_its_process_ends_by_itself(start: Ends, tmp_path: Path) -> None:
    """Once the job has ended, no SIGTERM comes, though stdin closes while the process takes its time to end."""
    lines = list[str]()
    code = f"""
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
say("ready")
while not stopped: time.sleep(0.01)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
atexit.register(lambda: (time.sleep(0.5), pathlib.Path({str(tmp_path / "over")!r}).touch()))
return Ended(130)"""
    assert start(job(code), lines.append, lambda: lines == ["ready"]) is None
    assert (tmp_path / "over").exists()


LAST_WORDS = "print('last words', file=sys.stderr); os._exit(3)"
LOST = "its process was killed, most likely because the machine ran out of memory: lower train.micro_batch_tokens"


@pytest.mark.parametrize(
    ("code", "said", "ended"),
    [
        ("return Ended(0)", [], None),
        ("return Ended(71, 'no device')", ["no device"], Failure("no device", MACHINE)),
        (LAST_WORDS, [], Failure("last words", 3)),
        ("os._exit(3)", [], Failure("its process ended with status 3", 3)),
        ("os.kill(os.getpid(), signal.SIGKILL)", [], Failure(LOST, -9)),
    ],
)
def test_a_job_that_fails_says_why_or_its_process_does(start: Ends, code, said, ended) -> None:
    lines = list[str]()
    assert start(job(code), lines.append) == ended
    assert lines == said


def test_a_job_is_longer_than_an_argument_and_no_other_process_sees_it(start: Ends) -> None:
    """A recipe has at most 100,000 characters, of six bytes each in JSON."""
    lines = list[str]()
    code = "say(json.dumps([len(taken.recipe), sys.argv[1:], asked['folder']]))\nreturn Ended(0)"
    assert start(job(code), lines.append, recipe="é" * 100_000) is None
    length, (argument,), folder = json.loads(lines[0])
    assert length == 100_000
    assert json.loads(argument).keys() == {"local", "silent", "stopping", "bases", "folder"}
    assert not Path(folder).exists(), "it is removed with the process"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_whose_lines_cannot_be_said_is_killed(start: Ends) -> None:
    def full(_: str) -> None:
        raise OSError("no space left")

    ended = start(job("say('ready')\ntime.sleep(600)"), full)
    assert ended is not None
    assert ended.status == -9


ORPHAN = """
import os, re, signal, sys, time
from turret.workspace.child_process import Alive, hear_parent
hear_parent(print, lambda: os.kill(os.getpid(), signal.SIGTERM), 0.3)
if sys.argv[1] == "hangs":
    Alive("1", 0.5)
    re.match("(a+)+$", "a" * 64 + "b")
else:
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
    assert child.stdout.readline() in ("ready\n", '{"run": "1"}\n')
    began = time.monotonic()
    try:
        child.communicate("", timeout=20)
    finally:
        child.kill()
    # Its watch ends it by SIGTERM if it gets Python's lock before the expression takes it; a deaf one ignores that.
    assert child.returncode in ((1, -9, -15) if how == "hangs" else (1, -9))
    assert time.monotonic() - began < 10
