"""Tells which functions of turret run during a block, on this thread and on those that started in the block."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import turret

ROOT = str(Path(turret.__file__).parent)


class Entered:
    """The calls that are counted while `on` is true, by code object.

    Args:
        aside: A thread that enters one of these functions is not watched from then on.
    """

    def __init__(self, aside: tuple[Callable[..., Any], ...] = ()) -> None:
        self.on = False
        self.calls: Counter[CodeType] = Counter()
        self._aside = {each.__code__ for each in aside}

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        if frame.f_code in self._aside:
            sys.setprofile(None)
        elif self.on:
            self.calls[frame.f_code] += 1

    def of(self, function: Callable[..., Any]) -> int:
        """How often a function was called."""
        return self.calls[function.__code__]

    def files(self) -> dict[str, list[str]]:
        """File of turret -> the functions in it that were entered. The body of a module or a class is no function."""
        found: dict[str, list[str]] = {}
        for code, count in sorted(self.calls.items(), key=lambda item: item[0].co_firstlineno):
            if code.co_filename.startswith(ROOT) and code.co_name != "<module>":
                name = Path(code.co_filename).relative_to(ROOT).as_posix()
                found.setdefault(name, []).append(f"{code.co_qualname} {count}")
        return dict(sorted(found.items()))


@contextmanager
def watching(*aside: Callable[..., Any]) -> Iterator[Entered]:
    """Watch this thread and those that start in the block. Set `on` around what shall be counted."""
    entered = Entered(aside)
    threading.setprofile(entered)
    sys.setprofile(entered)
    try:
        yield entered
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
