"""Worker processes for tests of the queue."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a `turret worker` on a store; it is killed after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(url: str, *more: str) -> subprocess.Popen[str]:
        command, pipe = [sys.executable, "-m", "turret", "worker", "--store", url, *more], subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd="/"))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.communicate()
