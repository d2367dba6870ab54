"""A histogram of seconds, as Prometheus counts them."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


@dataclass(frozen=True)
class Seconds:
    """A histogram at one moment. buckets: upper bound as text -> values up to it, ending with "+Inf"."""

    buckets: dict[str, int]
    sum: float


class Histogram:
    """Counts values by the bound that they do not exceed."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count a value, `times` times."""
        self._counts[bisect_left(BOUNDS, seconds)] += times
        self._sum += seconds * times

    def now(self) -> Seconds:
        """What was counted so far."""
        total, buckets = 0, {}
        for bound, count in zip([*map(str, BOUNDS), "+Inf"], self._counts, strict=True):
            total += count
            buckets[bound] = total
        return Seconds(buckets, self._sum)
