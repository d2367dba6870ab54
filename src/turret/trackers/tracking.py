"""All trackers of one run, each in a process of its own: a queue that never blocks, and calls that take a bounded time.

No function here raises because of a tracker; one line reports an outage, once.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO, TypeAlias

from turret.errors import one_line
from turret.json_types import Plain
from turret.process import kill_child
from turret.trackers import TRACKERS, Entry, Point, State, TrackedRun, Tracker

Message: TypeAlias = Sequence[Plain]  # a method of `Tracker` and its arguments, for the process of a tracker


@dataclass(frozen=True)
class Patience:
    """How long a training bears with a tracker."""

    call_seconds: float = 60.0  # a call that takes longer is an outage
    end_seconds: float = 15.0  # at the end of the run, for all that is still waiting
    most_waiting: int = 10_000  # steps; further ones are dropped while the tracker is slower than the training


BATCH_SECONDS = 1.0  # about as long a call may be expected to take
MOST_AT_ONCE = 500  # steps in one call
KILL_SECONDS = 5.0  # a killed process is gone in far less


class TrackerProcess:
    """A tracker in a process of its own. No method raises because of the tracker.

    Args:
        at: module:class of the tracker.
        log: the file that gets what the tracker prints.
    """

    def __init__(self, at: str, run: TrackedRun, log: Path, patience: Patience) -> None:
        self._patience = patience
        self._changed = threading.Condition()
        self._messages: deque[Message] = deque([("start", asdict(run))])
        self._points: deque[Point] = deque()
        self._lost = 0  # steps that were dropped
        self._ending: float | None = None  # when the end began
        self._busy_since: float | None = None
        self._seconds_per_point = 0.0
        self._problem: str | None = None
        self._process: subprocess.Popen[str] | None = None
        try:
            with log.open("ab") as printed:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "turret.trackers.tracking", at],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=printed,
                    text=True,
                    encoding="utf-8",
                    start_new_session=True,  # Ctrl-C is the training's, which then ends the tracker
                )
        except OSError as error:
            self._problem = f"its process cannot be started ({error.strerror})"
        self._thread = threading.Thread(target=self._work, name=f"tracker {at}", daemon=True)
        self._thread.start()

    def log(self, point: Point) -> None:
        """Queue the numbers of a step. Never waits."""
        with self._changed:
            if self._problem is not None:
                return
            if len(self._points) >= self._patience.most_waiting:
                self._lost += 1
                return
            self._points.append(point)
            self._changed.notify()

    def problem(self) -> str | None:
        """What is wrong, in a few words; None while all is well."""
        since = self._busy_since
        if since is not None and time.monotonic() - since > self._patience.call_seconds:
            self._fail(f"no answer for {self._patience.call_seconds:g} seconds")
        return self._problem

    def leave(self) -> None:
        """End the process at once, if it still runs, and close the streams to it."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            kill_child(process)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS)
        self._thread.join(KILL_SECONDS)  # it read from the process that has just ended
        for stream in (process.stdin, process.stdout):
            if stream is not None and not self._thread.is_alive():
                with contextlib.suppress(OSError):
                    stream.close()

    def end(self, state: State, summary: Mapping[str, float | str]) -> None:
        """Queue the end of the run. Never waits."""
        with self._changed:
            self._ending = time.monotonic()
            self._messages.append(("finish", state, dict(summary)))
            self._changed.notify()

    def wait(self) -> None:
        """Wait until the end has been sent, `end_seconds` after `end` at most. What is not sent by then is lost."""
        assert self._ending is not None, "end() comes before wait()"
        until = self._ending + self._patience.end_seconds
        try:
            self._thread.join(max(0.0, until - time.monotonic()))
            if self._thread.is_alive():
                self._fail(f"it did not end within {self._patience.end_seconds:g} seconds")
            elif self._lost:
                self._fail(f"slower than the training, {self._lost} steps are missing")
            elif self._process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(max(0.0, until - time.monotonic()))
        finally:
            self.leave()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Pass on one message after the other, until the end or a problem."""
        while (following := self._next()) is not None:
            message, points = following
            self._busy_since = started = time.monotonic()
            error = self._ask(message)
            self._busy_since = None
            if error is not None:
                self._fail(error)
            elif message[0] == "finish":
                return
            elif points:
                self._seconds_per_point = (time.monotonic() - started) / points

    def _next(self) -> tuple[Message, int] | None:
        """Wait for the next message: the start, then steps, then the end; and the number of its steps."""
        with self._changed:
            while not (self._points or self._messages or self._problem):
                self._changed.wait()
            if self._problem is not None:
                return None
            if self._messages and self._messages[0][0] == "start":
                return self._messages.popleft(), 0
            late = self._ending is not None and time.monotonic() - self._ending > self._patience.end_seconds / 2
            if late:  # the end is worth more than the last steps
                self._lost += len(self._points)
                self._points.clear()
            if not self._points:
                return self._messages.popleft(), 0
            most = int(BATCH_SECONDS / self._seconds_per_point) if self._seconds_per_point else 1
            count = min(len(self._points), max(1, min(most, MOST_AT_ONCE)))
            return ("log", [self._points.popleft() for _ in range(count)]), count

    def _ask(self, message: Message) -> str | None:
        """Send a message and wait for its answer. Returns what went wrong."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return "its process cannot be started"
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        except (OSError, ValueError):
            return "its process ended"
        return None if answer.get("error") is None else one_line(str(answer["error"]), 160)

    def _fail(self, problem: str) -> None:
        """Keep the first problem."""
        with self._changed:
            self._problem = self._problem or problem
            self._points.clear()
            self._changed.notify_all()


