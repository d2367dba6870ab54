"""Today's code reads what Turret 0.1.0 wrote: stores, runs, experiments, bundles, recipes. See fixtures/v0_1."""

from __future__ import annotations

import json
import shutil
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from turret import Recipe, Workspace, adapters, bases, bundles
from turret.engine.request import SamplingParams
from turret.errors import GateFailed
from turret.store.access_tokens import token_with_secret
from turret.train.curve import StepRecord

FIXTURE = Path(__file__).parent / "fixtures" / "v0_1"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
CLASSIFIERS = [name for name, each in EXPECTED["versions"].items() if isinstance(each["answers"][0], list)]
WRITERS = sorted(set(EXPECTED["versions"]) - set(CLASSIFIERS))
BUNDLES = sorted(path.name for path in (FIXTURE / "bundles").iterdir())
SAME_LIBRARIES = all(version(name) == EXPECTED["made_with"][name] for name in ("torch", "transformers"))
OTHERS = "belongs to another run: its (torch|transformers) is"
METHODS = {"lora", "prefix", "head", "full", "peft"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixtures as the current folder, because their paths are relative."""
    copy = Path(shutil.copytree(FIXTURE, tmp_path / "v0_1"))
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def workspace(folder: Path) -> Workspace:
    return Workspace("store")


def logits(bundle: Path, base: str = "bases/bert") -> torch.Tensor:
    """The logits (B, C) of a classifier's bundle for the known texts, in float32."""
    loaded = bases.load(base, task="classify", num_labels=2, dtype="float32")
    adapters.mount(loaded.model, bundles.read_bundle(bundle), fingerprint=loaded.fingerprint)
    rows = [loaded.tokenizer(text, return_tensors="pt").input_ids[0] for text in EXPECTED["texts"]]
    with torch.no_grad():
        return adapters.classify_logits(loaded.model, rows)


def agree(found: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(found, torch.tensor(EXPECTED["versions"][name]["answers"]), rtol=1e-4, atol=1e-5)


# --- the store --------------------------------------------------------------------------------------------------------


def test_every_version_is_listed_and_verifies(workspace: Workspace) -> None:
    assert {str(each): each.digest for each in workspace.list()} == {
        name: each["digest"] for name, each in EXPECTED["versions"].items()
    }
    assert {each.manifest["method"]["kind"] for each in workspace.list()} == METHODS
    verified = workspace.verify()
    assert verified.ok
    assert workspace.store.problems() == []
    workspace.gc()
    assert workspace.verify().ok


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_answers_as_it_did(name: str, workspace: Workspace, tmp_path: Path) -> None:
    workspace.store.materialize(name, tmp_path / "bundle")
    agree(logits(tmp_path / "bundle"), name)


def test_the_engine_answers_as_0_1_did_with_all_that_may_share_a_base(workspace: Workspace) -> None:
    shared = [name for name in CLASSIFIERS if not name.startswith(("reviews-full", "reviews-ia3"))]
    with workspace.engine("bases/bert", dtype="float32") as engine:
        for name in shared:
            answers = engine.classify(EXPECTED["texts"], name)
            chances = torch.tensor([[each["probabilities"][label] for label in ("bad", "good")] for each in answers])
            expected = torch.tensor(EXPECTED["versions"][name]["answers"]).softmax(-1)
            torch.testing.assert_close(chances, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["llama", "t5"])
def test_what_generates_writes_the_same_tokens_with_the_same_chances(base: str, workspace: Workspace) -> None:
    names = [name for name in WRITERS if name.startswith("writer" if base == "llama" else "summaries")]
    assert len(names) == 2
    with workspace.engine(f"bases/{base}", dtype="float32") as engine:
        for name in names:
            options = SamplingParams(max_tokens=6, num_beams=1, logprobs=0)
            found = engine.generate(EXPECTED["texts"], name, options)
            for answer, expected in zip(found, EXPECTED["versions"][name]["answers"], strict=True):
                assert answer["text"] == expected["text"]
                told = [(each["id"], each["logprob"]) for each in answer["logprobs"]]
                assert told == [(each["id"], pytest.approx(each["logprob"], abs=1e-3)) for each in expected["logprobs"]]


def test_aliases_name_what_they_named_and_walk_back(workspace: Workspace) -> None:
    for reference, named in EXPECTED["aliases"].items():
        assert str(workspace.resolve(reference)) == named
    for name, moves in EXPECTED["history"].items():
        found = workspace.show(name)["alias_history"]
        assert [{key: move[key] for key in known} for move, known in zip(found, moves, strict=True)] == moves
    assert workspace.rollback("writer").version == "writer@1"
    assert str(workspace.resolve("writer")) == "writer@1"


def test_gates_and_golden_examples_still_decide(workspace: Workspace) -> None:
    assert [str(gate) for gate in workspace.gate("reviews-lora")] == EXPECTED["gates"]
    assert workspace.show("reviews-lora@1")["replays"] == EXPECTED["replays"]
    assert (
        workspace.promote("reviews-lora@2", "production").before == "reviews-lora@1"
    )  # asked before: nothing is loaded
    workspace.gate("reviews-lora", "production", add=["accuracy>=0.99"])
    with pytest.raises(GateFailed, match=r"accuracy>=0\.99 is required"):
        workspace.promote("reviews-lora@1", "production")


def test_a_deleted_number_is_not_given_again(workspace: Workspace) -> None:
    workspace.import_adapter("bundles/reviews-prefix", "reviews-head")
    assert [each.number for each in workspace.list("reviews-head")] == [1, 2, 4]


def test_tokens_are_known_by_their_secrets(workspace: Workspace) -> None:
    known = workspace.tokens.list()
    found = {name: token_with_secret(known, secret) for name, secret in EXPECTED["tokens"].items()}
    assert {name: token and token.name for name, token in found.items()} == {name: name for name in found}
    assert (found["gone"] and found["gone"].revoked) is not None
    assert (found["asker"] and found["asker"].requests_per_minute) == 600
    assert found["operator"] is not None
    assert found["operator"].scopes == ("infer", "admin")
    assert found["operator"].revoked is None


# --- experiments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(EXPECTED["experiments"]))
def test_an_experiment_has_its_arms_outcomes_and_state(name: str, workspace: Workspace) -> None:
    expected = EXPECTED["experiments"][name]["status"]
    found = workspace.experiment(name).status().as_json()
    for key in ("experiment", "state", "alias", "metric", "unit", "alpha", "steps", "created", "ended", "history"):
        assert found[key] == expected[key], key
    assert found["guards"].items() >= expected["guards"].items()
    for arm, known in zip(found["arms"], expected["arms"], strict=True):
        for key in ("arm", "version", "share", "units", "outcomes", "mean", "answers", "errors"):
            assert arm[key] == known[key], key


def test_the_same_unit_sees_the_same_arm_and_the_experiment_goes_on(workspace: Workspace) -> None:
    experiment, router = workspace.experiment("reviews-lora"), workspace.router()
    found = {unit: router.assign("reviews-lora", unit) for unit in EXPECTED["assigned"]}
    assert {unit: [each.version, each.arm] for unit, each in found.items() if each} == EXPECTED["assigned"]
    assert experiment.outcome(1, receipt="reviews-lora-user-0").status == "counted"
    assert experiment.stop(promote="candidate").experiment.state == "ended"
    assert str(workspace.resolve("reviews-lora@production")) == "reviews-lora@2"


# --- runs -------------------------------------------------------------------------------------------------------------


def test_runs_have_their_recipes_and_curves(workspace: Workspace) -> None:
    expected = [[*each[:2], "interrupted" if each[2] == "running" else each[2]] for each in EXPECTED["runs"]]
    assert [[run["id"], run["name"], run["state"]] for run in workspace.runs()] == expected  # its process has ended
    for run_id, name, _ in EXPECTED["runs"]:
        recipe = Recipe.from_toml(workspace.run(run_id)["recipe"])
        assert recipe.name == name
        again = "a setting that was added must have None as its default, see Recipe.to_toml"
        assert recipe.to_toml() == workspace.run(run_id)["recipe"], again
        assert len(workspace.curve(run_id)) > 1
    assert [each["key"] for each in workspace.comparisons() if each["problem"] is None] == [EXPECTED["comparison"]]
    assert "compared@1" in workspace.report(EXPECTED["comparison"])


class EnoughError(Exception):
    """Ends a training that the test needs no longer."""


@pytest.mark.slow
def test_a_killed_run_of_an_older_turret_starts_over_and_says_so(workspace: Workspace) -> None:
    """Its steps drew dropout from a generator, whose state its checkpoint has."""
    seen, said = list[int](), list[str]()

    def look(record: StepRecord) -> None:
        seen.append(record.step)
        if record.step == 2:
            raise EnoughError

    with pytest.raises(EnoughError):
        workspace.train(Recipe.load("recipes/unfinished.toml"), on_record=look, on_warning=said.append)
    assert seen == [1, 2]
    (line,) = [each for each in said if "starting over" in each]
    assert "has format 1, expected 2" in line
    assert len(line) < 300
    assert "\n" not in line
    assert len(workspace.runs()) == len(EXPECTED["runs"]), "it is the same run"
    assert [record.step for record in workspace.curve(EXPECTED["unfinished"]["run"])] == [1, 2]


# --- bundles and recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_is_imported_as_the_version_it_was(name: str, folder: Path, tmp_path: Path) -> None:
    workspace, of = Workspace(tmp_path / "other"), name.partition(".")[0].removesuffix("-vllm")
    if name == "peft-lora":  # saved by PEFT alone
        said: dict[str, Any] = {"base": "bases/bert", "labels": ["bad", "good"]}
        assert workspace.import_adapter(f"bundles/{name}", "x", **said).version == "x@1"
        return
    assert workspace.import_adapter(f"bundles/{name}", "x").digest == EXPECTED["versions"][f"{of}@1"]["digest"]
    assert workspace.verify().ok


@pytest.mark.parametrize("path", sorted((FIXTURE / "recipes").iterdir()), ids=lambda path: path.stem)
def test_a_recipe_still_means_what_it_says(path: Path) -> None:
    said, read = tomllib.loads(path.read_text()), Recipe.load(path).model_dump(mode="json")
    for key, value in said.items():
        for inner, wanted in value.items() if isinstance(value, dict) else [(None, value)]:
            assert (read[key] if inner is None else read[key][inner]) == wanted, (key, inner)


# --- a store by URL ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dumped_catalog_and_its_files_are_a_store(folder: Path, postgres_server: Any) -> None:
    statements = [line for line in (folder / "catalog" / "dump.sql").read_text().splitlines() if line[:1] != "\\"]
    expected = EXPECTED["catalog"]
    with postgres_server.database() as name:
        postgres_server.execute("\n".join(statements), name)
        url = f"{postgres_server.url(name)}&files={folder / 'catalog' / 'files'}&local={folder / 'local'}"
        workspace = Workspace(url)
        assert {str(each): each.digest for each in workspace.list()} == expected["versions"]
        assert workspace.verify().ok
        assert str(workspace.resolve("reviews@production")) == expected["production"]
        token = token_with_secret(workspace.tokens.list(), expected["token"])
        assert token is not None
        arms = workspace.experiment("reviews").status().as_json()["arms"]
        assert {arm["arm"]: {"units": arm["units"], "outcomes": arm["outcomes"]} for arm in arms} == expected["counts"]
        workspace.store.materialize("reviews@1", folder / "bundle")
        agree(logits(folder / "bundle"), "reviews-lora@1")
        assert workspace.import_adapter("bundles/reviews-head", "reviews").version == "reviews@3"
