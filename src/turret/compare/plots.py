"""Draws small plots as SVG inside a page, without scripts or fonts.

Every plot is WIDTH wide, so that its text is readable on a phone. Colours come from the page's CSS classes (`.k-lora`,
`.k-full`, ...), which also cover dark mode and print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from turret.compare.report_text import signed_ascii

# --- labels -----------------------------------------------------------------------------------------------------------
# Places the names of a plot so that none covers another.
#
# The page's font is unknown, so a character counts as CHARACTER wide, which is generous at 12 px.


WIDTH = 420
LEFT, RIGHT, TOP = 46, 14, 12
CHARACTER = 6.8  # width
SHIFTS = (-6, 4, -20, 18, -34, 32, -48, 46, -62, 60)  # of a name's y from its point's, nearest first
Box = tuple[float, float, float, float]  # left, top, right, bottom


def clamp_label(x: float, words: str) -> float:
    """The x of the middle of some words, moved so that they stay inside the plot."""
    half = 3.1 * len(words) + 4
    return max(half, min(WIDTH - half, x))


def cut_label(label: str, room: float) -> str:
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
        costs = [_covered_area(box, taken) + _covered_area(box, lines) + _outside(box, foot) for box in boxes]
        best = costs.index(min(costs))
        tx, ty, right = spots[best]
        taken.append(boxes[best])
        spots_of[place] = (tx, ty, "start" if right else "end")
    return [spots_of[place] for place in range(len(points))]


def _covered_area(box: Box, others: Sequence[Box]) -> float:
    """The area of other boxes that a box covers."""
    sizes = [
        (min(box[2], each[2]) - max(box[0], each[0]), min(box[3], each[3]) - max(box[1], each[1])) for each in others
    ]
    return sum(width * height for width, height in sizes if width > 0 and height > 0)


def _outside(box: Box, foot: float) -> float:
    """The area of a box outside the plot."""
    over = max(0.0, LEFT - box[0]) + max(0.0, box[2] - WIDTH + 2) + max(0.0, TOP + 4 - box[1]) + max(0.0, box[3] - foot)
    return 14 * over


def spread_heights(heights: Sequence[float], top: float, foot: float, gap: float = 15) -> list[float]:
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


# --- plots ------------------------------------------------------------------------------------------------------------


HEIGHT = 320  # of curves
BOTTOM = 40
NAMES = 96  # room for names at the ends of lines
NUMBER = Callable[[float], str]


@dataclass(frozen=True)
class Mark:
    """A point with an interval in y, and in x if its bounds are known. `kind` chooses its colour."""

    label: str
    kind: str
    x: float
    y: float
    low: float
    high: float
    x_low: float | None = None
    x_high: float | None = None


@dataclass(frozen=True)
class Line:
    """Points that a line connects."""

    label: str
    kind: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class LossCurve:
    """Values from the start of a training to its end, evenly spaced. A dashed line is a training that collapsed."""

    label: str
    kind: str
    values: tuple[float, ...]
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """A horizontal stack of parts."""

    label: str
    parts: tuple[tuple[str, float], ...]  # (name of a part, which is also its CSS class; value)


@dataclass(frozen=True)
class Axis:
    """Maps numbers to positions on the page."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The position of a value. Values outside the axis are at its ends."""
        low, high, place = self.low, self.high, value
        if self.log:
            low, high, place = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        share = (place - low) / (high - low)
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 1)

    def ticks(self, most: int = 5) -> list[float]:
        """About `most` round numbers."""
        if not self.log or self.high < 8 * self.low:
            step = _nice((self.high - self.low) / most)
            first = math.ceil(self.low / step - 1e-9)
            return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        whole = [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first + 1) / most)))]
        if len(whole) >= 2:
            return whole
        around = [m * 10.0**power for power in range(first - 1, last + 1) for m in (1, 2, 5)]
        return [each for each in around if self.low <= each <= self.high] or [self.low, self.high]


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * 0.999), 10 * power)


