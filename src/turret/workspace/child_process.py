"""Of the processes of a worker: how it starts one, and what such a process does to do jobs.

A process gets a `WorkerRequest` as its argument. Then it hears lines of JSON on stdin: `StartLine`, with a job, and
`StopLine`. It says lines of JSON on stdout, each with the id of a job: `{"run": ID}` as a sign of life, with `stage`
for a line of its log, with `status` and `text` at its end. `do_request` does one job;
`turret.workspace.resident_trainer` does several.

Its environment has none of torchrun's variables. It finds the store in TURRET_STORE, because a URL may have a password
and arguments are visible. Its stdin closes when the worker ends, which tells it to stop; `hear_parent` hears that.

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
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
from turret.process import environment
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


def never_stopped() -> bool:
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


def start_child(module: str, argument: str, errors: IO[str], store: Location) -> subprocess.Popen[str]:
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


def silence_failure(seconds: float) -> Failure:
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
    """What a worker asks of its processes.

    local: folder of the store. silent, stopping: seconds. folder: for data; None: the data is this user's.
    """

    local: str
    silent: float
    stopping: float
    bases: list[str]
    folder: str | None


@final
class StartLine(TypedDict):
    """A run that the process begins. queued: names of the bases that waiting runs want."""

    start: JsonObject  # `Job.as_json`
    queued: list[str]


@final
class StopLine(TypedDict):
    """The id of a run that the process ends."""

    stop: str


@dataclass(frozen=True)
class Ended:
    """How a try ended."""

    status: int  # 0, or that of the error
    text: str | None = None  # of the error


def do_request(request: str, do: Callable[[WorkerRequest, Store, Job, Say], Ended]) -> None:
    """Do the one job that the worker gives this process, in this thread.

    Args:
        do: gets the store as the job's tenant sees it, and says lines for the log. SIGTERM tells it to stop.
    """
    asked: WorkerRequest = json.loads(request)
    starts, ended = SimpleQueue[StartLine](), threading.Event()

    def stop() -> None:
        if not ended.is_set():  # else this process is about to end
            os.kill(os.getpid(), signal.SIGTERM)

    def hear(line: StartLine | StopLine) -> None:
        if "stop" in line:
            stop()
        else:
            starts.put(line)

    hear_parent(hear, stop, asked["stopping"])
    taken = Job.of(starts.get()["start"])
    store = parents_store(asked["local"]).with_access(Access(taken.tenant))
    done = do(asked, store, taken, partial(say_to_parent, taken.id))
    ended.set()
    print_to_parent({"run": taken.id, "status": done.status, "text": done.text})


def attempt_job(
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
            queue.end_try(taken, None)
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
            queue.end_try(taken, str(error), again=again, outage=status == OUTAGE, result=result)
        return Ended(status, str(error))
    except Exception as error:
        text = mistake_of_turret(error)
        with suppress(StoreError):
            queue.end_try(taken, text)
        return Ended(1, text)
    return Ended(0)


def mistake_of_turret(error: BaseException) -> str:
    """A line for the log of a run that ended by an error in the code. TURRET_DEBUG=1 prints where it is, on stderr."""
    if os.environ.get("TURRET_DEBUG") == "1":
        traceback.print_exception(error)
    return one_line(f"this is a bug in turret ({type(error).__name__}: {error}): please report it")


def say_to_parent(run: str, line: str) -> None:
    """Print a line for the log of a run."""
    print_to_parent({"run": run, "stage": line})


def print_to_parent(value: Mapping[str, Plain]) -> None:
    """Print a line of JSON for the parent process."""
    sys.stdout.write(json.dumps(value) + "\n")  # one write, because several threads print
    sys.stdout.flush()


class Alive:
    """Signs of life for the parent process. If there is none for too long, this process ends, whoever its parent is.

    Args:
        run: the job that this process does.
        silent: seconds; the parent kills this process earlier than that.
    """

    def __init__(self, run: str, silent: float) -> None:
        self._run, self._silent, self._last = run, silent, 0.0
        self.sign()

    def sign(self) -> None:
        """Called when something was done."""
        now = time.monotonic()
        if now - self._last > ALIVE_SECONDS:
            self._last = now
            print_to_parent({"run": self._run})
            # A thread in C, which does not need Python's lock: a regular expression may hold that for ever.
            faulthandler.dump_traceback_later(self._silent, exit=True)


def hear_parent(hear: Callable[[StartLine | StopLine], None], stop: Callable[[], None], stopping: float) -> None:
    """From now on, hear the worker in a thread.

    Args:
        hear: gets each line of stdin.
        stop: called once the worker has ended, which closes stdin.
        stopping: seconds after that, in which this process must end. Else it is killed, with all that it started.
    """

    def listen() -> None:
        left = b""
        while piece := os.read(sys.stdin.fileno(), 1 << 16):  # not sys.stdin: at exit Python would wait for its lock
            *lines, left = (left + piece).split(b"\n")
            for line in lines:
                hear(json.loads(line))
        stop()
        time.sleep(stopping)
        end_at_once()

    threading.Thread(target=listen, daemon=True).start()


def end_at_once() -> None:
    """Kill this process, with all that it started."""
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
