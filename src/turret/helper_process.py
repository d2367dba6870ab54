"""A process for work that may end or block a process: a line of JSON in, one out, with limits of time and memory.

`python -m turret.helper_process MODULE` imports a module, gives what the first line of stdin says to its `helper`, and
answers every further line by what that returned. A helper that died is replaced for the next line.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from turret.errors import EngineError
from turret.json_types import Plain
from turret.process import environment

START_SECONDS = 60.0  # until a helper has read its first line
POLL_SECONDS = 0.2  # between two questions whether to stop
_KILLED = tuple(-getattr(signal, name, 0) for name in ("SIGKILL", "SIGTERM", "SIGINT"))  # by somebody else
_PIECE = 1 << 16

Question = TypeVar("Question")
Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Died:
    """The helper ended instead of answering. late: it was ended because it ran out of time."""

    late: bool


class HelperProcess(Generic[Question, Reply]):
    """It starts with the first question, and ends with this process. Any thread may call its methods.

    Args:
        module: has `helper(about)`, which gives a function from a question to its reply.
        about: what the helper reads first.
        seconds: for one question.
        memory: bytes that the helper may allocate beyond those at its start; None: any number.
        problem: the start of an error: `a constraint cannot be compiled`.
        store: the store that the helper opens, as TURRET_STORE; None: none, and no credentials of PostgreSQL and S3.
        idle: seconds without a question after which the process ends; None: never.
    """

    def __init__(
        self,
        module: str,
        about: Mapping[str, Plain],
        seconds: float,
        memory: int | None,
        problem: str,
        *,
        store: str | None = None,
        idle: float | None = None,
    ) -> None:
        self._module, self._seconds, self._problem, self._store = module, seconds, problem, store
        self._idle = idle
        self._end_idle: threading.Timer | None = None
        self._about = json.dumps({"about": about, "seconds": seconds, "memory": memory}).encode() + b"\n"
        self._lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0  # processes

    def ask(self, question: Question, stop: Callable[[], bool] = lambda: False) -> Reply | Died:
        """The helper's answer, or how it died.

        Args:
            stop: asked a few times a second; once it is true, the helper is ended.

        Raises:
            EngineError: The helper cannot be started, or was killed twice.
        """
        line = json.dumps(question).encode() + b"\n"
        with self._lock, self._kept_awake():
            for _ in range(2):
                process = self._running()
                answer = self._answer(process, line, self._seconds, stop)
                if answer is not None:
                    return answer
                if stop():
                    self._end()
                    return Died(late=True)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                status = process.returncode
                self._end()
                if status is None or status == -signal.SIGALRM:
                    return Died(late=True)
                if status not in _KILLED:
                    return Died(late=False)
        raise EngineError(f"{self._problem}: its process was killed twice; try again")

    def close(self) -> None:
        """End the helper."""
        with self._lock:
            self._end()

    @contextlib.contextmanager
    def _kept_awake(self) -> Iterator[None]:
        """While a question is answered the process is not idle."""
        if self._end_idle is not None:
            self._end_idle.cancel()
        try:
            yield
        finally:
            if self._idle is not None:
                self._end_idle = threading.Timer(self._idle, self.close)
                self._end_idle.daemon = True
                self._end_idle.start()

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self._end()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "turret.helper_process", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C is the parent's, which then ends the helper
            )
        except OSError as error:
            raise EngineError(f"{self._problem}: no process can be started ({error.strerror})") from None
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        self.started += 1
        if self._answer(self.process, self._about, START_SECONDS) is None:
            self._end()
            raise EngineError(f"{self._problem}: its process ended while it started")
        return self.process

    def _environment(self) -> dict[str, str]:
        own = environment(store=self._store is not None)
        return own if self._store is None else own | {"TURRET_STORE": self._store}

    def _answer(
        self, process: subprocess.Popen[bytes], line: bytes, seconds: float, stop: Callable[[], bool] = lambda: False
    ) -> Reply | None:
        """The helper's answer to a line; None if it died, did not answer in time, or was to stop."""
        assert process.stdin is not None
        assert process.stdout is not None
        until = time.monotonic() + seconds
        try:
            if not _sent(process.stdin.fileno(), line, until):
                return None
            answer = _line_from(process.stdout.fileno(), until, stop)
            found: Reply | None = None if answer is None else json.loads(answer)
            return found
        except (OSError, ValueError):
            return None

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _sent(descriptor: int, line: bytes, until: float) -> bool:
    """Write a line to a pipe that never blocks. Returns whether all of it was written in time."""
    left = memoryview(line)
    while left:
        _, ready, _ = select.select([], [descriptor], [], max(0.0, until - time.monotonic()))
        if not ready:
            return False
        left = left[os.write(descriptor, left[:_PIECE]) :]
    return True


def _line_from(descriptor: int, until: float, stop: Callable[[], bool]) -> bytes | None:
    """A line from a pipe; None if the pipe was closed, the line did not come in time, or the wait was to stop."""
    pieces: list[bytes] = []
    while not (pieces and pieces[-1].endswith(b"\n")):
        ready: list[int] = []
        left = until - time.monotonic()
        while not ready and left > 0 and not stop():
            ready, _, _ = select.select([descriptor], [], [], min(POLL_SECONDS, left))
            left = until - time.monotonic()
        piece = os.read(descriptor, _PIECE) if ready else b""
        if not piece:
            return None
        pieces.append(piece)
    return b"".join(pieces)


# --- in the helper ----------------------------------------------------------------------------------------------------


def main(module: str) -> None:
    """Answer a line of JSON for each line of JSON on stdin, until it is closed."""
    said = json.loads(sys.stdin.buffer.readline())
    answer: Callable[[Plain], Plain] = importlib.import_module(module).helper(said["about"])
    if said["memory"] is not None:
        _limit_memory(int(said["memory"]))
    _print({})
    for line in sys.stdin.buffer:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, float(said["seconds"]) + 1)  # if the parent is no more there to end it
        answered = answer(json.loads(line))
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        _print(answered)


def _limit_memory(most: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as read:  # without it, there is no limit
            size = int(read.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + most, size + most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _print(said: Plain) -> None:
    sys.stdout.buffer.write(json.dumps(said).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1])
