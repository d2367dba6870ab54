"""The schema has a number; it is created or migrated when the store opens, and a newer one is refused.

`place` is one of each kind in turn: an SQLite file and a PostgreSQL database, not created yet.
"""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, insert, select

from turret import database as db
from turret.access import Access
from turret.database import OLDEST, SCHEMA, Database
from turret.errors import StoreError
from turret.location import Location
from turret.store import JobQueue, Store
from turret.store.batches import WHOLE_FILE, Batches

MIGRATIONS = Path(db.__file__).parent / "migrations"
OLDER = Path(__file__).parent / "fixtures" / "v0_1"  # catalogs of the first format that is read


def test_the_numbers_of_the_schema_are_the_first_and_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    scripts = ScriptDirectory.from_config(config)
    assert (scripts.get_bases(), scripts.get_heads()) == ([OLDEST], [SCHEMA])


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path, new_url: Callable[..., str]) -> Path | Location:
    if request.param == "sqlite":
        return tmp_path / "turret.db"
    return Location.parse(new_url(str(tmp_path / "files")))


@pytest.fixture(autouse=True)
def migrations(recorded_migrations, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests make and migrate the catalogs themselves."""
    monkeypatch.setattr(db, "_migrate", recorded_migrations.run)


@pytest.mark.parametrize("older", [True, False])
def test_a_new_and_a_migrated_catalog_have_exactly_the_tables_that_the_code_uses(place, older) -> None:
    if older:
        _older(place, OLDEST)
    with Database.open_catalog(place).reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), db.metadata) == []


def test_a_new_and_a_migrated_catalog_have_the_same_of_everything(tmp_path: Path, new_url: Callable[..., str]) -> None:
    """Tables, indexes, constraints, triggers and functions, by their names."""
    of_sqlite = "SELECT type, name FROM sqlite_master ORDER BY 1, 2"
    of_postgres = (
        "SELECT 'column', table_name || '.' || column_name,"
        " concat(data_type, collation_name, column_default, is_nullable)"
        " FROM information_schema.columns WHERE table_schema = 'public' UNION ALL "
        "SELECT 'index', indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' UNION ALL "
        "SELECT 'constraint', conname, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE connamespace = 'public'::regnamespace UNION ALL "
        "SELECT 'trigger', tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal UNION ALL "
        "SELECT 'function', proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1, 2"
    )
    for query, new, old in (
        (of_sqlite, tmp_path / "new.db", tmp_path / "old.db"),
        (of_postgres, Location.parse(new_url(str(tmp_path / "new"))), Location.parse(new_url(str(tmp_path / "old")))),
    ):
        _older(old, OLDEST)
        Database.open_catalog(old)
        Database.open_catalog(new)
        found = _execute(new, query)
        assert len(found) > 90
        assert found == _execute(old, query)


def test_another_program_s_table_in_a_new_catalog_s_database_is_refused(place) -> None:
    """It would be taken for a table of the catalog, and nothing is left of the others."""
    _execute(place, "CREATE TABLE usage (day INTEGER)")
    with pytest.raises(StoreError, match=r"usage.* already exists"):
        Database.open_catalog(place)
    assert _execute(place, "SELECT * FROM usage") == []
    with pytest.raises(Exception, match="adapters"):
        _execute(place, "SELECT * FROM adapters")


def test_other_tests_have_exactly_the_catalogs_that_the_code_makes(
    tmp_path: Path, new_url: Callable[..., str], recorded_migrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL's tables are compared above; SQLite keeps the statements that made everything."""
    made = []
    for name in ("made", "recorded once", "recorded twice"):
        if name != "made":
            monkeypatch.setattr(db, "_migrate", recorded_migrations)
        Database.open_catalog(tmp_path / name)
        found = _execute(tmp_path / name, "SELECT type, name, coalesce(sql, '') FROM sqlite_master ORDER BY name")
        # a table that a migration made anew lists its constraints in no order
        made.append([(kind, of, sorted(sql.replace(",", " ").split())) for kind, of, sql in found])
        made[-1] += _execute(tmp_path / name, "SELECT version_num FROM alembic_version")
    assert len(made[0]) > 50
    assert made[0] == made[1] == made[2]
    for name in ("once", "twice"):
        place = Location.parse(new_url(str(tmp_path / name)))
        with Database.open_catalog(place).reading() as connection:
            assert compare_metadata(MigrationContext.configure(connection), db.metadata) == []


def test_nothing_is_made_by_looking(place) -> None:
    assert Database.find_catalog(place) is None
    assert Database.find_catalog(place) is None
    Database.open_catalog(place)
    assert Database.find_catalog(place) is not None


def test_a_newer_schema_is_refused_with_both_numbers_and_untouched(place) -> None:
    Database.open_catalog(place)
    _execute(place, "UPDATE alembic_version SET version_num = '0999'")
    with pytest.raises(StoreError, match=rf"has format 0999, this turret reads up to {SCHEMA}: .* upgrade turret"):
        Database.open_catalog(place)
    assert _execute(place, "SELECT version_num FROM alembic_version") == [("0999",)]


def _older(place: Path | Location, number: str) -> None:
    """Make an empty catalog of an earlier format."""
    if isinstance(place, Path):
        with closing(sqlite3.connect(f"file:{OLDER / 'store' / 'turret.db'}?immutable=1", uri=True)) as kept:
            made = kept.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type = 'table' DESC")
            statements = [str(sql) for (sql,) in made]
    else:
        rows = r"^(INSERT INTO|COMMENT ON|SELECT pg_catalog\.setval).*?;$|^\\\w+ \w+$"
        dump = (OLDER / "catalog" / "dump.sql").read_text()
        statements = [re.sub(rows, "", dump, flags=re.MULTILINE | re.DOTALL)]
    for statement in statements:
        _execute(place, statement)
    _execute(place, f"INSERT INTO alembic_version VALUES ('{OLDEST}')")
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with db._server(place).transaction(writes=True) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, number)


