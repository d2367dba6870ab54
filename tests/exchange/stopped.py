"""Exports and imports that are stopped: each round forks the command, stops it, and looks at what is there.

`stopped.py FOLDER VERB SIGNAL HOW FIRST LAST STEP`; VERB is one of `VERBS`, SIGNAL is TERM or KILL, HOW is

- `operations`: the signal comes at the n-th file operation, for n from FIRST to LAST or until the command comes through
- `moments`: the signal comes from outside, LAST times, at random moments of the time that the command takes
- `errors`: no signal; the n-th write or flush fails as of a broken disk (`failing_disk.py`); the command must say so

Prints how often the target was found in which state: `before`, `after`, `unloadable`. Fails at anything else, and where
the same command does not work again or `gc` leaves something.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import small_models
import torch
from exchange.foreign import LABELS, peft_folder
from failing_disk import fail_at, of_sqlite, what_failed

from turret.cli.main import run
from turret.process import stop_on_sigterm
from turret.store import Store
from turret.workspace import Workspace

EVENTS = ("open", "os.", "shutil.", "sqlite3.connect")
LOADED = {"adapter_config.json", "config.json"}
Content = dict[str, bytes] | None


@dataclass(frozen=True)
class Verb:
    """A command, and the form of the export that its target contains before; None: the target does not exist."""

    words: tuple[str, ...]
    holds: tuple[str, ...] | None = None
    target: str = "out"


VERBS = {
    "new": Verb(("export", "a@2"), None),
    "deep": Verb(("export", "a@2"), None, "deep/er/out"),
    "vllm": Verb(("export", "w", "--vllm"), None),
    "merged": Verb(("export", "a@2", "--merged"), None),
    "empty": Verb(("export", "a@2"), ()),
    "over": Verb(("export", "a@2", "--force"), ("a@1",)),
    "over-merged": Verb(("export", "a@2", "--force"), ("a@1", "--merged")),
    "merged-over": Verb(("export", "a@2", "--merged", "--force"), ("a@1",)),
    "import": Verb(("import",), None),
}


def content(folder: Path) -> Content:
    """The contents of the folder, without working folders of exports."""
    if not folder.exists():
        return None
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".turret-export-")}


class Place:
    """A store with a@1, a@2 and a LoRA on Llama, a PEFT folder to import, and the target of one command."""

    def __init__(self, folder: Path, verb: Verb) -> None:
        self.folder, self.verb = folder, verb
        self.store, self.out = folder / "store", folder / "room" / verb.target
        base = small_models.save_base("bert", folder / "bert")
        for number in (3, 4):
            source = peft_folder("bert", "classify", folder / f"peft{number}", r=number)
            Workspace(self.store).import_adapter(source, "a", base=str(base), labels=LABELS)
        if "--vllm" in verb.words:
            llama = small_models.save_base("llama", folder / "llama")
            Workspace(self.store).import_adapter(peft_folder("llama", "generate", folder / "w"), "w", base=str(llama))
        self.base = str(base)
        self.make_ready()
        self.before = content(self.out)
        assert self.carry_out() == 0
        self.after = content(self.out)

    def make_ready(self) -> None:
        shutil.rmtree(self.folder / "room", ignore_errors=True)
        (self.folder / "room").mkdir()
        if self.verb.holds is not None:
            self.out.mkdir()
        if self.verb.holds:
            (self.out / "notes.txt").write_text("mine")
            assert self.run("export", self.verb.holds[0], str(self.out), "--force", *self.verb.holds[1:]) == 0

    def carry_out(self) -> int:
        command, *rest = self.verb.words
        if command == "import":
            more = ("--name", "b", "--base", self.base, "--labels", ",".join(LABELS))
            return self.run("import", str(self.folder / "peft3"), *more)
        return self.run(command, rest[0], str(self.out), *rest[1:])

    def run(self, *words: str) -> int:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            status = run([*words, "--store", str(self.store)])
        assert status in (0, 1, 130), err.getvalue()
        assert "bug in turret" not in err.getvalue(), err.getvalue()
        return status

    def look(self, *, killed: bool, failed: bool = False) -> str:
        """The state of the target. Raises AssertionError if it is a bad state, or if files are left behind."""
        if not killed:
            assert self.left() == [], self.left()
        found = content(self.out)
        state = "before" if found == self.before else "after" if found == self.after else "unloadable"
        if state == "unloadable":
            assert killed or failed, found
            assert self.verb.holds is not None, found
            assert found is not None
            assert not LOADED & set(found), set(found)
            assert found.get("notes.txt") == (self.before or {}).get("notes.txt")
        status = self.carry_out()
        assert status == 0 or (state == "after" and "--force" not in self.verb.words), (state, status, self.left())
        assert content(self.out) == self.after
        self.collect()
        assert content(self.out) == self.after
        return state

    def left(self) -> list[Path]:
        """Working folders that stopped commands left behind."""
        room = list((self.folder / "room").rglob(".turret-export-*"))
        above = [] if self.out.exists() else list((self.folder / "room").iterdir())
        return [*(self.store / "scratch").glob("*"), *room, *above]

    def collect(self) -> None:
        """Run gc with all leftovers old enough to be removed."""
        for path in (*(self.store / "scratch").rglob("*"), *(self.folder / "room").rglob(".turret-export-*")):
            for each in (path, *path.rglob("*")):
                os.utime(each, (0, 0))
        assert self.run("gc") == 0
        assert self.left() == [], self.left()


def at_operation(number: int, sent: signal.Signals) -> None:
    """Send this process the signal at its n-th file operation from now."""
    seen = 0

    def hook(event: str, _arguments: Any) -> None:
        nonlocal seen
        if event.startswith(EVENTS):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), sent)

    sys.addaudithook(hook)


def child(place: Place, arm: Callable[[], None]) -> int:
    process = os.fork()
    if process == 0:
        status = 99
        try:
            stop_on_sigterm()
            arm()
            status = place.carry_out()
        except KeyboardInterrupt as error:  # before the command or after it, as in a program that runs it
            inside = any(frame.f_code is run.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))
            status = 99 if inside else 130
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    return process


def rounds(place: Place, sent: signal.Signals, how: str, first: int, last: int, step: int) -> Iterator[str]:
    draw = random.Random(first)
    place.make_ready()
    started = time.perf_counter()
    os.waitpid(child(place, lambda: None), 0)
    usual, told = time.perf_counter() - started, place.folder.parent / "failed"
    for number in range(first, last + 1, step):
        place.make_ready()
        if how == "errors":
            process = child(place, lambda number=number: fail_at(number, place.folder, told))  # type: ignore[misc]
        elif how == "operations":
            process = child(place, lambda number=number: at_operation(number, sent))  # type: ignore[misc]
        else:
            process = child(place, lambda: None)
            time.sleep(draw.uniform(0, 1.1 * usual))
            os.kill(process, sent)
        status = os.waitpid(process, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or os.WEXITSTATUS(status) in ((0, 1) if how == "errors" else (0, 130)), status
        failed = what_failed(told)
        said = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 1
        assert failed is None or said or of_sqlite(failed), f"nobody heard that {failed} failed"
        yield place.look(killed=killed, failed=failed is not None)
        if failed is None and how == "errors":
            return
        if how == "operations" and os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return


def main(folder: str, verb: str, sent: str, how: str, *numbers: str) -> None:
    torch.set_num_threads(1)
    place = Place(Path(folder), VERBS[verb])
    first, last, step = map(int, numbers)
    print(dict(Counter(rounds(place, signal.Signals[f"SIG{sent}"], how, first, last, step))), flush=True)
    assert Store(place.store).verify().ok


if __name__ == "__main__":
    main(*sys.argv[1:])
