"""Content in an object store is there whole or not at all, comes back unchanged, and each error is one line.

On S3, and on fsspec's memory filesystem, the simplest one.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from servers import BUCKET
from store.s3_proxy import proxied

from turret.errors import Corrupt, StoreError
from turret.store.blobs import Blob, Blobs, Objects, _s3, hash_file

PART = 5 << 20  # the smallest part that S3 accepts
Make = Callable[..., Objects]


@pytest.fixture(params=["s3", "memory"])
def make(request: pytest.FixtureRequest) -> Make:
    """Opens the same place again and again, as several processes do."""
    url = f"{request.param}://{BUCKET}/{uuid.uuid4().hex}"
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return lambda connect=None: Objects(url, connect, part=PART)
    memory = MemoryFileSystem(global_store=False, skip_instance_cache=True)
    return lambda connect=None: Objects(url, connect or (lambda: memory), part=PART)


@pytest.fixture
def s3(s3_server) -> Make:
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    return lambda connect=None: Objects(url, connect, part=PART)


def put(objects: Objects, source: Path) -> Blob:
    """Store a copy under its own name."""
    blob = replace(hash_file(source), upload=uuid.uuid4().hex)
    objects.put(source, blob)
    return blob


def file(folder: Path, content: bytes) -> Path:
    path = folder / uuid.uuid4().hex
    path.write_bytes(content)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, 2 * PART + 7])
def test_content_of_any_size_comes_back_as_it_went(make, tmp_path, size) -> None:
    source = file(tmp_path, os.urandom(size))
    objects = make()
    blob = put(objects, source)
    other = make()
    assert other.glance(blob) is None
    other.check(blob)
    other.copy(blob, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == source.read_bytes()
    with other.checked_file(blob) as held:
        assert hash_file(held) == blob
    assert not held.exists()
    assert [(each, each.upload) for _, each in other.walk()] == [(blob, blob.upload)]


def test_copies_of_one_content_are_apart_and_names_of_format_five_are_read(make, tmp_path) -> None:
    source, objects = file(tmp_path, b"content"), make()
    first, second, before = put(objects, source), put(objects, source), hash_file(source)
    objects.put(source, before)
    names = {each.upload: name for name, each in objects.walk()}
    assert set(names) == {first.upload, second.upload, ""}
    assert objects.remove(names[first.upload])
    assert "is missing" in objects.glances([first])[first.digest]
    assert objects.glances([second]) == objects.glances([before]) == {}
    objects.check(second)
    objects.check(before)


def test_local_copies_last_as_long_as_what_made_them(make, tmp_path) -> None:
    objects = make()
    blob = put(objects, file(tmp_path, b"content"))
    path = objects.local(blob)
    assert objects.local(blob) == path
    assert path.read_bytes() == b"content"
    del objects
    gc.collect()
    assert not path.exists()


def test_what_is_removed_is_gone_for_all_at_once_and_only_once(make, tmp_path) -> None:
    one, other = make(), make()
    blobs = [put(one, file(tmp_path, b"%d" % i)) for i in range(3)]
    names = {blob.digest: name for name, blob in other.walk()}
    assert other.remove(names[blobs[0].digest])
    assert not one.remove(names[blobs[0].digest])
    assert one.glance(blobs[0]) is not None
    assert {blob.digest for _, blob in one.walk()} == {blob.digest for blob in blobs[1:]}
    assert list(one.glances(blobs)) == [blobs[0].digest]
    assert "is missing" in one.glances(blobs)[blobs[0].digest]
    with pytest.raises(Corrupt, match="is missing"):
        one.check(blobs[0])
    with pytest.raises(Corrupt, match="is missing"):
        one.copy(blobs[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Watched:
    """A filesystem that calls `before` ahead of every upload, and aborts uploads on demand."""

    def __init__(self, system: Any, before: Callable[[], object], breaks: bool = False) -> None:
        self._system, self._before, self._breaks = system, before, breaks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._system, name)

    def open(self, key: str, mode: str, **more: Any) -> Any:
        if mode != "wb":
            return self._system.open(key, mode, **more)
        self._before()
        upload = self._system.open(key, mode, **more)
        if self._breaks:
            write, written = upload.write, []

            def broken(data: bytes) -> int:
                written.append(len(data))
                if sum(written) > PART + (1 << 20):
                    raise OSError("the network is down")
                return int(write(data))

            upload.write = broken
        return upload


def unended(objects: Objects) -> list[Any]:
    """Unfinished uploads under this prefix, because the server has those of other tests too."""
    prefix = objects._url.removeprefix(f"s3://{BUCKET}/")
    return [each for each in _s3("").list_multipart_uploads(BUCKET) if each["Key"].startswith(f"{prefix}/")]


def test_a_source_that_changes_on_its_way_is_not_kept_under_the_name_it_had(s3, tmp_path) -> None:
    source, system = file(tmp_path, os.urandom(PART + 9)), _s3("")
    objects = s3(lambda: Watched(system, lambda: source.write_bytes(os.urandom(PART + 9))))
    with pytest.raises(Corrupt, match="changed while it was being stored"):
        put(objects, source)
    assert list(s3().walk()) == []
    assert unended(s3()) == []


def test_an_upload_that_breaks_off_leaves_nothing(s3, tmp_path) -> None:
    source, system = file(tmp_path, os.urandom(3 * PART)), _s3("")
    objects = s3(lambda: Watched(system, lambda: None, breaks=True))
    with pytest.raises(StoreError, match="the network is down"):
        put(objects, source)
    assert list(s3().walk()) == []
    assert unended(s3()) == []
    put(s3(), source)


KILLED = """
import os, signal, sys
from pathlib import Path
from s3fs import S3FileSystem
from turret.store.blobs import hash_file
from turret.store.blobs import Objects
ask = S3FileSystem._call_s3
async def watched(self, method, *arguments, **more):
    answer = await ask(self, method, *arguments, **more)
    if method == "upload_part":
        os.kill(os.getpid(), signal.SIGKILL)
    return answer
