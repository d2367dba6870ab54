"""Run a training in a process of its own: pass its progress on, and stop it when asked.

The child prints its progress on stdout, one JSON object per line. Its environment has none of torchrun's variables. It
finds the store in TURRET_STORE, because a URL may have a password and arguments are visible. Its stdin closes when the
parent process ends, which tells it to stop; `stop_with_parent` watches that.

A child that hangs hears no signal but SIGKILL. With `Patience` its parent kills it; without a parent, `Alive` ends it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from turret.errors import Interrupted
from turret.json_types import JsonObject
from turret.location import Location
from turret.process import environment
from turret.workspace.progress import Say

OUTAGE = 75  # exit status: the store's own places did not answer
MACHINE = 71  # exit status: this machine failed, or the Hub: another try, or another machine, may succeed
STOPPED = "stopped; run the same command again to continue"
POLL_SECONDS = 0.2
PAUSED_SECONDS = 5.0  # between two polls: this process was stopped itself
ALIVE_SECONDS = 1.0  # at least, between two signs of life of a child


@dataclass(frozen=True)
class Patience:
    """How long a parent waits for its child, in seconds; None: for ever."""

    silent: float | None = None  # without a line or a sign of life
    stopping: float | None = None  # after it was told to stop


@dataclass(frozen=True)
class Failure:
    """Why a child failed."""

    text: str
    status: int | None = None  # its exit status; None: this process killed it


def never() -> bool:
    """For children that nothing stops but their parent."""
    return False


def run_child(
    module: str,
    argument: str,
    errors: Path,
    say: Say,
    store: Location,
    stop: Callable[[], bool] = never,
    patience: Patience = Patience(),
) -> Failure | None:
    """Run `python -P -m MODULE ARGUMENT` until it ends.

    Args:
        errors: the file for its stderr.
        stop: asked a few times a second; once it is true, the child is told to write a checkpoint and end.
        patience: after it, the child and all processes that it started are killed.

    Returns:
        Why the process failed; None if it succeeded or was told to stop.

    Raises:
        Interrupted: the user stopped it.
    """
    command = [sys.executable, "-P", "-m", module, argument]
    asked, hung, ended = threading.Event(), threading.Event(), threading.Event()
    variables, pipe = environment(store=True) | {"TURRET_STORE": store.given}, subprocess.PIPE
    heard = [time.monotonic()]  # when the child last printed something
    with (
        errors.open("w+", encoding="utf-8") as written,
        subprocess.Popen(
            command,
            env=variables,
            stdin=pipe,
            stdout=pipe,
            stderr=written,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as child,
    ):

        def watch() -> None:
            polled, end = time.monotonic(), None
            while not ended.wait(POLL_SECONDS):
                now = time.monotonic()
                if now - polled > PAUSED_SECONDS:  # the child is given the time in which this process heard nothing
                    heard[0] += now - polled
                polled = now
                if not asked.is_set() and stop():
                    asked.set()
                    child.terminate()  # it finishes the step and writes a checkpoint
                    end = None if patience.stopping is None else time.monotonic() + patience.stopping
                if end is not None and time.monotonic() > end:
                    _kill(child)
                elif patience.silent is not None and now - heard[0] > patience.silent:
                    hung.set()
                    _kill(child)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            for line in _progress(child.stdout, heard):
                say(line)
            status = child.wait()
        except KeyboardInterrupt:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(patience.stopping)
            raise Interrupted(STOPPED) from None
        finally:
            ended.set()
            watcher.join()
            if child.poll() is None:
                _kill(child)
        written.seek(0)
        lines: Sequence[str] = [line.strip() for line in written if line.strip()]
    if status == 0 or (asked.is_set() and not hung.is_set()):
        return None
    if hung.is_set():
        return Failure(f"its process was silent for {_span(patience.silent or 0)}, and was killed: look at its log")
    if status == Interrupted.exit_status:
        raise Interrupted(STOPPED)
    if hasattr(signal, "SIGKILL") and status == -signal.SIGKILL:
        return Failure(
            "its process was killed, most likely because the machine ran out of memory: lower train.micro_batch_tokens",
            status,
        )
    return Failure(lines[-1] if lines else f"its process ended with status {status}", status)


def _kill(child: subprocess.Popen[str]) -> None:
    """Kill a child, and what it has started: it leads a session of its own."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:g} s"


def _progress(lines: Iterable[str] | None, heard: list[float]) -> Iterator[str]:
    """The progress lines among the process's output, until it closes its stdout."""
    for line in lines or ():
        heard[0] = time.monotonic()
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("stage"), str):
            yield value["stage"]


# --- in the child -----------------------------------------------------------------------------------------------------


def say_to_parent(line: str) -> None:
    """Print a line of progress for the parent process."""
    _print({"stage": line})


def _print(value: JsonObject) -> None:
    sys.stdout.write(json.dumps(value) + "\n")  # one write, because several threads print
    sys.stdout.flush()


class Alive:
    """Signs of life for the parent process. If there is none for too long, this process ends, whoever its parent is.

    Args:
        silent: seconds; the parent kills this process earlier than that.
    """

    def __init__(self, silent: float) -> None:
        self._silent, self._last = silent, 0.0
        self.sign()

    def sign(self) -> None:
        """Called when something was done."""
        now = time.monotonic()
        if now - self._last > ALIVE_SECONDS:
            self._last = now
            _print({"alive": True})
            # A thread in C, which does not need Python's lock: a regular expression may hold that for ever.
            faulthandler.dump_traceback_later(self._silent, exit=True)


def stop_with_parent(stopping: float | None = None) -> None:
    """From now on, ask this process to stop once its parent has ended, which closes our stdin.

    Args:
        stopping: seconds after which it is killed, with all that it started; None: never.
    """
    threading.Thread(target=_stop_at_end_of_stdin, args=[stopping], daemon=True).start()


def _stop_at_end_of_stdin(stopping: float | None) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin.read: at exit Python would wait for its lock and abort
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    if stopping is not None:
        time.sleep(stopping)
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)
