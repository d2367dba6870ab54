"""Trainings that share a base give the versions that each gives alone, bit for bit, and one's error is its own."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_gpu import GPU, pretend_gpu, to_gpu
from shelf import Shelf
from small_models import ENCODER_DECODERS, ENCODERS, FAMILIES, GENERATORS, save_base

from turret.bases import Base, choose_device
from turret.bases import load as load_base
from turret.bases.device import Gpu, Machine
from turret.engine import Engine, SamplingParams
from turret.errors import DataError, Interrupted, LossNotFinite, OutOfMemory, TrainingError, TurretError
from turret.recipe import Recipe
from turret.store import Store
from turret.tasks import task_of
from turret.train.curve import StepRecord
from turret.workspace import measure, reading, resident, serving, training
from turret.workspace.child_process import why_alone
from turret.workspace.progress import silent
from turret.workspace.resident import ALONE, ResidentBases, Room, Seat, ServingBase, predicted_for, with_room
from turret.workspace.results import Planned, RunResult

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "r": 4, "lora_dropout": 0.1},
    "prefix": {"kind": "prefix", "num_virtual_tokens": 4, "reparametrize": True},
    "head": {"kind": "head"},
}
WORDS = ("the market", "in london", "about the fox", "over the dog", "one line", "it is")
ENDS = {"good": ("great film", "a pleasure to watch"), "bad": ("dull story", "boring and lazy")}


@pytest.fixture
def place() -> Iterator[ResidentBases]:
    place = ResidentBases()
    yield place
    place.close()


def rows(count: int) -> Iterator[dict[str, str]]:
    for number in range(count):
        label = ("bad", "good")[number % 2]
        text = f"{WORDS[number % 6]} {ENDS[label][number // 2 % 2]} {WORDS[number * 5 % 6]} {number}"
        yield {"text": text, "label": label, "summary": ENDS[label][0]}


def recipe(folder: Path, family: str, method: str, seed: int = 0, task: str | None = None, **train: Any) -> Recipe:
    """A small training. task: "classify" or "generate"; None: generate if the family can."""
    base, data = folder / family, folder / "rows.jsonl"
    if not base.exists():
        save_base(family, base)
    if not data.exists():
        data.write_text("\n".join(map(json.dumps, rows(48))))
    writes = task == "generate" if task else family in GENERATORS
    columns = {"document": "text", "summary": "summary"} if writes else {"text": "text", "label": "label"}
    return Recipe(
        name=f"{family}-{method}-{seed}",
        base=str(base),
        data={"source": str(data), "test": 8, "validation": 8, **columns},
        task={"kind": "generate", "max_new_tokens": 4} if writes else {"kind": "classify"},
        method=METHODS[method],
        train={"max_steps": 4, "batch_size": 8, "lr": 1e-3, "dtype": "float32", "evaluate": 2} | train,
        seed=seed,
    )


def run(
    store: Store, recipe: Recipe, place: Any, *, on_record: Callable[[StepRecord], None] = lambda _: None, **how: Any
) -> str | TurretError:
    """The digest of the version, or the error."""
    try:
        return training.train(store, recipe, training.Callbacks(on_record), fresh=True, place=place, **how).digest
    except TurretError as error:
        return error


def beside(store: Store, recipes: list[Recipe], place: ResidentBases | ServingBase) -> dict[str, str | TurretError]:
    """The same of several at once."""
    results: dict[str, str | TurretError] = {}

    def each(recipe: Recipe) -> None:
        results[recipe.name] = run(store, recipe, place)

    threads = [threading.Thread(target=each, args=[recipe]) for recipe in recipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "task"), [(each, "classify") for each in FAMILIES] + [(each, "generate") for each in GENERATORS]
)
def test_runs_beside_one_another_and_beside_answers_equal_the_same_runs_alone(
    family: str, task: Any, tmp_path: Path, place: ResidentBases
) -> None:
    """16 runs and answers on one base, bit for bit. A digest covers every tensor and the lineage.

    Answers are asked one at a time, so that all passes with them have one row. Controls: another seed or another method
    gives another version, and another version gives other answers.
    """
    methods = ["lora", "prefix", "head"] if task == "classify" else ["lora", "prefix"]
    recipes = [recipe(tmp_path, family, method, seed, task) for method in methods for seed in range(2)]
    more = [recipe(tmp_path, family, "lora", seed, task) for seed in range(2, 18 - len(recipes))]
    store, served = Store(tmp_path / "store"), [recipe(tmp_path, family, method, 99, task) for method in methods]
    for one in served:
        run(store, one, place)
    alone = {each.name: run(Store(tmp_path / "alone"), each, place) for each in recipes}
    texts, meanwhile, found = [row["text"] for row in rows(2)], list[list[Any]](), dict[str, str | TurretError]()

    base = load_base(str(tmp_path / family), task=task, dtype="float32")
    with Engine(base, serving.StoreSource(store)) as engine:

        def ask(name: str) -> list[Any]:
            options = SamplingParams(logprobs=2, seed=1) if task == "generate" else None
            asked = [engine.submit(task, text, f"{name}@1", options).result(60) for text in texts]
            return [{key: value for key, value in answer.items() if key != "id"} for answer in asked]

        before = [ask(one.name) for one in served]
        neighbours = [*recipes, *more]
        thread = threading.Thread(
            target=lambda: found.update(beside(Store(tmp_path / "beside"), neighbours, ServingBase(engine)))
        )
        thread.start()
        while thread.is_alive():
            meanwhile.append([ask(one.name) for one in served])

    assert {name: found[name] for name in alone} == alone
    assert len(found) == len(set(found.values())) == 16
    assert len(meanwhile) > 1
    assert all(each == before for each in meanwhile)
    assert len({json.dumps(each) for each in before}) == len(methods)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_beside_one_another_on_a_resident_base_equal_the_same_runs_alone(
    family: str, tmp_path: Path, place: ResidentBases
) -> None:
    """Two bases, if the family also generates. Control: another seed, or another method, gives another version."""
    methods = ["lora", "prefix", *(["head"] if family in ENCODERS else [])]
    recipes = [recipe(tmp_path, family, method, seed) for method in methods for seed in range(2)]
    recipes += [recipe(tmp_path, family, "head", 0, "classify")] if family in GENERATORS else []
    more = [recipe(tmp_path, family, "lora", seed) for seed in range(2, 18 - len(recipes))]
    alone = {each.name: run(Store(tmp_path / "alone"), each, place) for each in recipes}

    found = beside(Store(tmp_path / "beside"), [*recipes, *more], place)

    assert {name: found[name] for name in alone} == alone
    assert len(found) == len(set(found.values())) == 16


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", *ENCODER_DECODERS[:1], "llama"])
def test_a_run_on_a_resident_base_gives_the_version_of_a_process_of_its_own(
    family: str, tmp_path: Path, place: ResidentBases
) -> None:
    for method in ("lora", "prefix"):
        one = recipe(tmp_path, family, method)
        assert run(Store(tmp_path / "here"), one, place) == run(Store(tmp_path / "own"), one, ALONE)


@pytest.mark.slow
def test_an_error_in_one_run_is_not_another_ones(tmp_path: Path, place: ResidentBases) -> None:
    good = [recipe(tmp_path, "bert", "lora", seed) for seed in range(2)]
    alone = {each.name: run(Store(tmp_path / "alone"), each, place) for each in good}
    infinite = recipe(tmp_path, "bert", "lora", seed=7, lr=1e30, warmup=0)
    missing = recipe(tmp_path, "bert", "lora", seed=8)
    missing = missing.model_copy(update={"data": missing.data.model_copy(update={"source": str(tmp_path / "no.csv")})})

    found = beside(Store(tmp_path / "beside"), [*good, infinite, missing], place)

    assert isinstance(found[infinite.name], LossNotFinite)
    assert isinstance(found[missing.name], DataError)
    assert {name: found[name] for name in alone} == alone


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_plan_on_a_resident_base_predicts_memory_from_the_batches_of_the_data(
    family: str, tmp_path: Path, place: ResidentBases
) -> None:
    """The recipe allows much larger batches than the data has, 32 short texts.

    Control: the prediction without the data, and the one for long texts.
    """
    planned: list[Planned] = []
    one = recipe(tmp_path, family, "lora", batch_size=512, micro_batch_tokens=1_000_000, max_steps=1)
    training.train(Store(tmp_path / "s"), one, training.Callbacks(planned=planned.append), fresh=True, place=place)
    found = planned[0].plan.memory
    assert found is not None

    kind = task_of("generate" if family in GENERATORS else "classify")
    most = predicted_for(planned[0].recipe, kind, ("bad", "good"), torch.device("cpu"))
    assert most is not None
    assert most.activations > 20 * found.activations

    short = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(short.replace('"text": "', '"text": "' + "the market in london " * 8))
    training.train(Store(tmp_path / "s"), one, training.Callbacks(planned=planned.append), fresh=True, place=place)
    longer = planned[1].plan.memory
    assert longer is not None
    assert longer.activations > 2 * found.activations
    assert longer.trainable == found.trainable


class Hungry(ServingBase):
    """Asks torch for more memory than any machine has, in the passes of its models that train, or in the others."""

    trains: bool

    def model_for(self, *how: Any) -> Base:
        base = super().model_for(*how)

        def eat(*_: Any) -> None:
            if base.model.training == self.trains:
                torch.empty(1 << 60)

        base.model.get_input_embeddings().register_forward_hook(eat)
        return base


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_memory_that_runs_out_in_one_run_and_a_cancel_end_that_run_alone(family: str, tmp_path: Path) -> None:
    """In a step, or between steps, by a real error of torch. Neighbours and answers stay as they are, bit for bit."""
    good = [recipe(tmp_path, family, method, 0) for method in ("lora", "prefix")]
    hungry = {trains: recipe(tmp_path, family, "lora", 7 + trains) for trains in (False, True)}
    cancelled, steps, found = recipe(tmp_path, family, "lora", 9), list[int](), dict[str, str | TurretError]()
    alone = {each.name: run(Store(tmp_path / "alone"), each, ALONE) for each in good}
    store, kind = Store(tmp_path / "beside"), "generate" if family in GENERATORS else "classify"
    run(store, recipe(tmp_path, family, "lora", 99), ALONE)

    with serving.engine(store, str(tmp_path / family), None, "float32") as engine:
        place = ServingBase(engine)
        ask = lambda: [engine.submit(kind, "the film", f"{family}-lora-99@1").result(60) for _ in range(2)]

        def each(one: Recipe, place: ServingBase, **how: Any) -> threading.Thread:
            thread = threading.Thread(target=lambda: found.update({one.name: run(store, one, place, **how)}))
            thread.start()
            return thread

        def stopped(record: StepRecord) -> None:
            steps.append(record.step)

        before, meanwhile = ask(), list[Any]()
        threads = [each(one, place) for one in good]
        for trains, one in hungry.items():
            eater = Hungry(engine)
            eater.trains = trains
            threads.append(each(one, eater))
        threads.append(each(cancelled, place, on_record=stopped, asked=lambda: len(steps) >= 2))
        while any(thread.is_alive() for thread in threads):
            meanwhile.append(ask())

    assert {name: found[name] for name in alone} == alone
    for trains, one in hungry.items():
        assert isinstance(found[one.name], OutOfMemory)
        said = str(found[one.name])
        assert said.startswith("out of memory at step " if trains else "out of memory in an evaluation")
        assert "\n" not in said
        assert len(said) < 300
    assert isinstance(found[cancelled.name], Interrupted)
    assert {version.name for version in store.list()} == {f"{family}-lora-99", *alone}
    assert len(meanwhile) > 1
    assert all(each == before for each in meanwhile)


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_resumes_from_its_checkpoint(tmp_path: Path, place: ResidentBases) -> None:
    one, steps = recipe(tmp_path, "bert", "lora", max_steps=6), list[int]()
    whole = run(Store(tmp_path / "whole"), one, place)
    store = Store(tmp_path / "stopped")

    stopped = run(store, one, place, on_record=lambda record: steps.append(record.step), asked=lambda: len(steps) == 1)
    assert isinstance(stopped, Interrupted)
    again = training.train(store, one, training.Callbacks(), fresh=False, place=place)

    assert again.resumed_from == 1
    assert again.digest == whole


@pytest.mark.slow
def test_the_weights_are_in_memory_once(tmp_path: Path, place: ResidentBases) -> None:
    one = recipe(tmp_path, "bert", "lora")
    ready = [training.prepare(Store(tmp_path / "s"), one, training.Callbacks(), place=place) for _ in range(3)]
    body = [each.base.model.get_parameter("bert.embeddings.word_embeddings.weight") for each in ready]
    assert len({each.data_ptr() for each in body}) == 1
    assert len({id(each.base.model) for each in ready}) == 3

    with torch.no_grad():
        weights = next((tmp_path / "bert").glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes())  # a new file: the base is read again
    changed = training.prepare(Store(tmp_path / "s"), one, training.Callbacks(), place=place)
    assert changed.base.model.get_parameter("bert.embeddings.word_embeddings.weight").data_ptr() != body[0].data_ptr()


@pytest.mark.slow
def test_cells_are_measured_on_the_base_that_stays_in_memory(
    tmp_path: Path, place: ResidentBases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them read it once, and have the results of processes of their own, where each measurement reads it."""
    store, read = Store(tmp_path / "store"), list[str]()

    def load(base: str, **how: Any) -> Base:
        read.append(base)
        return load_base(base, **how)

    def measured(one: Recipe, trained: RunResult, place: Any) -> dict[str, Any]:
        data = reading.read_dataset(store, one)
        found = place.run(lambda: measure.version(store, one, data, trained, {}, silent, place))
        return {name: found[name] for name in ("digest", "metrics", "answers", "scores", "forgetting")}

    monkeypatch.setattr(resident.bases, "load", load)
    cells, found = [recipe(tmp_path, "llama", "lora", seed, dtype="auto") for seed in (0, 1)], []
    for one in cells:
        seat = seat_on(place, Room())
        trained = training.train(store, one, training.Callbacks(), fresh=True, place=seat)
        found.append((one, trained, measured(one, trained, seat)))
    assert read == [cells[0].base]

    for one, trained, result in found:
        assert measured(one, trained, ALONE) == result
    assert read == [cells[0].base] * 3, "the control"


