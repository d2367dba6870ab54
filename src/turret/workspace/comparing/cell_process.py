"""The process of a cell, seen from the one that starts it: begun, heard, and stopped in time. Knows no torch.

It sees a clean environment, so that nothing of torchrun's reaches it, and a stdin whose end tells it that we are gone.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from turret.errors import Interrupted
from turret.process import environment

Say = Callable[[str], None]
STOPPED = "stopped; the same command goes on with what is missing"


def carried_out(here: Path, left: float | None, say: Say) -> str | None:
    """Run the cell in a folder to its end or the budget's; returns what is known of its end where that was neither.

    left: seconds of the budget. Raises Interrupted where the user stopped it.
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
            child.terminate()  # the step is finished and a checkpoint written

        timer = threading.Timer(threading.TIMEOUT_MAX if left is None else max(0.0, left), stop)
        timer.daemon = True
        timer.start()
        try:
            for words in _said(child.stdout):
                say(words)
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


def _said(lines: Iterable[str] | None) -> Iterator[str]:
    """The words of each line, until the process closes its end."""
    for line in lines or ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("stage"), str):
            yield value["stage"]
