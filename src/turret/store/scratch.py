"""Folders that a verb fills and then moves or removes, each known to the store, so that `gc` finds it after a kill.

Under the store's root on this machine:

- `scratch/<32 hex digits>/`: what an import copies and looks at
- `scratch/<32 hex digits>.json`: a note that an export is at work, with its folder `.turret-export-<the same digits>`.
  That one is next to the export's target, or in it, because it must be on the same disk. The note is written before the
  folder is made, and removed after the folder is. A store that cannot be written keeps no note.

In the folder of an export: `files/`, which become the target, and `placing`, a JSON list of their names, once they are
being moved one by one into a folder that was there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from turret.disk import FAILING, PRIVATE, create, exclusive_lock, flush, make_folder, permissions, sync
from turret.interrupt import uninterrupted

WHY = "leftover of a killed import or export"
OLD = 3600  # seconds without a change, after which its process is taken for dead
BESIDE = ".turret-export-"
LOADED = ("adapter_config.json", "config.json")  # without one of these nothing loads a folder
_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)


@contextmanager
def folder(root: Path) -> Iterator[Path]:
    """A folder in the store that is gone afterwards, and with it the store's own where this made it."""
    made = not root.exists()
    own = root / "scratch" / uuid.uuid4().hex
    try:
        with uninterrupted():
            _room(root)
            make_folder(own, PRIVATE)
        yield own
    finally:
        with uninterrupted():
            shutil.rmtree(own, ignore_errors=True)  # what stays is gc's
            if made:
                _remove_empty([own.parent, root])


class WorkingFolder:
    """The folder of an export, next to the target or in it, while a `with` block lasts.

    Afterwards it is gone, with the empty folders that were made for it; `left` says that it could not be removed.
    """

    def __init__(self, root: Path, target: Path) -> None:
        number = uuid.uuid4().hex
        where = target if target.exists() else target.parent  # a folder that is there may be a disk of its own
        self.folder = where / f"{BESIDE}{number}"
        self.files = self.folder / "files"
        self.left = False
        self._root, self._note = root, root / "scratch" / f"{number}.json"
        self._made = [each for each in (where, *where.parents) if not each.exists()]

    def __enter__(self) -> WorkingFolder:
        try:
            said = {"folder": str(self.folder), "made": [str(each) for each in self._made]}
            with uninterrupted():
                _keep_note(self._root, self._note, said)
                make_folder(self.folder, PRIVATE)
                make_folder(self.files)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with uninterrupted():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.left = self.folder.exists()
            if not self.left:
                _remove_empty(self._made)
                with suppress(OSError):  # a note without a folder is gc's
                    self._note.unlink(missing_ok=True)

    def begin_placing(self, names: list[str]) -> None:
        """Write down which files are about to be moved, one by one, into a folder that was there."""
        _write(self.folder / "placing", names)


def broken_off(beside: Path) -> bool:
    """Whether the export with this folder ended while it was moving its files, before the last of them."""
    return (beside / "placing").exists() and any((beside / "files").glob("*"))


def leftovers(root: Path, *, dry_run: bool) -> Iterator[tuple[str, int]]:
    """Remove, or only name, what killed imports and exports left: (name, bytes). Asks no database."""
    for path in sorted((root / "scratch").glob("*")):
        with suppress(PermissionError, FileNotFoundError):  # of another user of the store; gone meanwhile
            if _ID.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                yield from _of_import(path, root, dry_run)
            elif path.suffix == ".json" and _ID.fullmatch(path.stem):
                yield from _of_export(path, dry_run)


def _of_import(own: Path, root: Path, dry_run: bool) -> Iterator[tuple[str, int]]:
    changed, size = _state(own)
    if _old(changed):
        if not dry_run:
            shutil.rmtree(own)
        yield own.relative_to(root).as_posix(), size


def _of_export(note: Path, dry_run: bool) -> Iterator[tuple[str, int]]:
    own, made = _read(note)
    changed, size = _state(own) if own else (0.0, 0)
    if not _old(max(changed, note.stat().st_mtime)):
        return
    if own is not None and not dry_run:
        with exclusive_lock(own.parent) as held:
            if not held:
                return
            if broken_off(own):
                _take_back(own)
            shutil.rmtree(own)
    if not dry_run:
        _remove_empty(made)
        note.unlink(missing_ok=True)
    if own is not None:
        yield str(own), size


def _take_back(own: Path) -> None:
    """Remove the files that were moved into a folder that nothing loads, because the last of them never came."""
    target = own.parent
    if any((target / name).exists() for name in LOADED):  # another export was made since
        return
    with suppress(ValueError, TypeError):
        for name in json.loads((own / "placing").read_text(encoding="utf-8")):
            if Path(name).name == name and not (own / "files" / name).exists():
                (target / name).unlink(missing_ok=True)


def _read(note: Path) -> tuple[Path | None, list[Path]]:
    """(the export's folder where it is there, the folders that were made above it)."""
    try:
        said = json.loads(note.read_text(encoding="utf-8"))
        own, made = Path(said["folder"]), [Path(each) for each in said["made"]]
    except (ValueError, KeyError, TypeError):
        return None, []
    ours = own.name == f"{BESIDE}{note.stem}" and own.is_absolute() and own.is_dir() and not own.is_symlink()
    if not ours or (os.name != "nt" and own.stat().st_uid != os.geteuid()):
        return None, []
    return own, [each for each in made if each in own.parents]


def _keep_note(root: Path, note: Path, said: Mapping[str, object]) -> None:
    """Where the store cannot be written, or has no room, the export goes on without."""
    try:
        _room(root)
        _write(note, said)
        sync(note.parent)
    except OSError as error:
        if error.errno in FAILING:
            raise


def _room(root: Path) -> None:
    if not root.exists():
        make_folder(root, PRIVATE)
    make_folder(root / "scratch", permissions(root))


def _write(path: Path, said: object) -> None:
    with create(path) as file:
        file.write(json.dumps(said).encode())
        flush(file)


def _remove_empty(folders: list[Path]) -> None:
    for each in folders:
        with suppress(OSError):  # somebody put something there
            each.rmdir()


def _state(folder: Path) -> tuple[float, int]:
    """(last change, bytes) of a folder and all in it."""
    changed, size = folder.lstat().st_mtime, 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            found = path.lstat()
            changed, size = max(changed, found.st_mtime), size + (found.st_size if path.is_file() else 0)
    return changed, size


def _old(changed: float) -> bool:
    return time.time() - changed > OLD
