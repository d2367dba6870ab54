"""Which of many like cases run with the fast tests. The others are marked slow: `make test-all` runs every case."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def few(cases: Sequence[Any], fast: int) -> list[Any]:
    """The first `fast` cases are fast tests, the others slow ones."""
    return [*cases[:fast], *slow(cases[fast:])]


def fast_if_in(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases that are in `fast` are fast tests, the others slow ones."""
    return [_joined(each, slow=each not in fast) for each in cases]


def slow(cases: Iterable[Any]) -> list[Any]:
    """Slow tests all."""
    return fast_if_in((), cases)


def pairs(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Every pair of two values. Each value is in a fast test once at least, as in (a, x), (b, y), (c, x)."""
    count = max(len(first), len(second))
    fast = {(place % len(first), place % len(second)) for place in range(count)}
    return [
        _joined(one, other, slow=(i, j) not in fast) for i, one in enumerate(first) for j, other in enumerate(second)
    ]


def kind_of(value: Any) -> str:
    """The name of a method or of a family in the name of a test."""
    return str(getattr(value, "kind", value))


def _joined(*values: Any, slow: bool) -> Any:
    """One case with these values, each of which may be several and have marks of its own."""
    every, marks = list[Any](), [pytest.mark.slow] if slow else []
    for each in values:
        if isinstance(each, ParameterSet):
            every += each.values
            marks += each.marks
        else:
            every += each if isinstance(each, tuple) else (each,)
    return pytest.param(*every, marks=marks)
