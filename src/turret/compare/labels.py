"""Places the names of a plot so that none covers another.

The page's font is unknown, so a character counts as CHARACTER wide, which is generous at 12 px.
"""

from __future__ import annotations

from collections.abc import Sequence

WIDTH = 420
LEFT, RIGHT, TOP = 46, 14, 12
CHARACTER = 6.8  # width
SHIFTS = (-6, 4, -20, 18, -34, 32, -48, 46, -62, 60)  # of a name's y from its point's, nearest first
Box = tuple[float, float, float, float]  # left, top, right, bottom


def inside(x: float, words: str) -> float:
    """The x of the middle of some words, moved so that they stay inside the plot."""
    half = 3.1 * len(words) + 4
    return max(half, min(WIDTH - half, x))


def fitted(label: str, room: float) -> str:
    """A name, cut to the width `room`."""
    most = max(3, int(room / CHARACTER))
    return label if len(label) <= most else f"{label[: most - 1]}…"


def labels(
    points: Sequence[tuple[float, float, str]], foot: float, lines: Sequence[Box] = ()
) -> list[tuple[float, float, str]]:
    """(x, y, anchor) of the name beside each point, chosen to cover no name or point and to stay inside the plot.

    Args:
        points: (x, y, name).
        foot: y of the plot's lower edge.
        lines: that no name should cover, as boxes.
    """
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    spots_of: dict[int, tuple[float, float, str]] = {}
    for place in sorted(range(len(points)), key=lambda each: points[each][1]):
        x, y, label = points[place]
        width = CHARACTER * len(label)
        spots = [(x + 9 if right else x - 9, y + shift, right) for shift in SHIFTS for right in (True, False)]
        boxes = [(tx if right else tx - width, ty - 11, tx + width if right else tx, ty + 3) for tx, ty, right in spots]
        costs = [_covered(box, taken) + _covered(box, lines) + _outside(box, foot) for box in boxes]
        best = costs.index(min(costs))
        tx, ty, right = spots[best]
        taken.append(boxes[best])
        spots_of[place] = (tx, ty, "start" if right else "end")
    return [spots_of[place] for place in range(len(points))]


def _covered(box: Box, others: Sequence[Box]) -> float:
    """The area of other boxes that a box covers."""
    sizes = [
        (min(box[2], each[2]) - max(box[0], each[0]), min(box[3], each[3]) - max(box[1], each[1])) for each in others
    ]
    return sum(width * height for width, height in sizes if width > 0 and height > 0)


def _outside(box: Box, foot: float) -> float:
    """The area of a box outside the plot."""
    over = max(0.0, LEFT - box[0]) + max(0.0, box[2] - WIDTH + 2) + max(0.0, TOP + 4 - box[1]) + max(0.0, box[3] - foot)
    return 14 * over


def spread(heights: Sequence[float], top: float, foot: float, gap: float = 15) -> list[float]:
    """The heights moved apart by at least `gap`, between top and foot if they fit."""
    order = sorted(range(len(heights)), key=lambda each: heights[each])
    moved = list(heights)
    last = top - gap
    for place in order:
        last = moved[place] = max(heights[place], last + gap)
    last = foot + gap
    for place in reversed(order):
        last = moved[place] = min(moved[place], last - gap)
    return moved
