"""The benchmarks beside other engines: turns between processes, a missing rival, and what the reports say."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PROGRAM = """
import side
says = side.answers_alone()
print("a library prints")
ways = {"lengths": lambda rows: [len(row) for row in rows]}
side.take_turns(ways, {"speed": [[1, 2], [3]]}, says, {"version": "1.0"})
"""


@pytest.fixture
def module(monkeypatch):
    """A module of benchmarks by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCHMARKS)):
            del sys.modules[name]


def started(module, folder: Path, program: str = PROGRAM):
    environment = {"PYTHONPATH": str(BENCHMARKS)}
    return module("side").Side([sys.executable, "-c", program], folder / "log", environment)


def test_a_side_answers_when_it_is_told_and_prints_elsewhere(module, tmp_path) -> None:
    each = started(module, tmp_path)
    try:
        each.facts = each.hear("ready")
        assert each.facts == {"version": "1.0", "ways": ["lengths"]}
        assert module("rivals").answered(each, "lengths", "speed", tmp_path / "answers.json") == [2, 1]
        times = module("rivals").in_turns({"one": each}, rounds=3, pause=0)
        assert len(times["one"]["lengths"]) == 3
    finally:
        each.end()
    assert (tmp_path / "log").read_text() == "a library prints\n"


def test_a_side_that_dies_says_its_last_words(module, tmp_path) -> None:
    each = started(module, tmp_path, "raise SystemExit('no such library')")
    try:
        with pytest.raises(RuntimeError, match="no such library"):
            each.hear("ready")
    finally:
        each.end()


@pytest.mark.parametrize("name", ["rivals_encoder", "rivals_decoder"])
def test_without_the_rivals_one_line_says_what_to_do(name: str, tmp_path) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--venvs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"--setup --venvs {tmp_path}" in done.stderr


def encoder_run(openvino: float, dtype: str = "float32") -> dict:
    def side(version: str, precision: str, **ways: list[float]) -> dict:
        return {"version": version, "dtype": precision, "ways": ways, "off": dict.fromkeys(ways, 1e-6), "accuracy": 0.9}

    ours = {"bare": [0.4, 0.4], "32 LoRAs": [0.5, 0.5]}
    return {
        "settings": {"dtype": dtype},
        "sides": {
            "turret": side("0.1", dtype, **ours),
            "openvino": side("2", dtype, whole=[2 * openvino] * 2, bucketed=[openvino, 1.2 * openvino]),
            "ctranslate2 int8": side("4", "int8", whole=[0.3, 0.3]),
        },
        "reference": {"logits": 3.0, "accuracy": 0.9},
        "machine": {"device": "a processor", "at": "2026-01-01T00:00:00Z", "commit": "abc"},
    }


def test_a_goal_holds_the_best_way_of_a_rival_against_the_mixed_batch(module) -> None:
    goals = module("rivals_encoder").goals
    goal = ["speed of 32 LoRAs against OpenVINO 2 with the bare base", "at least 1.0x", "0.88x", "missed"]
    assert goals(encoder_run(0.4)) == [goal]
    assert goals(encoder_run(0.6))[0][-1] == "reached"
    assert goals(encoder_run(0.4, "bfloat16")) == []


def test_a_rival_in_8_bits_stands_apart_from_those_in_the_same_precision(module) -> None:
    same, eight = module("rivals_encoder").report([encoder_run(0.6), encoder_run(0.4)]).split("\n\n")
    assert "0.88x [0.28, 2.79]" in same.splitlines()[2]  # what was missed stands first
    assert "1.31x [0.41, 4.19]" in same.splitlines()[3]
    assert "int8, Turret float32" in eight
    assert "int8" not in same


def test_no_kept_run_is_no_table(module) -> None:
    assert module("rivals_encoder").report([]) == ""
    assert module("rivals_decoder").report([]) == ""
