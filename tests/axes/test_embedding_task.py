"""The task `embedding` goes through everything: columns, plan, training, proof, answers, server, comparison, PEFT."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import small_models
import tiny_training as tiny
import torch
from axes.points import served
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import turret
from turret import adapters, bundles
from turret.cli.main import run
from turret.data import Related
from turret.engine import Embedding, SamplingParams
from turret.errors import AdapterError, BaseModelError, TurretError
from turret.methods import LoRA
from turret.recipe import Recipe
from turret.tasks.embedding import TextEmbedding
from turret.train.adamw import AdamW
from turret.train.batches import encode
from turret.train.slot import LocalSlot
from turret.workspace import Workspace

WORDS = ("dull boring story", "lazy bank story", "a story", "a quick pleasure", "great film")
TEXTS = ["a great film", "a dull story about the bank", "quick"]
RIGHT = ("boring", "the bank", "one line", "pleasure to watch", "a film that was great")


@dataclass
class House:
    """A store with embeddings of three forms of data, and a classifier, on one base."""

    folder: Path
    base: Path
    workspace: Workspace
    recipes: dict[str, Recipe]
    metrics: dict[str, Any]
    plans: dict[str, Any]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def house_on(family: str, folder: Path) -> House:
    base = small_models.save_base(family, folder / family)
    pairs = [{"query": f"{WORDS[n % 5]} {n}", "positive": f"{RIGHT[n % 5]} {n}"} for n in range(60)]
    triplets = [
        {"anchor": f"{WORDS[n % 5]} {n}", "positive": f"{RIGHT[n % 5]} {n}", "negative": f"{RIGHT[(n + 2) % 5]} {n}"}
        for n in range(60)
    ]
    scored = [
        {"sentence1": f"{WORDS[n % 5]} {n}", "sentence2": f"{WORDS[n * 3 % 5]} {n}", "score": 4 - 2 * n % 5}
        for n in range(60)
    ]
    tables: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "pairs": (pairs, {}),
        "triplets": (triplets, {"loss": "triplet", "dimensions": [32, 16], "prefix_text": "about: "}),
        "scored": (scored, {"kind": "embedding", "pooling": "first", "normalize": False}),
        "classes": ([{"text": f"{WORDS[n % 5]} {n}", "label": "good" if n % 5 > 2 else "bad"} for n in range(60)], {}),
    }
    workspace, recipes = Workspace(folder / "store"), dict[str, Recipe]()
    metrics, plans = dict[str, Any](), dict[str, Any]()
    for name, (rows, task) in tables.items():
        recipes[name] = Recipe(
            name=name,
            base=str(base),
            data={"source": str(write(folder / f"{name}.jsonl", rows))},
            task=task,
            train={"epochs": 4, "lr": 1e-3, "batch_size": 16},
        )
        result = workspace.train(recipes[name], on_plan=lambda plan, name=name: plans.__setitem__(name, plan))
        assert result.timing["proof_seconds"] > 0  # what fails it is not stored
        metrics[name] = result.metrics["test"]
    return House(folder, base, workspace, recipes, metrics, plans)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return house_on("bert", tmp_path_factory.mktemp("house"))


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_gradients_of_a_batch_in_many_passes_equal_those_of_one_graph_with_the_same_dropout(pooling: Any) -> None:
    """Gradient caching: the batch may be larger than a pass, and the vectors are those of one pass."""
    examples = [Related(f"{WORDS[n]}", f"{RIGHT[n]}", (f"{RIGHT[n - 1]} one",)) for n in range(5)]
    gradients: dict[int, tuple[float, torch.Tensor]] = {}
    for most in (100_000, 40, 1):
        base = tiny.base("bert")
        task = TextEmbedding(base.tokenizer, objective="multiple_negatives", pooling=pooling, dimensions=[64, 8])
        method = LoRA(r=4, init_lora_weights=False, lora_dropout=0.3)
        adapters.attach(base.model, method, generator=torch.Generator().manual_seed(0))
        base.model.train()
        rows = encode(task, examples)
        optimiser = AdamW(adapters.trainable_parameters(base.model))
        loss = LocalSlot(base, task, optimiser, 0, most).forward_backward(rows)
        gradients[most] = loss, optimiser.gradients.clone()
        optimiser.steps += 1
        other = LocalSlot(base, task, optimiser, 0, most).forward_backward(rows)
        assert other != pytest.approx(loss, rel=1e-6), "the control: dropout is on, and another step draws others"
    scale = float(gradients[100_000][1].abs().max())
    assert scale > 0
    for most in (40, 1):
        assert gradients[most][0] == pytest.approx(gradients[100_000][0], rel=1e-5)
        assert torch.allclose(gradients[most][1], gradients[100_000][1], atol=1e-4 * scale)


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_columns_plan_training_proof_and_metrics(house: House) -> None:
    stored = {name: house.workspace.resolve(name).task for name in ("pairs", "triplets", "scored")}
    assert {spec["kind"] for spec in stored.values()} == {"embedding"}
    assert [stored[name]["loss"] for name in stored] == ["multiple_negatives", "triplet", "cosent"]
    assert house.plans["pairs"].recipe.data.anchor == "query"
    assert not any(house.plans[name].plan.refused for name in stored)
    assert set(house.metrics["pairs"]) == {"main_score", "accuracy_at_1", "mrr_at_10", "loss"}
    assert {"triplet_accuracy", "main_score_32", "main_score_16"} <= set(house.metrics["triplets"])
    assert set(house.metrics["scored"]) == {"main_score", "spearman", "pearson", "loss"}
    assert house.metrics["triplets"]["main_score"] > 0.5, "it learnt"
    assert not any(bundles.bundle.read_bundle(each).head for each in exported(house, "pairs"))


def exported(house: House, name: str) -> list[Path]:
    folder = house.folder / f"exported-{name}"
    if not folder.exists():
        house.workspace.export(name, folder)
    return [folder]


@pytest.mark.slow
def test_answers_are_vectors_or_the_similarity_of_two_texts(
    house: House, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    workspace, store = house.workspace, ["--store", str(house.workspace.store.root)]
    vectors = torch.tensor([each["embedding"] for each in workspace.predict("triplets", TEXTS)])
    assert vectors.shape == (3, 32)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    both = workspace.predict("triplets", [(TEXTS[0], TEXTS[1])])[0]["value"]
    assert both == pytest.approx(float(vectors[0] @ vectors[1]), abs=2e-2)
    raw = torch.tensor([each["embedding"] for each in workspace.predict("scored", TEXTS)])
    assert float((raw.norm(dim=1) - 1).abs().max()) > 0.1, "the control: not normalized, as it was trained"
    bare = workspace.predict("pairs", TEXTS, bare=True)
    assert bare != workspace.predict("pairs", TEXTS)
    assert run(["predict", "triplets", TEXTS[0], *store]) == 0
    assert "32 numbers: " in capsys.readouterr().out
    assert run(["predict", "triplets", *TEXTS[:2], *store]) == 0
    assert f"{both:.3f}" in capsys.readouterr().out
    alone = write(tmp_path / "alone.jsonl", [{"query": text} for text in TEXTS])
    found = {}
    for table in (alone, Path(house.recipes["pairs"].data.source)):
        assert run(["predict", "pairs", str(table), "--out", str(tmp_path / "out.jsonl"), *store]) == 0
        found[table] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        (tmp_path / "out.jsonl").unlink()
    capsys.readouterr()
    one, two = found.values()
    assert [len(row["predicted"]) for row in one] == [64, 64, 64]
    assert len(two) == 60
    assert all(-1 <= row["predicted"] <= 1 for row in two)


@pytest.mark.slow
def test_evaluation_lists_the_worst_and_a_replay_compares_two_versions(
    house: House, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = ["--store", str(house.workspace.store.root)]
    for name in ("pairs", "triplets", "scored"):
        page = tmp_path / f"{name}.html"
        assert run(["evaluate", name, str(house.recipes[name].data.source), "--report", str(page), *store]) == 0
        said = capsys.readouterr().out
        assert "main_score" in said
        assert "main score" in page.read_text()
        found = house.workspace.evaluate(name, str(house.recipes[name].data.source))
        assert found.metrics["main_score"] > {"pairs": 0.2, "triplets": 0.6, "scored": 0.3}[name]
    shuffled = house.workspace.train(house.recipes["pairs"].model_copy(update={"seed": 7, "name": "again"}))
    replayed = house.workspace.replay("pairs", str(shuffled.version), str(house.recipes["pairs"].data.source))
    assert replayed.score == "main score"
    assert replayed.paired.as_json()["examples"] == 60


@pytest.mark.slow
def test_the_server_gives_vectors_as_trained_beside_a_classifier_in_one_pass(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = house.workspace.engine(str(house.base), dtype="float32")
    names = ("pairs", "triplets", "scored")
    expected = {name: [each["embedding"] for each in house.workspace.predict(name, TEXTS)] for name in names}
    for name in (*names, "classes"):
        engine.warm(name)
    sizes, run_pass = list[int](), engine._runner.run
    monkeypatch.setattr(
        engine._runner, "run", lambda fresh, steps: (sizes.append(len(fresh)), run_pass(fresh, steps))[1]
    )
    with engine._wake:  # no pass starts before all requests wait
        tickets = [(name, place, engine.submit("embed", TEXTS[place], name)) for name in names for place in range(3)]
        classes = [engine.submit("classify", text, "classes") for text in TEXTS]
    for name, place, ticket in tickets:
        own = expected[name][place]  # `predict` has its base in bfloat16 where the processor has it
        assert ticket.result()["embedding"] == pytest.approx(own, abs=3e-2 * max(map(abs, own)))
    assert all(set(ticket.result()["probabilities"]) == {"good", "bad"} for ticket in classes)
    assert sizes == [12]
    with served(house.workspace, engine) as client:
        ask = lambda **more: client.post("/v1/embeddings", json={"input": TEXTS, **more}).json()["data"]
        for name in names:
            assert [each["embedding"] for each in ask(model=name)] == [
                pytest.approx(vector, abs=3e-2 * max(map(abs, vector))) for vector in expected[name]
            ]
        short = ask(model="triplets", dimensions=16)[0]["embedding"]
        assert short == pytest.approx(F.normalize(torch.tensor(expected["triplets"][0][:16]), dim=0).tolist(), abs=2e-2)
        assert len(ask(model="scored", normalize=True)[0]["embedding"]) == 64
        pair = {"model": "scored", "text_1": TEXTS[0], "text_2": TEXTS[1]}
        scored = client.post("/v1/score", json=pair).json()
        assert scored["scoring"] == "cosine"
        assert scored["data"][0]["score"] == pytest.approx(
            house.workspace.predict("scored", [tuple(TEXTS[:2])])[0]["value"], abs=2e-2
        )
        refused = client.post("/v1/classify", json={"model": "pairs", "input": TEXTS})
        assert (refused.status_code, "embeds and was asked to classify" in refused.text) == (409, True), refused.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs", "scored"])
def test_a_comparison_judges_the_main_score_and_its_base_is_the_bare_vectors(house: House, name: str) -> None:
    found = house.workspace.compare(house.recipes[name], methods="base,lora", against="lora", seeds=1)
    assert (found.task, found.metric) == ("embedding", "main_score")
    rows = {row.spec: row for row in found.rows}
    version = house.workspace.resolve(rows["lora"].versions[0])
    assert rows["lora"].score.mean == pytest.approx(100 * rows["lora"].metrics["main_score"])
    assert rows["lora"].score.mean == pytest.approx(100 * version.metrics["test"]["main_score"], abs=5)
    assert not rows["base"].versions
    assert rows["base"].score.mean != rows["lora"].score.mean
    assert "main score" in (Path(found.folder) / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs", "triplets", "scored"])
def test_peft_gives_equal_vectors_on_auto_model_and_the_import_too(house: House, name: str, tmp_path: Path) -> None:
    (folder,) = exported(house, name)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "FEATURE_EXTRACTION"
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(house.base, dtype=torch.float32), folder).eval()
    known, spec = AutoTokenizer.from_pretrained(folder), house.workspace.resolve(name).task
    engine = house.workspace.engine(str(house.base), dtype="float32")
    for text in TEXTS:
        inputs = known(spec["prefix_text"] + text, return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs).last_hidden_state[0]
        vector = {"mean": states.mean(0), "first": states[0]}[spec["pooling"]][: max(spec["dimensions"] or [64])]
        vector = F.normalize(vector, dim=0) if spec["normalize"] else vector
        own = torch.tensor(engine.submit("embed", text, name).result()["embedding"])
        assert torch.allclose(own, vector, atol=1e-4)
    engine.close()
    printed: list[str] = []
    code = (folder / "README.md").read_text().split("```python\n")[-1].split("```")[0]
    exec(
        code.replace("FOLDER", str(folder)).replace("BASE", str(house.base)).replace("a text of your own", TEXTS[0]),
        {"print": lambda value: printed.append(value)},
    )
    expected = torch.tensor(house.workspace.predict(name, TEXTS[:1])[0]["embedding"])
    assert torch.allclose(torch.tensor(printed[0]), expected, atol=2e-2 * float(expected.abs().max())), (
        "the card's code"
    )
    again = Workspace(tmp_path / "store")
    assert again.import_adapter(folder, name).digest == house.workspace.resolve(name).digest
    assert again.predict(name, TEXTS) == house.workspace.predict(name, TEXTS)
    (folder / "manifest.json").rename(tmp_path / "manifest.json")  # a folder as PEFT itself writes it
    try:
        settings = {key: spec[key] for key in ("pooling", "normalize", "dimensions", "prefix_text") if spec[key]}
        again.import_adapter(
            folder, "foreign", base=str(house.base), settings={"normalize": spec["normalize"], **settings}
        )
        assert again.resolve("foreign").task["kind"] == "embedding"
        for one, other in zip(again.predict("foreign", TEXTS), again.predict(name, TEXTS), strict=True):
            assert one["embedding"] == pytest.approx(other["embedding"], abs=1e-5)
    finally:
        (tmp_path / "manifest.json").rename(folder / "manifest.json")
    house.workspace.export(name, tmp_path / "merged", form="merged")
    merged = AutoModel.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        whole = merged(**known(TEXTS[0], return_tensors="pt")).last_hidden_state
        adapted = model(**known(TEXTS[0], return_tensors="pt")).last_hidden_state
    assert torch.allclose(whole, adapted, atol=1e-4)


@pytest.mark.slow
def test_turret_load_puts_it_on_a_model_without_a_head(house: House) -> None:
    (folder,) = exported(house, "pairs")
    model = AutoModel.from_pretrained(house.base)
    inputs = AutoTokenizer.from_pretrained(house.base)(TEXTS[0], return_tensors="pt")
    before = model(**inputs).last_hidden_state
    turret.load(folder, model)
    assert not torch.allclose(model(**inputs).last_hidden_state, before)


@pytest.mark.slow
def test_a_decoder_embeds_by_its_last_token_and_its_vectors_equal_peft(tmp_path: Path) -> None:
    house = house_on("llama", tmp_path)
    assert house.workspace.resolve("pairs").task["pooling"] == "last"
    (folder,) = exported(house, "pairs")
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(house.base, dtype=torch.float32), folder).eval()
    engine = house.workspace.engine(str(house.base), dtype="float32")
    with torch.no_grad():
        state = model(**AutoTokenizer.from_pretrained(folder)(TEXTS[0], return_tensors="pt")).last_hidden_state[0, -1]
    own = torch.tensor(engine.submit("embed", TEXTS[0], "pairs").result()["embedding"])
    assert torch.allclose(own, F.normalize(state, dim=0), atol=1e-4)
    plain = SamplingParams(embedding=Embedding(normalize=False))
    assert len(engine.submit("embed", TEXTS[0], None, plain).result()["embedding"]) == len(state)
    engine.close()
    found = house.workspace.compare(house.recipes["pairs"], methods="base,lora", against="lora", seeds=1)
    assert {row.spec for row in found.rows} == {"base", "lora"}


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_cannot_be_is_one_line(house: House, tmp_path: Path) -> None:
    pairs = house.recipes["pairs"]
    seq2seq = small_models.save_base("t5", tmp_path / "t5")
    wrong: list[tuple[Recipe, type[TurretError], str]] = [
        (pairs.model_copy(update={"base": str(seq2seq)}), BaseModelError, "two stacks of layers"),
        (
            pairs.model_copy(update={"task": pairs.task.model_copy(update={"dimensions": [65, 8]})}),
            TurretError,
            "dimensions has 65, and a vector of .* has 64 numbers",
        ),
        (
            Recipe.model_validate({**pairs.model_dump(mode="json"), "method": {"kind": "head"}}),
            TurretError,
            "a task of vectors has none",
        ),
    ]
    for recipe, kind, line in wrong:
        with pytest.raises(kind, match=line) as caught:
            house.workspace.train(recipe)
        assert len(str(caught.value)) < 300
        assert "\n" not in str(caught.value)
    with pytest.raises(AdapterError, match="no probability of labels"):
        house.workspace.predict("pairs", TEXTS, coverage=0.9)
