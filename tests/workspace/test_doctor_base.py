"""`turret doctor --base` says what can be done on a base, for listed families and others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_models

from turret.cli.main import run
from turret.methods import SHOWN


def asked(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> str:
    capsys.readouterr()
    assert run(["doctor", "--base", str(folder), "--store", str(folder / "store"), *more]) == 0
    return capsys.readouterr().out


def test_it_names_family_tasks_layers_and_what_each_method_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_models.save_base("deberta-v2", tmp_path / "base")
    facts = json.loads(asked(capsys, folder, "--json"))["base"]
    assert (facts["family"], facts["listed"], facts["kind"]) == ("deberta-v2", True, "encoder")
    assert (facts["tasks"], facts["rows"], facts["lora_layers"]) == (
        ["classify"],
        "one by one",
        2 * small_models.LAYERS,
    )
    assert set(facts["refused"]) == set(SHOWN)
    assert facts["refused"]["lora"] == {}
    (reason,) = facts["refused"]["prefix"]["train"]
    assert "computes its attention itself" in reason
    assert list(facts["refused"]["full"]) == ["mix"]
    text = " ".join(asked(capsys, folder).split())
    assert "deberta-v2, encoder: classify" in text
    assert "not mix: full fine-tuning replaces every weight" in text


def test_a_base_that_is_not_there_costs_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--base", str(tmp_path / "no"), "--store", str(tmp_path / "store")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_without_a_base_nothing_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--store", str(tmp_path / "store"), "--json"]) == 0
    assert "base" not in json.loads(capsys.readouterr().out)