S3FileSystem._call_s3 = watched
source = Path(sys.argv[2])
Objects(sys.argv[1], part=5 << 20).put(source, hash_file(source))
"""


@pytest.mark.slow
def test_an_upload_whose_process_was_killed_is_not_there_and_can_be_made_again(s3, tmp_path) -> None:
    source, objects = file(tmp_path, os.urandom(3 * PART)), s3()
    killed = subprocess.run([sys.executable, "-c", KILLED, objects._url, str(source)], check=False)
    assert killed.returncode == -9
    assert len(unended(objects)) == 1
    assert list(objects.walk()) == []
    put(objects, source)
    _s3("").clear_multipart_uploads(BUCKET)


def test_a_flipped_bit_is_found_by_every_way_to_read(make, tmp_path) -> None:
    objects = make()
    blob = put(objects, file(tmp_path, b"0123456789"))
    with objects._system() as system:
        system.pipe_file(objects._key(blob), b"012345678x")
    assert objects.glance(blob) is None  # it hashes nothing
    for read in (objects.check, objects.local, lambda blob: objects.copy(blob, tmp_path / "out")):
        with pytest.raises(Corrupt, match="does not match its digest"):
            read(blob)
    with pytest.raises(Corrupt, match="does not match its digest"), objects.checked_file(blob):
        pass
    assert not (tmp_path / "out").exists()


def test_it_works_after_a_fork(s3, tmp_path) -> None:
    objects = s3()
    blob = put(objects, file(tmp_path, b"content"))
    code = (
        "import os, sys; from turret.store.blobs import Objects; objects = Objects(sys.argv[1])\n"
        "from turret.store.blobs import Blob; blob = Blob(sys.argv[2], 7, sys.argv[3])\n"
        "objects.check(blob); child = os.fork()\n"
        "objects.check(blob)\n"
        "os._exit(0) if child == 0 else sys.exit(os.waitpid(child, 0)[1])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, objects._url, blob.digest, blob.upload]
    subprocess.run(command, check=True, timeout=60)


def test_files_of_another_name_are_nobodys(make, tmp_path) -> None:
    objects = make()
    blob = put(objects, file(tmp_path, b"content"))
    with objects._system() as system:
        for name in ("blobs/sha256/ab/short", "blobs/sha256/xx", "blobs/other", f"blobs/sha256/00/{'f' * 64}"):
            system.pipe_file(f"{objects._prefix}/{name}", b"x")
    assert [each for _, each in objects.walk()] == [blob]


class Unconditional(MemoryFileSystem):
    """A server that has no conditional writes."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> None:
        if mode == "create":
            raise OSError(errno.ENOSYS, "not implemented")
        super().pipe_file(path, value, mode, **more)


