"""Promoting replays the alias's golden examples with the version and names the first wrong answer."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import small_models
import tiny_training
import torch

from turret import LoRA, Workspace, adapters, bases, bundles
from turret.errors import DataError, GateFailed
from turret.store import Golden
from turret.workspace import answering, promoting
from turret.workspace.promoting import read_examples

GOOD, BAD = ("great film", "a pleasure", "quick and great"), ("dull story", "boring and lazy", "a dull bank")


def table(path: Path, heads: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([heads, *rows])
    return path


def made(name: str, family: str, kind: str, folder: Path) -> Path:
    """The bundle of a random LoRA for a task of that kind, on a small base."""
    base = bases.load(
        str(small_models.save_base(family, folder / family)),
        task="classify" if kind == "classify" else "generate",
        num_labels=2 if kind == "classify" else None,
    )
    data = tiny_training.dataset(kind)
    recipe = tiny_training.recipe(task__max_tokens=40, task__max_target_tokens=8)
    spec = tiny_training.task_of(recipe, data, base).spec()
    adapters.attach(base.model, LoRA(init_lora_weights=False), generator=torch.Generator().manual_seed(0))
    tensors, head, method = adapters.extract(base.model)
    head = {key: value + 0.1 * place for place, (key, value) in enumerate(head.items())}
    info = adapters.BaseInfo(base.id, base.fingerprint, base.family.name)
    bundles.save_bundle(
        adapters.Adapter(method, tensors, head, info, spec, dict(spec.get("generation") or {})), folder / name
    )
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The bundles of a classifier `tone` and a generator `short`."""
    folder = tmp_path_factory.mktemp("promoting")
    made("tone", "bert", "classify", folder)
    made("short", "llama", "generate", folder)
    return folder


@pytest.fixture
def workspace(folder, tmp_path) -> Workspace:
    workspace = Workspace(tmp_path / "store")
    for name in ("tone", "short"):
        workspace.store.put(name, folder / name)
    return workspace


def answered(workspace: Workspace, texts: list[str]) -> list[str]:
    return [str(answer["label"]) for answer in workspace.predict("tone", texts)]


def test_a_version_with_the_right_answers_takes_the_alias_and_is_not_asked_twice(
    workspace, tmp_path, monkeypatch
) -> None:
    texts = ["a great film", "a dull story"]
    rows = [list(each) for each in zip(texts, answered(workspace, texts), strict=True)]
    golden = table(tmp_path / "golden.csv", ["text", "label"], rows)
    (gate,) = workspace.gate("tone", "production", golden=golden)
    assert isinstance(gate, Golden)
    stages: list[str] = []
    move = workspace.promote("tone", "production", on_stage=stages.append)
    assert [(each.passed, each.total) for each in move.replays] == [(2, 2)]
    assert any("asking 2 golden examples" in words for words in stages)
    (kept,) = workspace.show("tone")["replays"]
    monkeypatch.setattr(answering, "mount_version", None)  # loading a base now fails
    assert workspace.promote("tone", "production").replays == move.replays
    monkeypatch.undo()
    again = workspace.promote("tone", "production", replay=True)
    assert (again.changed, again.replays[0].passed) == (False, 2)
    assert again.replays[0].replayed > kept["replayed"]


