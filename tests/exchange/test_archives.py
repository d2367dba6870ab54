"""An archive unpacks only the known files of one adapter into our own folder, or is refused with one line."""

from __future__ import annotations

import io
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from exchange.foreign import (
    CONFIG,
    MANIFEST,
    WEIGHTS,
    contents,
    refused,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turret.bundles import fetch
from turret.errors import BundleError
from turret.workspace import Workspace


def zipped(path: Path, members: dict[str, bytes], mode: int = stat.S_IFREG | 0o644) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, mode << 16
            file.writestr(info, content)
    return path


def tarred(path: Path, members: dict[str, bytes], **changes: Any) -> Path:
    with tarfile.open(path, "w:gz" if path.name.lower().endswith("gz") else "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            file.addfile(info, io.BytesIO(content))
    return path


PACK: dict[str, Callable[..., Path]] = {"a.zip": zipped, "a.tar": tarred, "a.tar.gz": tarred, "a.TGZ": tarred}


@pytest.mark.parametrize(
    ("name", "inside"),
    [(name, inside) for name in PACK for inside in ("", "./", "my-adapter/") if (name, inside) != ("a.zip", "./")],
)
def test_a_packed_bundle_comes_back_with_the_same_digest(inside, name, workspace, bundle, tmp_path) -> None:
    members = {f"{inside}{key}": value for key, value in contents(bundle).items()}
    found = Workspace(tmp_path / "store").import_adapter(PACK[name](tmp_path / name, members), "x")
    assert found.digest == workspace.resolve("sentiment").digest


def test_folders_packed_by_the_usual_tools_are_read(workspace, bundle, tmp_path) -> None:
    digest = workspace.resolve("sentiment").digest
    for kind in ("zip", "tar", "gztar"):
        made = shutil.make_archive(str(tmp_path / kind), kind, bundle.parent, bundle.name)
        assert Workspace(tmp_path / "store").import_adapter(made, f"x{kind}").digest == digest


BAD_NAMES = [
    f"../{WEIGHTS}",
    f"a/../../{WEIGHTS}",
    f"/etc/{WEIGHTS}",
    f"a\\{WEIGHTS}",
    "%2e%2e/x",
    "C:/x",
    "a//b",
    "a/./b",
    "-rf",
    "a/-rf",
    "~/x",
    "x\x1b[31m",
    "a\nb",
    "аdapter_config.json",  # a Cyrillic letter
    "a" * 10_000,
    "trailing.",
    "trailing ",
]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("kind", ["a.zip", "a.tar"])
def test_a_member_with_a_name_that_could_mean_more_is_refused(kind, name, bundle, tmp_path, capsys) -> None:
    source = PACK[kind](tmp_path / kind, {name: b"x", **contents(bundle)})
    said = refused(capsys, tmp_path / "store", source)
    assert "has a member" in said


def test_a_nul_in_a_member_name_is_refused(bundle, tmp_path, capsys) -> None:
    path = zipped(tmp_path / "a.zip", {f"{WEIGHTS}#.txt": b"x", CONFIG: b"{}"})
    path.write_bytes(path.read_bytes().replace(b"safetensors#", b"safetensors\0"))
    refused(capsys, tmp_path / "store", path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S"])
def test_a_link_or_a_device_in_a_tar_is_refused(kind, bundle, tmp_path, capsys) -> None:
    path = tmp_path / "a.tar"
    tarred(path, contents(bundle))
    with tarfile.open(path, "a") as file:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = kind, "/etc/passwd"
        file.addfile(info)
    said = refused(capsys, tmp_path / "store", path)
    assert "a link or a device" in said or "sparse" in said


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO])
def test_a_link_in_a_zip_is_refused(kind, bundle, tmp_path, capsys) -> None:
    path = zipped(tmp_path / "a.zip", {**contents(bundle), "link": b"/etc/passwd"}, mode=kind | 0o777)
    assert "a link or a device" in refused(capsys, tmp_path / "store", path)


@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz"])
def test_members_that_clash_are_refused(kind, bundle, tmp_path, capsys) -> None:
    members = contents(bundle)
    for extra, text in (
        ({"readme.MD": b""}, "two members called"),
        ({"Manifest.json": b""}, "two members called"),
        ({"deep/ADAPTER_CONFIG.json": b"{}"}, "in lower case"),
        ({f"other/{CONFIG}": b"{}"}, "several adapters"),
    ):
        assert text in refused(capsys, tmp_path / "store", PACK[kind](tmp_path / kind, {**members, **extra}))


@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz"])
def test_an_archive_without_an_adapter_is_refused(kind, bundle, tmp_path, capsys) -> None:
    pack, path = PACK[kind], tmp_path / kind
    assert f"holds no {WEIGHTS}" in refused(capsys, tmp_path / "store", pack(path, {}))
    said = refused(capsys, tmp_path / "store", pack(path, {"x/adapter_model.bin": b"x", f"x/{CONFIG}": b"{}"}))
    assert "adapter_model.bin is a pickle, which is never opened" in said
    assert f"holds no {CONFIG}" in refused(capsys, tmp_path / "store", pack(path, {WEIGHTS: b"x"}))


@pytest.mark.parametrize("kind", ["a.zip", "a.tar.gz"])
def test_an_archive_bomb_is_refused_before_it_is_unpacked(kind, bundle, tmp_path, capsys) -> None:
    path = PACK[kind](tmp_path / kind, {"zeros": bytes(30 << 20), **contents(bundle)})
    assert path.stat().st_size < 300_000
    assert "unpacks to more than" in refused(capsys, tmp_path / "store", path)
    many = {f"f{number}": b"" for number in range(1_001)}
    assert "more than 1000 members" in refused(capsys, tmp_path / "store", PACK[kind](path, many))


def test_a_long_header_in_a_tar_is_not_taken_into_memory(bundle, tmp_path, capsys) -> None:
    path = tmp_path / "a.tar"
    tarred(path, contents(bundle), pax_headers={"comment": "x" * 100_000})
    assert "has a header of" in refused(capsys, tmp_path / "store", path)


def test_a_zip_that_is_encrypted_or_packed_oddly_is_refused(bundle, tmp_path, capsys) -> None:
    members = contents(bundle)
    path = zipped(tmp_path / "a.zip", {WEIGHTS: members[WEIGHTS], **members})  # the first is one that is unpacked
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\x01\x02")
    content[start + 8] |= 1  # the flag in the central directory
    content[6] |= 1
    path.write_bytes(content)
    assert "cannot be unpacked" in refused(capsys, tmp_path / "store", path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        file.writestr(WEIGHTS, b"x" * 100)
    assert "compression method 14" in refused(capsys, tmp_path / "store", path)


@pytest.mark.parametrize("kind", ["bz2", "xz"])
def test_what_is_packed_another_way_is_refused_and_says_which_ways_are_read(kind, bundle, tmp_path, capsys) -> None:
    mode: Any = f"w:{kind}"
    for name in (f"a.tar.{kind}", f"a.t{kind}", "a.tar", "a.tar.gz"):
        with tarfile.open(tmp_path / name, mode) as file:
            file.add(bundle, "adapter")
        said = refused(capsys, tmp_path / "store", tmp_path / name)
        assert "as .zip, .tar, .tar.gz, .tgz" in said


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["a.zip", "a.tar", "a.tar.gz"]), at=st.integers(0, 3000), noise=st.binary(max_size=60))
def test_a_mangled_archive_is_an_error_and_never_a_crash(
    kind: str, at: int, noise: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("mangled") / kind
    PACK[kind](path, {WEIGHTS: bytes(range(256)) * 8, CONFIG: b"{}"})
    content = path.read_bytes()
    path.write_bytes(content[:at] + noise + content[at + len(noise) // 2 :])
    with suppress(BundleError):
        fetch.unpack(path, path.parent / "out")


NAMES = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(["..", ".", "a", "-a", "~", "", "a b", "%2e", "\\", "CON", WEIGHTS, "é"]), max_size=5).map(
        "/".join
    ),
)


@settings(max_examples=150, deadline=None)
@given(name=NAMES)
def test_a_member_name_that_is_taken_stays_below_the_top(name: str) -> None:
    parts: tuple[str, ...] = ()
    with suppress(BundleError):
        parts = fetch.check_name(name, "a.zip")
    assert ".." not in parts
    assert all(part.isascii() and part.isprintable() and part[0] not in "-~/\\" for part in parts)
    assert Path("/top", *parts).resolve().is_relative_to("/top")


@settings(max_examples=40, deadline=None)
@given(names=st.lists(NAMES.filter(bool), max_size=4, unique=True), kind=st.sampled_from(["a.zip", "a.tar"]))
def test_nothing_is_written_but_the_known_files(
    names: list[str], kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    top = tmp_path_factory.mktemp("names")
    with suppress(UnicodeEncodeError, ValueError):
        PACK[kind](top / kind, {CONFIG: b"{}", **dict.fromkeys(names, b"x"), WEIGHTS: b"x"})
        with suppress(BundleError):
            fetch.unpack(top / kind, top / "out")
        assert {path.name for path in top.iterdir()} <= {kind, "out"}
        assert {path.name for path in (top / "out").rglob("*")} <= {WEIGHTS, CONFIG, MANIFEST}