def axis(values: Sequence[float], start: float, end: float, *, log: bool = False, room: float = 0.06) -> Axis:
    """An axis for some values, with some room around them."""
    low, high = min(values), max(values)
    if log:
        low = max(low, 1e-12)
        low, high = math.log10(low), math.log10(max(high, low))
        around = max(room * (high - low), 0.15)
        return Axis(10 ** (low - around), 10 ** (high + around), start, end, log=True)
    around = room * (high - low) or max(abs(high) * 0.05, 0.5)
    return Axis(low - around, high + around, start, end)


def short_number(value: float) -> str:
    """`0.5`, `12`, `1.5k`, `2M`."""
    value = float(f"{value:.3g}")  # rounded before the unit is chosen: 999.6 is 1k
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


# --- the plots -------------------------------------------------------------------------------------------------------


def forest(marks: Sequence[Mark], margin: float, *, unit: str, zero: str, scale: Sequence[Mark] | None = None) -> str:
    """Differences with intervals, one per line, over a band that shows the margin.

    Args:
        marks: the difference is x, its interval low to high.
        zero: name of the line at zero.
        scale: the marks that choose the axis; None: all. Marks outside it become arrows at its edge.
    """
    row, top = 40, 26
    height = top + row * len(marks) + 40
    chosen = marks if scale is None else scale
    values = [0.0, margin, -margin, *(each.low for each in chosen), *(each.high for each in chosen)]
    x = axis(values, 14, WIDTH - 14)
    foot = top + row * len(marks)
    parts = [
        _rect(x.at(-margin), top - 6, x.at(margin) - x.at(-margin), foot - top + 6, "band"),
        _line(x.at(0), top - 6, x.at(0), foot, "axis"),
        _text(clamp_label(x.at(0), zero), top - 12, zero, "note", "middle"),
    ]
    for place, mark in enumerate(marks):
        numbers = f"{signed_ascii(mark.x)}  ({signed_ascii(mark.low)} to {signed_ascii(mark.high)})"
        parts += _draw_mark(x, top + row * place + 26, mark, numbers)
    parts += _x_axis(x, foot, unit, lambda value: f"{value:+g}" if value else "0")
    return _svg(height, parts, f"Differences in {unit}")


def rates(marks: Sequence[Mark], lines: Sequence[tuple[float, str]], *, unit: str) -> str:
    """Rates from 0 to 100 with intervals, one per line. lines: (value, name) of vertical lines to compare them with."""
    row, top = 40, 12 + 15 * len(lines)
    foot = top + row * len(marks)
    x = Axis(0.0, 100.0, 14, WIDTH - 14)
    parts = []
    for place, (value, words) in enumerate(lines):
        y = 12 + 15 * place
        text = f"{words} {value:.0f}"
        parts += [_line(x.at(value), y + 4, x.at(value), foot, "axis dashed")]
        parts += [_text(clamp_label(x.at(value), text), y, text, "note", "middle")]
    for place, mark in enumerate(marks):
        numbers = f"{mark.x:.0f}%  ({mark.low:.0f} to {mark.high:.0f})"
        parts += _draw_mark(x, top + row * place + 26, mark, numbers)
    return _svg(foot + 40, [*parts, *_x_axis(x, foot, unit, short_number)], unit)


def _draw_mark(x: Axis, y: float, mark: Mark, numbers: str) -> list[str]:
    """One line of a plot: the name and the numbers, and below them the dot with its interval, or an arrow."""
    outside = -1 if mark.x < x.low else 1 if mark.x > x.high else 0
    words = f"off scale  {numbers}" if outside else numbers
    shown = [
        _line(x.at(mark.low), y, x.at(mark.high), y, f"whisker k-{mark.kind}"),
        _dot(x.at(mark.x), y, mark.kind, f"{mark.label}: {numbers}"),
    ]
    if outside:
        shown = [_arrow(x.start if outside < 0 else x.end, y, outside, 0, mark.kind, f"{mark.label}: {numbers}")]
    return [
        _background(y - 12, words),
        _text(14, y - 12, cut_label(mark.label, WIDTH - 44 - CHARACTER * len(words)), "name"),
        _text(WIDTH - 14, y - 12, words, "value", "end"),
        *shown,
    ]


