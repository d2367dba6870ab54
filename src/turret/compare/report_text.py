"""Formats numbers and names for reports."""

from __future__ import annotations

import re

from turret.methods import method_named


def sentence(text: str) -> str:
    """The text with its first letter, or its first word if that is a method, written as at the start of a sentence."""
    word = re.split(r"\W", text, maxsplit=1)[0]
    return (method_named(word).title or word[:1].upper() + word[1:]) + text[len(word) :]


def count(value: float) -> str:
    """`74k`, `22.7M`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def megabytes(value: float) -> str:
    """`3.2 kB`, `0.31 MB`, `91 MB`, `1.20 GB`."""
    if abs(value) >= 1e9:
        return f"{value / 1e9:.2f} GB"
    if abs(value) < 1e5:
        return f"{value / 1e3:.1f} kB"
    return f"{value / 1e6:.2f} MB" if abs(value) < 1e7 else f"{value / 1e6:.0f} MB"


def seconds(value: float) -> str:
    """`0.8 s`, `42 s`, `3 min 05 s`."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 100:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def milliseconds(value: float) -> str:
    """`3.1 ms`, `420 ms`, `1.2 s`."""
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.1f} ms" if value < 0.1 else f"{1000 * value:.0f} ms"


def percent(share: float) -> str:
    """`0.14%`, `0.0057%`, `100%`."""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"


def chance(p: float) -> str:
    """`0.03`, `0.4`, `below 0.001`."""
    return "below 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.995 else "1"


def points(value: float) -> str:
    """A number with one decimal."""
    return f"{value:.1f}"


def signed_number(value: float) -> str:
    """`+0.4`, `-1.2` with a typographic minus; `0.0` has no sign."""
    return plus(value).replace("-", "\u2212")


def plus(value: float) -> str:
    """`+0.4`, `-1.2` with a plain minus; `0.0` has no sign."""
    number = f"{value:+.1f}"
    return "0.0" if number in ("+0.0", "-0.0") else number


def rounded_estimate(value: float) -> str:
    """`12,000`, `240`, `35`: two significant digits, for estimates."""
    size = 10 ** max(0, len(str(round(abs(value)))) - 2)
    return f"{round(value / size) * size:,}"


def share(value: float) -> str:
    """`8%`, `below 1%`, `over 99%`."""
    return "below 1%" if value < 0.01 else "over 99%" if value > 0.99 else f"{100 * value:.0f}%"


def shorten_text(text: str, most: int) -> str:
    """The text on one line of at most `most` characters, cut at the end."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
