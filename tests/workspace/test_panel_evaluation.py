"""`evaluate_panel`: each question of a panel on one table, asked in shared passes, with what its threshold decides."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_models

from turret import Workspace
from turret.bases import base as loading
from turret.cli.main import run
from turret.compare.results import wilson
from turret.engine.runner import Runner
from turret.errors import AdapterError, BadArgument, DataError, NotFound
from turret.recipe import Recipe
from turret.store import Question, promises
from turret.tasks import label_probabilities

pytestmark = pytest.mark.slow  # real trainings

TOPICS, TONES = ("bill", "bug", "refund"), ("angry", "calm")
COLUMNS = ["id", "text", "topic", "urgent", "tone", "flags", "stars"]


def tickets(first: int, count: int, wrong: int = 0) -> list[list[str]]:
    """A text and its answers; every `wrong`-th topic is another one. Some rows lack an answer."""
    found = []
    for number in range(first, first + count):
        topic, tone, urgent = TOPICS[number % 3], TONES[number % 2], "yes" if number % 5 < 2 else "no"
        text = f"the {topic} is here, {tone} and {'now' if urgent == 'yes' else 'later'}, number {number}"
        said = TOPICS[(number + 1) % 3] if wrong and number % wrong == 0 else topic
        tone = "" if wrong and number % 7 == 0 else tone
        flags = "|".join(name for name, there in (("late", number % 5 < 2), ("loud", number % 2 == 0)) if there)
        found.append([f"#{number}", text, said, urgent, tone, flags or "[]", str(1 + number % 3)])
    return found


def table(path: Path, content: list[list[str]], columns: list[str] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *content])
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """`topic`, `mail` for two columns, `flags` with several labels and `stars` on one base, and the panel `tickets`."""
    folder = tmp_path_factory.mktemp("panel")
    base = small_models.save_base("bert", folder / "bert")
    workspace = Workspace(folder / "store")
    data = folder / "tickets"
    data.mkdir()
    for split, part in (("train", tickets(0, 60)), ("validation", tickets(100, 60)), ("test", tickets(200, 200, 9))):
        table(data / f"{split}.csv", part)
    labels = {"topic": "topic", "mail": ["urgent", "tone"], "flags": "flags", "stars": "stars"}
    task = {"flags": {"multi_label": True}, "stars": {"kind": "score"}}
    for name, label in labels.items():
        recipe = Recipe(
            name=name,
            base=str(base),
            data={"source": str(data), "text": "text", "label": label},
            task={"max_tokens": 32, **task.get(name, {})},
            train={"epochs": 4, "lr": 5e-3, "evaluate": "never"},
        )
        workspace.train(recipe)
    questions = [
        Question("topic", "topic@1", threshold=0.6),
        Question("urgent", "mail@1#urgent"),
        Question("tone", "mail@1#tone", threshold=0.7),
        Question("late", "flags@1#late"),
        Question("stars", "stars@1"),
    ]
    workspace.panels.create("tickets", questions)
    table(folder / "later.csv", tickets(400, 90, wrong=6))
    return workspace


@pytest.fixture(autouse=True)
def _without_promises(trained: Workspace) -> Iterator[None]:
    yield
    with trained.store.database().writing() as connection:
        for table in (promises.promise_inputs, promises.promise_watches, promises.promises):
            connection.execute(table.delete())


def folder_of(workspace: Workspace) -> Path:
    return Path(workspace.store.root).parent


def later(workspace: Workspace) -> Path:
    return folder_of(workspace) / "later.csv"


def answered(workspace: Workspace, version: str, part: str) -> list[tuple[str, float]]:
    """The most probable label of each text of the table, and its probability, as `predict` gives them."""
    answers = workspace.predict(version, [row[1] for row in tickets(400, 90, wrong=6)])
    every = [label_probabilities(answer, part) for answer in answers]
    return [max(each.items(), key=lambda pair: pair[1]) for each in every]


@pytest.mark.parametrize(
    ("question", "version", "part", "column"),
    [
        ("topic", "topic", "", 2),
        ("urgent", "mail", "urgent", 3),
        ("tone", "mail", "tone", 4),
        ("late", "flags", "late", 3),
    ],
)
def test_each_question_is_judged_as_its_version_answers_alone(trained, question, version, part, column) -> None:
    found = trained.evaluate_panel("tickets", later(trained), columns={"label": {"late": "urgent"}})
    mine = next(each for each in found.questions if each.question == question)
    right = [row[column] for row in tickets(400, 90, wrong=6)]
    pairs = [(given, true) for given, true in zip(answered(trained, version, part), right, strict=True) if true]
    wrong = [given[0] != true for given, true in pairs]
    assert mine.examples == len(pairs)
    assert mine.metrics["accuracy"] == pytest.approx(1 - sum(wrong) / len(pairs))
    assert len(mine.details.mistakes) == sum(wrong)
    assert mine.sureness.ece == pytest.approx(mine.metrics["ece"])
    for threshold in (0.5, 0.6, 0.8):
        decided = [bad for ((_, sure), _), bad in zip(pairs, wrong, strict=True) if sure >= threshold]
        at = mine.sureness.at(threshold)
        assert (at.count, at.wrong) == (len(decided), sum(decided)), threshold


def test_the_rows_of_mistakes_are_those_of_the_table(trained) -> None:
    found = trained.evaluate_panel("tickets", later(trained))
    rows = tickets(400, 90, wrong=6)
    tone = next(each for each in found.questions if each.question == "tone")
    assert tone.examples == 90 - sum(not row[4] for row in rows) < 90
    for each in found.questions:
        for mistake in each.details.mistakes:
            row = rows[mistake.row - 2]  # the header is line 1
            assert row[1] == mistake.text
            assert row[COLUMNS.index(each.column)] == mistake.right != mistake.given


def test_a_version_that_was_trained_on_some_of_the_rows_is_named(trained, tmp_path) -> None:
    mixed = table(tmp_path / "mixed.csv", [*tickets(40, 30), *tickets(200, 10)])
    said = [note for note in trained.evaluate_panel("tickets", mixed).notes if "trained on" in note]
    assert sorted(note.split(",")[0] for note in said) == [
        f"{version} was trained on 20 of 40 examples" for version in ("mail@1", "stars@1", "topic@1")
    ]
    assert not [note for note in trained.evaluate_panel("tickets", later(trained)).notes if "trained on" in note]


def test_the_threshold_is_the_questions_own_or_that_of_the_promise(trained) -> None:
    promise = trained.promise("topic", 0.45, data=str(later(trained)), columns={"label": "topic"}).promise
    trained.panels.create("plain", [Question("topic", "topic@1")])
    own = next(each for each in trained.evaluate_panel("tickets", later(trained)).questions if each.question == "topic")
    assert (own.threshold, own.threshold_of, own.bound) == (0.6, "question", 0.45)
    (found,) = trained.evaluate_panel("plain", later(trained)).questions
    assert (found.threshold, found.threshold_of, found.bound) == (promise.threshold, "promise", 0.45)
    assert (found.decided.count, found.decided.wrong) == (promise.decided, promise.wrong)
    said = found.as_json()["decided"]
    assert (said["low"], said["high"]) == wilson(said["error"], said["answers"])
    trained.panels.create("bare", [Question("urgent", "mail@1#urgent")])
    (every,) = trained.evaluate_panel("bare", later(trained)).questions
    assert (every.threshold, every.threshold_of, every.share) == (None, None, 1.0)


def test_the_base_is_loaded_once_and_the_questions_share_passes(trained, monkeypatch) -> None:
    loads, passes = [], []
    load, compute = loading._read_model, Runner.run

    def counted(runner, prefill, *more):
        passes.append(len({each.slot for each in prefill}))
        return compute(runner, prefill, *more)

    monkeypatch.setattr(loading, "_read_model", lambda *given: loads.append(given) or load(*given))
    monkeypatch.setattr(Runner, "run", counted)
    trained.evaluate_panel("tickets", later(trained), columns={"label": {"late": "urgent"}})
    assert len(loads) == 1
    assert max(passes) > 1, "adapters share passes"  # a row that is encoded late goes into the next one


def test_a_panel_over_two_bases_is_measured_base_by_base(trained, tmp_path) -> None:
    base = small_models.save_base("bert", tmp_path / "other", seed=7)
    recipe = {
        "base": str(base),
        "data": {"source": str(folder_of(trained) / "tickets"), "text": "text", "label": "tone"},
    }
    workspace = trained
    made = workspace.train(Recipe(name="elsewhere", **recipe, train={"max_steps": 2, "evaluate": "never"}))
    workspace.panels.create("both", [Question("topic", "topic@1"), Question("tone", "elsewhere")])
    found = workspace.evaluate_panel("both", later(trained))
    assert [each.version for each in found.questions] == ["topic@1", made.version]
    alone = workspace.evaluate("elsewhere", later(trained))
    assert found.questions[1].metrics["accuracy"] == pytest.approx(alone.metrics["accuracy"])


def test_a_predicate_also_reads_true_and_false(trained, tmp_path) -> None:
    rows = [[row[1], "true" if row[3] == "yes" else "False"] for row in tickets(400, 30)]
    path = table(tmp_path / "booleans.csv", [[text, said.lower()] for text, said in rows], ["text", "urgent"])
    (found,) = trained.evaluate_panel("tickets", path).questions
    same = table(tmp_path / "words.csv", [[row[1], row[3]] for row in tickets(400, 30)], ["text", "urgent"])
    assert found.metrics == trained.evaluate_panel("tickets", same).questions[0].metrics
    assert {each.right for each in found.details.mistakes} <= {"yes", "no"}


@pytest.mark.parametrize(
    ("reference", "columns", "error", "says"),
    [
        ("tickets", {"label": {"mood": "tone"}}, BadArgument, "no question 'mood': panel tickets@1 asks 'topic'"),
        ("tickets", {"label": {"tone": "mood"}}, DataError, "there is no column 'mood'"),
        ("tickets", {"label": "tone"}, DataError, "panel tickets@1 has 5 questions, expected their columns by name"),
        (
            "tickets",
            {"label": {"tone": "stars"}},
            DataError,
            "question 'tone' has no label '2': it has 'angry', 'calm'",
        ),
        ("other", {}, DataError, "has no column for a question of other@1 ('loud'): its columns are 'id', 'text'"),
        ("tickets", {"text_pair": "tone"}, DataError, "data.text_pair does not belong to a panel: name text"),
        ("nobody", {}, NotFound, "no panel 'nobody': there are "),
    ],
)
def test_a_mistake_is_one_line(trained, reference, columns, error, says) -> None:
    trained.panels.create("other", [Question("loud", "flags@1#loud")])
    with pytest.raises(error) as caught:
        trained.evaluate_panel(reference, later(trained), columns=columns)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_version_with_other_labels_than_its_question_is_refused(trained, tmp_path) -> None:
    trained.panels.create("moving", [Question("topic", "topic")])
    data = table(tmp_path / "two.csv", [row[1:3] for row in tickets(0, 60) if row[2] != "refund"], ["text", "topic"])
    base = str(folder_of(trained) / "bert")
    recipe = Recipe(
        name="topic",
        base=base,
        data={"source": str(data), "label": "topic"},
        train={"max_steps": 1, "evaluate": "never"},
    )
    made = trained.train(recipe)
    with pytest.raises(
        AdapterError, match="'bill', 'bug', 'refund', and topic@2 has the labels 'bill', 'bug': make a new"
    ):
        trained.evaluate_panel("moving", later(trained))
    trained.delete(made.version)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def said(trained, capsys):
    def said(*arguments: str, status: int = 0) -> tuple[str, str]:
        assert run([*arguments, "--store", str(trained.store.root)]) == status
        return capsys.readouterr()

    return said


def test_the_command_measures_a_panel_and_writes_a_page_and_a_table(trained, said, tmp_path) -> None:
    page, wrong = tmp_path / "page.html", tmp_path / "wrong.csv"
    out, _ = said(
        "evaluate", "tickets", str(later(trained)), "--label", "late=urgent", "--report", str(page), "--out", str(wrong)
    )
    lines = out.splitlines()
    assert lines[0] == f"tickets@1 on {later(trained)}"
    assert [line.split()[0] for line in lines[2:7]] == ["topic", "urgent", "tone", "late", "stars"]
    assert "0.6, question" in lines[2]
    assert "the report is" in out
    found = trained.evaluate_panel("tickets", later(trained), columns={"label": {"late": "urgent"}})
    with wrong.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found.wrong
    assert rows[0]["question"] == "topic"
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 2 * 5
    assert text.count('role="img" aria-label=') == 2 * 5
    assert text.count("threshold 0.6") == 2  # its line and its name in the plot of topic
    share, error = found.questions[0].share, found.questions[0].decided.error
    assert f'<td class="n">{100 * share:.1f}%</td><td class="n">{100 * error:.1f}%</td>' in text
    assert not re.search(r"(src|href)=\"(?!#)", text), "nothing is loaded from elsewhere"
    assert "<script" not in text
    assert "number 4" in text
    said("evaluate", "tickets", str(later(trained)), "--report", str(page), "--no-texts")
    assert "number 4" not in page.read_text(encoding="utf-8")


def test_json_is_one_object_with_stable_keys(trained, said) -> None:
    out, _ = said("evaluate", "tickets", str(later(trained)), "--json")
    found = json.loads(out)
    assert found.keys() == {"panel", "data", "questions", "left_out", "seconds", "notes"}
    assert found["left_out"] == ["late"]
    assert any(note.startswith("no column for 'late', left out: --label QUESTION=COLUMN") for note in found["notes"])
    keys = {"question", "version", "digest", "column", "type", "examples", "metrics", "threshold", "threshold_of"}
    assert found["questions"][0].keys() == keys | {"bound", "decided", "curve", "details"}
    assert found["questions"][0]["decided"].keys() == {"answers", "share", "wrong", "error", "low", "high"}
    assert found["questions"][0]["curve"][-1]["count"] == 90


def test_a_panel_goes_before_a_version_of_the_same_name(trained, said) -> None:
    """As in /v1/decisions: a panel may be there before an adapter gets its name."""
    trained.panels.create("twice", [Question("topic", "topic@1")])
    base = str(folder_of(trained) / "bert")
    data = {"source": str(folder_of(trained) / "tickets"), "text": "text", "label": "topic"}
    trained.train(Recipe(name="twice", base=base, data=data, train={"max_steps": 1, "evaluate": "never"}))
    out, _ = said("evaluate", "twice", str(later(trained)), "--json")
    assert json.loads(out)["panel"] == "twice@1"
    assert trained.evaluate("twice", str(later(trained))).version == "twice@1", "a version, in Python"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["nobody"], 1, "no adapter named 'nobody': the store has "),
        (["nobody"], 1, "; its panels are "),
        (["tickets@7"], 1, "no panel 'tickets@7': it has '1'"),
        (
            ["tickets", "--label", "urgent", "--label", "tone=tone"],
            2,
            "--label 'urgent': a panel has several questions",
        ),
        (["topic@9"], 1, "no topic@9: topic has"),
    ],
)
def test_a_mistake_of_the_command_is_one_line(trained, said, arguments, status, says) -> None:
    name, *more = arguments
    _, error = said("evaluate", name, str(later(trained)), *more, status=status)
    assert says in error
    assert error.count("\n") == 1
    assert len(error) < 300
    with pytest.raises(NotFound, match=r"tickets@1 is a panel and no adapter"):
        trained.evaluate("tickets", str(later(trained)))