def scatter(
    marks: Sequence[Mark],
    *,
    x_label: str,
    y_label: str,
    scale: Sequence[Mark] | None = None,
) -> str:
    """Points with intervals in y, and in x if known, over a logarithmic x axis, each with its name beside it.

    Args:
        scale: the marks that choose the y axis; None: all. Marks outside it become arrows at its edge.
    """
    height = 300
    foot = height - BOTTOM
    xs = [value for each in marks for value in (each.x, each.x_low, each.x_high) if value is not None]
    x = axis(xs, LEFT, WIDTH - RIGHT, log=True, room=0.12)
    y = axis([value for each in scale or marks for value in (each.low, each.high)], foot, TOP)
    parts = _grid(x, y, foot, x_label, y_label)
    beyond = {place: 1 if mark.y < y.low else -1 for place, mark in enumerate(marks) if not y.low <= mark.y <= y.high}
    names = [
        cut_label(f"{mark.label} {mark.y:.1f}, off scale" if place in beyond else mark.label, 190)
        for place, mark in enumerate(marks)
    ]
    spots = [(x.at(mark.x), y.at(mark.y)) for mark in marks]
    whiskers = [(x.at(mark.x) - 3, y.at(mark.high), x.at(mark.x) + 3, y.at(mark.low)) for mark in marks]
    whiskers += [
        (x.at(mark.x_low), y.at(mark.y) - 3, x.at(mark.x_high), y.at(mark.y) + 3)
        for mark in marks
        if mark.x_low is not None and mark.x_high is not None
    ]
    places = labels([(cx, cy, name) for (cx, cy), name in zip(spots, names, strict=True)], foot, whiskers)
    for place, mark in enumerate(marks):
        (cx, cy), (tx, ty, anchor) = spots[place], places[place]
        title = f"{mark.label}: {mark.y:.1f} ({mark.low:.1f} to {mark.high:.1f}) at {short_number(mark.x)}"
        if place in beyond:
            parts.append(_arrow(cx, cy, 0, beyond[place], mark.kind, title))
        else:
            if mark.x_low is not None and mark.x_high is not None:
                parts.append(_line(x.at(mark.x_low), cy, x.at(mark.x_high), cy, f"whisker k-{mark.kind}"))
            parts += _point(x, y, mark, title)
        parts.append(_text(tx, ty, names[place], f"name k-{mark.kind}", anchor))
    return _svg(height, parts, f"{y_label} against {x_label}")


def curves(lines: Sequence[Line], *, x_label: str, y_label: str) -> str:
    """Lines over a logarithmic x axis, with an interval at each point and the name at the end."""
    foot = HEIGHT - BOTTOM
    marks = [mark for line in lines for mark in line.marks]
    x = axis([mark.x for mark in marks], LEFT, WIDTH - NAMES, log=True)
    y = axis([value for mark in marks for value in (mark.low, mark.high)], foot, TOP)
    parts = _grid(x, y, foot, x_label, y_label)
    for line in lines:
        points = " ".join(f"{x.at(mark.x)},{y.at(mark.y)}" for mark in line.marks)
        parts.append(f'<polyline class="curve k-{line.kind}" points="{points}"/>')
        for mark in line.marks:
            title = f"{line.label}: {mark.y:.1f} ({mark.low:.1f} to {mark.high:.1f}) with {mark.x:.0f}"
            parts += _point(x, y, mark, title, " thin", 3.5)
    parts += _at_the_end([(y.at(line.marks[-1].y), line.label, line.kind) for line in lines], foot)
    return _svg(HEIGHT, parts, f"{y_label} against {x_label}")


def loss_curves(lines: Sequence[LossCurve], *, x_label: str, y_label: str) -> str:
    """Loss curves from the start of a training to its end, with the name at the end."""
    foot = HEIGHT - BOTTOM
    x = Axis(0.0, 100.0, LEFT, WIDTH - NAMES)
    y = axis([value for line in lines for value in line.values], foot, TOP)
    parts = _grid(x, y, foot, x_label, y_label)
    for line in lines:
        step = 100 / max(1, len(line.values) - 1)
        points = " ".join(f"{x.at(step * place)},{y.at(value)}" for place, value in enumerate(line.values))
        title, kind = f"<title>{escape(line.label)}</title>", f"curve k-{line.kind}{' dashed' if line.dashed else ''}"
        parts.append(f'<polyline class="{kind}" points="{points}">{title}</polyline>')
    parts += _at_the_end([(y.at(line.values[-1]), line.label, line.kind) for line in lines], foot)
    return _svg(HEIGHT, parts, f"{y_label} against {x_label}")


