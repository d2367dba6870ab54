"""Tasks of a head, of one text or two, go through everything: columns, training, proof, answers, server, exchange."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from axes.points import answered_together, served
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from turret.cli.main import run
from turret.errors import DataError
from turret.recipe import Recipe
from turret.workspace import Workspace
from turret.workspace.predicted_file import write_suggestions

pytestmark = pytest.mark.slow

WORDS = ("dull boring story", "lazy bank story", "a story", "a quick pleasure", "great film")
TABLES: dict[str, tuple[tuple[str, ...], Any]] = {  # task -> the names of its columns, and a row's cells by number
    "text_pairs": (
        ("premise", "hypothesis", "label"),
        lambda n: (WORDS[n % 5], WORDS[n * 3 % 5], "same" if n % 5 == n * 3 % 5 else "other"),
    ),
    "regression": (("sentence1", "sentence2", "score"), lambda n: (WORDS[n % 5], WORDS[n * 3 % 5], (n * 3 % 5) / 2)),
    "score": (("text", "stars"), lambda n: (WORDS[n % 5], 1 + n % 5)),
    "token_classification": (("tokens", "tags"), lambda n: tagged(WORDS[n % 5], WORDS[n % 3])),
    "questions": (("text", "topic", "urgent"), lambda n: (WORDS[n % 5], *answered(n % 5, n))),
    "rerank": (("query", "passage", "label"), lambda n: (WORDS[n % 5], WORDS[n % 7 % 5], int(n % 5 == n % 7 % 5))),
}


def answered(text: int, row: int) -> tuple[str, str]:
    """What a text is about and whether it is urgent, which some rows do not say."""
    return ("bank", "film")[text in (2, 3, 4)], ("", "yes", "no")[row % 7 and 1 + text % 2]


def tagged(before: str, after: str) -> tuple[str, str]:
    """Words and their tags: a bank between others."""
    tags = ["O"] * len(before.split()) + ["O", "B-ORG"] + ["O"] * len(after.split())
    return f"{before} by bank {after}", " ".join(tags)


METRICS = {
    "text_pairs": {"accuracy", "macro_f1", "loss", "ece", "per_class"},
    "regression": {"nearness", "mae", "rmse", "pearson", "spearman", "loss"},
    "score": {"nearness", "mae", "quadratic_kappa", "spearman", "accuracy", "macro_f1", "loss", "ece", "per_class"},
    "token_classification": {"text_f1", "precision", "recall", "f1", "loss", "ece", "per_class"},
    "questions": {"accuracy", "macro_f1", "loss", "ece", "per_question", "per_class"},
    "rerank": {"accuracy", "loss", "mrr", "ndcg", "ece"},
}
ONE_TEXT = ("score", "token_classification", "questions")
DATA = {"questions": {"label": ["topic", "urgent"]}}  # what no name of a column says
TRAINED = {"token_classification": {"epochs": 12, "lr": 1e-2}}  # until it marks a bank
ERRORS = {
    "text_pairs": "The most confident wrong answers",
    "regression": "The largest residuals",
    "score": "The largest errors",
    "rerank": "The worst pairs",
    "token_classification": "The texts with the most wrong spans",
    "questions": "The texts with the most wrong answers",
}
LEARNT = ("text_pairs", "score", "questions")  # whose versions are right on every row that they trained on
PAIRS = [("a great film", "a dull story about the bank"), ("quick", "a lazy fox")]


@dataclass
class House:
    """A store with a version of each task on one base."""

    folder: Path
    base: Path
    workspace: Workspace
    recipes: dict[str, Recipe]
    metrics: dict[str, Any]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    base = small_models.save_base("bert", folder / "bert")
    workspace, recipes, metrics = Workspace(folder / "store"), dict[str, Recipe](), dict[str, Any]()
    for kind, (names, cells) in TABLES.items():
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(names)
        table.writerows(cells(row) for row in range(70))
        (folder / f"{kind}.csv").write_text(text.getvalue())
        task = {"kind": kind} if kind == "score" else {}
        recipes[kind] = Recipe(
            name=kind.replace("_", "-"),
            base=str(base),
            data={"source": str(folder / f"{kind}.csv"), "validation": 20} | DATA.get(kind, {}),
            task=task,
            train={"epochs": 3, "lr": 1e-3, "batch_size": 8} | TRAINED.get(kind, {}),
        )
        result = workspace.train(recipes[kind])
        assert result.timing["proof_seconds"] > 0  # what fails it is not stored
        metrics[kind] = result.metrics["test"]
    return House(folder, base, workspace, recipes, metrics)


def asked(kind: str) -> list[Any]:
    return [first for first, _ in PAIRS] if kind in ONE_TEXT else list(PAIRS)


@pytest.mark.parametrize("kind", TABLES)
def test_columns_are_recognised_and_the_version_knows_its_task(house: House, kind: str) -> None:
    spec = house.workspace.resolve(house.recipes[kind].name).task
    assert spec["kind"] == kind
    assert bool(spec.get("pairs")) == (kind not in ONE_TEXT)
    assert set(house.metrics[kind]) == METRICS[kind]


def test_a_text_without_a_word_has_no_spans(house: House) -> None:
    name = house.recipes["token_classification"].name
    found = house.workspace.predict(name, ["", " ", "a story by bank great film"])
    assert [each["spans"] for each in found[:2]] == [[], []]
    assert found[2]["spans"] == house.workspace.predict(name, ["a story by bank great film"])[0]["spans"] != []
    assert house.workspace.predict(name, [""])[0]["spans"] == []  # no row of the pass has a word


@pytest.mark.parametrize("kind", TABLES)
def test_answers_equal_those_of_transformers_on_the_merged_model(house: House, kind: str, tmp_path: Path) -> None:
    name = house.recipes[kind].name
    house.workspace.export(name, tmp_path / "merged", form="merged")
    auto = AutoModelForTokenClassification if kind == "token_classification" else AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    known = AutoTokenizer.from_pretrained(tmp_path / "merged")
    task = house.workspace.resolve(name).task
    answers = house.workspace.predict(name, asked(kind))
    for text, answer in zip(asked(kind), answers, strict=True):
        inputs = known(*text, return_tensors="pt") if isinstance(text, tuple) else known(text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0].double()
        if kind == "token_classification":
            require_the_spans_of(logits, known(text, return_offsets_mapping=True)["offset_mapping"], answer, text)
            continue
        if kind == "text_pairs":
            logits = logits / task.get("calibration", {"temperature": 1.0})["temperature"]
            expected = dict(zip(task["labels"], logits.softmax(-1).tolist(), strict=True))
            assert answer["probabilities"] == pytest.approx(expected, abs=2e-2)
        elif kind == "regression":
            assert answer["value"] == pytest.approx(float(logits[0]) * task["deviation"] + task["mean"], abs=2e-2)
        elif kind == "questions":
            for question, ends in {"topic": slice(0, 2), "urgent": slice(2, 4)}.items():
                expected = dict(
                    zip(
                        (each.partition(": ")[2] for each in task["labels"][ends]),
                        logits[ends].softmax(-1).tolist(),
                        strict=True,
                    )
                )
                assert answer["answers"][question]["probabilities"] == pytest.approx(expected, abs=2e-2)
                assert answer["answers"][question]["label"] == max(expected, key=expected.__getitem__)
        elif kind == "rerank":
            assert answer["value"] == pytest.approx(float(logits[0].sigmoid()), abs=2e-2)
        else:
            assert answer["label"] in task["labels"]
            assert sum(answer["probabilities"].values()) == pytest.approx(1.0)


def require_the_spans_of(logits: torch.Tensor, offsets: list[tuple[int, int]], answer: Any, text: str) -> None:
    """The tags of the first token of each word, O, B-ORG and I-ORG, as the answer has them."""
    begins = {0} | {place + 1 for place, letter in enumerate(text) if letter == " "}
    words = {start: place for place, (start, end) in enumerate(offsets) if start in begins and end > start}
    tags = {start: int(logits[place].argmax()) for start, place in words.items()}
    inside = {start for each in answer["spans"] for start in tags if each["start"] <= start < each["end"]}
    assert {start for start, tag in tags.items() if tag} == inside
    for each in answer["spans"]:
        own = [words[start] for start in tags if each["start"] <= start < each["end"]]
        chances = [float(logits[place].softmax(-1).max()) for place in own]
        assert each["probability"] == pytest.approx(sum(chances) / len(chances), abs=2e-2)


def test_one_mixed_pass_answers_as_each_version_alone_and_segments_matter(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = house.workspace.engine(str(house.base), dtype="float32")
    names = [recipe.name for recipe in house.recipes.values()]
    for name in names:
        engine.warm(name)
    questions = [
        ("classify", each, name) for kind, name in zip(house.recipes, names, strict=True) for each in inputs(kind)
    ]
    together, sizes = answered_together(engine, questions, monkeypatch)
    assert sizes == [len(questions)]
    alone = [engine.submit(*each).result() for each in questions]
    for one, other in zip(together, alone, strict=True):
        if "value" in one:
            assert one["value"] == pytest.approx(other["value"], abs=1e-5)
        elif "answers" in one:
            for question, own in one["answers"].items():
                assert own["probabilities"] == pytest.approx(other["answers"][question]["probabilities"], abs=1e-5)
        elif "spans" in one:
            assert [each["start"] for each in one["spans"]] == [each["start"] for each in other["spans"]]
        else:
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    row = engine._prompts._base.tokenizer(*PAIRS[0])
    ids, types = row["input_ids"], row["token_type_ids"]
    with pytest.raises(DataError, match=r"give two texts as TextPair\(a, b\)"):
        engine.submit("classify", PAIRS[0], names[0])
    with_types = engine.submit("classify", list(zip(ids, types, strict=True)), names[0]).result()
    without = engine.submit("classify", ids, names[0]).result()
    assert with_types["probabilities"] == pytest.approx(together[0]["probabilities"], abs=1e-5)
    assert without["probabilities"] != pytest.approx(together[0]["probabilities"], abs=1e-4)
    engine.close()


def inputs(kind: str) -> list[Any]:
    from turret.workspace.reading import inputs_in

    return inputs_in(asked(kind))


def test_the_server_answers_labels_numbers_and_relevances(house: House) -> None:
    engine = house.workspace.engine(str(house.base), dtype="float32")
    pairs = [{"text": first, "text_pair": second} for first, second in PAIRS]
    with served(house.workspace, engine) as client:
        ask = lambda model, given: client.post("/v1/classify", json={"model": model, "input": given})
        said = ask("text-pairs", pairs).json()["data"]
        expected = house.workspace.predict("text-pairs", PAIRS)
        assert [each["label"] for each in said] == [each["label"] for each in expected]
        (number,) = ask("regression", pairs[0]).json()["data"]
        assert number["value"] == pytest.approx(house.workspace.predict("regression", PAIRS[:1])[0]["value"], abs=2e-2)
        assert "label" not in number or number["label"] is None
        scores = {"model": "rerank", "text_1": PAIRS[0][0], "text_2": [PAIRS[0][1], "a great film"]}
        whole = client.post("/v1/score", json=scores).json()
        found = whole["data"]
        own = house.workspace.predict("rerank", [PAIRS[0], (PAIRS[0][0], "a great film")])
        assert [each["score"] for each in found] == pytest.approx([each["value"] for each in own], abs=2e-2)
        ranked = client.post(
            "/v1/rerank", json={"model": "rerank", "query": PAIRS[0][0], "documents": scores["text_2"]}
        ).json()["results"]
        best = max(range(2), key=lambda place: found[place]["score"])
        assert ranked[0]["index"] == best
        assert ranked[0]["relevance_score"] == pytest.approx(found[best]["score"])
        alike = client.post("/v1/score", json=scores | {"model": "text-pairs"}).json()  # classes give no number
        assert (alike["scoring"], whole["scoring"]) == ("cosine", "adapter")
        cosine = alike["data"]
        assert [each["score"] for each in cosine] != [each["score"] for each in found]
        refused = ask("text-pairs", ["one text"])
        assert (refused.status_code, "reads two texts, and one was given" in refused.text) == (400, True), refused.text
        (marked,) = ask("token-classification", "a story by bank a story").json()["data"]
        (own,) = house.workspace.predict("token-classification", ["a story by bank a story"])
        assert [(each["start"], each["end"]) for each in marked["spans"]] == [(11, 15)]
        assert [each["label"] for each in own["spans"]] == ["ORG"]
        (said,) = ask("questions", "a great film").json()["data"]
        (own,) = house.workspace.predict("questions", ["a great film"])
        assert {question: each["label"] for question, each in said["answers"].items()} == {
            question: each["label"] for question, each in own["answers"].items()
        }
        assert list(said["answers"]) == ["topic", "urgent"]
        refused = ask("score", pairs)
        assert (refused.status_code, "give one text" in refused.text) == (400, True), refused.text


@pytest.mark.parametrize("kind", TABLES)
def test_rows_to_label_are_suggested_where_answers_have_probabilities(
    house: House, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, source = house.recipes[kind].name, str(house.recipes[kind].data.source)
    if kind not in ("text_pairs", "score"):
        assert run(["suggest", name, source, "--store", str(house.workspace.store.root)]) == 1
        assert f"has the task {kind}, whose answers have no probability" in capsys.readouterr().err
        return
    found = house.workspace.suggest(name, source, most=2)
    texts = TABLES[kind][0][:-1]
    assert (found.columns, found.label) == (texts, TABLES[kind][0][-1])
    assert [len(each.texts) for each in found.suggestions] == [len(texts)] * 2
    written = write_suggestions(found, tmp_path / "label.jsonl")
    assert written.columns == ("row", *texts, found.label, "predicted", "confidence")


def other_answers(source: Path, to: Path) -> str:
    """A table in which every row has the answers of the row before it, so that a version is wrong on some."""
    with source.open(newline="") as lines:
        names, *rows = csv.reader(lines)
    inputs = sum(name in ("text", "premise", "hypothesis") for name in names)
    with to.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(names)
        table.writerows(
            [*row[:inputs], *before[inputs:]] for row, before in zip(rows, rows[-1:] + rows[:-1], strict=True)
        )
    return str(to)


@pytest.mark.parametrize("kind", TABLES)
def test_the_command_line_answers_evaluates_and_writes_a_file(
    house: House, kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name, store = house.recipes[kind].name, ["--store", str(house.workspace.store.root)]
    texts = [text for pair in PAIRS for text in pair]
    assert run(["predict", name, *texts, *store, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert len(answers) == (4 if kind in ONE_TEXT else 2)
    source = str(house.recipes[kind].data.source)
    judged = other_answers(Path(source), tmp_path / "other.csv") if kind in LEARNT else source
    page = tmp_path / "page.html"
    assert run(["evaluate", name, judged, *store, "--json", "--report", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["metrics"]) == METRICS[kind]
    html = page.read_text()
    assert ("On the dashed line the answer is right" in html) == (kind in ("regression", "rerank"))
    assert ERRORS[kind] in html
    mistakes = found["details"]["mistakes"]
    assert mistakes
    assert all(("text_pair" in each) == (kind not in ONE_TEXT) for each in mistakes)
    for called in {"rerank": ("query", "passage")}.get(kind, () if kind in ONE_TEXT else ("first text", "second text")):
        assert f"<dt>{called}</dt>" in html
    assert run(["evaluate", house.recipes[kind].name, judged, *store]) == 0
    assert (
        f"{ERRORS[kind][0].lower()}{ERRORS[kind][1:]}, {min(5, found['details']['wrong'])}" in capsys.readouterr().out
    )
    assert run(["predict", name, source, "--out", str(tmp_path / "out.jsonl"), *store]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 70
    number = isinstance(rows[0].get("predicted"), float)
    assert number == (kind in ("regression", "rerank"))
    if kind == "questions":
        assert {row["predicted_topic"] for row in rows} == {"bank", "film"}
        assert all(0.5 <= row["probability_urgent"] <= 1 for row in rows)
    if kind not in ONE_TEXT:
        capsys.readouterr()
        assert run(["predict", name, "one text", *store]) == 1
        assert "this version reads two texts together, given 1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", TABLES)
def test_a_comparison_judges_each_tasks_own_score(house: House, kind: str) -> None:
    methods = "linear,lora" if kind == "text_pairs" else "base,lora"
    found = house.workspace.compare(house.recipes[kind], methods=methods, against="lora", seeds=1)
    assert found.task == kind
    row = next(row for row in found.rows if row.spec == "lora")
    metrics = house.workspace.resolve(row.versions[0]).metrics["test"]
    assert row.score.mean == pytest.approx(100 * metrics[found.metric], abs=0.6)


@pytest.mark.parametrize("kind", TABLES)
def test_export_and_import_give_the_same_version(house: House, kind: str, tmp_path: Path) -> None:
    name = house.recipes[kind].name
    house.workspace.export(name, tmp_path / "peft")
    again = Workspace(tmp_path / "store")
    assert again.import_adapter(tmp_path / "peft", name).digest == house.workspace.resolve(name).digest
    assert again.predict(name, asked(kind)) == house.workspace.predict(name, asked(kind))
