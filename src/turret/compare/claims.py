"""Common claims about LoRA and prefix tuning against full fine-tuning, each with what was measured here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from turret.compare.costs import Costs
from turret.compare.rows import ComparisonRow
from turret.methods import method_named

ClaimAnswer = Literal["yes", "no", "not shown"]


@dataclass(frozen=True)
class Claim:
    """One claim, tested on one row."""

    claim: str
    spec: str
    measured: str
    answer: ClaimAnswer


def claims(rows: Sequence[ComparisonRow], against: str) -> tuple[Claim, ...]:
    """Every claim for every LoRA and prefix row. None if the baseline is not full fine-tuning, or has not run.

    Args:
        against: spec of the baseline.
    """
    full = next((row for row in rows if row.spec == against), None)
    if full is None or full.costs is None or not method_named(full.kind).every_weight:
        return ()
    tested: list[Claim] = []
    for row in rows:
        if method_named(row.kind).claimed and row.costs is not None:
            tested += [
                _parameters(row.spec, row.costs, full.costs),
                _memory(row.spec, row.costs, full.costs),
                _quality(row),
                _size(row.spec, row.costs),
                _time(row.spec, row.costs, full.costs),
            ]
    return tuple(sorted(tested, key=lambda each: ORDER.index(each.claim)))


ORDER = (
    "more than 99% fewer trainable parameters",
    "up to 95% less memory",
    "within 1-2% of full fine-tuning",
    "adapters of one or two megabytes",
    "faster training",
)


def _parameters(spec: str, own: Costs, full: Costs) -> Claim:
    saved = 1 - own.trainable / max(1, full.trainable)
    measured = f"{100 * saved:.2f}% fewer: {own.trainable:,} of {full.trainable:,}"
    return Claim(ORDER[0], spec, measured, "yes" if saved > 0.99 else "no")


def _memory(spec: str, own: Costs, full: Costs) -> Claim:
    if not (own.above_base and own.peak and full.above_base and full.peak and full.above_base.mean):
        return Claim(ORDER[1], spec, "not measured", "not shown")
    saved, whole = 1 - own.above_base.mean / full.above_base.mean, 1 - own.peak.mean / full.peak.mean
    measured = f"{100 * saved:.0f}% less above the loaded base, {100 * whole:.0f}% less of the whole process"
    return Claim(ORDER[1], spec, measured, "yes" if saved >= 0.95 else "no")


def _quality(row: ComparisonRow) -> Claim:
    verdict = row.verdict
    if verdict is None:
        return Claim(ORDER[2], row.spec, "not measured", "not shown")
    span = verdict.span()
    if verdict.seeds < 2:
        return Claim(ORDER[2], row.spec, f"{span}, one seed", "not shown")
    if verdict.collapsed:
        return Claim(ORDER[2], row.spec, f"{verdict.collapses()}; in the others {span}", "not shown")
    d = verdict.difference
    return Claim(ORDER[2], row.spec, span, "yes" if d.low >= -2 else "no" if d.high < -2 else "not shown")


def _size(spec: str, own: Costs) -> Claim:
    size = own.bundle_bytes
    return Claim(ORDER[3], spec, f"{size / 1e6:.2f} MB on disk", "yes" if size <= 2_000_000 else "no")


def _time(spec: str, own: Costs, full: Costs) -> Claim:
    ratios = [theirs / max(mine, 1e-9) for mine, theirs in zip(own.seconds, full.seconds, strict=False)]
    if not ratios:
        return Claim(ORDER[4], spec, "not measured", "not shown")
    speed = f"{ratios[0]:.2f}x the speed, one seed"
    if len(ratios) > 1:
        speed = f"{min(ratios):.2f}x to {max(ratios):.2f}x the speed, over {len(ratios)} seeds"
    faster, slower = min(ratios) > 1.05, max(ratios) <= 1.05
    answer: ClaimAnswer = "yes" if faster else "no" if slower else "not shown"
    return Claim(ORDER[4], spec, f"{speed}, the whole training", answer)
