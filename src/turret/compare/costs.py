"""The measured costs of a method over its seeds: weights, memory, time, size and forgetting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from turret.compare.results import CellResult


@dataclass(frozen=True)
class MeanRange:
    """A mean over seeds with its smallest and largest value."""

    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> MeanRange | None:
        """The span of some values; None if there are none."""
        values = list(values)
        return cls(fmean(values), min(values), max(values)) if values else None


@dataclass(frozen=True)
class Costs:
    """The costs of one row."""

    trainable: int
    total: int
    bundle_bytes: int
    above_base: MeanRange | None  # peak bytes of the process above the loaded base; None: nothing is trained
    peak: MeanRange | None  # bytes of the whole process
    predicted: Mapping[str, int] | None  # bytes by component, by the preflight
    measured: Mapping[str, int] | None  # bytes by component
    train_seconds: MeanRange | None
    best_seconds: MeanRange | None  # until the best evaluation during training
    best_split: str | None  # of that evaluation
    answer_seconds: MeanRange | None  # one answer to one text
    forgetting: MeanRange | None  # increase of the base's loss on neutral text
    seconds: tuple[float, ...]  # of training, by seed
    forgetting_low: float | None = None  # the ends of its 95% interval over texts, means over seeds
    forgetting_high: float | None = None

    @property
    def forgot(self) -> str:
        """`+0.031 (+0.012 to +0.050)`: the increase of the base's loss on neutral text; "–" if it is not measured."""
        if self.forgetting is None:
            return "–"
        if self.forgetting_low is None or self.forgetting_high is None:
            return f"{self.forgetting.mean:+.3f}"
        return f"{self.forgetting.mean:+.3f} ({self.forgetting_low:+.3f} to {self.forgetting_high:+.3f})"

    @property
    def share(self) -> float:
        """The share of the base's weights that are trained."""
        return self.trainable / max(1, self.total)


def costs(own: Sequence[CellResult]) -> Costs:
    """The costs of one row from all its results."""
    first, trained = own[0], [each for each in own if each.timing]
    forgot = [each.forgetting for each in own if each.forgetting]
    ends = [(each["low"], each["high"]) for each in forgot if "low" in each]
    best = [each.best for each in own if each.best]
    measured = [each.memory["measured"] for each in trained if each.memory]
    predicted = [each.memory["predicted"] for each in trained if each.memory.get("predicted")]
    return Costs(
        trainable=first.parameters["trainable"],
        total=first.parameters["total"],
        bundle_bytes=round(fmean(each.bundle_bytes for each in own)),
        above_base=MeanRange.of(each.memory["above_base_bytes"] for each in trained if each.memory),
        peak=MeanRange.of(each.memory["peak_bytes"] for each in trained if each.memory),
        predicted=_means(predicted),
        measured=_means(measured),
        train_seconds=MeanRange.of(each.timing["train_seconds"] for each in trained),
        best_seconds=MeanRange.of(each["seconds"] for each in best),
        best_split=best[0]["split"] if best else None,
        answer_seconds=MeanRange.of(each.latency["median_seconds"] for each in own),
        forgetting=MeanRange.of(each["loss"] - each["base_loss"] for each in forgot),
        seconds=tuple(each.timing["train_seconds"] for each in trained),
        forgetting_low=fmean(low for low, _ in ends) if ends else None,
        forgetting_high=fmean(high for _, high in ends) if ends else None,
    )


def _means(parts: Sequence[Mapping[str, int]]) -> dict[str, int] | None:
    if not parts:
        return None
    return {name: round(fmean(part[name] for part in parts)) for name in parts[0]}