def _first_format(place: Path | Location) -> None:
    """A store in the first format that is read, with a name, two versions and an alias."""
    _older(place, OLDEST)
    for statement in (
        "INSERT INTO adapters (id, name, last_number, created) VALUES (1, 'a', 2, 'then')",
        "INSERT INTO versions VALUES (1, 1, 1, 'sha256:1', 'then', NULL, 5, '{}', '{}', NULL)",
        "INSERT INTO versions VALUES (2, 1, 2, 'sha256:2', 'then', NULL, 5, '{}', '{}', NULL)",
        "INSERT INTO aliases VALUES (1, 'production', 2, 'then')",
        "INSERT INTO alias_history (id, adapter_id, alias, version_id, moved, number, verb) "
        "VALUES (1, 1, 'production', 1, 'then', 1, 'promote')",
    ):
        _execute(place, statement)


def _store(place: Path | Location) -> Store:
    return Store(place.parent if isinstance(place, Path) else place)


@pytest.mark.slow
def test_an_older_store_is_brought_up_to_date_when_it_is_opened(place) -> None:
    _first_format(place)
    store = _store(place)
    assert [str(version) for version in store.list()] == ["a@1", "a@2"]
    assert _execute(place, "SELECT version_num FROM alembic_version") == [(SCHEMA,)]
    with Database.open_catalog(place).reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), db.metadata) == []
    assert _execute(place, "SELECT id, verb, number FROM alias_history") == [(1, "promote", 1)]
    assert list(store.gate("a")) == []


