"""Settings of a Turret process: OpenMP waiting, garbage collection, SIGTERM, and the environment of subprocesses.

Loads no torch, because its libraries read these settings when they are loaded.
"""

from __future__ import annotations

import gc
import os
import signal

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
)
PASSED_PREFIXES = ("HF_", "XDG_", "TURRET_", "OMP_", "GOMP_", "MKL_", "CUDA_", "LD_LIBRARY", "PYTHONPATH", "PYTHONHOME")
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
