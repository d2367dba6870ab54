"""A store by URL works as a folder does: errors are one line without a password, and files belong to one catalog."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from servers import PASSWORD, USER
from store.bundles import tensors, write_bundle
from store.s3_proxy import proxied, through

from turret.access import Access
from turret.cli.main import run
from turret.errors import BadLocation, InUse, NotFound, StoreError
from turret.location import Location
from turret.postgres import Postgres
from turret.store import Store
from turret.workspace import Workspace


@pytest.fixture
def database(postgres_server) -> Iterator[str]:
    with postgres_server.database() as name:
        yield name


def one_line(said: pytest.ExceptionInfo[StoreError]) -> str:
    text = str(said.value)
    assert "\n" not in text
    assert PASSWORD not in text
    return text


def test_the_files_of_a_catalog_may_be_in_a_folder(new_url, tmp_path) -> None:
    store = Store(new_url(str(tmp_path / "files")))
    for seed in range(3):
        store.put("a", write_bundle(tmp_path, tensors(seed)), metrics={"test": {"loss": 0.1 * seed}})
    store.promote("a@1", "production")
    store.promote("a@2", "production")
    assert store.rollback("a").version == "a@1"
    store.delete("a@3")
    assert len(store.gc().removed) == 2
    assert store.verify().ok
    assert len(store.materialize("a", tmp_path / "out").digest) > 60
    assert {path.name for path in (tmp_path / "files").iterdir()} == {"blobs", "tmp", "catalog"}
    assert not store.root.exists()  # no run was started


def test_a_run_is_taken_up_on_any_machine_with_a_folder_of_its_own(new_url, tmp_path) -> None:
    url = new_url()
    first = Store(url).new_run("a", "x", "y")
    assert first.folder.parents[2] == tmp_path / "local"
    elsewhere = Store(url.replace(str(tmp_path / "local"), str(tmp_path / "another machine")))
    assert elsewhere.unfinished_run("x", "y") is None, "its process lives"
    Store(url).end_run(first, "interrupted")
    assert elsewhere.gc().removed == ()
    again = elsewhere.unfinished_run("x", "y")
    assert again is not None
    assert again.id == first.id
    assert again.folder.parents[2] == tmp_path / "another machine"
    elsewhere.end_run(again, "finished")


def test_names_order_by_their_bytes_as_in_a_folder(store, make_bundle) -> None:
    names = ["a-b", "a.b", "a0", "aa", "a_a", "b"]
    for name in reversed(names):
        store.put(name, make_bundle())
    assert [version.name for version in store.list()] == sorted(names)
    assert list(store.show("aa")["files"]) == sorted(store.show("aa")["files"])


def test_two_stores_in_one_database_are_apart(new_url, postgres_server, make_bundle, tmp_path) -> None:
    url = new_url(str(tmp_path / "files"))
    postgres_server.execute("CREATE SCHEMA team_a", urlsplit(url).path.removeprefix("/"))
    one, two = Store(url), Store(f"{url.replace('/files', '/other')}&options=-csearch_path%3Dteam_a")
    one.put("a", make_bundle(b"1"))
    assert not two.exists()
    two.put("b", make_bundle(b"2"))
    assert [str(version) for version in one.list()] == ["a@1"]
    assert [str(version) for version in two.list()] == ["b@1"]
    assert one.root != two.root


def test_characters_that_a_server_may_refuse_harm_no_verb(store, put) -> None:
    put(said={"note": "a\0b", "half": "\ud800", "lineage": {"recipe": "\0"}})
    put(said={"lineage": {"parent": "a@1"}})
    assert [store.list()[0].manifest[key] for key in ("note", "half")] == ["a\ufffdb", "\ufffd"]
    assert store.verify().ok
    store.promote("a@1", "production")
    assert [each.number for each in store.pointing()[1]] == [1]
    assert [str(each) for each in store.with_access(Access(bases=("tiny",))).list()] == ["a@1", "a@2"]
    with pytest.raises(InUse, match="a@2 was made from it"):
        store.delete("a@1")
    store.delete("a@2")
    run = store.new_run("a", "x", "y")
    store.end_run(run, "failed", error="bad \0 byte \ud800", result={"said": "\0"})
    assert [str(gate) for gate in store.gate("a", "production", add=[f"{'x' * 99}.{'y' * 99}>1"])]


# --- owner of files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", ["s3", "folder"])
def test_a_catalog_never_takes_the_files_of_another(new_url, make_bundle, tmp_path, files) -> None:
    """A gc would remove them all, because this catalog lists none of them."""
    one = Location.parse(new_url("s3" if files == "s3" else str(tmp_path / "files")))
    Store(one).put("a", make_bundle(b"1"))
    other = Store(new_url(str(one.files)))
    for write in (lambda: other.put("b", make_bundle(b"2")), lambda: (other.database(make=True), other.gc())):
        with pytest.raises(StoreError, match=r"has the files of another catalog .* use another place; if that") as said:
            write()
        one_line(said)
    assert len(Store(one).files("a")) == 3
    assert Store(one).gc().removed == ()


@pytest.mark.slow
def test_a_catalog_that_was_dumped_without_its_id_says_so(new_url, make_bundle, postgres_server) -> None:
    url = new_url()
    Store(url).put("a", make_bundle(b"1"))
    postgres_server.execute("COMMENT ON TABLE alembic_version IS NULL", urlsplit(url).path.removeprefix("/"))
    with pytest.raises(StoreError, match=r"has lost its id, .*: set it to the content of s3://.*/catalog"):
        Store(url).put("a", make_bundle(b"2"))
    assert len(Store(url).files("a")) == 3


def test_a_gc_leaves_files_alone_that_no_catalog_ever_marked(new_url, make_bundle, tmp_path) -> None:
    folder = Store(tmp_path / "store")
    folder.put("a", make_bundle())
    (tmp_path / "copy").mkdir()
    (folder.root / "blobs").rename(tmp_path / "copy" / "blobs")
    store = Store(new_url(str(tmp_path / "copy")))
    store.database(make=True)
    assert store.gc().removed == ()
    assert store.verify().orphans == 3


def test_a_folder_store_and_a_catalog_do_not_share_a_folder(new_url, make_bundle, tmp_path) -> None:
    folder = Store(tmp_path / "store")
    folder.put("a", make_bundle())
    with pytest.raises(StoreError, match=r"has the files of another catalog \(of .*turret\.db"):
        Store(new_url(str(folder.root))).put("a", make_bundle())
    Store(new_url(str(tmp_path / "files"))).put("a", make_bundle())
    with pytest.raises(StoreError, match="has the files of a catalog elsewhere: use another --store"):
        Store(tmp_path / "files").put("a", make_bundle())


# --- concurrency -----------------------------------------------------------------------------------------------------


class Cut:
    """Files whose catalog loses all connections when a file is removed."""

    def __init__(self, store: Store, cut: Any) -> None:
        self._files, self._cut, self.removed = store._blobs, cut, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def remove(self, name: str) -> bool:
        done = bool(self._files.remove(name))
        self.removed += 1
        self._cut()
        return done


def test_a_gc_whose_connections_are_lost_removes_what_was_dead_and_no_more(
    new_url, make_bundle, postgres_server
) -> None:
    store = Store(new_url())
    bundle = make_bundle(tensors(1))
    store.put("a", bundle)
    store.delete("a@1")

    def cut() -> None:
        postgres_server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'turret'"
        )

    store._blobs = Cut(store, cut)
    assert len(store.gc().removed) == 3
    assert store._blobs.removed == 3
    store._blobs = store._blobs._files
    assert str(store.put("a", bundle)) == "a@2"
    assert store.verify().ok


def test_a_writer_that_waits_too_long_says_so(postgres_server, database) -> None:
    url = postgres_server.url(database)
    held = Postgres(url, "x")
    with held.transaction(writes=True):
        waiting = Postgres(url, "x", busy_seconds=1)
        with pytest.raises(Exception, match="lock timeout") as raised, waiting.transaction(writes=True):
            pass
    said = waiting.describe_error(str(raised.value.orig))
    assert said == "another process has locked it for 1 seconds: wait for that process, or end it"


def open_now(server: Any, database: str) -> list[int]:
    """The number of connections that the server has from turret."""
    query = f"SELECT pid FROM pg_stat_activity WHERE application_name = 'turret' AND datname = '{database}' ORDER BY 1"
    return [pid for (pid,) in server.execute(query)]


def test_a_connection_is_used_again_and_goes_with_its_store(new_url, postgres_server, make_bundle, tmp_path) -> None:
    url = new_url(str(tmp_path / "files"))
    database = urlsplit(url).path.removeprefix("/")
    store = Store(url)
    store.put("a", make_bundle(b"1"))
    first = open_now(postgres_server, database)
    store.promote("a", "production")
    store.list()
    assert open_now(postgres_server, database) == first
    assert len(first) == 1
    del store
    deadline = time.monotonic() + 10  # the server closes it a moment later
    while open_now(postgres_server, database) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert open_now(postgres_server, database) == []


def test_a_connection_that_the_server_ended_meanwhile_is_made_anew(
    new_url, postgres_server, make_bundle, tmp_path
) -> None:
    """A restart of the server, or its idle timeout, is not noticed by the next command."""
    url = new_url(str(tmp_path / "files"))
    store = Store(url)
    store.put("a", make_bundle(b"1"))
    for pid in open_now(postgres_server, urlsplit(url).path.removeprefix("/")):
        postgres_server.execute(f"SELECT pg_terminate_backend({pid}, 5000)")
    assert store.promote("a", "production").changed


def test_a_fork_makes_a_connection_of_its_own_and_leaves_its_parents_alone(
    new_url, postgres_server, make_bundle, tmp_path
) -> None:
    url = new_url(str(tmp_path / "files"))
    database = urlsplit(url).path.removeprefix("/")
    store = Store(url)
    store.put("a", make_bundle(b"1"))
    (mine,) = open_now(postgres_server, database)
    code = (
        "import os, sys; from turret.store import Store; store = Store(sys.argv[1]); store.list()\n"
        "child = os.fork()\n"
        "if child == 0: store.promote('a', 'production'); del store; sys.exit()\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "assert store.resolve('a').aliases == ('production',)\n"
        "(opened,) = store._opened._server._engines.values()\n"
        "assert opened.pool.status().startswith('Pool size: 2  Connections in pool: 1 ')"
    )
    done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert open_now(postgres_server, database) == [mine]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_password_opens_the_door_and_is_never_shown(postgres_server, database, make_bundle, tmp_path, capsys) -> None:
    url = f"{postgres_server.url_with_password(database)}?files={tmp_path}/files&local={tmp_path}/local"
    Store(url).put("a", make_bundle())
    for verb in (["list"], ["verify"], ["show", "a"], ["doctor"], ["gc"], ["promote", "a@7", "x"], ["list", "none"]):
        for form in ([], ["--json"]):
            run([*verb, *form, "--store", url])
            out = "".join(capsys.readouterr())
            assert PASSWORD not in out
            assert "not%3Ato" not in out
    assert run(["list", "--store", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["store"].startswith(f"postgresql://{USER}:***@127.0.0.1:")
    assert PASSWORD not in repr(Store(url).location)
    with pytest.raises(NotFound, match=r"no store at postgresql://turret:\*\*\*@"):
        Store(url.replace(database, "template1")).resolve("a")


def test_what_a_server_says_is_told_without_the_password_also_by_who_never_connected() -> None:
    server = Postgres("postgresql://me:Sec%2Fret@h/db?sslpassword=Other", "x")
    assert server.describe_error("password Sec/ret of key Other is wrong") == (
        "password *** of key *** is wrong: set PGPASSWORD or ~/.pgpass, or ask for access"
    )


def test_a_wrong_password_is_said_and_not_shown(postgres_server, database, tmp_path) -> None:
    with pytest.raises(StoreError, match=r"password authentication failed .*: set PGPASSWORD or ~/.pgpass") as said:
        Store(f"{postgres_server.url_with_password(database, 'WRONG!word')}?files={tmp_path}").list()
    assert "WRONG" not in one_line(said)


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("postgresql://me:Secret@127.0.0.1:9/db?files=/x", r"cannot be reached \(.*refused\): check host and port"),
        ("postgresql://me:Secret@127.0.0.1:port/db?files=/x", 'invalid integer value "port"'),
        (
            "postgresql://me:Secret@127.0.0.1/db?files=/x&unknown=1",
            "PostgreSQL cannot read this URL: expected files, local and keys of libpq",
        ),
        ("postgresql://me:Sec%ret@127.0.0.1/db?files=/x", "PostgreSQL cannot read this URL"),
    ],
)
def test_a_server_that_cannot_be_reached_is_said(url, complaint) -> None:
    with pytest.raises(StoreError, match=complaint) as said:
        Store(url).list()
    assert "Sec" not in one_line(said)


def test_a_database_that_is_not_there_is_said(postgres_server, tmp_path) -> None:
    with pytest.raises(StoreError, match='database "none" does not exist: create it, or correct the URL') as said:
        Store(f"{postgres_server.url('none')}&files={tmp_path}").list()
    one_line(said)


@pytest.mark.slow
def test_an_outage_is_told_from_a_mistake(new_url, s3_server, postgres_server, tmp_path, make_bundle) -> None:
    """What passes, so that a training that met it is tried again without counting, and what somebody has to mend."""
    url, nowhere = new_url(), "postgresql://me@127.0.0.1:9/db"
    Store(url).put("a", make_bundle(tensors(1)))
    with proxied(s3_server) as (proxy, address):
        store = through(address, url)
        for deed in ("refuse", "cut"):
            proxy.rule(deed, times=1000)
            with pytest.raises(StoreError) as said:
                store.put("a", make_bundle(tensors(2)))
            assert said.value.outage, said.value
        proxy.release()
    for where, passes in (
        (f"{nowhere}?files={tmp_path}", True),
        (f"{postgres_server.url('none')}&files={tmp_path}", False),
        (url.replace("s3://", "s3://no-such-bucket-"), False),
    ):
        with pytest.raises(StoreError) as said:
            Store(where).put("a", make_bundle(tensors(3)))
        assert said.value.outage == passes, said.value


@pytest.mark.slow
def test_a_user_who_may_only_read_reads_and_is_told_so(new_url, postgres_server, make_bundle, tmp_path, capsys) -> None:
    url = new_url()
    Store(url).put("a", make_bundle(tensors(1)))
    database = urlsplit(url).path.removeprefix("/")
    role = f"reader_{database}"
    postgres_server.execute(f"CREATE ROLE {role} LOGIN")
    try:
        postgres_server.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}", database)
        reader = url.replace(f"//{USER}@", f"//{role}@")
        assert [str(version) for version in Store(reader).list()] == ["a@1"]
        Store(reader).materialize("a", tmp_path / "out")
        assert Store(reader).verify().ok
        for write in (
            lambda: Store(reader).promote("a", "production"),
            lambda: Store(reader).delete("a@1"),
        ):
            with pytest.raises(
                StoreError, match=r"permission denied for table .*: grant it, or connect as another"
            ) as said:
                write()
            one_line(said)
        for write in (lambda: Store(reader).put("a", make_bundle(b"2")), Store(reader).gc):
            with pytest.raises(StoreError, match="is read-only for this user: grant INSERT"):
                write()
        assert Store(url).verify().orphans == 0
        assert Store(reader).gc(dry_run=True).removed == ()
        assert run(["doctor", "--store", reader]) == 0
        assert "1 version, read-only" in " ".join(capsys.readouterr().out.split())
    finally:
        postgres_server.execute(f"DROP OWNED BY {role}", database)
        postgres_server.execute(f"DROP ROLE {role}")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("psycopg", r"PostgreSQL needs psycopg .*: pip install 'turret\[postgres\]'"),
        ("s3fs", r"S3 needs s3fs .*: pip install 'turret\[s3\]'"),
    ],
)
def test_what_is_not_installed_is_one_line_that_says_what_to_install(new_url, module, words) -> None:
    url = new_url()
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from turret.cli.main import run\n"
        "from turret.store import Store\n"
        "from turret.errors import StoreError\n"
        "try: Store(sys.argv[1]).database(make=True); Store(sys.argv[1]).verify()\n"
        "except StoreError as error: sys.exit(str(error))"
    )
    out = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert re.search(words, out.stderr), out.stderr
    assert out.stderr.count("\n") == 1


def test_a_folder_store_loads_neither_driver(tmp_path) -> None:
    Store(tmp_path / "store").put("a", write_bundle(tmp_path, tensors(1)))
    code = (
        "import sys; from turret.store import Store; store = Store(sys.argv[1]); store.files('a'); store.verify()\n"
        "assert not {'psycopg', 's3fs', 'fsspec', 'aiobotocore', 'botocore'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], check=True)


def test_a_workspace_opens_a_url(new_url, make_bundle, tmp_path) -> None:
    url = new_url()
    Store(url).put("a", make_bundle())
    workspace = Workspace(url)
    assert workspace.promote("a", "production").changed
    assert workspace.doctor()["store"] | {"path": ""} == {
        "path": "", "exists": True, "versions": 1, "writable": True, "problems": [],
    }  # fmt: skip
    with pytest.raises(BadLocation, match="it is a str, not a Path"):
        Workspace(Path(url))
