"""Programs as syntax trees. A module of the source is read by many tests, and parsed once for all of them."""

from __future__ import annotations

import ast
from functools import cache


@cache
def module_of(text: str) -> ast.Module:
    """The tree of a program. Nobody changes it."""
    return ast.parse(text)


@cache
def nodes(text: str) -> list[ast.AST]:
    """Every node of a program."""
    return list(ast.walk(module_of(text)))
