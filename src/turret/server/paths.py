"""Which paths are pages of the console. Every other path belongs to the API."""

from __future__ import annotations

# The first part of a page's path. Pages use a session cookie and forms, and answer in HTML.
PAGES = frozenset(
    ("", "adapters", "runs", "comparisons", "playground", "experiments", "store", "sign-in", "sign-out", "static")
)
UNSIGNED = frozenset(("sign-in", "static"))  # open without a session
INFER_PAGES = frozenset(("", "playground", "sign-out"))  # open to the scope infer; admin opens all pages


def first(path: str) -> str:
    """`/adapters/news` -> `adapters`."""
    return path.lstrip("/").partition("/")[0]


def is_page(path: str) -> bool:
    return first(path) in PAGES