def test_a_wrong_answer_is_named_with_what_was_expected_and_given_unless_enough_are_right(workspace, tmp_path) -> None:
    texts = [f"{words}, number {number}" for number, words in enumerate((*GOOD, *BAD))]
    labels = answered(workspace, texts)
    wrong = "bad" if labels[3] == "good" else "good"
    rows = [
        [text, wrong if place == 3 else label] for place, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    golden = table(tmp_path / "golden.csv", ["text", "label"], rows)
    workspace.gate("tone", "production", golden=golden)
    said = (
        rf"1 of 6 golden examples failed .* first: example 4 '{texts[3]}', expected label '{wrong}', "
        rf"given '{labels[3]}'"
    )
    with pytest.raises(GateFailed, match=said):
        workspace.promote("tone", "production")
    assert workspace.resolve("tone").aliases == ()
    workspace.gate("tone", "production", golden=golden, share=0.8)
    assert workspace.promote("tone", "production").changed


def test_a_writer_must_equal_contain_or_be_like_a_text(workspace, tmp_path) -> None:
    texts = ["the market fell, 3", "the market fell, 5"]
    given = [str(answer["text"]) for answer in workspace.predict("short", texts)]
    right = [
        {"prompt": texts[0], "equals": f" {given[0]}\n"},
        {"prompt": texts[0], "contains": [given[0][:3], given[0][1:]]},
        {"prompt": texts[1], "contains": given[1][1:4]},
        {"prompt": texts[1], "expected": given[1], "min_score": 0.9},
    ]
    path = tmp_path / "golden.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in right))
    workspace.gate("short", "production", golden=path)
    assert workspace.promote("short", "production").replays[0].passed == len(right)
    for row, words in (
        ({"prompt": texts[0], "equals": "nothing like it"}, "expected 'nothing like it', given"),
        ({"prompt": texts[0], "contains": [given[0], "zebra"]}, "expected a text with .*zebra.*, given"),
        ({"prompt": texts[0], "expected": "zebra", "min_score": 0.5}, r"like 'zebra' \(score>=0.5\), scored 0.000"),
    ):
        path.write_text(json.dumps(row) + "\n")
        workspace.gate("short", "candidate", golden=path)
        with pytest.raises(GateFailed, match=words):
            workspace.promote("short", "candidate")
        workspace.gate("short", "candidate", remove=["golden:" + read_examples(path).digest[7:]])


def test_examples_that_are_added_while_others_are_replayed_are_asked_too(workspace, tmp_path) -> None:
    """Between the replay and the move, another process adds golden examples that this version fails."""
    (label,) = answered(workspace, ["a great film"])
    wrong = "bad" if label == "good" else "good"
    workspace.gate("tone", "production", golden=table(tmp_path / "1.csv", ["text", "label"], [["a great film", label]]))
    more = table(tmp_path / "2.csv", ["text", "label"], [["a great film", wrong]])
    seen: list[str] = []

    def meddle(words: str) -> None:
        if words.startswith("asking") and not any(said.startswith("asking") for said in seen):
            Workspace(workspace.store.root).gate("tone", "production", golden=more)
        seen.append(words)

    with pytest.raises(GateFailed, match="1 of 1 golden examples failed"):
        workspace.promote("tone", "production", on_stage=meddle)
    assert sum(words.startswith("asking") for words in seen) == 2
    assert sum(words.startswith("loading") for words in seen) == 1
    assert workspace.resolve("tone").aliases == ()


def test_an_alias_that_moves_on_meanwhile_changes_nothing_of_what_is_promoted(workspace, tmp_path) -> None:
    """`candidate` names another version at the time of the move: the version that was replayed is promoted."""
    workspace.store.materialize("tone", tmp_path / "tone")
    other = json.loads((tmp_path / "tone" / "manifest.json").read_text())
    (tmp_path / "tone" / "manifest.json").write_text(json.dumps(other | {"digest": "sha256:other"}))
    workspace.store.put("tone", tmp_path / "tone")
    workspace.promote("tone@1", "candidate")
    (label,) = (
        answered(workspace, ["a great film"])
        if False
        else [str(workspace.predict("tone@1", ["a great film"])[0]["label"])]
    )
    workspace.gate("tone", "production", golden=table(tmp_path / "1.csv", ["text", "label"], [["a great film", label]]))

    def meddle(words: str) -> None:
        if words.startswith("asking"):
            Workspace(workspace.store.root).promote("tone@2", "candidate")

    assert workspace.promote("tone@candidate", "production", on_stage=meddle).version == "tone@1"
    assert str(workspace.resolve("tone@candidate")) == "tone@2"


def test_a_label_that_the_version_does_not_know_and_the_wrong_kind_are_refused_before_a_base_is_loaded(
    workspace, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(answering, "mount_version", None)
    golden = table(tmp_path / "golden.csv", ["text", "label"], [["x", "goood"]])
    for name, words in (("tone", "expects label 'goood' in example 1"), ("short", "expects labels")):
        workspace.gate(name, "production", golden=golden)
        for replay in (False, True):
            with pytest.raises(GateFailed, match=words):
                workspace.promote(name, "production", replay=replay)


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("g.csv", "", "g.csv is empty"),
        ("g.csv", "text,label\n", "has columns and no rows"),
        ("g.csv", "text\nx\n", "has no column with expected answers"),
        ("g.csv", "label\nx\n", "needs one column text, prompt or document: it has label"),
        ("g.csv", "text,prompt,label\nx,y,z\n", "needs one column"),
        ("g.csv", "text,labels\nx,y\n", "has no column with expected answers.* it has text, labels"),
        ("g.csv", "text,label,weight\nx,y,1\n", "unknown column 'weight'"),
        ("g.csv", "text,label\nx,\n", "line 2: expected one of label, found nothing"),
        ("g.csv", "text,label\n ,y\n", "line 2: the text is missing"),
        ("g.csv", "text,label,equals\nx,y,z\n", "line 2: expected one of .* found label and equals"),
        ("g.csv", "text,label,equals\nx,y,\nx,,z\n", "in one set of golden examples: keep them in two sets"),
        ("g.csv", "text,label\nx,0.5\n", "is a fraction"),
        ("g.csv", "text,label\nx,y\nx,z\n", "requires 'y' and 'z' for 'x': no version can answer both"),
        ("g.csv", "text,expected\nx,y\n", "expected and min_score come together"),
        ("g.csv", "text,expected,min_score\nx,y,\n", "expected and min_score come together"),
        ("g.csv", "text,expected,min_score\nx,y,1.5\n", "min_score '1.5': expected a number above 0"),
        ("g.csv", "text,expected,min_score\nx,y,nan\n", "min_score 'nan': expected a number above 0"),
        ("g.jsonl", '{"text": "x", "label": {"a": 1}}\n', "expected a label, found dict"),
        ("g.jsonl", '{"text": "x", "contains": ["a", 1, null]}\n', "contains lists a text that is missing"),
        ("g.jsonl", "{\n", "g.jsonl line 1"),
        ("g.pkl", "x", "no known kind of table"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_in_one_line(tmp_path, name, content, complaint) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=complaint) as refused:
        read_examples(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_ten_thousand_examples_are_read_and_one_more_is_not(tmp_path) -> None:
    lines = [f"text {number},y\n" for number in range(10_001)]
    (tmp_path / "g.csv").write_text("text,label\n" + "".join(lines[1:]))
    assert len(read_examples(tmp_path / "g.csv").examples) == 10_000
    (tmp_path / "g.csv").write_text("text,label\n" + "".join(lines))
    with pytest.raises(DataError, match="more than 10000 golden examples"):
        read_examples(tmp_path / "g.csv")
    with pytest.raises(DataError, match="there is no file"):
        read_examples(tmp_path / "none.csv")


def test_labels_of_many_at_once_are_compared_as_a_set(tmp_path) -> None:
    (tmp_path / "g.jsonl").write_text('{"text": "x", "label": ["b", "a"]}\n{"text": "y", "label": "b | a"}\n')
    wanted = read_examples(tmp_path / "g.jsonl")
    assert promoting.judge_answers("d", wanted, [["a", "b"]] * 2).passed == 2
    found = promoting.judge_answers("d", wanted, [["a", "b"], ["a"]])
    assert (found.passed, found.first["example"], found.first["given"]) == (1, 2, ["a"])


def test_whoever_has_the_base_in_memory_is_asked_in_place_of_a_base_that_is_loaded(
    workspace, tmp_path, monkeypatch
) -> None:
    golden = table(tmp_path / "golden.csv", ["text", "label"], [["one", "good"], ["two", "bad"]])
    workspace.gate("tone", "production", golden=golden)
    monkeypatch.setattr(answering, "mount_version", None)  # loading a base now fails
    asked: list[tuple[str, list[str]]] = []

    def ask(version, texts):
        asked.append((version, list(texts)))
        return [{"label": "good"}, {"label": "bad"}]

    assert workspace.promote("tone", "production", ask=ask).replays[0].passed == 2
    assert asked == [("tone@1", ["one", "two"])]
