"""If the disk fills during an export or import, the error is one line, and with space the same command works."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exchange.foreign import LABELS, contents
from small_disk import mounted_disk

from turret.errors import StoreError
from turret.workspace import Workspace


def fill(disk: Path, room: int) -> Path:
    """Fill the disk except for so many bytes."""
    filler = disk / "filler"
    filler.write_bytes(b"")
    filler.write_bytes(bytes(max(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - room, 0)))
    return filler


def complaint(verb: Callable[[], object]) -> str | None:
    """The error line of a call; None if it succeeded."""
    try:
        verb()
    except StoreError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("form", "there", "most", "step"),
    [
        ("peft", "nothing", 40_960, 4096),
        ("peft", "an export", 40_960, 4096),
        pytest.param("merged", "nothing", 400_000, 32_768, marks=pytest.mark.slow),
        pytest.param("merged", "an export", 400_000, 32_768, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_at_any_byte_of_an_export_leaves_its_target_as_it_was(
    form: Any, there: str, most: int, step: int, workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    with mounted_disk(tmp_path / "disk", "size=4m") as disk:
        out, said = disk / "out", 0
        if there == "an export":
            workspace.export("writer", out)
        before = contents(out) if out.exists() else None
        for room in range(0, most, step):
            filler = fill(disk, room)
            line = complaint(lambda: workspace.export("sentiment", out, form=form, force=True))
            if line is None:
                break
            said += 1
            assert re.search("No space left on device: .*: free some space", line), line
            assert line.endswith("the folder does not exist" if before is None else "the folder is unchanged")
            assert (contents(out) if out.exists() else None) == before
            assert {path.name for path in disk.iterdir()} <= {"filler", "out"}
            filler.unlink()
        assert said > 1
        fill(disk, 0).unlink()
        workspace.export("sentiment", out, form=form, force=True)
        workspace.export("sentiment", tmp_path / "whole", form=form)
        assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_fills_at_any_byte_of_an_import_stores_nothing_or_all(
    foreign: Path, bert: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    with mounted_disk(tmp_path / "disk", "size=4m") as disk:
        workspace, said = Workspace(disk / "store"), 0
        workspace.import_adapter(foreign, "first", base=str(bert), labels=LABELS[::-1])
        for room in range(0, 400_000, 12_288):
            filler = fill(disk, room)
            line = complaint(lambda: workspace.import_adapter(foreign, "x", base=str(bert), labels=LABELS))
            filler.unlink()
            if line is None:
                break
            said += 1
            assert re.search("No space left on device|is full", line), line
            assert workspace.store.list("x") == []
            assert workspace.store.verify().ok
            assert list((workspace.store.root / "scratch").iterdir()) == []
        assert said > 1
        assert [str(each) for each in workspace.store.list("x")] == ["x@1"]
