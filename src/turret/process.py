"""Settings of a Turret process: OpenMP waiting, garbage collection, SIGTERM, and the environment of subprocesses.

Loads no torch, because its libraries read these settings when they are loaded.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

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
def uninterrupted() -> Iterator[None]:
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


def release() -> None:
    """Return free memory to the system, after work that used much memory for a short time (a load, a plan)."""
    gc.collect()
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def share() -> None:
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
)
PASSED_PREFIXES = (
    *("HF_", "XDG_", "TURRET_", "OMP_", "GOMP_", "MKL_", "LD_LIBRARY", "PYTHONPATH", "PYTHONHOME"),
    *("CUDA_", "PYTORCH_", "TORCH_", "TRITON_", "NCCL_", "BNB_", "LIGER_", "HIP_", "ROCR_", "HSA_"),  # of a GPU
)
STORE_PREFIXES = ("AWS_", "PG")  # addresses and credentials of a store by URL
SPIN = "10000"  # iterations of an OpenMP thread's busy wait: less than a millisecond
FULL_COLLECTION_EVERY = 100  # collections of the middle generation per full collection; Python's default is 10
OPENMP_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_briefly() -> None:
    """Shorten the busy wait of OpenMP threads, unless the environment sets it.

    By default GNU's OpenMP spins for 300,000 iterations. If two processes with several threads share the processors, a
    spinning thread blocks the processor that the thread it waits for needs. Next to another such training, a training
    was 5x to 50x slower than alone, instead of 2x slower (`benchmarks/busy_machine.py`).
    """
    if not any(name in os.environ for name in OPENMP_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN


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
