"""A disk that fails once: a library, compiled here and loaded before libc, makes one write or flush end in EIO.

A test starts a process with `environment()`; in it `fail_at(n, folder, told)` arms the library, and `what_failed(told)`
says which file it was.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
from compiled_kernels import COMPILER

needed = pytest.mark.skipif(COMPILER is None, reason="no C compiler on this machine")
SOURCE = Path(__file__).with_name("failing_disk.c")
SAYS = r"(Input/output error|disk I/O error)"


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process whose disk can fail; the library is compiled into `folder`."""
    library = folder / "failing_disk.so"
    if not library.exists():
        assert COMPILER is not None
        command = [COMPILER, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
    return {**os.environ, "LD_PRELOAD": str(library)}


def fail_at(number: int, folder: Path, told: Path) -> None:
    """Have the n-th write or flush from now of a file under the folder, or of the folder itself, fail once."""
    ctypes.CDLL(None).fail_at(number, os.fsencode(folder), os.fsencode(told))


def what_failed(told: Path) -> str | None:
    """The file of the write that failed, and the library that wrote; None where none failed. Forgets it."""
    try:
        text = told.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    told.unlink()
    return text


def of_sqlite(failed: str) -> bool:
    """Whether SQLite wrote: a commit is in its journal until a later write succeeds, and it flushes folders unheard."""
    return "sqlite" in Path(failed.rpartition("\t")[2]).name
