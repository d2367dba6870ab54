"""Proves bundles in processes that a test session forks from one that has imported what a proof needs.

Each of them loads the bundle and the base from disk, as a fresh one does. To import takes four to eight seconds of
processor time, a third of the whole time of many tests. `tests/train/test_proof.py` starts fresh ones, and holds the
reports of both to be the same.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from turret.process import environment
from turret.train import proof


class ForkedProofs:
    """Stands for `turret.train.proof._run` in tests.

    Attributes:
        run: starts a fresh process.
    """

    def __init__(self) -> None:
        self.run, self._path = proof._run, os.environ.get("PYTHONPATH")
        self._context: BaseContext | None = None
        if "forkserver" in multiprocessing.get_all_start_methods():
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload(["ready_to_prove"])

    def __call__(self, folder: Path, timeout: float) -> str:
        if self._context is None or os.environ.get("PYTHONPATH") != self._path:  # read when Python starts
            return self.run(folder, timeout)
        from multiprocessing import forkserver  # Windows has none

        with pytest.MonkeyPatch.context() as patch:  # of the first process, from which all are forked
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(Path(__file__).parent), self._path])))
            forkserver.ensure_running()
        process = self._context.Process(target=_read_back, args=(str(folder), environment()))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            return f"it took longer than {timeout:.0f} s"
        return f"exit status {process.exitcode}"


def _read_back(folder: str, variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    proof.read_back(folder)
