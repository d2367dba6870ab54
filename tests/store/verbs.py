"""All commands that change or read a store, prepared to be killed: what each does, and what must hold after it.

A command is prepared again and again in the same store, so an earlier round must not matter, whether it was carried out
or not. Only `import` and `export` load torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from store import by_hand
from store.bundles import tensors, write_bundle

from turret import audit
from turret.database import OLDEST
from turret.errors import ExperimentError, NotFound
from turret.experiments import Guards, input_drift, rows
from turret.experiments.rows import ArmHealth
from turret.store import Store, promises
from turret.store.blobs import hash_file
from turret.store.catalog import now
from turret.store.golden import Example, GoldenReplay, GoldenSet
from turret.store.promises import Promise, Terms
from turret.store.uploads import Upload

Hold = Callable[[bool], None]  # called with whether the command was acknowledged; asserts what must hold
TASK = {"task": {"kind": "classify", "labels": ["bad", "good"]}}
GOLDEN = GoldenSet((Example("a great film", "label", "good"),))
BUILT: dict[Path, Path] = {}  # folder -> a real bundle in it
NEXT: dict[Path, Path] = {}  # folder -> the bundle that is put next


@dataclass(frozen=True)
class Verb:
    """Prepares a store, carries the command out in another process, and checks the store after."""

    ready: Callable[[str, Path], Hold]  # the store, and a folder for other files
    act: Callable[[str, Path], object]


def unlike(folder: Path) -> Path:
    """A bundle that differs from all others."""
    seed = int.from_bytes(os.urandom(6), "big")
    return write_bundle(folder, tensors(seed, 5000), {"same": b"in every version"}, TASK)


def ready_to_put(_where: str, folder: Path) -> Hold:
    NEXT[folder] = unlike(folder)
    return lambda _done: None  # stdout has what was acknowledged


def put(where: str, folder: Path) -> None:
    os.write(1, f"{Store(where).put('a', NEXT[folder])}\n".encode())  # in one call: a kill does not split the line


def two(where: str, folder: Path) -> Store:
    """A store with a@1 and a@2, which pass the gates of `production`: one of a metric, one of golden examples."""
    store = Store(where)
    for number in range(len(store.list("a")), 2):
        version = store.put("a", write_bundle(folder, tensors(number), said=TASK), metrics={"test": {"accuracy": 0.9}})
        store.gate("a", "production", add=["accuracy>=0.9"], examples=GOLDEN)
        store.keep_replay(version, GoldenReplay(GOLDEN.digest, 1, 1, None, "then"))
    return store


def names(where: str, *allowed: str) -> None:
    found = str(Store(where).resolve("a@production"))
    assert found in allowed, (found, allowed)


def ready_to_promote(where: str, folder: Path) -> Hold:
    two(where, folder).promote("a@1", "production")
    return lambda done: names(where, "a@2") if done else names(where, "a@1", "a@2")


def ready_to_rollback(where: str, folder: Path) -> Hold:
    store = two(where, folder)
    store.promote("a@1", "production")
    store.promote("a@2", "production")
    return lambda done: names(where, "a@1") if done else names(where, "a@1", "a@2")


def ready_to_gate(where: str, folder: Path) -> Hold:
    """One transaction removes two gates and adds two."""
    store = two(where, folder)
    for gate in store.gate("a", "candidate"):
        store.gate("a", "candidate", remove=[str(gate)])
    before = ["test.loss<1", f"golden:{OTHER.digest[7:19]}>=1"]
    store.gate("a", "candidate", add=before[:1], examples=OTHER)
    after = ["test.accuracy>=0.5", f"golden:{GOLDEN.digest[7:19]}>=0.5"]

    def hold(done: bool) -> None:
        found = [str(gate) for gate in Store(where).gate("a", "candidate")]
        assert found == after or (found == before and not done), found
        assert Store(where).examples(GOLDEN.digest) == GOLDEN

    return hold


OTHER = GoldenSet((Example("a dull story", "label", "bad"),) * 200)


def gate(where: str, folder: Path) -> None:
    remove = ["loss", f"golden:{OTHER.digest[7:19]}"]
    Store(where).gate("a", "candidate", add=["accuracy>=0.5"], remove=remove, examples=GOLDEN, share=0.5)


def ready_to_replay(where: str, folder: Path) -> Hold:
    store = two(where, folder)
    passed = {"then": 1, "now": 1}
    store.keep_replay(store.resolve("a@1"), GoldenReplay(GOLDEN.digest, 1, 1, None, "then"))

    def hold(done: bool) -> None:
        (found,) = Store(where).show("a@1")["replays"]
        assert found["passed"] == passed[found["replayed"]]
        assert found["replayed"] == "now" or not done

    return hold


def replay(where: str, folder: Path) -> None:
    store = Store(where)
    store.keep_replay(store.resolve("a@1"), GoldenReplay(GOLDEN.digest, 1, 1, None, "now"))


def ready_to_delete(where: str, folder: Path) -> Hold:
    """Delete the newest version with the alias that names it."""
    store = two(where, folder)
    newest = str(store.put("a", unlike(folder)))
    store.promote(newest, "candidate2")

    def hold(done: bool) -> None:
        listed = [str(version) for version in Store(where).list("a")]
        assert {"a@1", "a@2"} <= set(listed)
        assert not (done and newest in listed)
        if newest in listed:
            assert str(Store(where).resolve("a@candidate2")) == newest
        else:
            try:
                Store(where).resolve("a@candidate2")
            except NotFound:
                pass
            else:
                raise AssertionError("an alias names what is not listed")

    return hold


def delete(where: str, folder: Path) -> None:
    Store(where).delete("a@candidate2", force=True)


def ready_to_gc(where: str, folder: Path) -> Hold:
    """Two versions are listed, another was deleted, a put was killed, and a killed writer left a file."""
    store = two(where, folder)
    store.gc()
    before = {str(version) for version in store.list()}
    begun = {hash_file(path): path for path in write_bundle(folder, tensors(8)).iterdir()}
    Upload(store.database(), store._blobs).write(begun)  # of a killed put
    by_hand.forget_uploads(store)
    again = write_bundle(folder, tensors(7), said=TASK)  # the same each time, so that no folder is added
    store.delete(str(store.put("a", again)))
    if store.location.catalog is None:
        (store.root / "tmp" / "left").write_bytes(b"x")
        os.utime(store.root / "tmp" / "left", (0, 0))

    def hold(done: bool) -> None:
        assert {str(version) for version in Store(where).list()} == before
        assert not done or (Store(where).verify().orphans == 0 and not (store.root / "tmp" / "left").exists())
        put = str(store.put("a", again))  # the removed content is used again
        Store(where).gc()
        found = Store(where).verify()
        assert (found.problems, found.orphans) == ((), 0)
        store.delete(put)

    return hold


def ready_to_begin(where: str, folder: Path) -> Hold:
    store = two(where, folder)
    before = len(store.runs())

    def hold(done: bool) -> None:
        runs = Store(where).runs()
        assert len(runs) - before in ((1,) if done else (0, 1))
        assert all((store.root / "runs" / run["id"] / "recipe.toml").read_text() == "recipe" for run in runs)

    return hold


EARLIER = (  # the tables of the first format that later ones replaced
    "CREATE TABLE runs (id VARCHAR(40) NOT NULL, name VARCHAR(100) NOT NULL, state VARCHAR(16) NOT NULL, "
    "recipe_digest VARCHAR(80) NOT NULL, data_digest VARCHAR(80) NOT NULL, created VARCHAR(32) NOT NULL, "
    "ended VARCHAR(32), error TEXT, result JSON, tenant VARCHAR(64) DEFAULT 'default' NOT NULL, "
    "CONSTRAINT pk_runs PRIMARY KEY (id))",
    "CREATE INDEX ix_runs_recipe_digest ON runs (recipe_digest)",
    "CREATE TABLE queue (run VARCHAR(40) NOT NULL, tenant VARCHAR(64) DEFAULT 'default' NOT NULL, "
    "priority INTEGER NOT NULL, tries INTEGER NOT NULL, queued VARCHAR(32) NOT NULL, started VARCHAR(32), "
    "due FLOAT NOT NULL, cancelled VARCHAR(32), who VARCHAR(100), recipe TEXT NOT NULL, "
    "CONSTRAINT fk_queue_run FOREIGN KEY(run) REFERENCES runs (id), CONSTRAINT pk_queue PRIMARY KEY (run))",
    "CREATE INDEX ix_queue_tenant ON queue (tenant)",
    "CREATE TABLE batches (id VARCHAR(40) NOT NULL, owner VARCHAR(200) NOT NULL, state VARCHAR(16) NOT NULL, "
    "endpoint VARCHAR(64) NOT NULL, input_file VARCHAR(40) NOT NULL, output_file VARCHAR(40), error_file VARCHAR(40), "
    "notes JSON, error TEXT, created INTEGER NOT NULL, times JSON NOT NULL, total INTEGER NOT NULL, "
    "done INTEGER NOT NULL, failed INTEGER NOT NULL, worker VARCHAR(32), until FLOAT, "
    "CONSTRAINT pk_batches PRIMARY KEY (id))",
    "CREATE INDEX ix_batches_owner ON batches (owner)",
    "CREATE INDEX ix_batches_state ON batches (state)",
)


EMPTY = (  # tables that are later than the first format, those that refer to others first
    "jobs", "job_turns", "batches", "flushes", "panel_moves", "panel_versions", "panels",
    "promise_inputs", "promise_watches", "promise_outcomes", "promise_answers", "promises", "alarms",
)  # fmt: skip


def ready_to_migrate(where: str, folder: Path) -> Hold:
    """The store has the first format that is read, with an alias that was moved."""
    two(where, folder).promote("a@1", "production")
    with by_hand.catalog(Store(where)) as connection:
        if connection.execute("SELECT version_num FROM alembic_version").fetchone()[0] != OLDEST:
            for table, column in (("versions", "comparison"), ("tokens", "sign_in"), ("leases", "seconds")):
                connection.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
            log = "ALTER TABLE run_log {} CONSTRAINT fk_run_log_run"
            on_postgres = where.startswith("postgresql")  # which drops no table that another one refers to
            if on_postgres:
                connection.execute(log.format("DROP"))
            for table in EMPTY:
                connection.execute(f"DROP TABLE {table}")
            for made in EARLIER:
                connection.execute(made)
            if on_postgres:
                connection.execute(f"{log.format('ADD')} FOREIGN KEY (run) REFERENCES runs (id)")
            connection.execute(f"UPDATE alembic_version SET version_num = '{OLDEST}'")

    def hold(_done: bool) -> None:
        store = Store(where)
        assert [str(version) for version in store.list("a")][:2] == ["a@1", "a@2"]
        assert str(store.resolve("a")) == "a@1"
        for version in store.list("a"):
            store.keep_replay(version, GoldenReplay(keep(store), 1, 1, None, "then"))

    return hold


def keep(store: Store) -> str:
    store.gate("a", "production", add=["accuracy>=0.9"], examples=GOLDEN)
    return GOLDEN.digest


def real(folder: Path) -> Path:
    """A bundle for a two-layer base, made once."""
    if folder not in BUILT:
        import small_models
        import tiny_training
        import torch

        from turret import LoRA, adapters, bases, bundles

        torch.set_num_threads(1)
        base: Any = bases.load(str(small_models.save_base("bert", folder / "bert")), task="classify", num_labels=2)
        task = tiny_training.task_of(tiny_training.recipe(), tiny_training.dataset(), base)
        adapters.attach(base.model, LoRA(init_lora_weights=False), generator=torch.Generator().manual_seed(0))
        tensors, head, method = adapters.extract(base.model)
        info = adapters.BaseInfo(base.id, base.fingerprint, base.family.name)
        bundles.save_bundle(adapters.Adapter(method, tensors, head, info, task.spec()), folder / "real")
        BUILT[folder] = folder / "real"
    return BUILT[folder]


def ready_to_import(where: str, folder: Path) -> Hold:
    store, source = two(where, folder), real(folder)
    for version in store.list("b"):
        store.delete(str(version), force=True)
    store.gc()
    assert source.exists()

    def hold(done: bool) -> None:
        assert len(Store(where).list("b")) == 1 or not done

    return hold


def import_(where: str, folder: Path) -> None:
    from turret import Workspace

    Workspace(where).import_adapter(str(folder / "real"), "b")


def ready_to_export(where: str, folder: Path) -> Hold:
    from turret import bundles

    store = two(where, folder)
    store.put("b", real(folder))
    out = store.root / "out"
    shutil.rmtree(out, ignore_errors=True)

    def hold(done: bool) -> None:
        assert out.exists() or not done
        if out.exists():
            bundles.read_bundle(out)

    return hold


def export(where: str, folder: Path) -> None:
    from turret import Workspace

    Workspace(where).export("b", Store(where).root / "out")


# --- experiments ----------------------------------------------------------------------------------------------------


def begun(root: Path, folder: Path) -> Store:
    """A new experiment on `a` between the two versions: the alias names a@1, and one answer was given."""
    from turret import Workspace

    store, experiment = two(root, folder), Workspace(root).experiment("a")
    with suppress(ExperimentError, NotFound):
        experiment.stop()
    store.promote("a@1", "production")
    experiment.start("a@2", steps=(0.1, 0.5, 0.9), guards=Guards(max_errors=0.1))
    return store


def state(root: Path) -> tuple[str, float, list[str], str]:
    """The state of the experiment, and the alias."""
    from turret import Workspace

    said = Workspace(root).experiment("a").status().as_json()
    return said["state"], said["arms"][1]["share"], [each["verb"] for each in said["history"]], said["alias_names"]


def all_or_nothing(before: tuple[object, ...], after: tuple[object, ...], root: Path) -> Hold:
    """The experiment, its history and the alias are all as before, or all as after."""

    def hold(done: bool) -> None:
        found = state(root)
        shown = (found[0], round(found[1], 6), *found[2:])
        assert shown == after or (shown == before and not done), (shown, done)

    return hold


BEGUN = ("running", 0.1, ["start"], "a@1")


def ready_to_start(root: Path, folder: Path) -> Hold:
    from turret import Workspace

    begun(root, folder)
    Workspace(root).experiment("a").stop()
    return all_or_nothing(("ended", 0.1, ["start", "stop"], "a@1"), ("running", 0.2, ["start"], "a@1"), root)


def ready_to_ramp(root: Path, folder: Path) -> Hold:
    begun(root, folder)
    return all_or_nothing(BEGUN, ("running", 0.5, ["start", "ramp"], "a@1"), root)


def ready_to_outcome(root: Path, folder: Path) -> Hold:
    """The outcome counts once, even if it is sent again after the kill."""
    from turret import Workspace

    begun(root, folder)
    Workspace(root).experiment("a").assign("ann")

    def hold(done: bool) -> None:
        experiment = Workspace(root).experiment("a")
        found = sum(arm["outcomes"] for arm in experiment.status().as_json()["arms"])
        assert found in ((1,) if done else (0, 1))
        assert experiment.outcome(1, unit="ann").status == ("repeated" if found else "counted")
        assert sum(arm["outcomes"] for arm in experiment.status().as_json()["arms"]) == 1

    return hold


def ready_to_stop(root: Path, folder: Path) -> Hold:
    begun(root, folder)
    return all_or_nothing(BEGUN, ("ended", 0.1, ["start", "promote"], "a@2"), root)


def ready_to_settle(root: Path, folder: Path) -> Hold:
    """The candidate has too many errors, so a rollback must move its traffic and the alias that names it."""
    store = begun(root, folder)
    store.promote("a@2", "production")
    with store.database().writing() as connection:
        running = rows.find(connection, "a")
        seen = {(running.id, "control"): ArmHealth(50), (running.id, "candidate"): ArmHealth(50, 50)}
        rows.keep_health(connection, seen, now())
    before = ("running", 0.1, ["start"], "a@2")
    return all_or_nothing(before, ("ended", 0.0, ["start", "drop", "rollback"], "a@1"), root)


TERMS = Terms("error", 0.02, 0.95, 0.9, 500, 400, 2, 400, "x.csv", "test", "sha256:0", "alarm", 604800.0, 0.05)


def watched(where: str, folder: Path) -> tuple[Store, Promise]:
    """A new promise of a@1, whose live texts are far from its examples."""
    store = two(where, folder)
    references, live = input_drift.pack_vectors(np.eye(40)), input_drift.pack_vectors(np.eye(40) + 1)
    with store.database().writing() as connection:
        promise = promises.make(connection, store.resolve("a@1"), TERMS, inputs=references)
        for each in live:
            promises.add_input(connection, promise.id, each)
    return store, promise


def ready_to_watch(where: str, folder: Path) -> Hold:
    """That they have drifted is recorded with its row in the audit log, and what was kept goes with it; or nothing."""
    _, promise = watched(where, folder)

    def hold(done: bool) -> None:
        with Store(where).database().reading() as connection:
            watch = promises.watch_of(connection, promise.id)
            kept = promises.bytes_of_inputs(connection, promise.id)
            told = sum(
                each.verb == "promise drift" and each.at >= promise.created for each in audit.read_actions(connection)
            )
        drifted = watch is not None and watch.drifted is not None
        assert (drifted, kept, told) in (((True, 0, 1),) if done else ((True, 0, 1), (False, 2 * 80 * 40, 0)))

    return hold


def watch(where: str, _: Path) -> None:
    from turret import Workspace

    Workspace(where).settle_promises()


def on_experiment(act: Callable[[Any], object]) -> Callable[[Path, Path], object]:
    def carry_out(root: Path, _: Path) -> object:
        from turret import Workspace

        return act(Workspace(root).experiment("a"))

    return carry_out


VERBS = {
    "put": Verb(ready_to_put, put),
    "promote": Verb(ready_to_promote, lambda where, _: Store(where).promote("a@2", "production")),
    "rollback": Verb(ready_to_rollback, lambda where, _: Store(where).rollback("a")),
    "gate": Verb(ready_to_gate, gate),
    "replay": Verb(ready_to_replay, replay),
    "delete": Verb(ready_to_delete, delete),
    "gc": Verb(ready_to_gc, lambda where, _: Store(where).gc()),
    "begin": Verb(ready_to_begin, lambda where, _: Store(where).new_run("a", "recipe", "data")),
    "migrate": Verb(ready_to_migrate, lambda where, _: Store(where).list()),
    "import": Verb(ready_to_import, import_),
    "export": Verb(ready_to_export, export),
    "start": Verb(ready_to_start, on_experiment(lambda each: each.start("a@2", share=0.2))),
    "ramp": Verb(ready_to_ramp, on_experiment(lambda each: each.ramp())),
    "outcome": Verb(ready_to_outcome, on_experiment(lambda each: each.outcome(1, unit="ann"))),
    "stop": Verb(ready_to_stop, on_experiment(lambda each: each.stop(promote="candidate"))),
    "watch": Verb(ready_to_watch, watch),
    "settle": Verb(ready_to_settle, on_experiment(lambda each: each.settle())),
}
