"""Bar charts as SVG, in a light and a dark version, drawn from numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, ROW, LABEL, RIGHT, TOP = 760, 30, 330, 90, 62  # pixels
COLOURS = {
    "light": {"text": "#1f2328", "faint": "#59636e", "bar": "#0969da", "line": "#d1d9e0", "back": "#ffffff"},
    "dark": {"text": "#f0f6fc", "faint": "#9198a1", "bar": "#4493f8", "line": "#3d444d", "back": "#0d1117"},
}


@dataclass(frozen=True)
class Bar:
    """One bar: how many times faster, with its 95% interval."""

    label: str
    value: float
    low: float
    high: float


def drawn(title: str, note: str, bars: Sequence[Bar], theme: str) -> str:
    """One chart: horizontal bars from 0, a thin line for the interval, and a dashed line at 1 (the rival)."""
    colours = COLOURS[theme]
    height = TOP + ROW * len(bars) + 14
    most = max(max(bar.high for bar in bars), 1.0)
    scale = (WIDTH - LABEL - RIGHT) / most
    one = LABEL + scale
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="{colours["back"]}"/>',
        f'<text x="16" y="24" font-size="15" font-weight="600" fill="{colours["text"]}">{escape(title)}</text>',
        f'<text x="16" y="44" font-size="12" fill="{colours["faint"]}">{escape(note)}</text>',
    ]
    for place, bar in enumerate(bars):
        y = TOP + ROW * place
        middle = y + 10
        lines += [
            f'<text x="{LABEL - 10}" y="{middle + 5}" text-anchor="end" fill="{colours["text"]}">'
            f"{escape(bar.label)}</text>",
            f'<rect x="{LABEL}" y="{y}" width="{bar.value * scale:.1f}" height="20" rx="3" fill="{colours["bar"]}"/>',
            f'<line x1="{LABEL + bar.low * scale:.1f}" x2="{LABEL + bar.high * scale:.1f}" y1="{middle}" '
            f'y2="{middle}" stroke="{colours["text"]}" stroke-width="1.5"/>',
            f'<text x="{LABEL + bar.high * scale + 8:.1f}" y="{middle + 5}" font-weight="600" '
            f'fill="{colours["text"]}">{bar.value:.1f}x</text>',
        ]
    lines.append(
        f'<line x1="{one:.1f}" x2="{one:.1f}" y1="{TOP - 6}" y2="{height - 10}" stroke="{colours["faint"]}" '
        f'stroke-dasharray="3 3"/>'
    )
    return "\n".join([*lines, "</svg>", ""])
