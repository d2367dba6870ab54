"""What is commonly said of adapters, beside what was measured here: a value, and yes, no, or not shown.

Knows rows and the yardstick; a claim is about LoRA and prefix tuning against full fine-tuning. Refuses to quote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from turret.methods import method_named

Answer = Literal["yes", "no", "not shown"]


@dataclass(frozen=True)
class Claim:
    """One claim, held against one row."""

    claim: str
    spec: str
    measured: str
    answer: Answer


def claims(rows: Sequence[Any], against: str) -> tuple[Claim, ...]:
    """Every claim for every LoRA and prefix row; none where the yardstick is not full fine-tuning, or has not run."""
    full = next((row for row in rows if row.spec == against and row.costs), None)
    if full is None or not method_named(full.kind).every_weight:
        return ()
    found: list[Claim] = []
    for row in rows:
        if method_named(row.kind).claimed and row.costs is not None:
            found += [
                _parameters(row, full),
                _memory(row, full),
                _quality(row),
                _size(row),
                _time(row, full),
            ]
    return tuple(sorted(found, key=lambda each: ORDER.index(each.claim)))


ORDER = (
    "more than 99% fewer trainable parameters",
    "up to 95% less memory",
    "within 1-2% of full fine-tuning",
    "adapters of one or two megabytes",
    "faster training",
)


def _parameters(row: Any, full: Any) -> Claim:
    saved = 1 - row.costs.trainable / max(1, full.costs.trainable)
    said = f"{100 * saved:.2f}% fewer: {row.costs.trainable:,} of {full.costs.trainable:,}"
    return Claim(ORDER[0], row.spec, said, "yes" if saved > 0.99 else "no")


def _memory(row: Any, full: Any) -> Claim:
    mine, theirs = row.costs.above_base, full.costs.above_base
    if mine is None or theirs is None or not theirs.mean:
        return Claim(ORDER[1], row.spec, "not measured", "not shown")
    saved, whole = 1 - mine.mean / theirs.mean, 1 - row.costs.peak.mean / full.costs.peak.mean
    said = f"{100 * saved:.0f}% less above the loaded base, {100 * whole:.0f}% less of the whole process"
    return Claim(ORDER[1], row.spec, said, "yes" if saved >= 0.95 else "no")


def _quality(row: Any) -> Claim:
    verdict = row.verdict
    if verdict is None:
        return Claim(ORDER[2], row.spec, "not measured", "not shown")
    said = verdict.span()
    if verdict.seeds < 2:
        return Claim(ORDER[2], row.spec, f"{said}, one seed", "not shown")
    if verdict.collapsed:
        return Claim(ORDER[2], row.spec, f"{verdict.collapses()}; in the others {said}", "not shown")
    d = verdict.difference
    return Claim(ORDER[2], row.spec, said, "yes" if d.low >= -2 else "no" if d.high < -2 else "not shown")


def _size(row: Any) -> Claim:
    size = row.costs.bundle_bytes
    return Claim(ORDER[3], row.spec, f"{size / 1e6:.2f} MB on disk", "yes" if size <= 2_000_000 else "no")


def _time(row: Any, full: Any) -> Claim:
    mine, theirs = row.costs.seconds, full.costs.seconds
    count = min(len(mine), len(theirs))
    if not count:
        return Claim(ORDER[4], row.spec, "not measured", "not shown")
    ratios = [theirs[place] / max(mine[place], 1e-9) for place in range(count)]
    several = f"{min(ratios):.2f} to {max(ratios):.2f} times as fast, over {count} seeds"
    said = f"{several if count > 1 else f'{ratios[0]:.2f} times as fast, one seed'}, the whole training"
    faster = all(ratio > 1.05 for ratio in ratios)
    slower = all(ratio < 1 / 1.05 for ratio in ratios) or max(ratios) <= 1.05
    return Claim(ORDER[4], row.spec, said, "yes" if faster else "no" if slower else "not shown")
