"""The code blocks of the documentation, and how they are run.

A block is marked by the comment above it:

- `<!-- run -->`: run in order, in one folder of the page: all of a python block, the `turret` lines of a console block
- `<!-- run: background -->`: a console block whose one command runs until the end of the page, such as `turret serve`
- `<!-- not run: REASON -->`: a fragment

A block with a title, such as `title="src/turret/server/counts.py"`, is a file or a change of one.
"""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FENCED = re.compile(
    r"^(?:<!-- (?P<mark>(?:not )?run[^\n]*?) -->\n+)?```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<content>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SERVER = "127.0.0.1:8000"  # where the pages say that a server answers


@dataclass(frozen=True)
class Block:
    language: str
    content: str
    mark: str  # run, run: background, not run: …; empty
    title: str


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    """Every fenced block, in order."""
    return [
        Block(each["language"], each["content"], each["mark"] or "", each["title"] or "")
        for each in FENCED.finditer(text)
    ]


def commands(content: str) -> list[list[str]]:
    """The arguments of each line that begins with `turret`."""
    lines = content.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("turret ")]


def calls(block: Block) -> Iterator[list[str]]:
    """A block as arguments of the Python that runs the tests."""
    if block.language == "python":
        yield ["-c", block.content]
    else:
        assert block.language == "console", f"a block to be run is python or console, not {block.language}"
        found = commands(block.content)
        assert found, "a console block to be run has a line that begins with turret"
        yield from (["-m", "turret", *arguments] for arguments in found)


def run(arguments: list[str], folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"


def run_page(text: str, folder: Path) -> None:
    """Run the marked blocks of a page, in order. A server gets a free port."""
    port = free_port()
    marked = [each for each in blocks(text) if each.mark.startswith("run")]
    assert marked, "the page has no block to run"
    with ExitStack() as running:
        for block in marked:
            moved = Block(block.language, block.content.replace(SERVER, f"127.0.0.1:{port}"), block.mark, block.title)
            if block.mark == "run: background":
                (arguments,) = calls(moved)
                running.enter_context(server([*arguments, "--port", str(port)], folder, port))
            else:
                for arguments in calls(moved):
                    run(arguments, folder)


@contextmanager
def server(arguments: list[str], folder: Path, port: int) -> Iterator[str]:
    """`turret serve` with these arguments, from its first answer to the end of the block. Gives its address."""
    url, log = f"http://127.0.0.1:{port}", folder / "server.log"
    with log.open("w") as written:
        process = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdout=written, stderr=written)
        try:
            wait_until_ready(url, process)
            yield url
        except TimeoutError:
            raise AssertionError(log.read_text()) from None
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Raises TimeoutError if the server ends, or does not answer in time."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