class Tracking:
    """The trackers that follow a run. Without names, all methods do nothing.

    Args:
        warn: gets one line when a tracker fails; called in the thread of the training.
        table: what the names mean.
    """

    def __init__(
        self,
        names: Iterable[str],
        run: TrackedRun,
        warn: Callable[[str], None],
        *,
        table: Mapping[str, Entry] = TRACKERS,
        patience: Patience | None = None,
    ) -> None:
        self._warn = warn
        self.warnings: list[str] = []  # the outages so far, a line each
        self.summary: dict[str, float | str] = {}  # for `end`: the final metrics, and the version that was stored
        folder = Path(run.folder)
        self._processes = {
            name: TrackerProcess(table[name].at, run, folder / f"tracker-{name}.log", patience or Patience())
            for name in dict.fromkeys(names)
        }
        self._folder = folder

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Pass the numbers of a step to all trackers. Never waits."""
        for process in self._processes.values():
            process.log(Point(step, values))
        self._look()

    def end(self, state: State, summary: Mapping[str, float | str]) -> None:
        """End the run in all trackers, in a bounded time. A tracker that does not end by then is left behind."""
        for process in self._processes.values():
            process.end(state, summary)
        for process in self._processes.values():
            process.wait()
        self._look("")
        self._processes.clear()

    def _look(self, then: str = "; the training goes on without it") -> None:
        """Leave out the trackers that have failed, each with a warning."""
        for name, process in list(self._processes.items()):
            if (problem := process.problem()) is not None:
                process.leave()
                del self._processes[name]
                line = f"tracker {name}: {problem}{then} (what it printed: {self._folder / f'tracker-{name}.log'})"
                self.warnings.append(line)
                self._warn(line)


# --- the process of a tracker -----------------------------------------------------------------------------------------


def main(at: str, messages: TextIO, answers: TextIO) -> None:
    """Read messages from stdin, call the tracker, and answer each one on stdout: `… tracking MODULE:CLASS`.

    A message is a line of JSON: `["start", <the fields of a TrackedRun>]`, `["log", <steps with their values>]` or
    `["finish", <state>, <summary>]`. An answer is `{}`, or `{"error": "..."}`, after which the process ends.
    If stdin ends first, the training was killed, and the run is marked as interrupted.

    What the tracker's library prints goes to stderr, which is a file of the run.
    """
    tracker: Tracker | None = None
    try:
        for line in messages:
            verb, *given = json.loads(line)
            if verb == "start":
                module, _, name = at.partition(":")
                tracker = getattr(importlib.import_module(module), name)()
                given = [TrackedRun(**given[0])]
            elif verb == "log":
                given = [[Point(step, values) for step, values in given[0]]]
            getattr(tracker, verb)(*given)
            _answer(answers, {})
            if verb == "finish":
                return
        if tracker is not None:
            tracker.finish("interrupted", {})
    except Exception as error:  # whatever a tracker's library raises
        _answer(answers, {"error": one_line(f"{type(error).__name__}: {error}", 160)})


def _answer(answers: TextIO, value: dict[str, str]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _own_streams() -> tuple[TextIO, TextIO]:
    """The streams of messages and answers, moved away from 0 and 1: the library reads nothing and prints to stderr."""
    messages = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return messages, answers


if __name__ == "__main__":
    main(sys.argv[1], *_own_streams())
