"""Whatever a tracker does, a training neither stops nor waits long, and one line says what happened."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trackers.own_trackers import rows, steps

from turret.errors import RecipeError
from turret.recipe import Recipe
from turret.trackers import TRACKERS, Entry, TrackedRun, require_installed
from turret.trackers.tracking import Patience, Tracking

ROOT = Path(__file__).parents[2]
QUICK = Patience(call_seconds=0.5, end_seconds=2.0)


@pytest.fixture(autouse=True)
def own_trackers_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)


def tracked(folder: Path, after: int = 0) -> TrackedRun:
    return TrackedRun("20260102-030405-abcdef", "tone", str(folder), after, {"train.lr": 0.1}, {"recipe.toml": "a = 1"})


def tracking(folder: Path, *classes: str, patience: Patience = QUICK) -> tuple[Tracking, list[str]]:
    """Trackers of `own_trackers`, and the list of their warnings."""
    said: list[str] = []
    table = {name: Entry(f"trackers.own_trackers:{name}", "turret") for name in classes}
    return Tracking(classes, tracked(folder), said.append, table=table, patience=patience), said


def until(done, seconds: float = 20.0) -> None:
    started = time.monotonic()
    while not done():
        assert time.monotonic() - started < seconds, "it never came"
        time.sleep(0.01)


def test_a_tracker_is_told_the_start_every_step_in_order_and_the_end(tmp_path: Path) -> None:
    made, said = tracking(tmp_path, "Recording", patience=Patience())
    for step in range(1, 2001):
        made.log(step, {"train/loss": 1 / step})
    made.end("finished", {"version": "tone@1", "test/accuracy": 0.9})
    found = rows(tmp_path)
    assert found[0]["start"]["id"] == "20260102-030405-abcdef"
    assert found[0]["start"]["texts"] == {"recipe.toml": "a = 1"}
    assert [step for row in found for step, _ in row.get("log", ())] == list(range(1, 2001))
    assert steps(tmp_path)[4] == {"train/loss": 0.25}
    assert found[-1] == {"finish": "finished", "summary": {"version": "tone@1", "test/accuracy": 0.9}}
    assert said == made.warnings == []


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("RaisingAtStart", "ConnectionError: nobody answers at tracker.example"),
        ("RaisingAtFirstStep", "RuntimeError: quota exceeded"),
        ("Dying", "its process ended"),
        ("Hanging", "no answer for 0.5 seconds"),
        ("NotThere", "AttributeError"),
    ],
)
def test_a_tracker_that_fails_is_left_out_with_one_line_and_the_others_go_on(
    kind: str, reason: str, tmp_path: Path
) -> None:
    made, said = tracking(tmp_path, kind, "Recording")
    step = 0

    def logged() -> bool:
        nonlocal step
        step += 1
        started = time.monotonic()
        made.log(step, {"train/loss": 1.0})
        assert time.monotonic() - started < 6  # a hanging process is killed in far less
        return bool(said)

    until(logged)
    for _ in range(5):
        logged()
    made.end("finished", {})
    (line,) = said
    assert line.startswith(f"tracker {kind}: {reason}")
    assert "; the training goes on without it (what it printed: " in line
    assert "\n" not in line
    recorded = tmp_path / "recorded.jsonl"
    assert rows(tmp_path)[-1]["finish"] == "finished", recorded
    assert max(steps(tmp_path)) == step


def test_a_tracker_that_hangs_at_the_end_is_given_up_in_a_bounded_time(tmp_path: Path) -> None:
    made, said = tracking(tmp_path, "HangingAtTheEnd", patience=Patience(end_seconds=1.0))
    made.log(1, {"train/loss": 1.0})
    until(lambda: steps(tmp_path))
    started = time.monotonic()
    made.end("finished", {})
    assert time.monotonic() - started < 8
    assert said[0].startswith("tracker HangingAtTheEnd: it did not end within 1 seconds (what it printed: ")
    assert len(said) == 1


@pytest.mark.slow
def test_a_slow_tracker_delays_no_step_and_gets_the_end_even_if_steps_are_missing(tmp_path: Path) -> None:
    made, said = tracking(tmp_path, "Slow", patience=Patience(end_seconds=6.0, most_waiting=500))
    until(lambda: rows(tmp_path))
    started = time.monotonic()
    for step in range(1, 2001):  # 100 seconds of its work
        made.log(step, {"train/loss": 1.0})
    assert time.monotonic() - started < 1
    made.end("finished", {"version": "tone@1"})
    assert time.monotonic() - started < 12
    assert rows(tmp_path)[-1] == {"finish": "finished", "summary": {"version": "tone@1"}}
    (line,) = said
    assert "slower than the training" in line
    assert "steps are missing" in line
    assert len(steps(tmp_path)) + int(line.split("training, ")[1].split()[0]) == 2000


def test_what_a_tracker_prints_goes_to_a_file_of_the_run_and_it_cannot_ask(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made, said = tracking(tmp_path, "Talkative", patience=Patience())
    made.end("finished", {})
    assert capfd.readouterr() == ("", "")
    printed = (tmp_path / "tracker-Talkative.log").read_text()
    assert "view your run at http://tracker.example" in printed
    assert "from a child process" in printed
    assert {"asked": "and got no answer"} in rows(tmp_path)
    assert said == []


def test_a_training_that_is_killed_ends_its_run_as_interrupted(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from trackers.test_tracking import tracking, until, steps, Patience\n"
        "folder = Path(sys.argv[2]); made, _ = tracking(folder, 'Recording', patience=Patience())\n"
        "made.log(1, {'train/loss': 1.0}); until(lambda: steps(folder)); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(ROOT / "tests"), str(tmp_path)], check=False, timeout=60)
    until(lambda: rows(tmp_path)[-1].get("finish") == "interrupted")


def test_a_tracker_whose_library_is_missing_is_named_with_its_extra() -> None:
    require_installed([])
    require_installed(["here"], {"here": Entry("m:C", "turret")})
    with pytest.raises(
        RecipeError, match=r"names 'gone', whose library is not installed: pip install 'turret\[gone\]'"
    ):
        require_installed(["gone"], {"gone": Entry("m:C", "not_a_package_of_anybody")})


def test_a_folder_of_results_is_not_taken_for_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb_results").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecipeError, match="not installed"):
        require_installed(["x"], {"x": Entry("m:C", "wandb_results")})


@pytest.mark.parametrize(
    ("given", "expected"),
    [('["trackio"]', ("trackio",)), ("trackio", ("trackio",)), ("mlflow,wandb", ("mlflow", "wandb")), ("none", None)],
)
def test_a_recipe_names_its_trackers(given: str, expected: tuple[str, ...] | None) -> None:
    recipe = Recipe(base="b", data="reviews.csv").with_overrides({"train.trackers": given})
    assert recipe.train.trackers == expected
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert recipe.without_trackers().to_toml() == Recipe(base="b", data="reviews.csv").to_toml()


def test_a_recipe_refuses_a_tracker_that_turret_does_not_have() -> None:
    for value in ('["neptune"]', "[]", "[3]"):
        with pytest.raises(RecipeError, match="expected a list of trackio, mlflow, wandb, tensorboard"):
            Recipe.from_toml(f'base = "b"\ndata = "d.csv"\n[train]\ntrackers = {value}')


def test_naming_a_tracker_imports_no_library_of_one() -> None:
    code = (
        "import sys; from turret.recipe import Recipe; from turret.trackers.tracking import Tracking\n"
        "Recipe(base='b', data='d.csv', train={'trackers': ['trackio', 'mlflow', 'wandb', 'tensorboard']})\n"
        "print({'trackio', 'mlflow', 'wandb', 'tensorboard', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_tracker_of_the_table_has_an_extra_of_its_name() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name, entry in TRACKERS.items():
        assert f'\n{name} = ["{entry.library}>=' in text
        assert (ROOT / "src" / "turret" / "trackers" / f"{name}.py").exists()
