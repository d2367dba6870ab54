"""Run a job in a process of its own: pass on the progress, and stop it when asked.

The child prints its progress on stdout, one JSON object per line. Its environment has none of torchrun's variables. It
finds the store in TURRET_STORE, because a URL may have a password and arguments are visible. Its stdin closes when the
parent process ends, which tells it to stop; `stop_with_parent` watches that.

A child that hangs hears no signal but SIGKILL. Its parent kills it; without a parent, `Alive` ends it.
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
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TypedDict, final

from turret.access import Access
from turret.database import STUDY
from turret.disk import FAILING, NO_ROOM, errno_of
from turret.errors import (
    DeviceError,
    HubError,
    Interrupted,
    LeaseLost,
    OutOfMemory,
    StoreError,
    TurretError,
    one_line,
)
from turret.json_types import JsonObject, Plain
from turret.location import Location
from turret.process import environment, kill_child
from turret.recipe import Recipe
from turret.store import JobQueue, Store
from turret.store.jobs import Job
from turret.workspace.progress import Say

OUTAGE = 75  # exit status: the store's own places did not answer
SHORT = 72  # exit status: there is too little memory beside others
MACHINE = 71  # exit status: this machine failed, or the Hub: another try, or another machine, may succeed
STOPPED = "stopped; run the same command again to continue"
POLL_SECONDS = 0.2
PAUSED_SECONDS = 5.0  # between two polls: this process was stopped itself
ALIVE_SECONDS = 1.0  # at least, between two signs of life of a child


@dataclass(frozen=True)
class Failure:
    """Why a child failed."""

    text: str
    status: int | None = None  # its exit status; None: this process killed it


def never() -> bool:
    """For children that nothing stops but their parent."""
    return False


def why_alone(recipe: Recipe) -> str | None:
    """Why a training cannot share its base with others; None if it can."""
    if recipe.train.shard is not None:
        return f'train.shard = "{recipe.train.shard}" divides the base among processes'
    if recipe.train.lr == "auto":
        return 'train.lr = "auto" runs trials first, which are measured alone'
    if recipe.method.every_weight:
        return f"method {recipe.method.kind} trains a copy of every weight"
    if recipe.method.wraps_modules:
        return f"method {recipe.method.kind} changes the base's modules, by patterns of its recipe"
    return None


def run_child(
    module: str,
    argument: str,
    errors: Path,
    say: Say,
    store: Location,
    stop: Callable[[], bool] = never,
    *,
    silent: float | None = None,
    stopping: float | None = None,
) -> Failure | None:
    """Run `python -P -m MODULE ARGUMENT` until it ends.

    Args:
        errors: the file for its stderr.
        stop: asked a few times a second; once it is true, the child is told to write a checkpoint and end.
        silent: seconds without a line or a sign of life, after which the child and all processes that it started are
            killed; None: never.
        stopping: seconds after it was told to stop, after which they are killed; None: never.

    Returns:
        Why the process failed; None if it succeeded or was told to stop.

    Raises:
        Interrupted: the user stopped it.
    """
    with errors.open("wb") as written, start_child(module, argument, written, store) as child:
        return _follow_child(child, errors, say, stop, silent, stopping)


def _follow_child(
    child: subprocess.Popen[str],
    errors: Path,
    say: Say,
    stop: Callable[[], bool],
    silent: float | None,
    stopping: float | None,
) -> Failure | None:
    """Follow a child until it ends."""
    asked, hung, ended = threading.Event(), threading.Event(), threading.Event()
    heard = [time.monotonic()]  # when the child last printed something

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
                end = None if stopping is None else time.monotonic() + stopping
            if end is not None and time.monotonic() > end:
                kill_child(child)
            elif silent is not None and now - heard[0] > silent:
                hung.set()
                kill_child(child)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        for value in _printed_objects(child.stdout, heard):
            if isinstance(value.get("stage"), str):
                say(value["stage"])
        status = child.wait()
    finally:
        ended.set()
        watcher.join()
        if child.poll() is None:
            kill_child(child)
    if status == 0 or (asked.is_set() and not hung.is_set()):
        return None
    if hung.is_set():
        return silence(silent or 0)
    if status == Interrupted.exit_status:
        raise Interrupted(STOPPED)
    text = errors.read_text(errors="replace")
    return failure_of(status, [line.strip() for line in text.splitlines() if line.strip()])


def start_child(module: str, argument: str, errors: IO[str] | IO[bytes], store: Location) -> subprocess.Popen[str]:
    """Start `python -P -m MODULE ARGUMENT`, with pipes to and from it. errors: the file for its stderr."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, argument],
        env=environment(store=True) | {"TURRET_STORE": store.given},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def silence(seconds: float) -> Failure:
    """Of a child that was killed because it was silent for so long."""
    return Failure(f"its process was silent for {_span(seconds)}, and was killed: look at its log")


def failure_of(status: int, lines: Sequence[str]) -> Failure:
    """Of a child that ended by itself, or by somebody else. lines: of its stderr."""
    if hasattr(signal, "SIGKILL") and status == -signal.SIGKILL:
        return Failure(
            "its process was killed, most likely because the machine ran out of memory: lower train.micro_batch_tokens",
            status,
        )
    return Failure(lines[-1] if lines else f"its process ended with status {status}", status)


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:g} s"


