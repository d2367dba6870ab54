"""What the losses of a training say of its course: flat, risen, or still falling at its last step. Plain numpy.

Losses are means over equal stretches of the training, in order (`binned`), as `measure` keeps them with a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from turret.compare.evidence import Array

BINS = 60
FEWEST = 8  # losses that say anything of a course
SHARE = 0.1  # of the whole fall: an exponential fall of 3 time constants loses so much in its last quarter
FLAT = 0.02  # of the first losses


def binned(losses: Sequence[float], most: int = BINS) -> list[float]:
    """Means over at most so many equal stretches."""
    if len(losses) <= most:
        return [float(each) for each in losses]
    return [float(part.mean()) for part in np.array_split(np.asarray(losses, dtype=float), most)]


def course(losses: Sequence[float]) -> str | None:
    """`loss flat at 0.69` or `loss rose from 0.70 to 2.31`; None where it fell, or where there are too few losses."""
    found = np.asarray(losses, dtype=float)
    if len(found) < FEWEST:
        return None
    first, last = (float(part.mean()) for part in (_ends(found)))
    if last > (1 + 5 * FLAT) * first:
        return f"loss rose from {first:.2f} to {last:.2f}"
    return f"loss flat at {last:.2f}" if last > (1 - FLAT) * first else None


def still_falling(losses: Sequence[float]) -> bool:
    """Whether the last quarter of a training lowered its loss, beyond chance, by a tenth of the whole fall or more.

    The rate usually ends at zero and flattens every curve, so a fall here is a sure sign that more steps would help,
    and no fall is no proof that they would not.
    """
    found = np.asarray(losses, dtype=float)
    if len(found) < FEWEST or course(losses) is not None:
        return False
    quarter = len(found) // 4
    before, after = found[-2 * quarter : -quarter], found[-quarter:]
    fell = float(before.mean() - after.mean())
    chance = math.sqrt(float(before.var(ddof=1) + after.var(ddof=1)) / quarter)
    first, last = (float(part.mean()) for part in (_ends(found)))
    return fell > 2 * chance and fell >= SHARE * (first - last)


def _ends(found: Array) -> tuple[Array, Array]:
    """The first and the last tenth, three losses at least."""
    count = max(3, len(found) // 10)
    return found[:count], found[-count:]
