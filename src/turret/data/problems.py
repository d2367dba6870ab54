"""Collects the problems of a source of data, so that one error names all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from turret.errors import DataError, one_line

T = TypeVar("T")
_ROOM = 270  # characters of the error
_MOST = 4  # problems that are named; the others are counted


class Problems:
    """The texts of errors that were found so far."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, text: str) -> None:
        if text not in self._found:
            self._found.append(text)

    def note(self, check: Callable[[], T]) -> T | None:
        """The result of a check; None if it raised a DataError, which is collected."""
        try:
            return check()
        except DataError as error:
            self.add(str(error))
            return None

    def require(self) -> None:
        """Raise one DataError with all problems, if there are any."""
        if self._found:
            more = len(self._found) - _MOST
            raise DataError("; ".join(_shortened(self._found, _ROOM)) + (f"; and {more} more" if more > 0 else ""))


def _shortened(texts: Sequence[str], room: int) -> list[str]:
    """The first texts, of which the long ones are cut in the middle until all fit.

    Args:
        room: characters of all of them, with two between them.
    """
    shown = list(texts[:_MOST])
    room -= 2 * len(shown)
    for rest, text in zip(range(len(shown), 0, -1), sorted(shown, key=len), strict=True):
        if len(text) > room // rest:  # this one and all longer ones share what is left
            return [one_line(each, max(room // rest, 40)) if len(each) >= len(text) else each for each in shown]
        room -= len(text)
    return shown
