"""Prints the test files that a change touches, for `make check`: as many as run in about a minute.

    python release/touched_tests.py            what differs from the last commit, else that commit itself
    python release/touched_tests.py main       what differs from a branch

First come the tests that changed, and those that are named like a module that changed. Then come those that import such
a module, the quickest first. Seconds are those of the last runs on this machine, which `tests/conftest.py` keeps.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = ROOT / ".pytest_cache/v/turret/seconds"
MOST = 60.0  # seconds of tests, on two workers
UNKNOWN = 5.0  # seconds of a file that has not run here
DOCUMENTS = ("tests/test_docs.py", "tests/test_prose.py", "tests/test_figures.py")


def main() -> None:
    changed = _changed(sys.argv[1] if len(sys.argv) > 1 else None)
    modules = {_module(path) for path in changed if path.startswith("src/") and path.endswith(".py")}
    tests = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    first = {name for name in tests if name in changed or _tested(name) in modules}
    documents = DOCUMENTS if any(path.endswith(".md") for path in changed) else ()
    seconds = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
    others = sorted(
        (
            name
            for name, path in tests.items()
            if name not in first and (name in documents or modules & _imported(path))
        ),
        key=lambda name: seconds.get(name, UNKNOWN),
    )
    chosen, left = sorted(first), MOST - sum(seconds.get(name, UNKNOWN) for name in first)
    for name in others:
        left -= seconds.get(name, UNKNOWN)
        if left >= 0:
            chosen.append(name)
    print(*chosen)
    if more := len(first) + len(others) - len(chosen):
        print(f"{more} more test files import what changed: `make test` runs them", file=sys.stderr)


def _changed(since: str | None) -> set[str]:
    """The paths of files that changed and still exist."""

    def lines(*words: str) -> list[str]:
        return subprocess.check_output(["git", *words], cwd=ROOT, text=True).splitlines()

    found = {*lines("diff", "--name-only", since or "HEAD"), *lines("ls-files", "--others", "--exclude-standard")}
    found = found or set(lines("diff", "--name-only", "HEAD~1"))
    return {path for path in found if (ROOT / path).exists()}


def _module(path: str) -> str:
    """The name of the module in a file of src/."""
    return path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _tested(test: str) -> str:
    """The name of the module that a test file is named after."""
    return test.replace("tests/", "turret/", 1).replace("test_", "", 1).removesuffix(".py").replace("/", ".")


def _imported(path: Path) -> set[str]:
    """The names of all modules that a file may import: of `from a import b` both a and a.b."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update([node.module, *(f"{node.module}.{each.name}" for each in node.names)])
    return found


if __name__ == "__main__":
    main()
