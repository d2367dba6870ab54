"""Promises of a trained version: chosen on held-out examples, applied to answers, watched on outcomes."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_models
from sqlalchemy import update
from store.bundles import tensors, write_bundle

from turret import Workspace, audit, bases
from turret.access import Access
from turret.cli.main import run
from turret.engine.core import Engine
from turret.errors import AdapterError, BundleError, DataError, NotFound
from turret.experiments.input_drift import MOST_TOKENS, pack_vectors, unpack_vectors
from turret.recipe import Promise as RecipePromise
from turret.recipe import Recipe
from turret.store import Store, promises
from turret.store.promises import LoggedAnswer, Terms
from turret.tasks.calibration import Confidences
from turret.tasks.tokens import Tokens
from turret.timestamp import timestamp
from turret.workspace.promising import PromiseStatus

GOOD, BAD = ("great film", "a pleasure", "quick and great"), ("dull story", "boring and lazy", "a dull bank")
BOTH = ("film and story", "a bank and a pleasure", "lazy and quick")
LONG_AGO = "2026-01-01T00:00:00.000Z"


def rows(first: int, count: int, wrong: int = 0) -> list[tuple[str, str]]:
    """Texts and labels; every `wrong`-th text says both, and its label tells by turns one and the other."""
    found = []
    for number in range(first, first + count):
        words = (GOOD if number % 2 else BAD)[number // 2 % 3]
        label = "good" if number % 2 else "bad"
        if wrong and number % wrong == 0:
            words, label = BOTH[number // wrong % 3], ("bad" if number // wrong % 2 else "good")
        found.append((f"{words}, number {number}", label))
    return found


def table(path: Path, content: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *content])
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """reviews@1 with 240 test examples, of which 8% cannot be known; the recipe of reviews@2 has a promise."""
    folder = tmp_path_factory.mktemp("promise")
    base = small_models.save_base("bert", folder / "bert")
    (folder / "reviews").mkdir()
    for split, part in (("train", rows(0, 40)), ("test", rows(200, 240, wrong=12))):
        table(folder / "reviews" / f"{split}.csv", part)
    workspace = Workspace(folder / "store")
    settings = {"name": "reviews", "base": str(base), "data": str(folder / "reviews"), "task": {"max_tokens": 24}}
    workspace.train(Recipe(**settings, train={"epochs": 4, "lr": 5e-3, "evaluate": "never"}))
    return workspace


@pytest.fixture(autouse=True)
def _fresh(trained: Workspace) -> Iterator[None]:
    """Without the promises of other tests."""
    yield
    with trained.store.database().writing() as connection:
        tables = (promises.outcomes, promises.answers, promises.promise_inputs, promises.promise_watches)
        for each in (*tables, promises.promises):
            connection.execute(each.delete())


def folder_of(workspace: Workspace) -> Path:
    return Path(workspace.store.root).parent


def sent(workspace: Workspace, count: int, wrong: int, first: int = 0, at: str | None = None) -> list[str]:
    """Log answers of the version as a server does, and send outcomes of them; what became of each."""
    version = workspace.resolve("reviews")
    with workspace.store.database().writing() as connection:
        promise = promises.of_version(connection, version)
        moment = at or timestamp(time.time())
        receipts = [f"r{number}" for number in range(first, first + count)]
        logged = [LoggedAnswer(promise.id, each, "good", 0.99, 1, moment) for each in receipts]
        promises.log(connection, logged)
    told = [(each, 0 if place < wrong else "good") for place, each in enumerate(receipts)]
    return [each.status for each in workspace.promise_outcomes(told)]


def test_a_promise_is_chosen_on_the_test_split_and_kept_with_what_it_was_chosen_on(trained: Workspace) -> None:
    made = trained.promise("reviews", 0.05)
    promise = made.promise
    assert (made.version, promise.metric, promise.error, promise.confidence) == ("reviews@1", "error", 0.05, 0.95)
    assert (promise.examples, promise.split, promise.digest) == (240, "test", trained.resolve("reviews").digest)
    test = rows(200, 240, wrong=12)
    answers = trained.predict("reviews", [text for text, _ in test])
    decided = [answer["probabilities"][answer["label"]] >= promise.threshold for answer in answers]
    wrong = [answer["label"] != label for answer, (_, label) in zip(answers, test, strict=True)]
    assert promise.decided == sum(decided) == promise.counted
    assert promise.wrong == sum(a and b for a, b in zip(decided, wrong, strict=True))
    assert made.all_wrong == pytest.approx(sum(wrong) / 240)
    assert 0 < promise.decided < 240
    assert promise.data_digest.startswith("sha256:")
    drawn = made.sureness
    assert drawn is not None
    assert (drawn.answers, drawn.at(None).wrong) == (240, sum(wrong))
    at = drawn.at(promise.threshold)
    assert (at.threshold, at.count, at.wrong) == (promise.threshold, promise.decided, promise.wrong)
    assert trained.promise("reviews").sureness == drawn, "it is kept"
    again = trained.promise("reviews", 0.05).promise
    assert (again.threshold, again.data_digest) == (promise.threshold, promise.data_digest)
    assert trained.promise("reviews").promise == again, "the newest is in force"


def test_answers_below_the_threshold_abstain_and_say_what_they_would_be(trained: Workspace, tmp_path: Path) -> None:
    texts = [text for text, _ in rows(200, 240, wrong=12)]
    assert not any("abstain" in each for each in trained.predict("reviews", texts[:3])), "the control: no promise"
    threshold = trained.promise("reviews", 0.05).promise.threshold
    answers = trained.predict("reviews", texts)
    for each in answers:
        assert each["abstain"] == (each["probabilities"][each["label"]] < threshold)
    abstained = [each["abstain"] for each in answers]
    assert 0 < sum(abstained) < 240
    source = tmp_path / "new.csv"
    table(source, [(text, "") for text in texts])
    done = trained.predict_file("reviews", source, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [each["to a person"] == "yes" for each in found] == abstained
    assert all(each["predicted"] for each in found)
    assert done.to_a_person == sum(abstained)


def test_examples_that_cannot_carry_it_make_no_promise_and_say_how_many_would(trained: Workspace) -> None:
    with pytest.raises(DataError, match=r"240 held-out examples cannot carry at most 0.1% wrong .* about [\d,]+ would"):
        trained.promise("reviews", 0.001)
    with pytest.raises(NotFound, match="reviews@1 has no promise: `turret promise reviews@1 --error"):
        trained.promise("reviews")


def test_rows_of_a_given_file_that_were_trained_on_are_left_out(trained: Workspace, tmp_path: Path) -> None:
    data = table(tmp_path / "more.csv", [*rows(0, 40), *rows(1000, 120)])
    made = trained.promise("reviews", 0.05, data=data)
    assert made.promise.examples == 120
    assert any("40 examples left out" in note for note in made.notes)
    with pytest.raises(DataError, match="no example that training did not use"):
        trained.promise("reviews", 0.05, data=table(tmp_path / "same.csv", rows(0, 40)))


def test_training_data_that_changed_is_not_taken_for_held_out(trained: Workspace) -> None:
    path = folder_of(trained) / "reviews" / "test.csv"
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(before + "a great film,good\n", encoding="utf-8")
        with pytest.raises(DataError, match=r"is not what reviews@1 was trained on.*--data FILE"):
            trained.promise("reviews", 0.05)
    finally:
        path.write_text(before, encoding="utf-8")
    assert trained.promise("reviews", 0.05).promise.split == "test"


def test_outcomes_break_a_promise_and_the_audit_log_says_so_once(trained: Workspace) -> None:
    trained.promise("reviews", 0.05)
    assert trained.promise("reviews").standing.state == "cannot be known"
    assert set(sent(trained, 60, 0)) == {"counted"}
    held = trained.promise("reviews")
    assert (held.standing.state, held.answers, held.decided, held.standing.outcomes) == ("holds so far", 60, 60, 60)
    sent(trained, 40, 20, first=60)
    (broken,) = trained.settle_promises()
    assert broken.standing.state == "broken"
    assert len(broken.done) == 1
    (again,) = trained.settle_promises()
    assert (again.done, again.standing.state, again.breaks) == ((), "broken", 1)
    assert Workspace(trained.store.root).promise("reviews").standing.state == "broken"
    with trained.store.database().reading() as connection:
        verbs = [(each.verb, each.what) for each in audit.read_actions(connection)]
    assert verbs[0] == ("promise broken", "reviews@1")
    assert verbs[1] == ("promise", "reviews@1")


def test_a_broken_promise_becomes_stricter_if_asked(trained: Workspace) -> None:
    trained.promise("reviews", 0.05, when_broken="stricter")
    sent(trained, 60, 40)
    (found,) = trained.settle_promises()
    assert "every answer goes to a person now" in found.done[1]
    assert trained.predict("reviews", "great film")["abstain"]
    status = trained.promise("reviews")
    assert (status.promise.split, status.breaks) == ("outcomes", 1)
    assert status.sureness is not None
    assert status.sureness.answers == status.promise.examples > 0, "of the outcomes that it was chosen from"


def test_a_broken_promise_rolls_back_if_asked(trained: Workspace, tmp_path: Path) -> None:
    first = trained.resolve("reviews@1")
    bundle = write_bundle(tmp_path, tensors(1), said={"task": dict(first.task)})
    other = trained.store.put("reviews", bundle)
    try:
        trained.promote("reviews@1", "production")
        with trained.store.database().writing() as connection:
            terms = replace(_terms(), when_broken="rollback")
            promises.make(connection, other, terms)
        trained.store.promote(str(other), "production")
        sent(trained, 40, 40)
        (found,) = trained.settle_promises()
        assert found.done[1] == "reviews@production names reviews@1 again"
        assert str(trained.resolve("reviews")) == "reviews@1"
        assert trained.settle_promises()[0].done == ()
    finally:
        trained.store.delete(str(other), force=True)


def test_the_status_of_each_outcome(trained: Workspace) -> None:
    trained.promise("reviews", 0.05)
    assert sent(trained, 1, 0) == ["counted"]
    assert [each.status for each in trained.promise_outcomes([("r0", 0)])] == ["repeated"]
    assert [each.status for each in trained.promise_outcomes([("none", 1), ("", 1), ("x\n", 1)])] == ["unknown"] * 3
    assert sent(trained, 1, 0, first=1, at=LONG_AGO) == ["late"]
    with trained.store.database().writing() as connection:
        promise = promises.of_version(connection, trained.resolve("reviews"))
        now = timestamp(time.time())
        promises.log(connection, [LoggedAnswer(promise.id, "low", "good", 0.5, 0, now)])
        promises.log(connection, [LoggedAnswer(promise.id, "odd", "good", 0.99, 1, now)] * 2)
    assert [each.status for each in trained.promise_outcomes([("low", "bad"), ("odd", "middling")])] == [
        "noted",
        "refused",
    ]
    assert trained.promise("reviews").standing.outcomes == 1
    trained.promise("reviews", 0.05)
    assert [each.status for each in trained.promise_outcomes([("odd", 1)])] == ["late"], "a newer promise is in force"


def test_the_misses_of_a_label_need_the_right_label(trained: Workspace) -> None:
    made = trained.promise("reviews", 0.2, metric="misses:bad")
    assert made.promise.counted == sum(label == "bad" for _, label in rows(200, 240, wrong=12))
    with trained.store.database().writing() as connection:
        now = timestamp(time.time())
        logged = [LoggedAnswer(made.promise.id, f"m{n}", "good", 0.99, n % 2, now) for n in range(4)]
        promises.log(connection, logged)
    told = [("m0", "bad"), ("m1", "bad"), ("m2", "good"), ("m3", 0)]
    assert [each.status for each in trained.promise_outcomes(told)] == ["counted", "counted", "noted", "noted"]
    standing = trained.promise("reviews").standing
    assert (standing.outcomes, standing.wrong) == (2, 1), "m0 was not decided, so it is no miss"


def test_missing_outcomes_leave_open_whether_it_holds(trained: Workspace) -> None:
    trained.promise("reviews", 0.05)
    sent(trained, 100, 0)
    assert trained.promise("reviews").standing.state == "holds so far"
    with trained.store.database().writing() as connection:
        promise = promises.of_version(connection, trained.resolve("reviews"))
        promises.log(connection, [LoggedAnswer(promise.id, f"s{n}", "good", 0.99, 1, LONG_AGO) for n in range(40)])
    found = trained.promise("reviews").standing
    assert found.missing == 1.0, "of the answers whose time to live is over"
    assert found.state == "cannot be known"


def test_another_tenant_has_no_part_in_it(trained: Workspace) -> None:
    trained.promise("reviews", 0.05)
    sent(trained, 1, 0)
    digest = trained.resolve("reviews").digest
    other = trained.with_access(Access("legal"))
    with other.store.database().reading() as connection:
        assert promises.of_digest(connection, digest) is None
    assert [each.status for each in other.promise_outcomes([("r0", 0)])] == ["unknown"]
    assert list(other.settle_promises()) == []
    limited = trained.with_access(Access(adapters=("films-*",)))
    with limited.store.database().reading() as connection:
        assert promises.of_digest(connection, digest) is None
        whole = trained.store.database()
    with whole.reading() as connection:
        assert promises.of_digest(connection, digest) is not None, "the control"


@pytest.mark.slow
def test_a_recipe_with_a_promise_trains_a_version_that_keeps_it(trained: Workspace, tmp_path: Path) -> None:
    recipe = Recipe.from_toml(str(trained.resolve("reviews").lineage["recipe"]))
    other = Workspace(tmp_path / "store")
    said = []
    for name, promise in (
        ("kept", {"error": 0.05, "when_broken": "rollback"}),
        ("bold", {"error": 0.001}),
        ("reviews", None),
    ):
        found = other.train(recipe.model_copy(update={"name": name, "promise": promise and RecipePromise(**promise)}))
        said.append(found.warnings)
    assert said[0] == said[2] == []
    assert "the version makes no promise: bold: 240 held-out examples cannot carry" in said[1][0]
    kept = other.promise("kept").promise
    assert (kept.error, kept.when_broken, kept.examples, kept.split) == (0.05, "rollback", 240, "test")
    assert kept.threshold == trained.promise("reviews", 0.05).promise.threshold
    assert other.resolve("kept").lineage["promise"]["threshold"] == kept.threshold
    assert other.promise("kept").sureness == trained.promise("reviews", 0.05).sureness
    assert other.promise("kept").inputs.state == "alike so far", "its training kept embeddings"
    assert other.resolve("reviews").digest == trained.resolve("reviews").digest, "the control: nothing else changed"


def test_a_recipe_whose_promise_makes_no_sense_is_refused_before_the_training(trained: Workspace) -> None:
    recipe = Recipe.from_toml(str(trained.resolve("reviews").lineage["recipe"]))
    with pytest.raises(DataError, match="expected one of 'bad', 'good'"):
        trained.plan(recipe.model_copy(update={"promise": RecipePromise(error=0.05, metric="misses:awful")}))


def live(workspace: Workspace, texts: list[str]) -> None:
    """Keep embeddings of live texts, as a server does."""
    base = bases.load(str(folder_of(workspace) / "bert"))
    with Engine(base, None) as engine, workspace.store.database().writing() as connection:
        promise = promises.of_version(connection, workspace.resolve("reviews"))
        for text in texts:
            row = Tokens(base.tokenizer).row(text, min(MOST_TOKENS, engine.longest))
            vector = engine.submit("embed", row, None).result()["embedding"]
            assert promises.add_input(connection, promise.id, pack_vectors([vector])[0])


def test_a_promise_keeps_embeddings_of_its_examples_by_the_bare_base(trained: Workspace) -> None:
    made = trained.promise("reviews", 0.05)
    assert made.notes == ()
    with trained.store.database().reading() as connection:
        watch = promises.watch_of(connection, made.promise.id)
        assert watch is not None
        found = promises.vectors_of(connection, watch, promises.REFERENCE_ROUND)
    kept = unpack_vectors([row for _, row in found], watch.size)
    assert watch.examples == len(kept) > 100
    assert np.linalg.norm(kept, axis=1) == pytest.approx(1, abs=1e-3)
    live(trained, [text for text, _ in rows(200, 240, wrong=12)][:3])
    with trained.store.database().reading() as connection:
        rest = unpack_vectors([row for _, row in promises.vectors_of(connection, watch, 1)], watch.size)
    assert (rest @ kept.T).max(1) == pytest.approx(1, abs=1e-3), "a server embeds the same texts alike"


def test_live_texts_that_are_unlike_the_examples_warn_and_the_promise_stays(
    trained: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    promise = trained.promise("reviews", 0.05).promise
    store = ["--store", str(trained.store.root)]
    live(trained, [text for text, _ in rows(1000, 12)])
    assert run(["promise", "reviews", *store]) == 0
    assert "like the held-out ones so far, 12 texts seen" in capsys.readouterr().out
    live(trained, [f"{number} bank lazy {number}" for number in range(100)])
    assert trained.promise("reviews").inputs.state == "alike so far", "only settling records"
    server = Workspace(trained.store.root)  # other tests have removed promises, whose ids come again
    (found,) = server.settle_promises()
    assert (found.inputs.state, len(found.done)) == ("drifted", 1)
    (again,) = server.settle_promises()
    assert (again.inputs.state, again.done, again.promise) == ("drifted", (), promise)
    assert run(["promise", "reviews", *store]) == 0
    assert "have drifted since 20" in capsys.readouterr().out
    assert run(["promise", "reviews", "--json", *store]) == 0
    said = json.loads(capsys.readouterr().out)["inputs"]
    assert (said["state"], said["evidence"] >= said["needed"]) == ("drifted", True)
    assert trained.promise("reviews", 0.05).inputs.state == "alike so far", "a new promise begins anew"


def test_a_stricter_promise_was_chosen_on_outcomes_whose_texts_nobody_kept(trained: Workspace) -> None:
    trained.promise("reviews", 0.05, when_broken="stricter")
    sent(trained, 60, 40)
    trained.settle_promises()
    assert trained.promise("reviews").inputs.state == "not watched"


def _terms() -> Terms:
    return Terms("error", 0.02, 0.95, 0.9, 500, 400, 2, 400, "x.csv", "test", "sha256:0", "alarm", 604800.0, 0.05)


def test_a_promise_in_a_bundle_is_in_force_once_it_is_stored(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    said = {"task": {"kind": "classify", "labels": ["a", "b"]}, "lineage": {"promise": vars(_terms())}}
    version = store.put("news", write_bundle(tmp_path / "bundles", tensors(1), said=said))
    with store.database().reading() as connection:
        found = promises.of_digest(connection, version.digest)
    assert found is not None
    assert (found.threshold, found.examples, found.metric) == (0.9, 500, "error")
    store.put("news", write_bundle(tmp_path / "bundles", tensors(1), said=said))
    with store.database().reading() as connection:
        assert [each.id for each in promises.in_force(connection)] == [found.id]
    for broken in ({"error": 0.02}, vars(_terms()) | {"error": 2.0}, 3):
        said["lineage"] = {"promise": broken}
        with pytest.raises(BundleError, match="the bundle's promise cannot be read"):
            store.put("news", write_bundle(tmp_path / "bundles", tensors(2), said=said))
    drawn = Confidences([0.5, 0.9], (), [False, True]).sureness().to_json()
    for broken in (
        3,
        {"bins": []},
        drawn | {"curve": [[0.9, 1]]},
        drawn | {"curve": [[0.9, "1", 0]]},
        drawn | {"curve": [[0.9, 1, 2]]},
        drawn | {"bins": "<b>"},
    ):
        said["lineage"] = {"promise": vars(_terms()) | {"sureness": broken}}
        with pytest.raises(BundleError, match="what the bundle's promise was chosen on cannot be read"):
            store.put("news", write_bundle(tmp_path / "bundles", tensors(2), said=said))
    assert [str(each) for each in store.list()] == ["news@1"]
    said["lineage"] = {"promise": vars(_terms()) | {"sureness": drawn}}
    other = store.put("news", write_bundle(tmp_path / "bundles", tensors(2), said=said))
    with store.database().reading() as connection:
        kept = promises.sureness_of(connection, promises.of_version(connection, other))
        assert promises.sureness_of(connection, found) is None, "the control: a bundle without it"
    assert kept is not None
    assert kept.to_json() == drawn


def test_a_version_whose_answers_are_no_single_label_cannot_promise(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "store")
    for name, task in (
        ("tags", {"kind": "classify", "labels": ["a", "b"], "multi_label": True}),
        ("many", {"kind": "questions", "labels": ["q: a", "q: b"]}),
        ("stories", {"kind": "generate"}),
    ):
        workspace.store.put(name, write_bundle(tmp_path / "bundles", tensors(len(name)), said={"task": task}))
        with pytest.raises(AdapterError, match=f"{name}@1 cannot make a promise: its answers are not one label"):
            workspace.promise(name, 0.02)


def test_the_command_says_what_it_promises_and_what_that_costs(
    trained: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", str(trained.store.root)]
    assert run(["promise", "reviews", "--error", "5%", "--confidence", "95%", *store]) == 0
    said = capsys.readouterr().out
    assert "reviews@1 promises at most 5% wrong among what it decides, at 95% confidence" in said
    assert "an answer with a lower probability goes to a person" in said
    assert "% of 240 examples" in said
    assert "without it" in said
    assert run(["promise", "reviews", "--error", "0.1%", *store]) == 1
    wrong = capsys.readouterr().err
    assert wrong.count("\n") == 1
    assert len(wrong) < 320
    assert run(["promise", "reviews", "--error", "5%", "--metric", "misses:awful", *store]) == 1
    assert "expected one of 'bad', 'good'" in capsys.readouterr().err
    sent(trained, 2, 0)
    with trained.store.database().writing() as connection:
        connection.execute(promises.outcomes.delete())
    (tmp_path / "outcomes.csv").write_text("receipt,value\nr0,good\nr1,bad\nr9,good\n", encoding="utf-8")
    assert run(["promise", "reviews", "--outcomes", str(tmp_path / "outcomes.csv"), "--json", *store]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["status"] for each in found["outcomes"]] == ["counted", "counted", "unknown"]
    assert (found["standing"]["outcomes"], found["standing"]["wrong"]) == (2, 1)


def test_both_statuses_are_json(trained: Workspace) -> None:
    made = trained.promise("reviews", 0.05)
    assert isinstance(made, PromiseStatus)
    assert json.loads(json.dumps(made.as_json()))["threshold"] == made.promise.threshold


def test_an_older_outcome_does_not_count_for_a_changed_time(trained: Workspace) -> None:
    """The time to live is the promise's own."""
    trained.promise("reviews", 0.05, outcome_ttl=3600)
    assert sent(trained, 1, 0, at=timestamp(time.time() - 7200)) == ["late"]
    with trained.store.database().writing() as connection:
        connection.execute(update(promises.promises).values(outcome_ttl=86400.0))
    assert [each.status for each in trained.promise_outcomes([("r0", 1)])] == ["counted"]


def test_a_store_by_url_keeps_promises_as_a_folder_does(new_url: Callable[[str], str], tmp_path: Path) -> None:
    workspace = Workspace(new_url(str(tmp_path / "files")))
    task = {"kind": "classify", "labels": ["bad", "good"]}
    version = workspace.store.put("reviews", write_bundle(tmp_path, tensors(1), said={"task": task}))
    with workspace.store.database().writing() as connection:
        promises.make(connection, version, replace(_terms(), when_broken="stricter"))
    assert sent(workspace, 60, 40) == ["counted"] * 60
    assert sent(workspace, 1, 1, at=LONG_AGO) == ["repeated"], "the same receipt"
    (found,) = workspace.settle_promises()
    assert (found.standing.state, found.standing.wrong, len(found.done)) == ("broken", 40, 2)
    status = workspace.promise("reviews")
    assert (status.breaks, status.promise.threshold, status.answers) == (1, promises.NEVER, 0)
