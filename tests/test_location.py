"""A store is a folder or a catalog's URL. No text about a store shows a password."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turret.cli.main import run
from turret.errors import BadLocation
from turret.location import Location
from turret.store import Store

URL = "postgresql://me@db.example.org/turret?files=s3://bucket/some/prefix"


@pytest.mark.parametrize("folder", [".turret", "/srv/turret", "a folder", "C:\\turret", "sub/x@y", Path("x")])
def test_what_is_no_url_is_a_folder_for_all_of_it(folder) -> None:
    found = Location.parse(folder)
    assert (found.catalog, found.local, found.files, str(found)) == (
        None,
        Path(folder),
        Path(folder),
        str(Path(folder)),
    )
    assert Location.parse(found) is found


def test_a_url_names_the_catalog_and_where_the_files_go() -> None:
    found = Location.parse(URL)
    assert (str(found), found.files) == (URL, "s3://bucket/some/prefix")
    assert found.catalog == "postgresql://me@db.example.org/turret"
    assert found.local.parent == Path(".turret")
    assert found.local.name.startswith("turret-")
    folder = Location.parse("postgresql:///turret?host=/run/postgresql&files=/srv/files&local=/scratch&sslmode=disable")
    assert folder.files == Path("/srv/files")
    assert folder.local.parent == Path("/scratch")
    assert folder.catalog == "postgresql:///turret?host=/run/postgresql&sslmode=disable"


def test_runs_of_two_catalogs_are_apart_and_of_one_together_whoever_asks() -> None:
    one = Location.parse(URL).local
    for same in (URL.replace("me@", "you:word@"), URL + "&sslmode=require", URL.replace("bucket", "other")):
        assert Location.parse(same).local == one
    for other in (
        URL.replace("example", "beispiel"),
        URL.replace("/turret?", "/Turret?"),
        URL + "&options=-csearch_path%3Dx",
    ):
        assert Location.parse(other).local != one


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (
            "s3://bucket/prefix",
            "holds files but no catalog: give the URL of a catalog that names it, such as post",
        ),
        ("mysql://root@host/db?files=/x", r"store mysql://\.\.\.: expected a folder, or postgresql://"),
        ("file:///srv/turret", "expected a folder, or postgresql://"),
        ("postgres://host/db?files=/x", "expected a folder, or postgresql://"),
        ("postgresql:/host/db", "a URL has two slashes, and in Python it is a str"),
        (Path(URL), "a URL has two slashes, and in Python it is a str, not a Path"),
        ("postgresql://host?files=/x", "no database name"),
        ("postgresql://host/a/b?files=/x", "no database name"),
        ("postgresql://host/db", r"no place for the files: add \?files=s3://bucket/prefix or \?files=/folder"),
        ("postgresql://host/db?files=", "no place for the files"),
        ("postgresql://host/db?files=here", "expected s3://bucket/prefix or an absolute folder"),
        ("postgresql://host/db?files=gs://bucket/x", "expected s3://bucket/prefix or an absolute folder"),
        ("postgresql://host/db?files=s3://", "expected s3://bucket/prefix"),
        ("postgresql://host/db?files=s3://bucket/../x", "expected s3://bucket/prefix"),
        ("postgresql://host/db?files=s3://bucket//x", "expected s3://bucket/prefix"),
        ("postgresql://host/db?files=/x&files=/y", "key 'files' is given twice"),
        ("postgresql://host/db?files=/x&local=here", "local=here is not an absolute folder"),
        ("postgresql://host/db?files=/x\n", "cannot tell its parts"),
        ("postgresql://[::1/db?files=/x", "cannot tell its parts"),
    ],
)
def test_what_is_no_store_is_refused_with_an_example_of_one(said, complaint) -> None:
    with pytest.raises(BadLocation, match=complaint) as raised:
        Store(said)
    assert "\n" not in str(raised.value)


def test_the_command_says_it_in_one_line_with_status_2(capsys) -> None:
    assert run(["list", "--store", "postgresql://me:secret@host/db"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("turret: store postgresql://me:***@host/db: no place for the files")
    assert said.count("\n") == 1


SECRET = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6).map(lambda word: f"Q{word}Q")


@given(
    secret=SECRET,
    encoded=st.booleans(),
    rest=st.sampled_from(["/db?files=/x", "/db", "", "/db?files=here", "?files=/x"]),
)
def test_no_password_is_ever_shown(secret, encoded, rest) -> None:
    word = quote(secret, safe="") if encoded else secret
    for url in (
        f"postgresql://me:{word}@host{rest}",
        f"postgresql://host/db?files=/x&password={word}",
        f"s3://k:{word}@b/x",
    ):
        shown = shown_of(url)
        assert word not in shown
        assert secret not in shown


def shown_of(url: str) -> str:
    """Every text that shows the location."""
    try:
        found = Location.parse(url)
    except BadLocation as error:
        return str(error)
    assert found.catalog is not None
    assert len(found.catalog) > len("postgresql://host/db")
    return f"{found} {found!r}"
