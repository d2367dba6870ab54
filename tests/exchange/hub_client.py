"""A process that runs commands of `turret` against a stand-in Hub: huggingface_hub reads HF_ENDPOINT when it is loaded.

The process is started once and runs many commands, because loading torch takes most of a command's time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Client:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, *arguments: str, token: str | None) -> Ran:
        """Run one command. token: what HF_TOKEN holds; None: nobody has logged in."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"arguments": arguments, "token": token}) + "\n")
        self._process.stdin.flush()
        return Ran(**json.loads(self._process.stdout.readline()))


@contextmanager
def client(endpoint: str, home: Path) -> Iterator[Client]:
    """home: of huggingface_hub's cache."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, **settings}
    environment.pop("HF_TOKEN", None)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__))],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Client(process)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()


def main() -> None:
    from turret.cli.main import run
    from turret.cli.output import console

    answers = sys.stdout
    for line in sys.stdin:
        asked = json.loads(line)
        os.environ.pop("HF_TOKEN", None)
        if asked["token"] is not None:
            os.environ["HF_TOKEN"] = asked["token"]
        out, err = io.StringIO(), io.StringIO()
        console.cache_clear()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run(asked["arguments"])
        answers.write(json.dumps({"status": status, "out": out.getvalue(), "err": err.getvalue()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