def test_of_catalogs_that_claim_one_place_at_once_the_first_has_it(make, tmp_path) -> None:
    for one, other in ((make(), make()), (Blobs(tmp_path), Blobs(tmp_path))):
        assert (one.owner(), other.owner()) == (None, None)
        one.claim("one")
        other.claim("other")
        assert one.owner() == other.owner() == "one"
    assert [each.name for each in tmp_path.rglob("*") if each.is_file()] == ["catalog"]


def test_a_place_can_be_claimed_without_conditional_writes(monkeypatch, tmp_path) -> None:
    memory = Unconditional(global_store=False, skip_instance_cache=True)
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "no second names")))
    for files in (Objects(f"memory://{uuid.uuid4().hex}", lambda: memory), Blobs(tmp_path)):
        files.claim("one")
        assert files.owner() == "one"


# --- trouble ----------------------------------------------------------------------------------------------------------


def complaint(objects: Objects, source: Path) -> str:
    with pytest.raises(StoreError) as raised:
        put(objects, source)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_bucket_that_is_not_there_is_said(s3_server, tmp_path) -> None:
    said = complaint(Objects("s3://no-such-bucket/x"), file(tmp_path, b"1"))
    assert said.startswith("files s3://no-such-bucket/x: The specified bucket does not exist: create the bucket")


def test_a_server_that_is_not_there_is_said(s3_server, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    said = complaint(Objects("s3://bucket/x"), file(tmp_path, b"1"))
    assert "cannot be reached" in said
    assert "AWS_ENDPOINT_URL" in said


def test_missing_credentials_are_said(s3_server, tmp_path, monkeypatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    said = complaint(Objects("s3://bucket/x"), file(tmp_path, b"1"))
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" in said


def test_nothing_is_asked_before_the_first_use() -> None:
    Objects("s3://bucket/x", lambda: pytest.fail("asked"))


def test_a_bad_digest_is_no_key(make) -> None:
    for digest in ("sha256:x", "sha256:../../x", "", f"sha256:{'A' * 64}"):
        with pytest.raises(Corrupt, match="is not a digest"):
            make().check(Blob(digest, 1))
        with pytest.raises(Corrupt, match="is not a digest"):
            make().glance(Blob(digest, 1))
    for upload in ("x", "../../x", "A" * 32):
        with pytest.raises(Corrupt, match="is not an upload"):
            make().check(Blob(f"sha256:{'a' * 64}", 1, upload))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["turret", "s3fs"])
def test_a_filesystem_that_is_garbage_on_the_loop_of_a_server_is_closed_without_an_error(
    s3_server: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The control is s3fs as it is, which closes the connections on the loop that happens to run."""
    from s3fs import S3FileSystem

    from turret.store.s3 import S3

    told: list[str] = []

    async def serve(address: str) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, about: told.append(str(about)))
        made = [S3() if kind == "turret" else S3FileSystem(skip_instance_cache=True, endpoint_url=address)]
        await asyncio.to_thread(made[0].ls, BUCKET)
        connector = made[0].s3._endpoint.http_session
        made.clear()
        gc.collect()
        for _ in range(100):
            await asyncio.sleep(0.02)
            gc.collect()
            if told or not connector._sessions:
                break
        assert told or not connector._sessions, "the connections are closed"

    with proxied(s3_server) as (_, address):  # it keeps connections open, as S3 does
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        asyncio.run(serve(address))
    assert bool(told) == (kind == "s3fs"), told
