"""What a notebook shows: small, escaped HTML without colours of its own, curves as tables and pictures, progress."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas
import pytest
from simulated_comparison import made

from turret import LoRA, Recipe, Workspace
from turret.compare.results import Details
from turret.errors import NotInstalled
from turret.methods.method import Check
from turret.store import Version
from turret.tasks import Mistake
from turret.train.curve import RunCurve, StepRecord
from turret.train.training_plan import Plan
from turret.workspace import Planned, RunResult
from turret.workspace.progress import NotebookLine
from turret.workspace.results import Evaluation

EVIL = "<script>alert('x')</script> & \"more\""
METRICS = {"accuracy": 0.95, "macro_f1": 0.9, "examples": 20, "per_class": {EVIL: {"precision": 0.5, "recall": 1.0}}}


def plan() -> Plan:
    checks = (Check("labels", "ok", EVIL), Check("leaks", "warn", "3 rows", "set data.drop_duplicates"))
    return Plan(checks, None, 75.0, 80, 1e-3, 1000, 20_000)


def result() -> RunResult:
    timing = {"steps": 80.0, "train_seconds": 14.2}
    parameters = {"trainable": 1000, "total": 20_000}
    return RunResult(
        EVIL, "sha256:x", {"id": EVIL}, {"test": METRICS}, parameters, timing, {}, 12_345, "20260101-000000-aaaaaa",
        warnings=[EVIL], notes=[EVIL],
    )  # fmt: skip


def evaluation() -> Evaluation:
    mistakes = (Mistake(3, EVIL * 40, "good", EVIL, 0.0, 0.91),)
    return Evaluation(
        "news@1", "sha256:x", {"source": EVIL, "examples": 20}, METRICS, 1.5, Details(mistakes, "classify")
    )


def version() -> Version:
    manifest = {"base": {"id": EVIL}, "method": {"kind": "lora"}, "task": {"kind": "classify"}}
    return Version("news", 1, "sha256:x", "2026-01-01T00:00:00.000Z", None, 12_345, {"test": METRICS}, manifest)


def curve(steps: int = 20) -> RunCurve:
    def record(step: int) -> StepRecord:
        metrics = {"accuracy": step / steps, "loss": 1 / step} if step % 5 == 0 else None
        split = None if metrics is None else "validation"
        return StepRecord(step, steps, step / 10, 2 / step, 1e-3, 1.0, 8, 100, 0.1, 1000.0, 1, metrics, split)

    return RunCurve([record(step) for step in range(1, steps + 1)])


OBJECTS: dict[str, Any] = {
    "Recipe": lambda: Recipe(name="x", base=EVIL, data=EVIL, method=LoRA(r=4), train={"epochs": 2}),
    "Plan": plan,
    "Planned": lambda: Planned(OBJECTS["Recipe"](), plan(), [EVIL]),
    "RunResult": result,
    "Evaluation": evaluation,
    "Version": version,
    "RunCurve": curve,
    "Workspace": lambda: Workspace("nowhere"),
    "Comparison": lambda: made(seeds=2, count=100, failures={"prefix": EVIL}, without=("prefix",)),
}


class Balance(HTMLParser):
    """Checks that every tag is closed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_shows_itself_in_small_escaped_html_without_colours(name: str) -> None:
    found = OBJECTS[name]()._repr_html_()
    balance = Balance()
    balance.feed(found)
    assert balance.open == []
    assert "script" not in re.findall(r"<(\w+)", found)
    assert not re.search(r"#[0-9a-f]{3,6}\b|rgb\(|background|[^-]color:", found)
    assert len(found) < 10_000
    assert EVIL in balance.text or name in ("RunCurve", "Workspace")


def test_a_result_shows_what_it_measured() -> None:
    text = result()._repr_html_()
    for said in ("95.0%", "1,000 of 20,000 parameters", "14 s", "12.3 kB", "⚠"):
        assert said in text, said
    assert "labels" in plan()._repr_html_()
    assert "set data.drop_duplicates" in plan()._repr_html_()
    assert "about 1 min 15 s" in plan()._repr_html_()
    assert "method.r" in OBJECTS["Recipe"]()._repr_html_()


def test_results_keep_the_keys_that_commands_print() -> None:
    assert result().as_json()["metrics"] == {"test": METRICS}
    assert version().as_json()["version"] == "news@1"


# --- a curve ----------------------------------------------------------------------------------------------------------


def test_a_curve_is_still_a_sequence_of_records() -> None:
    found = curve()
    assert [each.step for each in found] == list(range(1, 21))
    assert found[-1].step == 20
    assert [each.step for each in found[:2]] == [1, 2]
    assert repr(found) == "20 of 20 steps, loss 2.000 -> 0.100"


def test_a_curve_becomes_a_table_with_a_column_for_each_metric() -> None:
    frame = curve().to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.index) == list(range(1, 21))
    assert frame["validation accuracy"].dropna().to_dict() == {5: 0.25, 10: 0.5, 15: 0.75, 20: 1.0}
    assert RunCurve([]).to_frame().empty


@pytest.mark.slow
@pytest.mark.parametrize(("package", "call"), [("pandas", "to_frame"), ("matplotlib", "plot")])
def test_a_package_that_is_missing_is_named_in_one_line(package: str, call: str) -> None:
    program = f"""
import sys
sys.modules[{package!r}] = None
from turret.train.curve import RunCurve
try:
    RunCurve([]).{call}()
except Exception as error:
    print(type(error).__name__, error)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=True)
    wanted = f"{NotInstalled.__name__} {call} needs {package}, which is not installed: run `pip install {package}`"
    assert out.stdout.strip() == wanted


def test_a_picture_of_a_curve_has_loss_and_metric_on_axes_that_are_returned(tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed: run `make setup`")
    import matplotlib as mpl

    mpl.use("agg")
    axes = curve().plot()
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    twin = next(each for each in axes.figure.axes if each is not axes)
    assert twin.get_ylabel() == "accuracy"
    assert curve().plot(ax=axes) is axes
    axes.figure.savefig(tmp_path / "curve.png")


def test_the_line_of_progress_ends_with_what_was_done_and_no_time_that_is_left(capsys: pytest.CaptureFixture) -> None:
    shown = []
    for how in ("done in", "stopped after"):
        line = NotebookLine()
        line.stage("4 of 4  lora, seed 43; last full 71.0; about 2 min 06 s left: timing single answers")
        assert "about 2 min 06 s left" in capsys.readouterr().out  # control: while it runs, it says so
        line.end(how)
        shown.append(capsys.readouterr().out)
    assert all("4 of 4  lora, seed 43; last full 71.0 · " in each and "left" not in each for each in shown)
    assert "done in " in shown[0]
    assert "stopped after " in shown[1]


# --- outside of a notebook --------------------------------------------------------------------------------------------


def test_nothing_of_a_notebook_is_loaded_or_shown_outside_of_one(tmp_path: Path) -> None:
    program = "import sys, turret; print(turret.Workspace('x').list(), [m for m in ('IPython', 'pandas', 'matplotlib') if m in sys.modules])"  # noqa: E501
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=True, cwd=tmp_path
    )
    assert out.stdout == "[] []\n"
    assert out.stderr == ""