def test_versions_that_comparisons_of_an_earlier_format_trained_are_recognised_in_a_folder(tmp_path) -> None:
    """By the runs in their results. A version that was there before, or was promoted, stays one of its own."""
    path = tmp_path / "turret.db"
    _older(path, OLDEST)
    _execute(path, "INSERT INTO adapters (id, tenant, name, last_number, created) VALUES (1, 'default', 'a', 4, '')")
    for number, run in enumerate(("own", "cell-1", "cell-2", "cell-3"), 1):
        _execute(
            path,
            f"INSERT INTO versions VALUES ({number}, 1, {number}, 'd{number}', '', '{run}', 5, '{{}}', '{{}}', '')",
        )
    _execute(path, "INSERT INTO aliases VALUES (1, 'production', 4, '')")
    _execute(path, "INSERT INTO alias_history (adapter_id, alias, version_id, moved) VALUES (1, 'production', 4, '')")
    cells = tmp_path / "comparisons" / "a-0123456789" / "cells"
    results = {
        "one": "cell-1",
        "two": "cell-2",
        "three": "cell-3",
        "base": None,
        "same": "cell-that-stored-nothing-new",
    }
    for key, run in results.items():
        (cells / key).mkdir(parents=True)
        (cells / key / "result.json").write_text(json.dumps({"version": "a@1", "run": run}))
    (cells / "broken").mkdir()
    (cells / "broken" / "result.json").write_text("{")
    found = {str(each): each.comparison for each in Store(tmp_path).list()}
    assert found == {"a@1": None, "a@2": "comparisons/a-0123456789", "a@3": "comparisons/a-0123456789", "a@4": None}


