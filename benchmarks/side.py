"""A process that takes turns with others: it works when it is told to, and sleeps in a read while others work.

`Side` is such a process as its driver sees it; `take_turns` is what runs in it. Only the standard library is imported:
rivals run in environments of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

Way = Callable[[Any], Any]  # rows of token ids -> their answers, as lists of numbers


class Side:
    """One side's process, as the others see it."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.facts: dict[str, Any] = {}  # what it said when it was ready
        self._log = log
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, **environment},
            )  # fmt: skip

    def tell(self, words: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(words)}\n")
        self._process.stdin.flush()

    def hear(self, key: str) -> Any:
        """The next answer, which is under that key. Raises RuntimeError with the process's last words if it ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            said = self._log.read_text(encoding="utf-8").strip().splitlines()
            raise RuntimeError(said[-1] if said else f"ended with {self._process.returncode}")
        return json.loads(line)[key]

    def end(self) -> None:
        """Let the process end by itself, or kill it after a minute."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def answers_alone() -> TextIO:
    """The standard output for answers alone: what a library prints goes to the standard error."""
    says = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return says


def take_turns(ways: Mapping[str, Way], rows: Mapping[str, Any], says: TextIO, facts: Mapping[str, Any]) -> None:
    """Say the facts and ways, then answer one set of rows in one way at a time, as lines of the standard input tell.

    A line is {"way", "rows"}: the answer is their seconds; with "save" the answers are written to that file too.
    """

    def say(**words: Any) -> None:
        says.write(json.dumps(words) + "\n")
        says.flush()

    say(ready={**facts, "ways": list(ways)})
    for line in sys.stdin:
        told = json.loads(line)
        work, given = ways[told["way"]], rows[told["rows"]]
        began = time.perf_counter()
        answers = work(given)
        seconds = time.perf_counter() - began
        if "save" in told:
            Path(told["save"]).write_text(json.dumps(answers), encoding="utf-8")
        say(seconds=round(seconds, 5))
