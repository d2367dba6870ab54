"""Settings of a Turret process: OpenMP, oneDNN, garbage collection, SIGTERM, environment; and helper processes.

Loads no torch, because its libraries read these settings when they are loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from turret.errors import EngineError
from turret.json_types import Plain

if TYPE_CHECKING:
    import socket

# --- interrupt --------------------------------------------------------------------------------------------------------
# Ctrl-C and SIGTERM as a request to stop: the first signal lets the current step finish, the second stops at once.


Handler = Callable[[int, FrameType | None], None] | int | None  # as `signal.signal` returns it


class StopRequest:
    """Context manager: the first SIGINT or SIGTERM in the block sets `asked`, the second raises KeyboardInterrupt.

    Python allows signal handlers only in the main thread. In other threads the block installs none.
    """

    def __init__(self) -> None:
        self.asked = False
        self.number = 0  # of the first signal
        self._previous: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {each: signal.signal(each, self._handle) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for each, previous in self._previous.items():
                signal.signal(each, signal.SIG_DFL if previous is None else previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self.number = True, number


@contextmanager
def delay_signals() -> Iterator[None]:
    """Delay the first SIGINT or SIGTERM until the end of the block. A second signal stops at once."""
    stop = StopRequest()
    try:
        with stop:
            yield
    finally:
        if stop.asked:
            signal.raise_signal(stop.number)


# --- heap -------------------------------------------------------------------------------------------------------------
# Control whether glibc keeps freed memory for the next allocation or returns it to the system.
#
# On other C libraries both functions do nothing.


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # options of mallopt, from malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # the largest value that mallopt accepts on 64 bits


_keeping, _keeping_lock = 0, threading.Lock()  # blocks of `keep_freed` that run


@contextmanager
def keep_freed() -> Iterator[None]:
    """Keep the memory that one step frees for the next step, instead of returning it to the system.

    Otherwise glibc returns large blocks and the free top of the heap, and the system clears these pages again: 20,000
    page faults per training step on articles, 2,000 per pass of 512 tokens. Peak memory does not change.

    It holds for all threads, until the last of the blocks that run has ended.
    """
    global _keeping
    option = _glibc("mallopt")
    with _keeping_lock:
        _keeping += 1
        if option is not None:
            option(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
            option(_TRIM_THRESHOLD, 0x7FFFFFFF)
    try:
        yield
    finally:
        with _keeping_lock:
            _keeping -= 1
            if option is not None and not _keeping:
                option(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)  # glibc's own after large blocks were freed


def release_memory() -> None:
    """Return free memory to the system, after work that used much memory for a short time (a load, a plan)."""
    gc.collect()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def use_one_heap() -> None:
    """Let all threads from now on allocate from one heap.

    Otherwise each of a server's threads gets one of up to eight per processor, and `malloc_trim` returns nothing from
    the top of any but the first.
    """
    option = _glibc("mallopt")
    if option is not None:
        option(_ARENA_MAX, 1)


class Trim:
    """Returns free memory to the system as long as the process is larger than it once was by `step` bytes.

    `keep_freed` holds for all threads: after requests with large bodies the heap would stay as large as it ever was.
    """

    def __init__(self, step: int = 64 << 20) -> None:
        self._step, self._least = step, _resident()

    def __call__(self) -> None:
        size, trim = _resident(), _glibc("malloc_trim")
        self._least = min(self._least, size)
        if trim is not None and size > self._least + self._step:
            trim(0)


def _resident() -> int:
    """Bytes of this process in memory; 0 if the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as read:
            return int(read.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def free_memory() -> int:
    """Free bytes of the machine within its container's limit."""
    import psutil

    free, limit = int(psutil.virtual_memory().available), _container_room()
    return free if limit is None else min(free, limit)


def _container_room() -> int | None:
    """Bytes left under the control group's limit; None if there is no limit."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            most = Path(limit).read_text(encoding="ascii").strip()
            if most.isdigit() and int(most) < 1 << 60:
                return max(0, int(most) - int(Path(used).read_text(encoding="ascii")))
        except OSError:
            continue
    return None


def _glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


# --- block ------------------------------------------------------------------------------------------------------------


class Closing:
    """A context manager whose block ends with `close`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what was begun."""
        raise NotImplementedError


# --- process ----------------------------------------------------------------------------------------------------------


PASSED = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "TEMP",
    "TMP",
    "SYSTEMROOT",
    "USERPROFILE",
    "VIRTUAL_ENV",
    "CC",  # Triton compiles with it
    "LRU_CACHE_CAPACITY",  # of torch's descriptions of oneDNN's kernels
)
PASSED_PREFIXES = (
    *("HF_", "XDG_", "TURRET_", "OMP_", "GOMP_", "MKL_", "ONEDNN_", "LD_LIBRARY", "PYTHONPATH", "PYTHONHOME"),
    *("CUDA_", "PYTORCH_", "TORCH_", "TRITON_", "NCCL_", "BNB_", "LIGER_", "HIP_", "ROCR_", "HSA_"),  # of a GPU
)
STORE_PREFIXES = ("AWS_", "PG")  # addresses and credentials of a store by URL
SPIN = "10000"  # iterations of an OpenMP thread's busy wait: less than a millisecond
FULL_COLLECTION_EVERY = 100  # collections of the middle generation per full collection; Python's default is 10
OPENMP_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
KERNELS = "256"  # that oneDNN keeps; its default is 1,024
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # kernels, and torch's descriptions of them


def wait_briefly() -> None:
    """Shorten the busy wait of OpenMP threads, unless the environment sets it.

    By default GNU's OpenMP spins for 300,000 iterations. If two processes with several threads share the processors, a
    spinning thread blocks the processor that the thread it waits for needs. Next to another such training, a training
    was 5x to 50x slower than alone, instead of 2x slower (`benchmarks/busy_machine.py`).
    """
    if not any(name in os.environ for name in OPENMP_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN


def keep_few_kernels() -> None:
    """Let oneDNN keep 256 compiled kernels, unless the environment sets another number.

    oneDNN multiplies bfloat16, and float32 on some processors. It compiles a kernel for each shape, so for each number
    of tokens in a pass. With its own limit an engine of 90 MB grew by 740 MB (`benchmarks/kernel_cache.py`).
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, KERNELS)


