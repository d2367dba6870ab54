"""A composition is compared with its parts on the same examples, as the engine and `turret evaluate` answer them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import byte_level
import numpy as np
import pytest
import small_models
from command_line import typed
from server.test_end_to_end import bundle

from turret.access import Access
from turret.data import Pair
from turret.engine import SamplingParams
from turret.errors import AdapterError, BadReference, NotFound, RecipeError, TurretError, WrongBase
from turret.tasks.generate import Generate
from turret.workspace import Workspace

PROMPTS = [f"the film number {number}" for number in range(12)]
MODELS = ("x+p", "x", "p", None)


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> SimpleNamespace:
    folder: Path = tmp_path_factory.mktemp("composing")
    base, other = byte_level.save_base(folder / "base"), byte_level.save_base(folder / "other", seed=1)
    workspace = Workspace(folder / "store")
    byte_level.store_to_compose(workspace, folder, base)
    workspace.store.put("far", byte_level.save_adapter(folder / "far", other, 9))
    with workspace.engine(str(base), dtype="float32") as engine:
        texts = {model: [text_of(engine, prompt, model) for prompt in PROMPTS] for model in MODELS}
    # each row of the comparison is nearest to the target of every fourth example
    targets = [" ".join(re.findall("[a-z0-9]+", texts[MODELS[n % 4]][n].lower())) or "fox" for n in range(len(PROMPTS))]
    table = folder / "test.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), *zip(PROMPTS, targets, strict=True)])
    found = workspace.compare_composition("x@production+p", str(table))
    return SimpleNamespace(
        folder=folder, base=base, workspace=workspace, table=table, found=found, texts=texts, targets=targets
    )


def text_of(engine: Any, prompt: str, model: str | None) -> str:
    """The engine's greedy answer."""
    options = SamplingParams(temperature=0.0, max_tokens=24)
    return str(engine.submit("generate", prompt, model, options).result(60)["text"])


def row(found: Any, spec: str) -> Any:
    return next(each for each in found.rows if each.spec == spec)


def scores(found: Any, name: str, dtype: str = "") -> np.ndarray:
    (path,) = Path(found.folder).glob(f"cells/{name}-{'[0-9a-f]' * 10}{dtype}/result.json")
    return np.array(json.loads(path.read_text())["scores"])


@pytest.mark.slow
def test_the_composition_scores_as_the_engine_answers(house) -> None:
    found = house.workspace.compare_composition("x+p", str(house.table), dtype="float32")
    assert found.made["precision"] == "float32"
    for model, name in (("x+p", "x-1-p-1"), ("x", "x-1"), ("p", "p-1")):
        pairs = [Pair(*pair) for pair in zip(PROMPTS, house.targets, strict=True)]
        expected = [Generate.score(text, pair) for text, pair in zip(house.texts[model], pairs, strict=True)]
        assert max(expected) > 0.5
        assert scores(found, name, "-float32").tolist() == pytest.approx(expected), model
    assert len({scores(found, name, "-float32").tobytes() for name in ("x-1-p-1", "x-1", "p-1", "base")}) == 4


def test_each_part_scores_as_turret_evaluate_measures_it(house) -> None:
    assert [each.spec for each in house.found.rows] == ["x@1+p@1", "x@1", "p@1", "base"]
    for spec in ("x@1", "p@1"):
        measured = house.workspace.evaluate(spec, str(house.table)).metrics
        assert dict(row(house.found, spec).metrics) == {key: pytest.approx(measured[key]) for key in measured}


def test_the_differences_are_paired_and_of_these_versions(house) -> None:
    whole = scores(house.found, "x-1-p-1")
    for spec, name in (("x@1", "x-1"), ("p@1", "p-1"), ("base", "base")):
        verdict = row(house.found, spec).verdict
        assert verdict.difference.mean == pytest.approx(100 * float((scores(house.found, name) - whole).mean()))
        assert verdict.difference.low < verdict.difference.mean < verdict.difference.high
        assert verdict.fixed
        assert "seed" not in verdict.sentence(house.found.against_label)
    assert row(house.found, "base").costs.forgetting.mean == 0
    assert row(house.found, "x@1").costs.forgetting.mean != 0
    assert row(house.found, "x@1+p@1").costs.bundle_bytes == sum(
        house.workspace.resolve(each).bytes for each in ("x@1", "p@1")
    )


