"""Helpers of the tests of the three axes: register a toy in child processes, and answer requests in one mixed pass."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from turret.engine import Engine


@contextmanager
def known_to_children(folder: Path, registration: str) -> Iterator[pytest.MonkeyPatch]:
    """Make every Python that starts within the block run `registration` first.

    Args:
        folder: an empty folder for the file that does it.
        registration: Python source.

    Yields:
        A patch that is undone at the end of the block.
    """
    tests = str(Path(__file__).parent.parent)
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.path.append({tests!r})\n{registration}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield patch


def answered_together(
    engine: Engine,
    asked: Sequence[tuple[Literal["classify", "generate"], str, str | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[dict[str, Any]], list[int]]:
    """The answers to (kind, text, adapter), all submitted before the first pass, and the new rows in each pass."""
    sizes, run_pass = list[int](), engine._runner.run

    def counted(fresh: Any, steps: Any) -> Any:
        sizes.append(len(fresh))
        return run_pass(fresh, steps)

    monkeypatch.setattr(engine._runner, "run", counted)
    with engine._wake:  # no pass starts before all requests wait
        tickets = [engine.submit(kind, text, name) for kind, text, name in asked]
    return [ticket.result() for ticket in tickets], sizes
