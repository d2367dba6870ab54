"""Helpers of the tests of the three axes: register a toy in child processes, answer in one mixed pass, and serve."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx2
import pytest
from server.conftest import Running

from turret.engine import Engine, SamplingParams
from turret.server.services import ServerSettings
from turret.workspace import Workspace

TOLERANCE = 2e-2  # of a probability: `predict` has its base in bfloat16 where the processor has it


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


def require_one_pass_as_alone(
    workspace: Workspace, engine: Engine, names: Sequence[str], texts: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[dict[str, Any]]]:
    """Versions that classify in one mixed pass give the probabilities that `predict` gives: these are returned."""
    expected = {name: workspace.predict(name, texts) for name in names}
    for name in expected:
        engine.warm(name)
    asked = [(name, place) for place in range(len(texts)) for name in expected]
    answers, sizes = answered_together(engine, [("classify", texts[at], name) for name, at in asked], monkeypatch)
    for (name, place), answer in zip(asked, answers, strict=True):
        assert answer["probabilities"] == pytest.approx(expected[name][place]["probabilities"], abs=TOLERANCE)
    assert sizes == [len(asked)]
    return expected


@contextmanager
def served(workspace: Workspace, engine: Engine) -> Iterator[httpx2.Client]:
    """A client of a server with this engine, until the end of the block."""
    running = Running(workspace, engine, ServerSettings(), options=SamplingParams).start()
    try:
        yield running.client()
    finally:
        running.stop()


def classify_labels(client: httpx2.Client, model: str, texts: Sequence[str]) -> list[str]:
    """The labels that a server answers."""
    answers = client.post("/v1/classify", json={"model": model, "input": list(texts)}).json()["data"]
    return [each["label"] for each in answers]