def test_another_row_may_be_the_baseline_and_nothing_is_computed_again(house) -> None:
    stages: list[str] = []
    again = house.workspace.compare_composition(
        "x@1+p@1", str(house.table), against="x@production", margin=2, on_stage=stages.append
    )
    assert (again.folder, again.against, stages) == (house.found.folder, "x@1", [])
    difference = row(again, "x@1+p@1").verdict.difference
    assert difference.mean == pytest.approx(-row(house.found, "x@1").verdict.difference.mean)
    first = house.workspace.compare_composition("x@1+p@1", str(house.table))
    assert first.as_json() == house.found.as_json() | {"command": first.command}


def test_the_report_is_kept_for_those_who_see_every_part(house) -> None:
    (listed,) = house.workspace.comparisons()
    assert (listed["kind"], listed["composition"], listed["against"]) == ("comparison", "x@1+p@1", "x@1+p@1")
    page = house.workspace.report(listed["key"])
    assert "x@1+p@1" in page
    assert PROMPTS[0] in page
    markdown = (Path(house.found.folder) / "report.md").read_text()
    assert house.found.command in markdown
    assert "merge its LoRAs" in house.found.promotion.why
    assert house.found.promotion.version is None
    for names, count in ((("x",), 0), (("p",), 0), (("x", "p"), 1)):
        assert len(house.workspace.with_access(Access(adapters=names)).comparisons()) == count
    with pytest.raises(NotFound):
        house.workspace.with_access(Access(adapters=("x",))).report(listed["key"])


def test_what_cannot_be_compared_is_refused_before_an_answer(house, tmp_path) -> None:
    workspace = house.workspace
    bert = small_models.save_base("bert", house.folder / "bert")
    workspace.store.put("tone", bundle(house.folder / "tone", bert, "bert", "classify", 1))
    for names, kind, said in (
        ("p+q", AdapterError, "2 of the composed adapters have a prefix"),
        ("x+i", AdapterError, "only LoRAs and one prefix can be composed"),
        ("x+far", WrongBase, "far@1 was trained .* whose weights differ"),
        ("x+tone", AdapterError, "tone@1 answers with a head"),
        ("x+x@1", BadReference, "names an adapter twice"),
        ("x+nothing", NotFound, "nothing"),
        ("x", RecipeError, "expected several versions with [+] between them"),
    ):
        stages: list[str] = []
        with pytest.raises(kind, match=said) as caught:
            workspace.compare_composition(names, str(house.table), on_stage=stages.append)
        assert "\n" not in str(caught.value)
        assert not [stage for stage in stages if "answering" in stage], names
    with pytest.raises(RecipeError, match=r"expected one of x@1\+p@1, x@1, p@1, base"):
        workspace.compare_composition("x+p", str(house.table), against="y")
    with pytest.raises(TurretError, match=r"recipe\.toml"):
        workspace.compare_composition("x+p", str(tmp_path / "recipe.toml"))


def test_the_command_compares_and_refuses_options_of_a_training(house) -> None:
    words = ["compare", str(house.table), "--composition", "x+p", "--store", str(house.folder / "store")]
    status, out, _ = typed(*words, "--no-texts", "--json")
    told = json.loads(out)
    assert (status, told["examples"]) == (0, [])
    assert [each["spec"] for each in told["rows"]] == ["x@1+p@1", "x@1", "p@1", "base"]
    status, out, _ = typed(*words, "--against", "x")
    assert status == 0
    assert "x@1+p@1" in out
    assert "report.html" in out
    for option in (["--methods", "lora"], ["--seeds", "5"], ["--plan"]):
        status, _, err = typed(*words, *option)
        assert status == 2
        assert f"trains nothing: leave out {option[0]}" in err