def collect_garbage_rarely() -> None:
    """Run full garbage collections 10x less often; collections of young objects are unchanged.

    Loading torch and transformers makes a million permanent objects. Repeated full collections during the load would
    delay every command that needs these libraries.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, max(old, FULL_COLLECTION_EVERY))


def exempt_loaded() -> None:
    """Exempt all objects that live now from garbage collection, for ever: those of libraries.

    A full collection then takes 10 milliseconds instead of 480, and Python makes one as soon as the other objects have
    grown by a quarter, so that less garbage waits.
    """
    gc.freeze()


def stop_on_sigterm() -> None:
    """Make SIGTERM raise KeyboardInterrupt like Ctrl-C, so that cleanup runs, unless SIGTERM is ignored or handled."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def environment(*, store: bool = False) -> dict[str, str]:
    """Environment variables for a subprocess. Leaves out torchrun's: the subprocess is not one of its workers.

    Args:
        store: the subprocess opens the store, so it needs the credentials of PostgreSQL and S3.
    """
    prefixes = PASSED_PREFIXES + STORE_PREFIXES if store else PASSED_PREFIXES
    return {name: value for name, value in os.environ.items() if name in PASSED or name.startswith(prefixes)}


def kill_child(child: subprocess.Popen[str]) -> None:
    """Kill a child, and what it has started: it leads a session of its own."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()


# --- helper processes -------------------------------------------------------------------------------------------------
# A process for work that may end or block a process: a line of JSON in, one out, with limits of time and memory.
#
# `python -m turret.process MODULE` imports a module, gives what the first line of stdin says to its `helper`,
# and answers every further line by what that returned. A helper that died is replaced for the next line.


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
        self._socket: socket.socket | None = None  # its stdin and stdout are the other end
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
                answer = self._answer(line, self._seconds, stop)
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
        import socket  # not at the start of every command

        try:
            self._socket, theirs = socket.socketpair()
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "turret.process", self._module],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.DEVNULL,
                    env=self._environment(),
                    start_new_session=True,  # Ctrl-C is the parent's, which then ends the helper
                )
        except OSError as error:
            raise EngineError(f"{self._problem}: no process can be started ({error.strerror})") from None
        self.started += 1
        if self._answer(self._about, START_SECONDS) is None:
            self._end()
            raise EngineError(f"{self._problem}: its process ended while it started")
        return self.process

    def _environment(self) -> dict[str, str]:
        own = environment(store=self._store is not None)
        return own if self._store is None else own | {"TURRET_STORE": self._store}

    def _answer(self, line: bytes, seconds: float, stop: Callable[[], bool] = lambda: False) -> Reply | None:
        """The helper's answer to a line; None if it died, did not answer in time, or was to stop."""
        assert self._socket is not None
        until, read = time.monotonic() + seconds, bytearray()
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(line)
            while not read.endswith(b"\n"):
                left = until - time.monotonic()
                if left <= 0 or stop():
                    return None
                self._socket.settimeout(min(POLL_SECONDS, left))
                with contextlib.suppress(TimeoutError):
                    piece = self._socket.recv(_PIECE)
                    if not piece:
                        return None
                    read += piece
            return json.loads(read)
        except (OSError, ValueError):
            return None

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None


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
