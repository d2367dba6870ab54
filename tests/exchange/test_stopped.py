"""If an export or import is stopped at any moment, its target is unchanged, complete, or not loadable."""

from __future__ import annotations

import ast
import errno
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import small_models
from exchange.foreign import CONFIG, MANIFEST, WEIGHTS, contents
from exchange.stopped import at_operation

from turret.errors import BundleError, StoreError
from turret.store import scratch
from turret.workspace import Workspace

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
STOPPED = Path(__file__).with_name("stopped.py")
NEW = ("new", "deep", "vllm", "merged")
THERE = ("empty", "over", "over-merged", "merged-over")


def stopped(folder: Path, *arguments: object) -> Counter[str]:
    """How often the target was in each state."""
    command = [sys.executable, str(STOPPED), str(folder), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert found.returncode == 0, found.stderr
    return Counter(ast.literal_eval(found.stdout.strip().splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("verb", [*NEW, *THERE])
def test_an_export_killed_at_file_operations_is_as_before_or_whole_or_refused_by_all(verb: str, tmp_path: Path) -> None:
    found = stopped(tmp_path, verb, "KILL", "operations", 1, 1500, 3 if verb in ("new", "over") else 7)
    assert found["before"]
    assert found["after"]
    assert set(found) <= ({"before", "after"} if verb in NEW else {"before", "after", "unloadable"})
    assert found["unloadable"] or verb != "over"  # control: the moment between two exports is among them


@pytest.mark.slow
@pytest.mark.parametrize("verb", [*NEW, *THERE, "import"])
def test_sigterm_leaves_nothing_behind_and_never_half_of_it(verb: str, tmp_path: Path) -> None:
    found = stopped(tmp_path, verb, "TERM", "operations", 1, 1500, 7)
    assert set(found) <= {"before", "after"}
    assert found["before"] or verb == "import"


@pytest.mark.slow
def test_what_a_killed_import_leaves_is_gone_after_gc(tmp_path: Path) -> None:
    assert stopped(tmp_path, "import", "KILL", "operations", 1, 1500, 11).total() > 5


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["TERM", "KILL"])
@pytest.mark.parametrize("verb", ["over", "merged-over", "import"])
def test_stopped_from_outside_at_random_moments(verb: str, sent: str, tmp_path: Path) -> None:
    assert stopped(tmp_path, verb, sent, "moments", 1, 12, 1).total() == 12


def sigterm_at(number: int, work: Callable[[], None]) -> int:
    """Run `work` in a process that gets SIGTERM at its n-th file operation. Returns its status; 130: it stopped."""
    process = os.fork()
    if process == 0:
        status = 99
        try:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            at_operation(number, signal.SIGTERM)
            work()
            status = 0
        except KeyboardInterrupt:
            status = 130
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False])
def test_sigterm_at_any_operation_of_a_scratch_folder_leaves_nothing(there: bool, tmp_path: Path) -> None:
    """Also while the folder is being made, or removed."""
    root, room = tmp_path / "store", tmp_path / "room"
    if there:
        (root / "scratch").mkdir(parents=True)

    def of_import() -> None:
        with scratch.folder(root) as own:
            (own / "weights").write_bytes(b"1")

    def of_export() -> None:
        with scratch.WorkingFolder(root, room / "deep" / "out") as beside:
            (beside.files / "weights").write_bytes(b"1")

    for work in (of_import, of_export):
        number, found = 1, [130]
        while found[-1] == 130:
            found.append(sigterm_at(number, work))
            assert [*(root / "scratch").glob("*")] == [], number
            assert not room.exists(), number
            number += 1
        assert found[-1] == 0
        assert number > 10  # control: signals came while it worked


