"""Start the process of one cell, pass its progress on, and stop it when the time budget ends.

Its environment has none of torchrun's variables. Its stdin closes when the parent process ends, which tells it to stop.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from turret.errors import Interrupted
from turret.process import environment
from turret.workspace.progress import Say

STOPPED = "stopped; run the same command again to continue"


def run_cell(here: Path, left: float | None, say: Say) -> str | None:
    """Run the cell in a folder until it ends or the budget ends.

    Args:
        here: the folder, with its request.json.
        left: seconds of the budget; None: no limit.

    Returns:
        Why the process failed; None if it succeeded or the budget ended.

    Raises:
        Interrupted: the user stopped it.
    """
    command = [sys.executable, "-P", "-m", "turret.workspace.comparing.cell_worker", str(here.absolute())]
    out_of_time = threading.Event()
    with (
        (here / "stderr.txt").open("w+", encoding="utf-8") as errors,
        subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, errors="replace", start_new_session=True,
        ) as child,
    ):  # fmt: skip

        def stop() -> None:
            out_of_time.set()
            child.terminate()  # it finishes the step and writes a checkpoint

        timer = threading.Timer(threading.TIMEOUT_MAX if left is None else max(0.0, left), stop)
        timer.daemon = True
        timer.start()
        try:
            for line in _progress(child.stdout):
                say(line)
            status = child.wait()
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise Interrupted(STOPPED) from None
        finally:
            timer.cancel()
            child.kill()
        errors.seek(0)
        lines: Sequence[str] = [line.strip() for line in errors if line.strip()]
    if status == 0 or out_of_time.is_set():
        return None
    if status == Interrupted.exit_status:
        raise Interrupted(STOPPED)
    if hasattr(signal, "SIGKILL") and status == -signal.SIGKILL:
        return (
            "its process was killed, most likely because the machine ran out of memory: lower train.micro_batch_tokens"
        )
    return lines[-1] if lines else f"its process ended with status {status}"


def _progress(lines: Iterable[str] | None) -> Iterator[str]:
    """The progress lines among the process's output, until it closes its stdout."""
    for line in lines or ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("stage"), str):
            yield value["stage"]
