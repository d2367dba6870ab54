"""Run a training in a process of its own: pass its progress on, and stop it when asked.

The child prints its progress on stdout, one JSON object per line. Its environment has none of torchrun's variables. It
finds the store in TURRET_STORE, because a URL may have a password and arguments are visible. Its stdin closes when the
parent process ends, which tells it to stop; `stop_with_parent` watches that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from turret.errors import Interrupted
from turret.location import Location
from turret.process import environment
from turret.workspace.progress import Say

STOPPED = "stopped; run the same command again to continue"
POLL_SECONDS = 0.2


def never() -> bool:
    """For children that nothing stops but their parent."""
    return False


def run_child(
    module: str, argument: str, errors: Path, say: Say, store: Location, stop: Callable[[], bool] = never
) -> str | None:
    """Run `python -P -m MODULE ARGUMENT` until it ends.

    Args:
        errors: the file for its stderr.
        stop: asked a few times a second; once it is true, the child is told to write a checkpoint and end.

    Returns:
        Why the process failed; None if it succeeded or was told to stop.

    Raises:
        Interrupted: the user stopped it.
    """
    command, asked, ended = [sys.executable, "-P", "-m", module, argument], threading.Event(), threading.Event()
    variables, pipe = environment(store=True) | {"TURRET_STORE": store.given}, subprocess.PIPE
    with (
        errors.open("w+", encoding="utf-8") as written,
        subprocess.Popen(
            command, env=variables, stdin=pipe, stdout=pipe, stderr=written, text=True, errors="replace",
            start_new_session=True,
        ) as child,
    ):  # fmt: skip

        def watch() -> None:
            while not ended.wait(POLL_SECONDS):
                if stop():
                    asked.set()
                    child.terminate()  # it finishes the step and writes a checkpoint
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            for line in _progress(child.stdout):
                say(line)
            status = child.wait()
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise Interrupted(STOPPED) from None
        finally:
            ended.set()
            watcher.join()
            child.kill()
        written.seek(0)
        lines: Sequence[str] = [line.strip() for line in written if line.strip()]
    if status == 0 or asked.is_set():
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


# --- in the child -----------------------------------------------------------------------------------------------------


def say_to_parent(line: str) -> None:
    """Print a line of progress for the parent process."""
    print(json.dumps({"stage": line}), flush=True)


def stop_with_parent() -> None:
    """From now on, ask this process to stop once its parent has ended, which closes our stdin."""
    threading.Thread(target=_stop_at_end_of_stdin, daemon=True).start()


def _stop_at_end_of_stdin() -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin.read: at exit Python would wait for its lock and abort
        pass
    os.kill(os.getpid(), signal.SIGTERM)
