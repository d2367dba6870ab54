"""Every verb on a real GPU: equal to the CPU and to PEFT, with the memory that was predicted. `make test-gpu` runs it.

It needs a GPU that torch can use, and nothing else: the bases are small and random.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import at_a_gpu
import pytest
import small_models
import tiny_training as tiny
import torch
from adapters_at_hand import CLASSIFIES, GENERATES, METHODS, alone, made
from batches import padded, rows, with_eos, without_dropout
from peft_twins import lora_twin
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

from turret import adapters, bases
from turret.adapters import packed
from turret.bases import choose_device, default_dtype, synchronize
from turret.bases.meta_model import CONTEXT, model_of
from turret.cli.main import run
from turret.engine import SamplingParams
from turret.engine.protocol import OptimStep
from turret.engine.runner import Runner
from turret.engine.sequence import DecodeStep, Prefill
from turret.methods import LoRA, Prefix
from turret.recipe import Recipe
from turret.train.memory import Work, predict_on_gpu, refusal
from turret.train.proof import tolerance
from turret.train.slot import LocalSlot
from turret.workspace import Workspace

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ALLOWED = tolerance(torch.float32, CPU, GPU)  # of the largest output
FAMILIES = [*small_models.FAMILIES, "gemma2", "mistral", "phi3", "electra"]


def near(one: torch.Tensor, other: torch.Tensor, allowed: float = ALLOWED) -> None:
    at_a_gpu.near(one, other, allowed)


def kind_of(family: str) -> Any:
    return "classify" if family in small_models.ENCODERS + small_models.RELATIVE_ENCODERS else "generate"


# --- the verbs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("gpu")
    at_a_gpu.write_inputs(where)
    return where


@pytest.mark.parametrize("dtype", ["float32", "auto", "float16"])
@pytest.mark.parametrize(("data", "base"), [("films", "bert"), ("lines", "llama")])
def test_every_verb_runs_on_the_gpu(
    folder: Path, tmp_path: Path, data: str, base: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store, table = ["--store", str(tmp_path / "store")], str(folder / f"{data}.csv")
    words = [table, "--base", str(folder / base), "--set", "train.epochs=2", "--set", f"train.dtype={dtype}"]
    words += ["--set", "task.max_target_tokens=8"] if data == "lines" else []

    def told(*arguments: str) -> Any:
        assert run([*arguments, *store, "--device", "cuda", "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    planned = told("plan", *words)
    assert {row["name"]: row["text"] for row in planned["plan"]["checks"]}["device"].startswith("cuda:0: ")
    trained = told("train", *words, "--name", data)
    assert trained["device"] == "cuda:0"
    assert trained["memory"]["peak_bytes"] > trained["memory"]["base_bytes"]
    assert len(told("predict", data, "a great film", "a dull story")) == 2
    assert told("evaluate", data, table)["metrics"]["loss"] >= 0
    assert run(["predict", data, "a great film", *store, "--device", "cpu", "--json"]) == 0  # made there, used here
    assert run(["export", data, str(tmp_path / "out"), *store]) == 0
    capsys.readouterr()
    assert told("import", str(tmp_path / "out"), "--name", "again")["effect"] > 0


@pytest.mark.slow
def test_compare_runs_its_trainings_on_the_gpu(folder: Path, tmp_path: Path, capsys) -> None:
    words = ["compare", str(folder / "films.csv"), "--base", str(folder / "bert"), "--methods", "head,lora"]
    words += ["--against", "head", "--seeds", "2", "--set", "train.epochs=1", "--store", str(tmp_path / "store")]
    assert run([*words, "--device", "cuda", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == 0


def test_auto_takes_the_gpu_and_says_so(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    recipe = Recipe(name="films", base=folder / "bert", data=folder / "films.csv", train={"epochs": 1})
    workspace = Workspace(tmp_path / "store")
    assert workspace.train(recipe, on_stage=said.append).device.startswith("cuda:")
    answers = workspace.predict("films", ["a great film"], on_stage=said.append)
    assert any("answering on cuda:" in line for line in said)
    with workspace.engine(str(folder / "bert"), on_stage=said.append) as engine:
        assert engine.base.model.device.type == "cuda"
        engine.warm("films")
        ticket = engine.submit("classify", "a great film", "films")
        mixed, alone = ticket.result(60)["probabilities"], answers[0]["probabilities"]
    near(torch.tensor(list(mixed.values())), torch.tensor(list(alone.values())), 2e-2)


def test_a_gpu_that_is_not_there_is_one_line(folder: Path, tmp_path: Path, capsys) -> None:
    words = ["train", str(folder / "films.csv"), "--base", str(folder / "bert"), "--store", str(tmp_path)]
    assert run([*words, "--device", f"cuda:{torch.cuda.device_count()}"]) == 2
    assert "is not there: this machine has cuda:0" in capsys.readouterr().err


def test_the_same_training_twice_makes_the_same_version(folder: Path, tmp_path: Path) -> None:
    changes = {"epochs": 2, "device": "cuda", "dtype": "float32"}
    recipe = Recipe(name="films", base=folder / "bert", data=folder / "films.csv", train=changes)
    first, second = (Workspace(tmp_path / name).train(recipe) for name in ("one", "two"))
    assert first.digest == second.digest


def test_the_fingerprint_is_that_of_the_files_on_any_device(folder: Path) -> None:
    here, there = (
        bases.load(str(folder / "bert"), task="classify", device=name, verify=True) for name in ("cpu", "cuda")
    )
    assert here.fingerprint == there.fingerprint
    assert there.model.device == GPU


# --- equal to the CPU and to PEFT ------------------------------------------------------------------------------------


def stepped(family: str, method: dict[str, Any], device: torch.device) -> tuple[float, torch.Tensor]:
    """The loss and the gradients of one training step."""
    kind = "classify" if kind_of(family) == "classify" else "summarize"
    base: Any = tiny.base(family, kind_of(family))
    without_dropout(base.model).to(device)
    task, optimiser, items = tiny.started(base, kind, **method)
    kept: list[torch.Tensor] = []
    optimiser.step = lambda rate: kept.append(optimiser.gradients.clone())
    loss, _ = LocalSlot(base, task, optimiser, 42, 256).train_step(items, OptimStep(1e-3, clip=0.0))
    return loss, kept[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_a_training_step_has_the_cpus_gradients(family: str, method: str) -> None:
    settings = {"method": method} | ({"method.lora_dropout": 0.0} if method == "lora" else {})
    there, here = stepped(family, settings, GPU), stepped(family, settings, CPU)
    assert there[0] == pytest.approx(here[0], rel=1e-4)
    near(there[1], here[1], 1e-3)


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gpt2"])
@torch.no_grad()
def test_the_answers_are_pefts_on_the_same_gpu(family: str) -> None:
    adapter = made(family, "classify", METHODS["wide"])
    ours = adapters.mount(alone(family, "classify", None).to(GPU), adapter)
    twin = lora_twin(family, "classify", adapter).to(GPU)
    for row in with_eos(ours, rows()):
        batch = {name: each.to(GPU) for name, each in padded([row], twin.config.pad_token_id).items()}
        near(adapters.classify_logits(ours, [row]), twin(**batch).logits)


def passed(family: str, names: list[str], device: torch.device) -> list[torch.Tensor]:
    """The logits of a mixed pass of these adapters, and of three decode steps if they generate."""
    kind, base = kind_of(family), tiny.base(family, kind_of(family))
    base.model.to(device)
    runner, spec = Runner(base), CLASSIFIES if kind == "classify" else GENERATES  # type: ignore[arg-type]
    for slot, name in enumerate(names, 1):
        adapter = made(family, kind, METHODS[name], slot)
        runner.adapter_pool.mount(slot, runner.adapter_pool.prepare(adapter, f"sha256:{slot}", spec))  # type: ignore[arg-type]
    inputs = list(enumerate(with_eos(runner.model, rows(lengths=(9, 3, 14))), 1))
    if kind == "classify":
        return runner.run([Prefill(row.tolist(), slot) for slot, row in inputs]).classes
    places = [runner.kv_slot(len(row), 8, slot) for slot, row in inputs]
    found = [runner.run([Prefill(row.tolist(), slot, places[slot - 1]) for slot, row in inputs]).vocabulary]
    steps = [[DecodeStep(7 + step, slot, places[slot - 1]) for slot, _ in inputs] for step in range(3)]
    return [*found, *(runner.run([], step).vocabulary for step in steps)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_pass_has_the_cpus_logits(family: str) -> None:
    names = ["lora", "wide", "prefix"]
    for one, other in zip(passed(family, names, GPU), passed(family, names, CPU), strict=True):
        near(one, other, 1e-3)


def test_a_mixed_engine_answers_as_each_adapter_alone(folder: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "store")
    changes = {"epochs": 2, "device": "cuda", "dtype": "float32"}
    methods = {"one": LoRA(r=4), "two": Prefix(num_virtual_tokens=4), "three": LoRA(r=8)}
    for name, method in methods.items():
        made_of = {"base": folder / "llama", "data": folder / "lines.csv", "task": {"max_target_tokens": 8}}
        workspace.train(Recipe(name=name, method=method, train=changes, **made_of))
    pairs = [(name, text) for name in methods for text in ("great film, number 3", "dull story, number 8")]
    expected = {each: workspace.predict(each[0], [each[1]], device="cuda")[0]["text"] for each in pairs}
    with workspace.engine(str(folder / "llama"), device="cuda") as engine:
        asked = {each: engine.submit("generate", each[1], each[0], SamplingParams()) for each in pairs}
        assert {each: ticket.result(120)["text"] for each, ticket in asked.items()} == expected


# --- memory ----------------------------------------------------------------------------------------------------------

WIDE = LlamaConfig(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=4,
    vocab_size=32000, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [LoRA(r=16, target_modules="all-linear"), LoRA(r=8), Prefix(num_virtual_tokens=16)],
    ids=["all-linear", "lora", "prefix"],
)
@pytest.mark.parametrize("work", [Work(1, 512, 64), Work(4, 200, 40)], ids=["long", "many"])
def test_the_predicted_memory_of_a_training_is_within_a_fifth(method: Any, work: Work) -> None:
    dtype = default_dtype(GPU)
    predicted = predict_on_gpu(model_of(WIDE, "generate"), method, work, dtype)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(GPU)
    with GPU:
        model: Any = type(model_of(WIDE, "generate"))(WIDE).to(dtype).requires_grad_(False)
    adapters.attach(model, method)
    model.train()
    trained = adapters.trainable_parameters(model)
    for each in trained.values():
        each.grad = torch.zeros_like(each)
    moments = [torch.zeros_like(each) for each in trained.values() for _ in range(2)]
    torch.cuda.reset_peak_memory_stats(GPU)
    sources = [torch.randint(5, 30000, (work.source,))] * work.rows
    targets = [torch.randint(5, 30000, (work.target,))] * work.rows

    def loss(states: torch.Tensor) -> torch.Tensor:
        return packed.vocabulary_logits(model, states).float().logsumexp(-1).sum()

    states = packed.target_states(model, sources, targets)
    losses: list[Any] = [checkpoint(loss, piece, use_reentrant=False) for piece in states.split(32)]
    torch.stack(losses).sum().backward()
    synchronize(GPU)
    peak = torch.cuda.max_memory_allocated(GPU) - before
    assert len(moments) == 2 * len(trained)
    assert predicted.total - CONTEXT == pytest.approx(peak, rel=0.2)


def test_the_plan_measures_the_peak_that_the_training_then_has(folder: Path, tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    changes = {"epochs": 2, "device": "cuda", "dtype": "float32", "batch_size": 16}
    recipe = Recipe(name="films", base=folder / "bert", data=folder / "films.csv", train=changes)
    memory = Workspace(tmp_path / "store").train(recipe).memory
    assert memory["predicted_bytes"] == pytest.approx(memory["peak_bytes"], rel=0.2)


def test_a_base_that_is_too_large_for_the_gpu_is_refused_before_it_is_read() -> None:
    huge = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=160, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    predicted = predict_on_gpu(model_of(huge, "generate"), LoRA(r=16), Work(1, 512, 64), torch.bfloat16)
    assert refusal(predicted, torch.cuda.mem_get_info(GPU)[0], "huge", "cuda:0") is not None
    assert choose_device("auto", lambda at: predicted.total).device.type == "cpu"