def test_a_training_that_needs_another_base_than_the_one_that_serves_says_so(tmp_path: Path) -> None:
    save_base("bert", tmp_path / "bert")
    with serving.engine(Store(tmp_path / "store"), str(tmp_path / "bert"), None, "float32") as engine:
        place = ServingBase(engine)
        for one in (recipe(tmp_path, "roberta", "lora"), recipe(tmp_path, "bert", "lora", dtype="bfloat16")):
            error = run(Store(tmp_path / "store"), one, place)
            assert isinstance(error, TrainingError)
            assert "use turret worker" in str(error)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"kind": "full"}}, "every weight"),
        ({"train": {"lr": "auto"}}, "trials"),
        ({"train": {"shard": "fsdp2"}}, "divides the base"),
        ({"method": {"kind": "peft", "peft_type": "IA3"}}, "by patterns of its recipe"),
    ],
)
def test_a_training_that_needs_the_base_for_itself_says_so(
    changes: dict[str, Any], words: str, tmp_path: Path, place: ResidentBases
) -> None:
    plain = recipe(tmp_path, "bert", "lora").model_dump()
    one = Recipe(**plain | {key: plain[key] | value if key == "train" else value for key, value in changes.items()})
    assert words in str(why_alone(one))
    assert why_alone(recipe(tmp_path, "bert", "lora")) is None
    if "shard" not in changes.get("train", {}):  # that one asks for several processes first
        error = run(Store(tmp_path / "s"), one, place)
        assert isinstance(error, TrainingError)
        assert words in str(error)


