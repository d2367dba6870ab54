"""Docstrings are in one style, Google's: `Args:` names arguments that are there, and every export has a docstring."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from syntax import module_of

SOURCE = Path(__file__).parents[1] / "src" / "turret"
MODULES = sorted(SOURCE.rglob("*.py"))
SECTION = re.compile(r"^(?P<indent> *)Args:\n(?P<body>(?:(?P=indent) +.*\n?|\n)+)", re.MULTILINE)
Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def documented(tree: ast.AST) -> Iterator[tuple[Documented, str]]:
    for node in ast.walk(tree):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            yield node, text


def names(node: Documented) -> set[str]:
    """The arguments of a function; of a class its fields, and the arguments of `__init__`."""
    if not isinstance(node, ast.ClassDef):
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        return {each.arg for each in every if each is not None}
    found = {
        each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name in ("__init__", "forward", "__call__"):
            found |= names(each)
    return found


def stale(text: str) -> list[str]:
    """`function: argument` for every argument that a docstring names and that is not there."""
    found = []
    for node, docstring in documented(module_of(text)):
        section = SECTION.search(docstring)
        for listed in (
            re.findall(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*):", section["body"], re.MULTILINE) if section else ()
        ):
            found += [f"{node.name}: {name}" for name in re.split(r", ", listed) if name.lstrip("*") not in names(node)]
    return found


def test_a_docstring_names_no_argument_that_is_not_there() -> None:
    found = {str(path.relative_to(SOURCE)): stale(path.read_text(encoding="utf-8")) for path in MODULES}
    assert {path: names for path, names in found.items() if names} == {}


def test_what_a_package_exports_has_a_docstring() -> None:
    bare = []
    for init in SOURCE.glob("**/__init__.py"):
        for node in module_of(init.read_text(encoding="utf-8")).body:
            path = SOURCE.parent.joinpath(*(getattr(node, "module", None) or "none").split(".")).with_suffix(".py")
            if not isinstance(node, ast.ImportFrom) or not path.exists():
                continue
            exported = {alias.name for alias in node.names}
            bare += [
                f"{path.relative_to(SOURCE)}: {found.name}"
                for found in module_of(path.read_text(encoding="utf-8")).body
                if isinstance(found, Documented) and found.name in exported and not ast.get_docstring(found)
            ]
    assert bare == []


def test_control_a_name_that_is_not_there_would_be_seen() -> None:
    text = 'def f(a, *, b):\n    """Do.\n\n    Args:\n        a: one.\n        c, b: two.\n    """'
    assert stale(text) == ["f: c"]
