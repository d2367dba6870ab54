"""Shell completion: `turret --install-completion`, and the completions at Tab."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from turret.cli.main import run


def completed(line: str) -> list[str]:
    """The completions of bash for the last word of `line`."""
    asked = {"_TURRET_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    command = [sys.executable, "-m", "turret"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | asked, check=False)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.slow
def test_tab_completes_commands_subcommands_and_options() -> None:
    assert completed("turret exp") == ["export", "experiment"]
    assert completed("turret token re") == ["revoke"]
    assert completed("turret predict --ba") == ["--bare"]
    assert completed("turret nothing-like-it") == []


def test_the_script_for_a_shell_can_be_shown_and_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    said = capsys.readouterr().out
    assert "--install-completion" in said
    assert "--show-completion" in said
