"""Small plots as SVG that a page carries inside itself: no script, no font, no colour of its own but CSS classes.

Every plot is drawn WIDTH wide, so that its text stays readable on a phone; the page puts several side by side where
there is room. Colours come from the page (`.k-lora`, `.k-full`, ...), so that dark, light and print are its business.
Knows numbers and labels; refuses to know comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 420
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40
NUMBER = Callable[[float], str]


@dataclass(frozen=True)
class Mark:
    """A point with an interval; `kind` is its colour, None for x or a missing bound where there is none."""

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
    """Points that belong together."""

    label: str
    kind: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Bar:
    """A stack of parts, from the left."""

    label: str
    parts: tuple[tuple[str, float], ...]  # (name of a part, which is its class too; value)


@dataclass(frozen=True)
class Axis:
    """From numbers to places on the page."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, here = self.low, self.high, value
        if self.log:
            low, high, here = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        share = (here - low) / (high - low)
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 1)

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers, at most about so many."""
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
    """An axis that holds the values with some room around them."""
    low, high = min(values), max(values)
    if log:
        low = max(low, 1e-12)
        low, high = math.log10(low), math.log10(max(high, low))
        around = max(room * (high - low), 0.15)
        return Axis(10 ** (low - around), 10 ** (high + around), start, end, log=True)
    around = room * (high - low) or max(abs(high) * 0.05, 0.5)
    return Axis(low - around, high + around, start, end)


def plain(value: float) -> str:
    """`0.5`, `12`, `1.5k`, `2M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


# --- the plots -------------------------------------------------------------------------------------------------------


def forest(marks: Sequence[Mark], margin: float, *, unit: str, zero: str) -> str:
    """Differences with intervals, one a line, over a band that is the margin. x of a mark is the difference."""
    row, top = 40, 26
    height = top + row * len(marks) + 40
    values = [0.0, margin, -margin, *(each.low for each in marks), *(each.high for each in marks)]
    x = axis(values, 14, WIDTH - 14)
    foot = top + row * len(marks)
    parts = [
        _rect(x.at(-margin), top - 6, x.at(margin) - x.at(-margin), foot - top + 6, "band"),
        _line(x.at(0), top - 6, x.at(0), foot, "axis"),
        _text(_inside(x.at(0), zero), top - 12, zero, "note", "middle"),
    ]
    for place, mark in enumerate(marks):
        said = f"{mark.x:+.1f}  ({mark.low:+.1f} to {mark.high:+.1f})"
        parts += _measured(x, top + row * place + 26, mark, said)
    parts += _x_axis(x, foot, unit, lambda value: f"{value:+g}" if value else "0")
    return _svg(height, parts, f"Differences in {unit}")


def rates(marks: Sequence[Mark], lines: Sequence[tuple[float, str]], *, unit: str) -> str:
    """Shares with intervals, one a line, between 0 and 100, with what to hold them against as vertical lines."""
    row, top = 40, 12 + 15 * len(lines)
    foot = top + row * len(marks)
    x = Axis(0.0, 100.0, 14, WIDTH - 14)
    parts = []
    for place, (value, words) in enumerate(lines):
        y = 12 + 15 * place
        said = f"{words} {value:.0f}"
        parts += [_line(x.at(value), y + 4, x.at(value), foot, "axis dashed")]
        parts += [_text(_inside(x.at(value), said), y, said, "note", "middle")]
    for place, mark in enumerate(marks):
        said = f"{mark.x:.0f}%  ({mark.low:.0f} to {mark.high:.0f})"
        parts += _measured(x, top + row * place + 26, mark, said)
    return _svg(foot + 40, [*parts, *_x_axis(x, foot, unit, plain)], unit)


def _measured(x: Axis, y: float, mark: Mark, said: str) -> list[str]:
    """A line of a plot: the name and the numbers, under them the dot on its interval."""
    return [
        _behind(y - 12, said),
        _text(14, y - 12, mark.label, "name"),
        _text(WIDTH - 14, y - 12, said, "value", "end"),
        _line(x.at(mark.low), y, x.at(mark.high), y, f"whisker k-{mark.kind}"),
        _dot(x.at(mark.x), y, mark.kind, f"{mark.label}: {said}"),
    ]


def scatter(
    marks: Sequence[Mark], *, x_label: str, y_label: str, log: bool = True, number: NUMBER = plain, height: int = 300
) -> str:
    """Points with intervals in y (and whiskers in x where they are known), each with its name beside it."""
    foot = height - BOTTOM
    xs = [value for each in marks for value in (each.x, each.x_low, each.x_high) if value is not None]
    x = axis(xs, LEFT, WIDTH - RIGHT, log=log, room=0.12)
    y = axis([value for each in marks for value in (each.low, each.high)], foot, TOP)
    parts = [*_grid(x, y, foot, x_label, y_label, number)]
    places = _labels([(x.at(each.x), y.at(each.y), each.label) for each in marks])
    for mark, (tx, ty, anchor) in zip(marks, places, strict=True):
        cx, cy = x.at(mark.x), y.at(mark.y)
        parts.append(_line(cx, y.at(mark.low), cx, y.at(mark.high), f"whisker k-{mark.kind}"))
        if mark.x_low is not None and mark.x_high is not None:
            parts.append(_line(x.at(mark.x_low), cy, x.at(mark.x_high), cy, f"whisker k-{mark.kind}"))
        said = f"{mark.label}: {mark.y:.1f} ({mark.low:.1f} to {mark.high:.1f}) at {number(mark.x)}"
        parts += [_dot(cx, cy, mark.kind, said), _text(tx, ty, mark.label, "name", anchor)]
    return _svg(height, parts, f"{y_label} against {x_label}")


def curves(lines: Sequence[Line], *, x_label: str, y_label: str, height: int = 320) -> str:
    """Lines over a logarithmic x, with an interval at every point and the name at the end."""
    foot = height - BOTTOM
    marks = [mark for line in lines for mark in line.marks]
    x = axis([mark.x for mark in marks], LEFT, WIDTH - 96, log=True)
    y = axis([value for mark in marks for value in (mark.low, mark.high)], foot, TOP)
    parts = [*_grid(x, y, foot, x_label, y_label, plain)]
    ends = [(WIDTH - 92.0, y.at(line.marks[-1].y), line.label) for line in lines]
    for line, (tx, ty, _) in zip(lines, _spread(ends), strict=True):
        points = " ".join(f"{x.at(mark.x)},{y.at(mark.y)}" for mark in line.marks)
        parts.append(f'<polyline class="curve k-{line.kind}" points="{points}"/>')
        for mark in line.marks:
            cx = x.at(mark.x)
            parts.append(_line(cx, y.at(mark.low), cx, y.at(mark.high), f"whisker thin k-{line.kind}"))
            said = f"{line.label}: {mark.y:.1f} ({mark.low:.1f} to {mark.high:.1f}) with {mark.x:.0f}"
            parts.append(_dot(cx, y.at(mark.y), line.kind, said, 3.5))
        parts.append(_text(tx, ty + 4, line.label, f"name k-{line.kind}"))
    return _svg(height, parts, f"{y_label} against {x_label}")


def stacks(bars: Sequence[Bar], *, unit: str, number: NUMBER = plain) -> str:
    """Horizontal stacks, a line of words above each."""
    row, top = 34, 8
    foot = top + row * len(bars)
    most = max((sum(value for _, value in bar.parts) for bar in bars), default=1.0)
    x = Axis(0.0, (most or 1.0) * 1.02, 14, WIDTH - 14)
    parts: list[str] = []
    for place, bar in enumerate(bars):
        y, at = top + row * place + 16, 0.0
        whole = sum(value for _, value in bar.parts)
        parts += [_text(14, y - 3, bar.label, "name"), _text(WIDTH - 14, y - 3, number(whole), "value", "end")]
        for name, value in bar.parts:
            start, end = x.at(at), x.at(at + value)
            if end - start > 0.2:
                parts.append(_rect(start, y + 1, end - start, 11, f"part p-{name}", f"{name}: {number(value)}"))
            at += value
    parts += _x_axis(x, foot + 4, unit, number)
    return _svg(foot + 40, parts, unit)


# --- pieces ----------------------------------------------------------------------------------------------------------


def _behind(y: float, words: str) -> str:
    """Paper under words that end at the right edge, so that no line runs through them."""
    width = 6.3 * len(words) + 6
    return _rect(WIDTH - 14 - width, y - 11, width, 15, "paper")


def _inside(x: float, words: str) -> float:
    """Where the middle of some words may be so that none of them leaves the plot."""
    half = 3.1 * len(words) + 4
    return max(half, min(WIDTH - half, x))


def _labels(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """(x, y, anchor) of a name beside each point, none over another where that can be had."""
    placed: list[tuple[float, float, float]] = []  # left, right, y of names that are there
    found: dict[int, tuple[float, float, str]] = {}
    for place in sorted(range(len(points)), key=lambda each: points[each][1]):
        px, py, label = points[place]
        width = 6.4 * len(label)
        right = px + 9 + width <= WIDTH - 2
        left_edge = px + 9 if right else px - 9 - width
        y = py - 6
        while any(
            left_edge < end and left_edge + width > begin and abs(y - other) < 14 for begin, end, other in placed
        ):
            y += 7
        placed.append((left_edge, left_edge + width, y))
        found[place] = (px + 9 if right else px - 9, y, "start" if right else "end")
    return [found[place] for place in range(len(points))]


def _spread(points: Sequence[tuple[float, float, str]], gap: float = 15) -> list[tuple[float, float, str]]:
    """The same points with their y moved so far apart that names do not touch."""
    order = sorted(range(len(points)), key=lambda each: points[each][1])
    found: dict[int, tuple[float, float, str]] = {}
    last = -math.inf
    for place in order:
        x, y, label = points[place]
        last = max(y, last + gap)
        found[place] = (x, last, label)
    return [found[place] for place in range(len(points))]


def _grid(x: Axis, y: Axis, foot: float, x_label: str, y_label: str, number: NUMBER) -> list[str]:
    parts = []
    for value in y.ticks():
        parts += [
            _line(LEFT, y.at(value), x.end, y.at(value), "grid"),
            _text(LEFT - 6, y.at(value) + 4, plain(value), "tick", "end"),
        ]
    parts.append(_text(LEFT, TOP - 1, y_label, "note"))
    return [*parts, *_x_axis(x, foot, x_label, number)]


def _x_axis(x: Axis, foot: float, label: str, number: NUMBER) -> list[str]:
    parts = [_line(x.start, foot, x.end, foot, "axis")]
    for value in x.ticks():
        parts += [
            _line(x.at(value), foot, x.at(value), foot + 4, "axis"),
            _text(x.at(value), foot + 17, number(value), "tick", "middle"),
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


def _rect(x: float, y: float, width: float, height: float, kind: str, said: str = "") -> str:
    title = f"<title>{escape(said)}</title>" if said else ""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{max(0.0, width):g}" height="{height:g}">{title}</rect>'


def _dot(x: float, y: float, kind: str, said: str, radius: float = 5) -> str:
    return f'<circle class="dot k-{kind}" cx="{x:g}" cy="{y:g}" r="{radius:g}"><title>{escape(said)}</title></circle>'


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'
