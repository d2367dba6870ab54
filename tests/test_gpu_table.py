"""The table of what fits on which GPU is what the plan's own code computes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "howto" / "gpu.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_table_is_what_the_plan_computes() -> None:
    command = [sys.executable, str(ROOT / "release" / "make_gpu_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_has_a_row_for_each_base_and_says_what_was_run() -> None:
    (table,) = re.findall(r"<!-- computed: what-fits -->\n(.*?)<!-- end of computed -->", PAGE, re.DOTALL)
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) > 20
    assert any("7B" in row and "LoRA" in row and "nf4" in row and "| 8 GB |" in row for row in rows)
    assert "**On a real GPU none of this was run yet.**" in PAGE
