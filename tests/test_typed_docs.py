"""The Python in README, docs and examples passes mypy strict as a user would run it: against the installed package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "tutorials").glob("*.md")),
    ROOT / "docs" / "howto" / "experiment-traffic.md",
    ROOT / "docs" / "howto" / "own-loop.md",
    ROOT / "docs" / "howto" / "write-programs.md",
)


def checked(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(folder / "cache"), *options, "."]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_examples_pass_strict_type_checks(tmp_path: Path) -> None:
    for page in PAGES:
        examples = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        assert examples
        for number, example in enumerate(examples):
            (tmp_path / f"{page.stem.lower()}_{number}.py").write_text(example, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text("[mypy-openpyxl.*]\nignore_missing_imports = true\n")  # it has no types
    found = checked(tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    (tmp_path / "control.py").write_text("import turret\n\nturret.Recipe(base=1, data={})\n", encoding="utf-8")
    assert 'control.py:3: error: Argument "base" to "Recipe" has incompatible type "int"' in checked(tmp_path).stdout


@pytest.mark.slow
def test_programs_pass_strict_type_checks(tmp_path: Path) -> None:
    for program in (ROOT / "examples").glob("*.py"):
        shutil.copy(program, tmp_path)
    found = checked(tmp_path, "--allow-untyped-calls")  # torch has no types for `backward` and `eval`
    assert found.returncode == 0, found.stdout + found.stderr
