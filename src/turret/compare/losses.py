"""Tells from the losses of a training whether they stayed flat, rose, or were still falling at the end.

Losses are means over equal stretches of the training, in order; `binned` makes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from turret.compare.evidence import Array

BINS = 60
FEWEST = 8  # losses that are enough to tell
SHARE = 0.1  # of the whole fall; an exponential fall over 3 time constants falls by that much in its last quarter
FLAT = 0.02  # of the first losses


def binned(losses: Sequence[float], most: int = BINS) -> list[float]:
    """The losses as means over at most `most` equal stretches."""
    if len(losses) <= most:
        return [float(each) for each in losses]
    return [float(part.mean()) for part in np.array_split(np.asarray(losses, dtype=float), most)]


def course(losses: Sequence[float]) -> str | None:
    """`loss flat at 0.69` or `loss rose from 0.70 to 2.31`; None if it fell, or if there are too few losses."""
    values = np.asarray(losses, dtype=float)
    if len(values) < FEWEST:
        return None
    first, last = (float(part.mean()) for part in _ends(values))
    if last > (1 + 5 * FLAT) * first:
        return f"loss rose from {first:.2f} to {last:.2f}"
    return f"loss flat at {last:.2f}" if last > (1 - FLAT) * first else None


def still_falling(losses: Sequence[float]) -> bool:
    """Whether the loss fell in the last quarter of a training, beyond chance, by a tenth of its whole fall or more.

    The learning rate usually ends at zero, which flattens every curve. So a fall is a sure sign that more steps would
    help, but a flat end does not prove that they would not.
    """
    values = np.asarray(losses, dtype=float)
    if len(values) < FEWEST or course(losses) is not None:
        return False
    quarter = len(values) // 4
    before, after = values[-2 * quarter : -quarter], values[-quarter:]
    fall = float(before.mean() - after.mean())
    error = math.sqrt(float(before.var(ddof=1) + after.var(ddof=1)) / quarter)
    first, last = (float(part.mean()) for part in _ends(values))
    return fall > 2 * error and fall >= SHARE * (first - last)


def _ends(values: Array) -> tuple[Array, Array]:
    """The first and the last tenth, at least three losses each."""
    count = max(3, len(values) // 10)
    return values[:count], values[-count:]
