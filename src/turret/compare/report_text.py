"""Formats numbers and names for reports."""

from __future__ import annotations

import re

from turret.methods import method_named


def sentence(text: str) -> str:
    """The text with its first letter, or its first word if that is a method, written as at the start of a sentence."""
    word = re.split(r"\W", text, maxsplit=1)[0]
    return (method_named(word).title or word[:1].upper() + word[1:]) + text[len(word) :]


def milliseconds(value: float) -> str:
    """`3.1 ms`, `420 ms`, `1.2 s`."""
    return f"{value:.1f} s" if value >= 0.9995 else f"{1000 * value:.{1 if value < 0.1 else 0}f} ms"


def percent(share: float) -> str:
    """`0.14%`, `0.0057%`, `100%`."""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"


def p_value_text(p: float) -> str:
    """`0.03`, `0.4`, `below 0.001`."""
    return "below 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.995 else "1"


def one_decimal(value: float) -> str:
    """A number with one decimal."""
    return f"{value:.1f}"


def signed_number(value: float) -> str:
    """`+0.4`, `-1.2` with a typographic minus; `0.0` has no sign."""
    return signed_ascii(value).replace("-", "\u2212")


def signed_ascii(value: float) -> str:
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
