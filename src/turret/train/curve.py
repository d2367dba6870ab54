"""The training curve: one record per optimiser step, kept in a file of JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from turret.disk import sync
from turret.json_types import JsonObject


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step. `loss` is the mean over the batch before the update.

    Only times and memory differ between a run and its repetition.
    """

    step: int  # 1, 2, ... steps
    steps: int  # of the whole run, unless it stops early
    epoch: float  # epochs done after this step: 1.5 is the middle of the second
    loss: float  # over examples (classify) or target tokens (generate)
    lr: float
    grad_norm: float  # before clipping
    examples: int
    tokens: int  # source and target tokens of this step
    seconds: float  # of this step, without its evaluation
    tokens_per_second: float
    rss: int  # resident bytes of the process after the step
    metrics: JsonObject | None = None  # of an evaluation after this step
    split: str | None = None  # of those metrics: validation, or test (only reported, never used to choose)
    guessing: float | None = None  # the loss of guessing, if the latest losses are no better

    def to_json(self) -> str:
        return json.dumps({key: value for key, value in asdict(self).items() if value is not None})

    @classmethod
    def from_json(cls, line: str) -> StepRecord:
        return cls(**json.loads(line))

    def repeatable(self) -> JsonObject:
        """The fields that are bit-equal in a repeated or resumed run."""
        measured = ("seconds", "tokens_per_second", "rss")
        return {key: value for key, value in asdict(self).items() if key not in measured}


class Curve:
    """The file `curve.jsonl` of a run. A resumed run drops the records after its checkpoint and writes them again."""

    def __init__(self, path: Path, *, resume_after: int = 0) -> None:
        self.path = path
        kept = [record for record in read_curve(path) if record.step <= resume_after]
        beside = path.with_name(path.name + ".new")
        beside.write_text("".join(record.to_json() + "\n" for record in kept), encoding="utf-8")
        sync(beside)
        os.replace(beside, path)

    def append(self, record: StepRecord) -> None:
        """Add a record to the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")


def read_curve(path: Path) -> Iterator[StepRecord]:
    """The records of the file. A last line that a kill cut short is left out."""
    if path.exists():
        yield from parse_curve(path.read_bytes())


def parse_curve(content: bytes) -> Iterator[StepRecord]:
    """The records in the content of such a file."""
    for line in content.decode("utf-8", "replace").splitlines():
        try:
            yield StepRecord.from_json(line)
        except (ValueError, TypeError):
            return