def seat_on(
    place: ResidentBases | ServingBase, room: Room, wanted: Callable[[], Collection[str]] = tuple, stop: bool = False
) -> Seat:
    return Seat(place, room, wanted, lambda: stop)


def test_a_training_that_does_not_fit_beside_another_begins_when_that_has_ended(place: ResidentBases) -> None:
    room, cpu, more = Room(), torch.device("cpu"), 1 << 60  # bytes that no machine has
    first, second, small = (seat_on(place, room) for _ in range(3))
    began: list[bool] = []
    with room.taken_by(second), room.taken_by(first):
        assert not room.wait(first, more, cpu, begins=True), "it is alone, so its plan refuses it"
        thread = threading.Thread(target=lambda: began.append(room.wait(second, 1, cpu, begins=True)))
        thread.start()
        thread.join(1)
        assert thread.is_alive()
        assert second.waits
        first.settle()  # the control: what it needed is no longer promised to it, but in use
        thread.join(20)
        assert began == [True]
        with room.taken_by(small):
            assert not room.wait(small, 1, cpu, begins=True)
    stopped = seat_on(place, room, stop=True)
    with room.taken_by(first), room.taken_by(stopped), pytest.raises(Interrupted):
        room.wait(stopped, more, cpu, begins=True)


@pytest.mark.slow
def test_a_base_that_nobody_wants_is_let_go_when_another_is_loaded(tmp_path: Path, place: ResidentBases) -> None:
    room, recipes = Room(), [recipe(tmp_path, family, "lora") for family in ("bert", "t5", "roberta")]
    loaded = []

    def load(one: Recipe, wanted: list[str]) -> None:
        ready = training.prepare(
            Store(tmp_path / "s"), one, training.Callbacks(), place=seat_on(place, room, lambda: wanted)
        )
        loaded.append(
            weakref.ref(ready.base.model.get_parameter(next(iter(dict(ready.base.model.named_parameters())))))
        )

    load(recipes[0], [])
    load(recipes[1], [recipes[0].base])
    gc.collect()
    assert loaded[0]() is not None, "a queued run wants it"
    load(recipes[0], [])
    load(recipes[2], ["auto"])
    gc.collect()
    assert all(each() is not None for each in loaded), "a queued run may want any"
    load(recipe(tmp_path, "distilbert", "lora"), [recipes[2].base])
    gc.collect()
    assert [each() is not None for each in loaded] == [False, False, False, True, True]


