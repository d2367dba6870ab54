"""Trackers of the tests: one that writes down what it is told, and some that fail, each in its own way."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from turret.trackers import Point, State, TrackedRun


class Recording:
    """Appends everything to the file `recorded.jsonl` of the run."""

    def start(self, run: TrackedRun) -> None:
        self.path = Path(run.folder) / "recorded.jsonl"
        self._add({"start": asdict(run)})

    def log(self, points: Sequence[Point]) -> None:
        self._add({"log": [[step, dict(values)] for step, values in points]})

    def finish(self, state: State, summary: Mapping[str, float | str]) -> None:
        self._add({"finish": state, "summary": dict(summary)})

    def _add(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Silent:
    """Takes everything and does nothing."""

    def start(self, run: TrackedRun) -> None:
        pass

    def log(self, points: Sequence[Point]) -> None:
        pass

    def finish(self, state: State, summary: Mapping[str, float | str]) -> None:
        pass


class RaisingAtStart(Silent):
    def start(self, run: TrackedRun) -> None:
        raise ConnectionError("nobody answers\nat tracker.example")


class RaisingAtFirstStep(Silent):
    def log(self, points: Sequence[Point]) -> None:
        raise RuntimeError("quota exceeded")


class Hanging(Silent):
    def log(self, points: Sequence[Point]) -> None:
        time.sleep(600)


class HangingAtTheEnd(Recording):
    def finish(self, state: State, summary: Mapping[str, float | str]) -> None:
        time.sleep(600)


class Slow(Recording):
    def log(self, points: Sequence[Point]) -> None:
        time.sleep(0.05 * len(points))
        super().log(points)


class Dying(Silent):
    def log(self, points: Sequence[Point]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Talkative(Recording):
    """Prints, reads from the terminal, and leaves a process behind."""

    def start(self, run: TrackedRun) -> None:
        super().start(run)
        print("view your run at http://tracker.example")
        os.system("echo from a child process")
        try:
            input("your key? ")
        except EOFError:
            self._add({"asked": "and got no answer"})


def rows(folder: Path) -> list[dict[str, Any]]:
    """What `Recording` wrote in a folder."""
    path = folder / "recorded.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(folder: Path) -> dict[int, dict[str, float]]:
    """The values of each step that was logged; the last ones, if a step was logged twice."""
    return {step: values for row in rows(folder) for step, values in row.get("log", ())}
