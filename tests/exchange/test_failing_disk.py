"""If the disk fails, an export leaves its target unchanged or not loadable, and the error names the disk."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import failing_disk
import pytest

from turret.disk import describe_error


@failing_disk.needed
@pytest.mark.slow
@pytest.mark.parametrize("verb", ["new", "over", "merged", "import"])
def test_no_write_or_flush_of_an_export_or_import_fails_unheard(verb: str, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    script = Path(__file__).with_name("stopped.py")
    command = [sys.executable, str(script), str(tmp_path / "place"), verb, "TERM", "errors", "1", "500", "1"]
    found = subprocess.run(
        command, capture_output=True, text=True, env=failing_disk.environment(tmp_path), timeout=1800, check=False
    )
    assert found.returncode == 0, found.stderr
    ended = ast.literal_eval(found.stdout.strip().splitlines()[-1])
    assert ended["before"] > 5 or verb == "import"
    assert set(ended) <= ({"before", "after", "unloadable"} if verb == "over" else {"before", "after"})


def test_the_disk_that_fails_is_named_and_another_error_is_said_as_it_is(tmp_path: Path) -> None:
    """Also if a library such as safetensors reports it in its own words."""
    fails = f"Input/output error: {tmp_path}: the disk at /"
    assert describe_error(OSError(5, "Input/output error"), tmp_path).startswith(fails)
    assert describe_error(RuntimeError("I/O error: Input/output error (os error 5)"), tmp_path).startswith(fails)
    assert describe_error(OSError(13, "Permission denied", "a"), tmp_path) == "Permission denied: a"
    assert describe_error(OSError(28, "No space left on device"), tmp_path) == f"No space left on device: {tmp_path}"
