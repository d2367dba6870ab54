"""What a process of turret's own runs with: how threads wait, how often all objects are looked through, what it sees.

Refuses to know what the process does. Loads no torch: what is set here, its libraries read when they are loaded.
"""

from __future__ import annotations

import gc
import os
import signal

KEPT = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "USERPROFILE", "VIRTUAL_ENV")
KEPT_BEGINNINGS = ("HF_", "XDG_", "TURRET_", "OMP_", "GOMP_", "MKL_", "CUDA_", "LD_LIBRARY", "PYTHONPATH", "PYTHONHOME")
SPIN = "10000"  # rounds that a thread waits awake, less than a millisecond
SELDOM = 100  # collections of the middle generation for one of all; Python's own is 10
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_briefly() -> None:
    """Have a thread that waits for another give its processor up soon, unless the environment says how it shall wait.

    GNU's OpenMP waits awake for 300,000 rounds. Where two processes of several threads share the processors, one waits
    awake on the very processor that the thread it waits for needs, and every operation takes as long as the system lets
    it: beside another such training one was 5 to 50 times slower than alone, not twice (`benchmarks/busy_machine.py`).
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = SPIN


def look_through_seldom() -> None:
    """Have Python look for cycles among all objects a tenth as often, and among the young ones as before.

    Loading torch and transformers makes a million objects that stay. All of them were walked through again and again on
    the way, which every command that needs them had to wait for.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, max(old, SELDOM))


def stop_on_sigterm() -> None:
    """Have SIGTERM stop what is at work as Ctrl-C does, so that it cleans up, unless the environment ignores it."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def environment() -> dict[str, str]:
    """The variables that are handed on; not what torchrun set: the process is alone."""
    return {name: value for name, value in os.environ.items() if name in KEPT or name.startswith(KEPT_BEGINNINGS)}