def test_a_gpu_has_room_for_a_training_of_the_base_that_it_holds() -> None:
    """Without this, a training that fits in a process of its own would go to the CPU beside its own base."""
    gpu = Gpu(torch.device("cuda:0"), "a GPU", free=3 << 30, total=16 << 30)
    other = replace(gpu, device=torch.device("cuda:1"))
    needed = lambda _: 5 << 30
    assert choose_device("auto", needed, Machine((gpu, other))).device.type == "cpu", "the control"
    roomy = with_room(Machine((gpu, other)), {other.device: 4 << 30})
    assert choose_device("auto", needed, roomy).device == other.device

    class OnGpu(ResidentBases):
        def machine(self) -> Machine:
            return roomy

    place = OnGpu(thread=None)
    assert seat_on(place, Room()).machine() == roomy, "the place of one training knows it too"


def test_a_training_beside_answers_finds_room_where_the_base_that_serves_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU, what the base takes is free for a training of it; on a CPU nothing is said."""
    gpu = Gpu(GPU, "a GPU", free=1000, total=16 << 30)
    monkeypatch.setattr(resident, "this_machine", lambda: Machine((gpu, replace(gpu, device=torch.device("cuda:1")))))
    shelf = Shelf("bert")
    shelf.put("a")
    with shelf.engine() as engine:
        place = ServingBase(engine)
        needed = lambda _: 1000 + engine.base.bytes
        assert engine.base.bytes > 0
        assert place.machine() is None, "the control: nothing is held on a GPU"
        assert choose_device("auto", needed, resident.this_machine()).device.type == "cpu", "the control"
        with pretend_gpu():
            to_gpu(engine.base.model)
            found = place.machine()
            assert found is not None
            assert [each.free for each in found.gpus] == [1000 + engine.base.bytes, 1000], "of its own GPU alone"
            assert choose_device("auto", needed, found).device == GPU
            assert seat_on(place, Room()).machine() == found, "the place of one training knows it too"
