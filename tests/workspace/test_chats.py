"""A file of conversations through plan, training, evaluation and prediction."""

from __future__ import annotations

import json
from pathlib import Path

import chats
import pytest
import small_models
from small_tables import write_jsonl

from turret.cli.main import run
from turret.recipe import Recipe
from turret.workspace import Workspace


def base_in(folder: Path, template: str | None = chats.UNMARKED) -> str:
    known = chats.tokenizer(template)
    small_models.build("qwen3", "generate", vocab_size=len(known)).save_pretrained(folder)
    known.save_pretrained(folder)
    return str(folder)


def conversations(folder: Path, count: int = 24) -> str:
    """Conversations of two exchanges; one of eight, which does not fit."""
    turns = [[("user", f"City {number}?"), *chats.ASKED[1:]] for number in range(count - 1)]
    rows = [{"messages": chats.messages(each)} for each in (*turns, chats.ASKED * 4)]
    return str(write_jsonl(folder / "chats.jsonl", rows))


@pytest.mark.slow
def test_a_file_of_conversations_is_planned_trained_evaluated_and_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, base = conversations(tmp_path), base_in(tmp_path / "base")
    task = {"max_tokens": 80, "max_target_tokens": 8}
    train = {"epochs": 16, "lr": 1e-2, "batch_size": 4}
    recipe = Recipe(name="cities", base=base, data={"source": data, "test": 4}, task=task, train=train)
    workspace = Workspace(tmp_path / "store")
    planned = workspace.plan(recipe)
    texts = {check.name: str(check) for check in planned.plan.checks}
    assert "the loss counts every answer of a conversation" in texts["loss"]
    assert "1 of 20 conversations are longer than 80 tokens: their oldest 10 turns are left out" in texts["turns"]
    result = workspace.train(recipe)
    assert any("turns are left out, as a whole" in note for note in result.notes)
    spec = workspace.resolve("cities").task
    assert (spec["kind"], spec["loss_on"], spec["template"]) == ("chat", "assistant", "base")
    found = workspace.evaluate("cities", data)
    assert found.metrics["loss"] < 2.5
    questions = write_jsonl(tmp_path / "ask.jsonl", [{"messages": chats.messages(chats.ASKED[:3])}] * 2)
    store = ["--store", str(workspace.store.root)]
    assert run(["predict", "cities", str(questions), *store, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert len(answers) == 2
    assert answers[0]["text"].startswith("Lima")


@pytest.mark.slow
def test_a_plan_by_the_command_line_recognises_a_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, base = conversations(tmp_path), base_in(tmp_path / "base", None)
    assert run(["plan", data, "--base", base, "--store", str(tmp_path / "store"), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["recipe"]["task"]["kind"] == "chat"
    assert planned["recipe"]["data"]["messages"] == "messages"
    assert any("this base has no chat template" in note for note in planned["notes"])


def test_a_drafted_recipe_has_room_for_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", conversations(tmp_path), "--out", "-"]) == 0
    drafted = Recipe.from_toml(capsys.readouterr().out)
    assert (drafted.task.kind, drafted.data.messages) == ("chat", "messages")
    assert drafted.task.max_tokens >= 20
    rows = [{"instruction": f"Do {i}.", "input": "this " * 100, "output": "Done."} for i in range(20)]
    assert run(["init", str(write_jsonl(tmp_path / "rows.jsonl", rows)), "--out", "-"]) == 0
    drafted = Recipe.from_toml(capsys.readouterr().out)
    assert (drafted.data.input, drafted.task.max_tokens, drafted.task.max_target_tokens) == ("input", 256, 64)