def _printed_objects(lines: Iterable[str] | None, heard: list[float]) -> Iterator[JsonObject]:
    """The objects among the process's output, until it closes its stdout."""
    for line in lines or ():
        heard[0] = time.monotonic()
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


# --- in the child -----------------------------------------------------------------------------------------------------


def parents_store(local: str) -> Store:
    """The store of the parent process, whose folder on this machine is `local`."""
    location = Location.parse(os.environ["TURRET_STORE"])
    return Store(replace(location, local=Path(local)) if location.catalog else Path(local))


def status_of(error: TurretError) -> int:
    """The exit status for an error: that of a mistake, unless another try may succeed."""
    if isinstance(error, StoreError):
        return OUTAGE if error.outage else MACHINE
    cause = error.__cause__
    disk = isinstance(cause, Exception) and errno_of(cause) in (*NO_ROOM, *FAILING)
    return MACHINE if disk or isinstance(error, HubError | DeviceError | OutOfMemory) else error.exit_status


class WorkerRequest(TypedDict):
    """What a worker asks of all its processes. local: folder of the store. silent, stopping: seconds."""

    local: str
    silent: float
    stopping: float
    bases: list[str]


class TrainerRequest(WorkerRequest):
    """What a worker asks of its kept process. own: the store's files are this user's."""

    own: bool


class JobRequest(WorkerRequest):
    """What a worker asks of the process of one job. folder: for its data; None: the data is this user's."""

    taken: JsonObject  # `Job.as_json`
    folder: str | None


@final
class StartLine(TypedDict):
    """A run that the kept process begins. queued: names of the bases that waiting runs want."""

    start: JsonObject  # `Job.as_json`
    queued: list[str]


@final
class StopLine(TypedDict):
    """The id of a run that the kept process ends."""

    stop: str


@dataclass(frozen=True)
class Ended:
    """How a try ended."""

    status: int  # 0, or that of the error
    text: str | None = None  # of the error


def do_request(request: str, do: Callable[[JobRequest, Store, Job], Ended]) -> int:
    """Do the job of a worker's request in this process. Returns the exit status.

    Args:
        do: gets the store as the job's tenant sees it.
    """
    asked: JobRequest = json.loads(request)
    stop_with_parent(asked["stopping"])
    taken = Job.of(asked["taken"])
    ended = do(asked, parents_store(asked["local"]).with_access(Access(taken.tenant)), taken)
    if ended.text is not None:
        say_to_parent(ended.text)
    return ended.status


def attempt(
    store: Store,
    taken: Job,
    do: Callable[[JobQueue], None],
    short: Callable[[TurretError], bool] = lambda _: False,
) -> Ended:
    """Do a job that the parent process has taken, and record how the try ended, unless it ended well.

    Args:
        short: whether an error says that a process of its own may have room.
    """
    try:
        queue = JobQueue.of(store)
    except StoreError as error:
        return Ended(status_of(error), str(error))
    try:
        do(queue)
    except (Interrupted, KeyboardInterrupt):
        with suppress(StoreError):  # then the worker records it
            queue.after(taken, None)
        return Ended(Interrupted.exit_status)
    except LeaseLost as error:
        return Ended(error.exit_status, str(error))
    except TurretError as error:
        if short(error):
            return Ended(SHORT, str(error))
        status, kind = status_of(error), {"kind": type(error).__name__}
        with suppress(StoreError):
            again = status != error.exit_status
            result = None if taken.kind == STUDY else kind  # a study keeps what it has found
            queue.after(taken, str(error), again=again, outage=status == OUTAGE, result=result)
        return Ended(status, str(error))
    except Exception as error:
        text = mistake_of_turret(error)
        with suppress(StoreError):
            queue.after(taken, text)
        return Ended(1, text)
    return Ended(0)


def mistake_of_turret(error: BaseException) -> str:
    """A line for the log of a run that ended by an error in the code. TURRET_DEBUG=1 prints where it is, on stderr."""
    if os.environ.get("TURRET_DEBUG") == "1":
        traceback.print_exception(error)
    return one_line(f"this is a bug in turret ({type(error).__name__}: {error}): please report it")


def say_to_parent(line: str) -> None:
    """Print a line of progress for the parent process."""
    print_to_parent({"stage": line})


def print_to_parent(value: Mapping[str, Plain]) -> None:
    """Print a line of JSON for the parent process."""
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
            print_to_parent({"alive": True})
            # A thread in C, which does not need Python's lock: a regular expression may hold that for ever.
            faulthandler.dump_traceback_later(self._silent, exit=True)


def stop_with_parent(stopping: float) -> None:
    """From now on, ask this process to stop once its parent has ended, which closes our stdin.

    Args:
        stopping: seconds after which it is killed, with all that it started.
    """
    threading.Thread(target=_watch_stdin, args=[stopping], daemon=True).start()


def _watch_stdin(stopping: float) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin: at exit Python would wait for its lock and abort
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(stopping)
    end_at_once()


def end_at_once() -> None:
    """Kill this process, with all that it started."""
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