def test_a_scratch_folder_whose_making_fails_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails after the rename, before the parent folder is flushed."""
    root = tmp_path / "store"
    (root / "scratch").mkdir(parents=True)

    def fails(path: Path) -> None:
        if list(root.glob("scratch/*")):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("turret.disk.sync", fails)
    with pytest.raises(OSError, match="Input/output"), scratch.folder(root):
        pass
    assert list(root.glob("scratch/*")) == []


def killed_at_rename(workspace: Workspace, out: Path, number: int) -> bool:
    """Export into `out`, killed at the n-th file that is moved into it. Returns False if it was not killed."""
    process = os.fork()
    if process == 0:
        seen = 0

        def hook(event: str, arguments: Any) -> None:
            nonlocal seen
            if event == "os.rename" and str(out) in str(arguments[1]):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        workspace.export("prefix", out, force=True)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def test_peft_and_turret_refuse_what_an_export_killed_between_two_files_leaves(
    workspace: Workspace, tmp_path: Path
) -> None:
    workspace.export("prefix", tmp_path / "whole")
    out, number = tmp_path / "out", 1
    workspace.export("writer", out)
    while killed_at_rename(workspace, out, number):
        found = contents_of_files(out)
        assert CONFIG not in found
        with pytest.raises(Exception, match="adapter_config"):
            peft.PeftModel.from_pretrained(small_models.build("llama", "generate"), str(out), local_files_only=True)
        with pytest.raises(BundleError, match=f"holds no {CONFIG}"):
            workspace.import_adapter(out, "x")
        number += 1
    assert number == 7  # weights, manifest, card, two files of the tokenizer, configuration
    assert contents_of_files(out) == contents(tmp_path / "whole")


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_an_empty_folder_that_an_export_broke_off_in_is_filled_by_the_same_command(
    workspace: Workspace, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert killed_at_rename(workspace, out, 3)
    assert {WEIGHTS, MANIFEST, "README.md"} & set(contents_of_files(out))
    workspace.export("prefix", out)
    assert CONFIG in contents_of_files(out)
    with pytest.raises(StoreError, match="is not empty"):
        workspace.export("prefix", out)


def test_gc_takes_back_what_a_killed_export_moved_and_leaves_an_export_at_work_alone(
    workspace: Workspace, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert killed_at_rename(workspace, out, 3)
    (beside,) = out.glob(".turret-export-*")
    before = set(out.iterdir())
    assert not [each for each in workspace.store.gc().removed if "export" in each.why]  # it may be at work
    assert set(out.iterdir()) == before
    note = workspace.store.root / "scratch" / f"{beside.name.removeprefix('.turret-export-')}.json"
    for path in (note, beside, *beside.rglob("*")):
        os.utime(path, (0, 0))
    dry = workspace.store.gc(dry_run=True).removed
    assert [each.path for each in dry if "export" in each.why] == [str(beside)]
    assert set(out.iterdir()) == before
    assert str(beside) in [each.path for each in workspace.store.gc().removed]
    assert {path.name for path in out.iterdir()} == {"notes.txt"}
    assert not note.exists()


def test_a_note_that_names_a_folder_of_another_name_removes_nothing(workspace: Workspace, tmp_path: Path) -> None:
    """A store can come from another user."""
    (tmp_path / "mine").mkdir()
    note = workspace.store.root / "scratch" / f"{'ab' * 16}.json"
    for text in (f'{{"folder": "{tmp_path / "mine"}", "made": ["{tmp_path / "mine"}"]}}', "[]", "{", '{"folder": 1}'):
        note.write_text(text)
        os.utime(note, (0, 0))
        workspace.store.gc()
        assert (tmp_path / "mine").is_dir()
        assert not note.exists()


def test_files_follow_the_umask(workspace: Workspace, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for form in ("peft", "merged"):
            workspace.export("sentiment", tmp_path / form, form=form)  # type: ignore[arg-type]
            assert oct((tmp_path / form).stat().st_mode & 0o777) == "0o750"
            assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / form).iterdir()} == {"0o640"}
    finally:
        os.umask(before)
