"""Code is loaded only from cache folders that no other user can write to: folders, files, links and parents."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from turret.disk import open_private, private_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is run from the cache elsewhere")
as_root = pytest.mark.skipif(
    sys.platform != "linux" or os.getuid() != 0, reason="only root can give a folder to another user"
)
NOBODY = 65534


def test_a_folder_that_is_missing_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    assert private_folder(tmp_path / "a" / "b") == folder


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702])
@pytest.mark.parametrize("which", ["a", "a/b"])
def test_a_folder_that_others_may_write_to_is_refused(mode: int, which: str, tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "a" / "b")
    (tmp_path / which).chmod(mode)
    if mode == 0o1777 and which == "a" and os.getuid() == 0:
        assert private_folder(folder) == folder  # as in /tmp: root's, sticky, and the entry is ours
        return
    with pytest.raises(PermissionError, match="is writable for others") as raised:
        private_folder(folder)
    assert raised.value.filename == str(tmp_path / which)


@as_root
@pytest.mark.parametrize("which", ["a", "a/b"])
def test_a_folder_of_another_user_is_refused(which: str, tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "a" / "b")
    os.chown(tmp_path / which, NOBODY, NOBODY)
    with pytest.raises(PermissionError, match=f"belongs to user {NOBODY}"):
        private_folder(folder)


@as_root
def test_another_user_trusts_root_but_not_an_entry_of_tmp_that_anybody_could_have_made() -> None:
    entry = Path(tempfile.mkdtemp(dir="/tmp"))
    entry.chmod(0o755)
    code = (
        "import os, sys; from pathlib import Path; from turret.disk import private_folder\n"
        f"os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "try: print(private_folder(Path(sys.argv[1])))\n"
        "except OSError as error: print(error.filename, error.strerror)"
    )

    def said(folder: Path) -> str:
        command = [sys.executable, "-c", code, str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        assert said(Path("/usr/lib")) == "/usr/lib"
        assert said(entry) == f"{entry} belongs to user 0"
        os.chown(entry, NOBODY, NOBODY)
        assert said(entry) == str(entry)
    finally:
        entry.rmdir()


def test_a_symbolic_link_is_refused_as_the_folder_and_followed_above_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(OSError, match="is a symbolic link"):
        private_folder(tmp_path / "link")
    assert private_folder(tmp_path / "link" / "below") == tmp_path / "real" / "below"
    (tmp_path / "real").chmod(0o777)
    with pytest.raises(PermissionError, match="is writable for others"):
        private_folder(tmp_path / "link" / "below")


def test_a_file_is_read_from_the_descriptor_that_was_checked(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"checked")
    (tmp_path / "other").write_bytes(b"swapped")
    descriptor = open_private(tmp_path / "file")
    os.replace(tmp_path / "other", tmp_path / "file")
    assert Path(f"/proc/self/fd/{descriptor}").read_bytes() == b"checked"
    assert (tmp_path / "file").read_bytes() == b"swapped"  # the control
    os.close(descriptor)


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, opened = tmp_path / "file", os.open
    place.write_bytes(b"old")

    def replaced(path: Path, flags: int) -> int:
        descriptor = opened(path, flags)
        if Path(f"/proc/self/fd/{descriptor}").read_bytes() == b"old":
            (tmp_path / "new").write_bytes(b"new")
            os.replace(tmp_path / "new", path)
        return descriptor

    monkeypatch.setattr(os, "open", replaced)
    descriptor = open_private(place)
    monkeypatch.undo()
    assert Path(f"/proc/self/fd/{descriptor}").read_bytes() == b"new"
    os.close(descriptor)


def test_files_that_others_could_have_written_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_bytes(b"x")
    os.close(open_private(place))  # the control
    place.chmod(0o666)
    with pytest.raises(PermissionError, match="is writable for others"):
        open_private(place)
    place.chmod(0o600)
    os.link(place, tmp_path / "second")
    with pytest.raises(PermissionError, match="not a regular file with one link"):
        open_private(place)
    (tmp_path / "second").unlink()
    (tmp_path / "link").symlink_to(place)
    with pytest.raises(OSError, match="symbolic links"):
        open_private(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PermissionError, match="not a regular file with one link"):
        open_private(tmp_path / "pipe")


@as_root
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    os.chown(tmp_path / "file", NOBODY, NOBODY)
    with pytest.raises(PermissionError, match=f"belongs to user {NOBODY}"):
        open_private(tmp_path / "file")
