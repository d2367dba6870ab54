"""Working folders of imports and exports. The store knows each of them, so `gc` finds it after a kill.

Under the store's root on this machine:

- `scratch/<32 hex digits>/`: the working folder of an import
- `scratch/<32 hex digits>.json`: a note about a running export, whose working folder is `.turret-export-<same digits>`.
  That folder is next to the target of the export or inside it, because it must be on the same disk. The note is written
  before the folder is created, and removed after the folder is. A store that cannot be written gets no note.

The working folder of an export has `files/`, which become the target, and `placing`, a JSON list of their names, once
they are moved one by one into an existing folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from turret.disk import (
    FAILING,
    PRIVATE,
    clock_of,
    create,
    describe_error,
    everything_below,
    exclusive_lock,
    file_bytes,
    flush,
    make_below,
    make_folder,
    sync,
)
from turret.errors import StoreError
from turret.json_types import Plain
from turret.process import delay_signals

WHY = "leftover of a killed import or export"
OLD = 3600  # seconds without a change, after which the process is considered dead
BESIDE = ".turret-export-"
LOADED = ("adapter_config.json", "config.json")  # libraries load a folder only if it has one of these
_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)


@dataclass(frozen=True)
class Removed:
    """One file or folder that a gc removed, or would remove."""

    path: str  # under the root of the files; for a run, under the store's folder on this machine
    bytes: int
    why: str


@contextmanager
def disk_errors(failed: str, where: Path, remedy: str) -> Iterator[None]:
    """Turn an error of the disk, while files are written, into a StoreError.

    Args:
        failed: what could not be done, as the error begins.
        where: the folder of the files.
        remedy: what to do, as the error ends.
    """
    from safetensors import SafetensorError  # loads no numpy or torch

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{failed}: {describe_error(error, where)}: {remedy}") from error


@contextmanager
def folder(root: Path) -> Iterator[Path]:
    """A working folder in the store, removed afterwards, and with it the store's root if this created it.

    Raises:
        StoreError: it cannot be made, or a file in it cannot be written.
    """
    created = not root.exists()
    own = root / "scratch" / uuid.uuid4().hex
    try:
        with delay_signals():
            make_below(root, root / "scratch")
            make_folder(own, PRIVATE)
        yield own
    except OSError as error:
        names = [os.fsdecode(each) for each in (error.filename, error.filename2) if isinstance(each, str | bytes)]
        if own.exists() and not any(Path(name).is_relative_to(own) for name in names):
            raise
        raise StoreError(
            f"store {root} cannot be written: {describe_error(error, own)}: make it writable, free some space, or use "
            "another --store"
        ) from error
    finally:
        with delay_signals():
            shutil.rmtree(own, ignore_errors=True)  # gc removes what is left
            if created:
                _remove_empty([own.parent, root])


class WorkingFolder:
    """The working folder of an export, for the duration of a `with` block.

    Afterwards it is removed, with the empty folders that were created for it. `left` is True if that failed.
    """

    def __init__(self, root: Path, target: Path) -> None:
        number = uuid.uuid4().hex
        where = target if target.exists() else target.parent  # an existing folder may be a mount point
        self.folder = where / f"{BESIDE}{number}"
        self.files = self.folder / "files"
        self.left = False
        self._root, self._note = root, root / "scratch" / f"{number}.json"
        self._created = [each for each in (where, *where.parents) if not each.exists()]

    def __enter__(self) -> WorkingFolder:
        try:
            content = {"folder": str(self.folder), "made": [str(each) for each in self._created]}
            with delay_signals():
                _write_note(self._root, self._note, content)
                make_folder(self.folder, PRIVATE)
                make_folder(self.files)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:  # object: the exception is not used
        with delay_signals():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.left = self.folder.exists()
            if not self.left:
                _remove_empty(self._created)
                with suppress(OSError):  # gc removes a note without a folder
                    self._note.unlink(missing_ok=True)

    def begin_placing(self, names: list[str]) -> None:
        """Record the files that are about to be moved, one by one, into an existing folder."""
        _write(self.folder / "placing", names)


def unfinished(working_folder: Path) -> bool:
    """Whether the export with this working folder ended while it moved its files, before the last one."""
    return (working_folder / "placing").exists() and any((working_folder / "files").glob("*"))


def leftovers(root: Path, *, dry_run: bool) -> Iterator[Removed]:
    """Remove, or only list, folders of killed imports and exports. Needs no database."""
    for path in sorted((root / "scratch").glob("*")):
        with suppress(PermissionError, FileNotFoundError):  # it belongs to another user, or is gone already
            if _ID.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                yield from _of_import(path, root, dry_run)
            elif path.suffix == ".json" and _ID.fullmatch(path.stem):
                yield from _of_export(path, dry_run)


def _of_import(own: Path, root: Path, dry_run: bool) -> Iterator[Removed]:
    changed, size = _state(own)
    if clock_of(own.parent) - changed > OLD:
        if not dry_run:
            shutil.rmtree(own)
        yield Removed(own.relative_to(root).as_posix(), size, WHY)


def _of_export(note: Path, dry_run: bool) -> Iterator[Removed]:
    own, created = _read_note(note)
    changed, size = _state(own) if own else (0.0, 0)
    if clock_of(note.parent) - note.stat().st_mtime <= OLD:
        return
    if own is not None and clock_of(own.parent) - changed <= OLD:
        return
    if own is not None and not dry_run:
        with exclusive_lock(own.parent) as locked:
            if not locked:
                return
            if unfinished(own):
                _remove_placed(own)
            shutil.rmtree(own)
    if not dry_run:
        _remove_empty(created)
        note.unlink(missing_ok=True)
    if own is not None:
        yield Removed(str(own), size, WHY)


def _remove_placed(own: Path) -> None:
    """Remove the files that a broken export has moved into an existing folder that nothing can load."""
    target = own.parent
    if any((target / name).exists() for name in LOADED):  # another export completed in the meantime
        return
    with suppress(ValueError, TypeError):
        for name in json.loads((own / "placing").read_text(encoding="utf-8")):
            if Path(name).name == name and not (own / "files" / name).exists():
                (target / name).unlink(missing_ok=True)


def _read_note(note: Path) -> tuple[Path | None, list[Path]]:
    """The working folder of the export if it exists, and the folders that were created above it."""
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        own, created = Path(content["folder"]), [Path(each) for each in content["made"]]
    except (ValueError, KeyError, TypeError):
        return None, []
    ours = own.name == f"{BESIDE}{note.stem}" and own.is_absolute() and own.is_dir() and not own.is_symlink()
    if not ours or (os.name != "nt" and own.stat().st_uid != os.geteuid()):
        return None, []
    return own, [each for each in created if each in own.parents]


def _write_note(root: Path, note: Path, content: Mapping[str, Plain]) -> None:
    """Write the note. If the store cannot be written or is full, the export continues without one."""
    try:
        make_below(root, root / "scratch")
        _write(note, content)
        sync(note.parent)
    except OSError as error:
        if error.errno in FAILING:
            raise


def _write(path: Path, content: Plain) -> None:
    with create(path) as file:
        file.write(json.dumps(content).encode())
        flush(file)


def _remove_empty(folders: list[Path]) -> None:
    for each in folders:
        with suppress(OSError):  # it is not empty
            each.rmdir()


def _state(folder: Path) -> tuple[float, int]:
    """Time of the last change, and bytes, of a folder and everything in it."""
    found = [folder.lstat(), *everything_below(folder)]
    return max(each.st_mtime for each in found), file_bytes(found)