def _at_the_end(ends: Sequence[tuple[float, str, str]], foot: float) -> list[str]:
    """The names of lines, to the right of their ends. ends: (y, name, kind)."""
    heights = spread_heights([y for y, _, _ in ends], TOP, foot)
    return [
        _text(WIDTH - NAMES + 4, y + 4, cut_label(label, NAMES - 8), f"name k-{kind}")
        for y, (_, label, kind) in zip(heights, ends, strict=True)
    ]


def stacks(bars: Sequence[Bar], *, unit: str, number: NUMBER = short_number) -> str:
    """Horizontal stacks, each below its name and total."""
    row, top = 34, 8
    foot = top + row * len(bars)
    most = max((sum(value for _, value in bar.parts) for bar in bars), default=1.0)
    x = Axis(0.0, (most or 1.0) * 1.02, 14, WIDTH - 14)
    parts: list[str] = []
    for place, bar in enumerate(bars):
        y, at = top + row * place + 16, 0.0
        whole = sum(value for _, value in bar.parts)
        parts += [_text(14, y - 3, cut_label(bar.label, WIDTH - 100), "name")]
        parts += [_text(WIDTH - 14, y - 3, number(whole), "value", "end")]
        for name, value in bar.parts:
            start, end = x.at(at), x.at(at + value)
            if end - start > 0.2:
                parts.append(_rect(start, y + 1, end - start, 11, f"part p-{name}", f"{name}: {number(value)}"))
            at += value
    parts += _x_axis(x, foot + 4, unit, number)
    return _svg(foot + 40, parts, unit)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _background(y: float, words: str) -> str:
    """A background for words at the right edge, so that no line runs through them."""
    width = 6.3 * len(words) + 6
    return _rect(WIDTH - 14 - width, y - 11, width, 15, "paper")


def reliability(points: Sequence[Mark], shares: Sequence[float]) -> str:
    """How often answers are right, by how sure they are, with the diagonal of a calibrated classifier.

    Args:
        points: x is the mean probability of a bin, y how often its answers are right, with an interval.
        shares: the share of all answers in each bin: bars at the foot.
    """
    x, y = Axis(0.0, 1.0, LEFT, WIDTH - RIGHT), Axis(0.0, 1.0, 340 - BOTTOM, TOP + 10)
    foot, x_label, y_label = y.start, "probability of the answer", "share that is right"
    parts = _grid(x, y, foot, x_label, y_label)
    parts.append(_line(x.at(0), y.at(0), x.at(1), y.at(1), "axis dashed"))
    for point, share in zip(points, shares, strict=True):
        tall = 44 * share
        parts.append(_rect(x.at(point.x) - 5, foot - tall, 10, tall, "band", f"{share:.0%} of the answers"))
    for point in points:
        parts += _point(x, y, point, point.label)
    return _svg(340, parts, f"{y_label} by {x_label}")


def error_by_share(
    points: Sequence[tuple[float, float]], threshold: Mark | None, live: Mark | None, bound: float | None
) -> str:
    """A line of errors over the share of the answers that is decided. All in %.

    Args:
        points: (share, error), by rising share.
        threshold: its share and error, with an interval: a dot on an upright line.
        live: the same of live outcomes: a dot.
        bound: of a promise: a dashed line.
    """
    marks = [each for each in (threshold, live) if each is not None]
    foot, height = 300 - BOTTOM, 300
    x = Axis(0.0, 100.0, LEFT, WIDTH - RIGHT)
    highest = max([error for _, error in points] + [each.high for each in marks] + [bound or 0.0])
    y = Axis(0.0, min(100.0, 1.1 * highest) or 1.0, foot, TOP + 10)
    x_label, y_label = "share of the answers that is decided, %", "wrong among these, %"
    parts = _grid(x, y, foot, x_label, y_label)
    if bound is not None:
        left = threshold is None or threshold.x > 50  # away from the threshold
        parts.append(_line(x.start, y.at(bound), x.end, y.at(bound), "axis dashed"))
        place = (x.start + 4, "start") if left else (x.end - 4, "end")
        parts.append(_text(place[0], y.at(bound) - 5, f"promised: at most {bound:g}%", "note", place[1]))
    if threshold is not None:
        parts.append(_line(x.at(threshold.x), y.end, x.at(threshold.x), foot, "axis dashed"))
    line = " ".join(f"{x.at(share)},{y.at(error)}" for share, error in points)
    parts.append(f'<polyline class="curve k-lora" points="{line}"/>')
    spots = [(x.at(each.x), y.at(each.y), each.label) for each in marks]
    whiskers = [(x.at(each.x) - 3, y.at(each.high), x.at(each.x) + 3, y.at(each.low)) for each in marks]
    curve = [(x.at(share) - 4, y.at(error) - 4, x.at(share) + 4, y.at(error) + 4) for share, error in points]
    for mark, (tx, ty, anchor) in zip(marks, labels(spots, foot, whiskers + curve), strict=True):
        parts += _point(x, y, mark, f"{mark.label}: {mark.y:.1f}% of {mark.x:.1f}% are wrong")
        parts.append(_text(tx, ty, mark.label, f"name k-{mark.kind}", anchor))
    return _svg(height, parts, f"{y_label} by {x_label}")


