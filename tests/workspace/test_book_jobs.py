"""The textbook's two jobs on one engine: LoRA on film reviews with BERT, a reparametrised prefix on news with T5.

The bases are small and built here. The data has the columns, the class names and the splits of the two data sets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from small_models import save_base

from turret import adapters
from turret.data import Example
from turret.engine import Engine, OptimStep, SamplingParams
from turret.errors import NotFound
from turret.recipe import Recipe
from turret.store import Store
from turret.train.curve import StepRecord
from turret.train.slot import TrainingSlot
from turret.workspace import Workspace, serving, training
from turret.workspace.reading import read_dataset
from turret.workspace.resident import ALONE, OwnProcess, ServingBase

pytestmark = pytest.mark.slow
PLACES = ("the market", "in london", "about the fox", "over the dog")
FILMS = (("a dull and boring story", "neg"), ("a great film, a pleasure to watch", "pos"))


def imdb(split: str, rows: int) -> datasets.Dataset:
    """`text` and `label`, whose classes are neg and pos."""
    texts = [f"{FILMS[row % 2][0]} {PLACES[row % 4]} {split} {row}" for row in range(rows)]
    classes = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes})
    return datasets.Dataset.from_dict({"text": texts, "label": [row % 2 for row in range(rows)]}, features=features)


def cnn_dailymail(split: str, rows: int) -> datasets.Dataset:
    """`article`, `highlights` and `id`."""
    articles = [f"{PLACES[row % 4]} shares of the bank fell by 12%; {FILMS[row % 2][0]} {row}" for row in range(rows)]
    highlights = [f"shares fell {PLACES[row % 4]}" for row in range(rows)]
    ids = [f"{split}-{row}" for row in range(rows)]
    return datasets.Dataset.from_dict({"article": articles, "highlights": highlights, "id": ids})


@dataclass(frozen=True)
class Job:
    """A preset, made small."""

    preset: str
    family: str
    make: Callable[[str, int], datasets.Dataset]
    splits: tuple[str, str]
    changes: Mapping[str, str]

    def recipe(self, folder: Path, seed: int) -> Recipe:
        base, data = folder / self.family, folder / self.make.__name__
        if not base.exists():
            save_base(self.family, base)
            data.mkdir()
            for split, rows in zip(self.splits, (48, 8), strict=True):
                self.make(split, rows).to_parquet(str(data / f"{split}.parquet"))
        own = {"base": str(base), "data.source": str(data), "seed": str(seed), "train.dtype": "float32"}
        small = {"data.train": "40", "data.test": "8", "train.lr": "1e-3", "train.max_steps": "8"}
        return Recipe.load(self.preset).with_overrides(own | small | dict(self.changes))


LORA = Job("book-lora", "bert", imdb, ("train", "test"), {"task.max_tokens": "64"})
PREFIX = Job(
    "book-prefix",
    "t5",
    cnn_dailymail,
    ("train", "validation"),
    {"method.reparametrize": "true", "task.max_target_tokens": "12", "task.max_new_tokens": "6"},
)
JOBS = pytest.mark.parametrize("job", [LORA, PREFIX], ids=["lora-imdb", "prefix-cnn_dailymail"])


def train(store: Store, recipe: Recipe, place: OwnProcess) -> tuple[str, str, list[tuple[float, float]]]:
    """The version, its digest, and the loss and the norm of the gradients at each step."""
    curve: list[tuple[float, float]] = []

    def record(record: StepRecord) -> None:
        curve.append((record.loss, record.grad_norm))

    result = training.train(store, recipe, training.Callbacks(record), fresh=True, place=place)
    return result.version, result.digest, curve


def ask(engine: Engine, job: Job, adapter: str | None, texts: list[str]) -> list[Any]:
    """The answers, one at a time, so that all passes have one row."""
    kind = "classify" if job is LORA else "generate"
    options = SamplingParams(temperature=0, logprobs=1, max_tokens=6) if job is PREFIX else None
    found = [engine.submit(kind, text, adapter, options).result(60) for text in texts]
    return [{key: value for key, value in each.items() if key != "id"} for each in found]


@JOBS
def test_the_job_trains_beside_answers_as_it_trains_alone_and_is_attached_and_detached(
    job: Job, tmp_path: Path
) -> None:
    """Losses, norms and digest bit for bit. Control: another seed has another curve and other answers."""
    recipe, other = job.recipe(tmp_path, 1), job.recipe(tmp_path, 2)
    texts = [each.input for each in examples(tmp_path, recipe)[:3]]
    store = Store(tmp_path / "store")
    _, digest, alone = train(Store(tmp_path / "alone"), recipe, ALONE)
    first, _, unlike = train(store, other, ALONE)
    bare = None if job is LORA else job  # a bare classifier has no head to answer with

    with serving.engine(store, recipe.base, None, "float32") as engine:
        weights = {name: each.clone() for name, each in engine.base.model.state_dict().items()}
        before = ask(engine, job, first, texts)
        unadapted = bare and ask(engine, job, None, texts)
        during: list[list[Any]] = []
        found: list[tuple[str, str, list[tuple[float, float]]]] = []
        thread = threading.Thread(target=lambda: found.append(train(store, recipe, ServingBase(engine))))
        thread.start()
        while thread.is_alive():
            during.append(ask(engine, job, first, texts))
        ((version, made, curve),) = found

        assert (curve, made) == (alone, digest)
        assert len(curve) == 8
        assert len(set(curve)) == 8
        assert curve != unlike
        assert len(during) > 1
        assert all(each == before for each in during)

        engine.warm(version)  # attach
        after = ask(engine, job, version, texts)
        assert after != before
        assert ask(engine, job, first, texts) == before
        engine.unload(version)  # detach
        with pytest.raises(NotFound):
            engine.unload(version)
        assert [each.version for each in engine.loaded()] == [first]
        assert (bare and ask(engine, job, None, texts)) == unadapted
        assert ask(engine, job, version, texts) == after  # it is loaded again
        now = engine.base.model.state_dict()
        assert all(torch.equal(each, now[name]) for name, each in weights.items())
        assert not hasattr(engine.base.model, adapters.hooks.ATTRIBUTE)


def examples(folder: Path, recipe: Recipe) -> list[Example]:
    return list(read_dataset(Store(folder / "read"), recipe).train)


@JOBS
def test_the_job_trains_verb_by_verb_beside_a_training_and_leaves_its_curve_as_it_is(job: Job, tmp_path: Path) -> None:
    """A slot answers with what it has learnt. Its losses are those of a slot alone. Control: another seed."""
    recipe = job.recipe(tmp_path, 1)
    store, rows = Store(tmp_path / "store"), examples(tmp_path, recipe)[:8]
    labels = ("neg", "pos") if job is LORA else ()
    asked = [each.input for each in rows]
    settings = recipe.task.model_dump(include={"prefix_text", "max_tokens", "max_target_tokens"}, exclude_none=True)
    kind = str(recipe.task.kind)
    options = SamplingParams(temperature=0, max_tokens=6) if job is PREFIX else None
    first, digest, alone = train(store, recipe, ALONE)

    def learn(engine: Engine, seed: int) -> tuple[list[float], list[Any]]:
        with TrainingSlot(engine, "job", recipe.method, kind=kind, labels=labels, settings=settings, seed=seed) as slot:
            before, losses = slot.sample(asked, options), list[float]()
            for _ in range(40):
                losses.append(slot.forward_backward(rows))
                slot.optim_step(OptimStep(1e-2))
                answers = slot.sample(asked, options)
            assert answers != before
            assert losses[-1] < losses[0] * (0.5 if job is LORA else 0.95)
            return losses, answers

    with serving.engine(store, recipe.base, None, "float32") as engine:
        undisturbed, other = learn(engine, 1), learn(engine, 2)
        found: list[tuple[str, str, list[tuple[float, float]]]] = []
        thread = threading.Thread(
            target=lambda: found.append(train(Store(tmp_path / "beside"), recipe, ServingBase(engine)))
        )
        thread.start()
        beside = learn(engine, 1)
        thread.join()

        assert beside == undisturbed
        assert other[0] != undisturbed[0]
        assert found == [(first, digest, alone)]
        if job is LORA:
            assert [each["label"] for each in beside[1]] == [each.label for each in rows]
        assert engine.loaded() == []  # the slots are gone


def test_control_is_measured_for_the_prefix_on_one_resident_base(tmp_path: Path) -> None:
    """Two aspects. A prefix that is trained for one writes it. Control: the bare base writes the same for both."""
    recipe = PREFIX.recipe(tmp_path, 1)
    save_base("bert", tmp_path / "bert")
    data = tmp_path / "aspects"
    data.mkdir()
    for split, rows in (("train", 48), ("test", 8)):
        table = cnn_dailymail(split, rows).rename_column("highlights", "market_highlights")
        table.add_column("film_highlights", [FILMS[0][0]] * rows).to_parquet(str(data / f"{split}.parquet"))
    aspects = {"data.source": str(data), "data.document": "article", "data.summary": "{aspect}_highlights"}
    asked = recipe.with_overrides(aspects | {"train.max_steps": "60", "train.epochs": "12", "train.lr": "3e-2"})
    workspace = Workspace(tmp_path / "store")
    found = workspace.control(asked, ["market", "film"], methods="base,prefix", judge=str(tmp_path / "bert"))

    bare, prefix = found.rated
    assert (bare.spec, prefix.spec) == ("base", "prefix")
    assert bare.by_classifier.mean == pytest.approx(50)
    assert prefix.by_classifier.mean > bare.by_classifier.mean
    names = {version.name for version in workspace.list()}
    assert names == {"book-prefix-market", "book-prefix-film", "book-prefix-judge"}
