"""Collects the problems of a source of data, so that one error names all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from turret.errors import DataError, joined

T = TypeVar("T")


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
            raise DataError(joined(self._found, 270))
