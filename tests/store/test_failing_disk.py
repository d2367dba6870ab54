"""If a write or flush fails with EIO, the command fails with one line and is not acknowledged."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import failing_disk
import pytest

WRITER = Path(__file__).with_name("writer.py")


@failing_disk.needed
@pytest.mark.slow
@pytest.mark.parametrize("verbs", ["begin", "put", "promote,rollback,gate,replay,delete,gc,migrate"])
def test_no_write_or_flush_of_a_verb_fails_unheard(verbs: str, tmp_path: Path) -> None:
    command = [sys.executable, str(WRITER), str(tmp_path / "store"), "errors", verbs, "1", "300"]
    found = subprocess.run(
        command, capture_output=True, text=True, env=failing_disk.environment(tmp_path), timeout=600, check=False
    )
    assert found.returncode == 0, found.stderr
    ended = ast.literal_eval(found.stdout.splitlines()[-1])
    assert ended["said"] > 3 * len(verbs.split(","))
    assert ended["done"] >= len(verbs.split(","))
    for line in found.stderr.splitlines():
        assert re.search(failing_disk.SAYS, line), line
        assert len(line) < 500
        assert "disk" in line
