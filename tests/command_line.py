"""Runs a command line inside the tests' process."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout

from turret.cli.main import run


def typed(*words: str) -> tuple[int, str, str]:
    """The exit status of `turret WORDS`, and what it wrote to stdout and to stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run(list(words))
    return status, out.getvalue(), err.getvalue()
