"""What a path is before anything is routed: a page of the console, or the API. Knows strings alone."""

from __future__ import annotations

# The first part of every page's path. Pages are for browsers: they take a session's cookie, forms, and answer in HTML.
PAGES = frozenset(
    ("", "adapters", "runs", "comparisons", "playground", "experiments", "store", "sign-in", "sign-out", "static")
)
UNSIGNED = frozenset(("sign-in", "static"))  # those that nobody need be known for
INFER_PAGES = frozenset(("", "playground", "sign-out"))  # those that the scope infer opens; admin opens all


def first(path: str) -> str:
    """`/adapters/news` -> `adapters`."""
    return path.lstrip("/").partition("/")[0]


def is_page(path: str) -> bool:
    return first(path) in PAGES