def agreement(points: Sequence[tuple[float, float]]) -> str:
    """A small dot for each pair of numbers, and the diagonal on which both are equal."""
    values = [each for point in points for each in point]
    x, y = axis(values, LEFT, WIDTH - RIGHT), axis(values, 340 - BOTTOM, TOP + 10)
    parts = _grid(x, y, y.start, "right", "answered")
    low, high = min(values), max(values)
    parts.append(_line(x.at(low), y.at(low), x.at(high), y.at(high), "axis dashed"))
    parts += [_dot(x.at(a), y.at(b), "lora", f"{short_number(a)}: {short_number(b)}", radius=2.5) for a, b in points]
    return _svg(340, parts, "answered by right")


def _point(x: Axis, y: Axis, mark: Mark, title: str, thin: str = "", radius: float = 5) -> list[str]:
    """A dot with its interval in y."""
    at = x.at(mark.x)
    whisker = _line(at, y.at(mark.low), at, y.at(mark.high), f"whisker{thin} k-{mark.kind}")
    return [whisker, _dot(at, y.at(mark.y), mark.kind, title, radius)]


def _grid(x: Axis, y: Axis, foot: float, x_label: str, y_label: str) -> list[str]:
    parts = []
    for value in y.ticks():
        parts += [
            _line(LEFT, y.at(value), x.end, y.at(value), "grid"),
            _text(LEFT - 6, y.at(value) + 4, short_number(value), "tick", "end"),
        ]
    parts.append(_text(LEFT, TOP - 1, y_label, "note"))
    return [*parts, *_x_axis(x, foot, x_label, short_number)]


def _x_axis(x: Axis, foot: float, label: str, number: NUMBER) -> list[str]:
    parts = [_line(x.start, foot, x.end, foot, "axis")]
    for value in x.ticks():
        parts += [
            _line(x.at(value), foot, x.at(value), foot + 4, "axis"),
            _text(clamp_label(x.at(value), number(value)), foot + 17, number(value), "tick", "middle"),
        ]
    return [*parts, _text((x.start + x.end) / 2, foot + 33, label, "note", "middle")]


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    inside = "".join(parts)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>{inside}</svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{max(0.0, width):g}" height="{height:g}">{inside}</rect>'


def _dot(x: float, y: float, kind: str, title: str, radius: float = 5) -> str:
    return f'<circle class="dot k-{kind}" cx="{x:g}" cy="{y:g}" r="{radius:g}"><title>{escape(title)}</title></circle>'


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def _arrow(x: float, y: float, right: int, down: int, kind: str, title: str) -> str:
    """A triangle at the edge of the plot that points to a mark outside it."""
    if down:
        points = f"{x - 6:g},{y - 9 * down:g} {x + 6:g},{y - 9 * down:g} {x:g},{y:g}"
    else:
        points = f"{x - 9 * right:g},{y - 6:g} {x - 9 * right:g},{y + 6:g} {x:g},{y:g}"
    return f'<polygon class="dot k-{kind}" points="{points}"><title>{escape(title)}, off scale</title></polygon>'
