"""One record per optimiser step, and the file of them. Knows no model; writes JSON lines and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turret.disk import sync


@dataclass(frozen=True)
class StepRecord:
    """What one optimiser step did. `loss` is the mean over the batch before the update; times and memory are the only
    fields that differ between a run and its repetition."""

    step: int  # 1, 2, ... steps
    steps: int  # how many there will be, unless the run stops early
    epoch: float  # epochs done after this step: 1.5 is the middle of the second
    loss: float  # over examples (classify) or target tokens (generate)
    lr: float
    grad_norm: float  # before clipping
    examples: int
    tokens: int  # source and target tokens of this step
    seconds: float  # of this step, evaluation left out
    tokens_per_second: float
    rss: int  # resident bytes of the process after the step
    metrics: dict[str, Any] | None = None  # on the steps that evaluate
    split: str | None = None  # what those metrics were measured on: validation, or test for reporting only
    guessing: float | None = None  # the loss of guessing, where the latest losses are no better

    def to_json(self) -> str:
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None})

    @classmethod
    def from_json(cls, line: str) -> StepRecord:
        return cls(**json.loads(line))

    def repeatable(self) -> dict[str, Any]:
        """The fields that a repetition, or a resumed run, gives again to the last bit."""
        measured = ("seconds", "tokens_per_second", "rss")
        return {key: value for key, value in asdict(self).items() if key not in measured}


class Curve:
    """`curve.jsonl` of a run. A resumed run drops the lines past its checkpoint (they are about to come again)."""

    def __init__(self, path: Path, *, resume_after: int = 0) -> None:
        self.path = path
        kept = [record for record in read_curve(path) if record.step <= resume_after]
        beside = path.with_name(path.name + ".new")
        beside.write_text("".join(record.to_json() + "\n" for record in kept), encoding="utf-8")
        sync(beside)
        os.replace(beside, path)

    def append(self, record: StepRecord) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")


def read_curve(path: Path) -> Iterator[StepRecord]:
    """The records of the file; a last line cut short by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield StepRecord.from_json(line)
        except (ValueError, TypeError):
            return