@pytest.mark.slow
@pytest.mark.parametrize("older", [True, False])
def test_processes_that_open_a_new_or_older_store_at_once_bring_it_up_to_date_once(place, older) -> None:
    if older:
        _first_format(place)
    code = "import sys; from turret.store import Store; assert Store(sys.argv[1]).database(make=True).writable()"
    where = str(place.parent if isinstance(place, Path) else _url(place))
    opened = [
        subprocess.Popen([sys.executable, "-c", code, where], stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for process in opened:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert _execute(place, "SELECT version_num FROM alembic_version") == [(SCHEMA,)]


def test_an_older_store_that_may_not_be_written_says_what_to_do_and_stays_as_it_was(tmp_path) -> None:
    path = tmp_path / "turret.db"
    _first_format(path)
    with pytest.raises(StoreError, match=r"has format 0012, this turret reads \d+, and it is read-only here: run"):
        Database.open_catalog(path, read_only=True)
    assert _execute(path, "SELECT version_num FROM alembic_version") == [(OLDEST,)]


def test_a_store_from_before_the_first_format_says_how_its_adapters_are_brought_here(place) -> None:
    Database.open_catalog(place)
    _execute(place, "UPDATE alembic_version SET version_num = '0005'")
    with pytest.raises(
        StoreError, match=r"has format 0005, this turret reads 0012 to \d+: export its adapters with"
    ) as raised:
        Database.open_catalog(place)
    assert "\n" not in str(raised.value)
    assert _execute(place, "SELECT version_num FROM alembic_version") == [("0005",)]


def test_the_journal_is_wal(tmp_path) -> None:
    Database.open_catalog(tmp_path / "turret.db")
    assert _execute(tmp_path / "turret.db", "PRAGMA journal_mode") == [("wal",)]


def test_a_transaction_that_fails_leaves_nothing(place) -> None:
    database = Database.open_catalog(place)
    row = {"name": "a", "last_number": 0, "created": "now"}
    with pytest.raises(StoreError, match=r"(?i)unique constraint"), database.writing() as connection:
        connection.execute(insert(db.adapters), [row, row])
    with database.reading() as connection:
        assert connection.execute(select(db.adapters)).all() == []


def test_a_read_only_database_refuses_to_write_in_one_line(tmp_path) -> None:
    Database.open_catalog(tmp_path / "turret.db")
    database = Database.open_catalog(tmp_path / "turret.db", read_only=True)
    with database.reading() as connection:
        assert connection.execute(select(db.versions)).all() == []
    with pytest.raises(StoreError, match="is read-only here"), database.writing():
        pass


def test_opening_a_store_of_this_format_loads_no_alembic_and_no_torch(tmp_path) -> None:
    Database.open_catalog(tmp_path / "turret.db")
    code = (
        "import sys; from pathlib import Path; from turret.store import Store\n"
        "assert list(Store(Path(sys.argv[1])).list()) == []\n"
        "assert not {'alembic', 'torch', 'pandas', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_writer_sees_what_the_writer_before_it_committed_and_a_reader_one_moment(place) -> None:
    database, seen = Database.open_catalog(place), list[int]()

    def count(connection: Connection) -> int:
        return len(connection.execute(select(db.adapters)).all())

    def write() -> None:
        with database.writing() as connection:
            seen.append(count(connection))

    second = threading.Thread(target=write)
    with database.reading() as reader:
        assert count(reader) == 0
        with database.writing() as connection:
            second.start()
            second.join(timeout=0.3)
            assert second.is_alive()  # it waits before it reads
            connection.execute(insert(db.adapters), {"name": "a", "last_number": 0, "created": "now"})
        second.join(timeout=60)
        assert count(reader) == 0
    assert seen == [1]


def _url(location: Location) -> str:
    assert location.catalog is not None
    return f"{location.catalog}&files={location.files}&local={location.local.parent}"


def _execute(place: Path | Location, statement: str) -> list[tuple[object, ...]]:
    if isinstance(place, Location):
        import psycopg

        with psycopg.connect(place.catalog) as server:
            cursor = server.execute(statement)
            return cursor.fetchall() if cursor.description else []
    connection = sqlite3.connect(place)
    try:
        with connection:
            return connection.execute(statement).fetchall()
    finally:
        connection.close()


@pytest.mark.parametrize("state", ["waiting", "running", "failed"])
def test_what_waits_in_the_queue_of_an_earlier_format_goes_on_in_its_turn(place, state) -> None:
    """Trainings and batches, with their priorities, tries and logs. Who had a turn last comes last."""
    _older(place, "0016")
    run = "INSERT INTO runs (id, name, state, recipe_digest, data_digest, created, tenant) VALUES"
    entry = "INSERT INTO queue (run, tenant, priority, tries, queued, started, due, who, recipe, beside) VALUES"
    for id, tenant, started in (("one", "legal", "'2'"), ("two", "sales", "'1'"), ("three", "sales", "NULL")):
        _execute(place, f"{run} ('{id}', 'a', '{state}', '', '', '{id}', '{tenant}')")
        _execute(place, f"{entry} ('{id}', '{tenant}', 3, 1, '{id}', {started}, 0, 'me', 'name = ''{id}''', false)")
    _execute(place, f"{run} ('direct', 'a', 'interrupted', '', '', '', 'legal')")
    _execute(place, "INSERT INTO run_log (run, tenant, at, line) VALUES ('one', 'legal', '', 'step 1')")
    _execute(
        place, "INSERT INTO leases (name, owner, process, host, fence, until) VALUES ('runs/one', 'x', '', '', 7, 0)"
    )
    worker = "'w'" if state == "running" else "NULL"
    batch = "INSERT INTO batches (id, owner, state, endpoint, input_file, created, times, total, done, failed, worker)"
    _execute(
        place, f"{batch} VALUES ('batch_1', 'token legal/x', 'in_progress', '/', 'f', 9, '{{}}', 2, 0, 0, {worker})"
    )
    _execute(place, "INSERT INTO batch_turns (name, turn) VALUES ('tenant legal', 5)")
    store = _store(place)
    queue, batches = JobQueue.of(store), Batches.of(store)
    assert store.with_access(Access("legal")).run("one")["queue"]["priority"] == 3
    assert store.with_access(Access("legal")).run("direct")["queue"] is None
    assert [each["line"] for each in JobQueue.of(store.with_access(Access("legal"))).log("one")] == ["step 1"]
    taken = [queue.take() for _ in range(3)]
    if state == "failed":
        assert taken == [None, None, None]
    else:
        assert [each and (each.id, each.tries, each.lease.fence) for each in taken] == [
            ("three", 2, 1),
            ("one", 2, 8),
            ("two", 2, 1),
        ]
    claimed = batches.claim()
    assert claimed is not None
    assert claimed.owner == "token legal/x"
    assert claimed.unanswered.get(WHOLE_FILE, 0) == (state == "running"), "its server died"
