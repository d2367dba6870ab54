"""What a method costs, over its seeds: measured numbers and nothing quoted. Knows results, judges nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from turret.compare.results import Result


@dataclass(frozen=True)
class Span:
    """A mean over seeds with the least and the most that was measured."""

    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Span | None:
        found = list(values)
        return cls(fmean(found), min(found), max(found)) if found else None


@dataclass(frozen=True)
class Costs:
    """Of one row."""

    trainable: int
    total: int
    bundle_bytes: int
    above_base: Span | None  # bytes of the process above the loaded base, at its peak; None: nothing is trained
    peak: Span | None  # bytes of the whole process
    predicted: Mapping[str, int] | None  # bytes by component, as the preflight said
    measured: Mapping[str, int] | None  # the same, measured
    train_seconds: Span | None
    best_seconds: Span | None  # until the best evaluation on the way
    best_split: str | None  # that it looked at
    answer_seconds: Span | None  # one answer to one text
    forgetting: Span | None  # by how much the base's loss on neutral text rises
    seconds: tuple[float, ...]  # of training, a seed each

    @property
    def share(self) -> float:
        """Of the base's weights that are trained."""
        return self.trainable / max(1, self.total)


def costs(own: Sequence[Result]) -> Costs:
    """Of all results of one row."""
    first, trained = own[0], [each for each in own if each.timing]
    forgot = [each.forgetting for each in own if each.forgetting]
    best = [each.best for each in own if each.best]
    parts = [each.memory["measured"] for each in trained]
    said = [each.memory["predicted"] for each in trained if each.memory.get("predicted")]
    return Costs(
        trainable=first.parameters["trainable"],
        total=first.parameters["total"],
        bundle_bytes=round(fmean(each.bundle_bytes for each in own)),
        above_base=Span.of(each.memory["above_base_bytes"] for each in trained),
        peak=Span.of(each.memory["peak_bytes"] for each in trained),
        predicted=_means(said),
        measured=_means(parts),
        train_seconds=Span.of(each.timing["train_seconds"] for each in trained),
        best_seconds=Span.of(each["seconds"] for each in best),
        best_split=best[0]["split"] if best else None,
        answer_seconds=Span.of(each.latency["median_seconds"] for each in own),
        forgetting=Span.of(each["loss"] - each["base_loss"] for each in forgot),
        seconds=tuple(each.timing["train_seconds"] for each in trained),
    )


def _means(parts: Sequence[Mapping[str, int]]) -> dict[str, int] | None:
    if not parts:
        return None
    return {name: round(fmean(part[name] for part in parts)) for name in parts[0]}
