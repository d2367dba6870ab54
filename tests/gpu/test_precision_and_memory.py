"""On a real GPU: gradients equal to PEFT's, a base in 4 bits, memory, and the verbs that load a base by the way.

`make test-gpu` runs it. It needs a GPU that torch can use; some tests need bitsandbytes, one needs two GPUs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import base_in_parts as parts
import pytest
import small_models
import tiny_training as tiny
import torch
from adapters_at_hand import METHODS, alone, made
from at_a_gpu import near, write_inputs
from batches import padded, rows, with_eos, without_dropout
from four_bits import base_in_four_bits, needs_bitsandbytes
from peft_twins import lora_twin
from several_launch import ended, launch

from turret import adapters, bases
from turret.adapters import attachment
from turret.bases.meta_model import CONTEXT, room_to_answer
from turret.cli.main import run
from turret.engine import SamplingParams
from turret.engine.protocol import OptimStep
from turret.methods import LoRA, Prefix
from turret.recipe import Recipe
from turret.train.slot import LocalSlot
from turret.workspace import Workspace, answering
from turret.workspace.resident import predicted_for

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
WIDE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("gpu")
    write_inputs(where)
    small_models.save_base("llama", where / "wide", **WIDE)
    return where


def recipe(folder: Path, name: str, base: str, data: str, **changes: Any) -> Recipe:
    task = {"max_target_tokens": 8} if data == "lines" else {}
    train = {"epochs": 1, "device": "cuda", "dtype": "float32", **changes.pop("train", {})}
    return Recipe(name=name, base=folder / base, data=folder / f"{data}.csv", task=task, train=train, **changes)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gpt2"])
def test_gradients_are_pefts_on_the_same_gpu(family: str) -> None:
    adapter, method = made(family, "classify", METHODS["wide"]), METHODS["wide"]
    ours = adapters.attach(alone(family, "classify", None).to(GPU), method)
    adapters.start_from(ours, adapter)
    twin = lora_twin(family, "classify", adapter).to(GPU)
    inputs = with_eos(ours, rows())
    labels = torch.arange(len(inputs), device=GPU) % 3
    batches = ({k: v.to(GPU) for k, v in padded([row], twin.config.pad_token_id).items()} for row in inputs)
    theirs = torch.cat([twin(**batch).logits for batch in batches])
    torch.nn.functional.cross_entropy(adapters.classify_logits(ours, inputs), labels).backward()
    torch.nn.functional.cross_entropy(theirs, labels).backward()
    expected = {name: each.grad for name, each in twin.named_parameters() if each.grad is not None}
    for path, layer in attachment(ours).linears.items():
        for factor in ("lora_A", "lora_B"):
            mine = getattr(layer.slots["1"], factor).grad
            near(mine, expected[f"base_model.model.{path}.{factor}.default.weight"], 1e-3)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_checkpointed_layers_have_the_same_gradients(family: str) -> None:
    found = []
    for checkpointed in (False, True):
        kind = "classify" if family == "bert" else "summarize"
        base: Any = tiny.base(family, "classify" if family == "bert" else "generate")
        without_dropout(base.model).to(GPU)
        task, optimiser, items = tiny.started(base, kind, train__checkpoint_layers=checkpointed)
        kept: list[torch.Tensor] = []
        optimiser.step = lambda rate, kept=kept, own=optimiser: kept.append(own.gradients.clone())
        LocalSlot(base, task, optimiser, 42, 256).train_step(items, OptimStep(1e-3, clip=0.0))
        found.append(kept[0])
    near(found[1], found[0], 1e-6)


# --- a base in 4 bits -------------------------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize("family", ["bert", "llama"])
@torch.no_grad()
def test_a_base_in_4_bits_is_the_same_on_every_load_and_near_the_cpus(family: str, tmp_path: Path) -> None:
    task = "classify" if family == "bert" else "generate"
    loaded = [base_in_four_bits(family, tmp_path, task, device=each) for each in ("cuda", "cuda", "cpu")]
    assert len({base.fingerprint for base in loaded}) == 1
    ids = torch.tensor([[5, 9, 20, 7]])
    one, again, here = (base.model(input_ids=ids.to(base.model.device)).logits for base in loaded)
    assert torch.equal(one, again)
    near(one, here, 1e-2)


@needs_bitsandbytes
@pytest.mark.parametrize(
    "method", [LoRA(r=4, target_modules="all-linear"), Prefix(num_virtual_tokens=4)], ids=["lora", "prefix"]
)
def test_an_adapter_on_4_bits_is_trained_proven_read_again_and_served_in_a_mixture(
    folder: Path, tmp_path: Path, method: Any
) -> None:
    workspace = Workspace(tmp_path / "store")
    for name in ("one", "two"):
        made_of = recipe(folder, name, "llama", "lines", base_quantization="nf4", method=method, seed=len(name))
        result = workspace.train(made_of)  # the proof has read it back in a fresh process, on the GPU
        assert result.device == "cuda:0"
    texts = ["great film, number 3", "dull story, number 8"]
    expected = {
        name: [each["text"] for each in workspace.predict(name, texts, device="cuda")] for name in ("one", "two")
    }
    assert expected["one"] == [each["text"] for each in workspace.predict("one", texts, device="cuda")]
    with workspace.engine(str(folder / "llama"), base_quantization="nf4", dtype="float32", device="cuda") as engine:
        tickets = {
            name: [engine.submit("generate", text, name, SamplingParams()) for text in texts] for name in expected
        }
        assert {name: [each.result(120)["text"] for each in own] for name, own in tickets.items()} == expected


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["none", pytest.param("nf4", marks=needs_bitsandbytes)])
def test_a_training_takes_the_memory_that_was_predicted_from_shapes(folder: Path, tmp_path: Path, kept: Any) -> None:
    """All texts are as long as the recipe allows, which the prediction assumes."""
    table, long = tmp_path / "long.csv", "the quick brown fox jumps over the lazy dog " * 60
    table.write_text("document,summary\n" + "".join(f"{row} {long},{long}\n" for row in range(12)))
    made_of = Recipe(
        name="wide", base=folder / "wide", base_quantization=kept, data={"source": str(table), "test": 2},
        task={"max_tokens": 384, "max_target_tokens": 64, "max_new_tokens": 4, "kind": "summarize"},
        method=LoRA(r=16, target_modules="all-linear"),
        train={"epochs": 1, "batch_size": 2, "device": "cuda", "dtype": "bfloat16", "evaluate": "never"},
    )  # fmt: skip
    from turret.tasks import task_of

    predicted = predicted_for(made_of, task_of("summarize"), (), GPU)
    torch.cuda.empty_cache()
    memory = Workspace(tmp_path / "store").train(made_of).memory
    assert predicted is not None
    assert predicted.total - CONTEXT == pytest.approx(memory["peak_bytes"], rel=0.2)
    assert memory["predicted_bytes"] == pytest.approx(memory["peak_bytes"], rel=0.2)  # the plan has measured


def test_answering_takes_the_room_that_was_predicted(folder: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "store")
    workspace.train(recipe(folder, "wide", "wide", "lines", train={"dtype": "bfloat16"}))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    with answering.mount_version(workspace.store, "wide", device="cuda") as ready:
        answering.answers(ready, [f"great film, number {row}" for row in range(16)])
    peak = torch.cuda.max_memory_allocated(GPU) - before
    room = room_to_answer(bases.resolve(str(folder / "wide")), ready.model.dtype)
    assert peak + CONTEXT == pytest.approx(room, rel=0.2)


# --- verbs that load a base by the way --------------------------------------------------------------------------------


def test_promote_replay_and_pull_take_the_device(folder: Path, tmp_path: Path, capsys: Any) -> None:
    workspace, store = Workspace(tmp_path / "store"), ["--store", str(tmp_path / "store")]
    for seed in (1, 2):
        workspace.train(recipe(folder, "films", "bert", "films", seed=seed))
    golden = tmp_path / "golden.csv"
    golden.write_text("text,label\na great film,good\n")
    workspace.gate("films", "production", golden=golden, share=0.01)

    def told(*words: str, status: int = 0) -> Any:
        assert run([*words, *store, "--device", "cuda", "--json"]) == status, capsys.readouterr().err
        return json.loads(capsys.readouterr().out or "null")

    replayed = told("experiment", "replay", "films@1", "films@2", str(folder / "films.csv"))
    assert replayed["score"] == "accuracy"
    assert run(["promote", "films@1", "production", *store, "--device", "cuda", "--json"]) in (0, 1)  # it has answered
    assert "golden examples" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_runs_on_the_gpu(tmp_path: Path, capsys: Any) -> None:
    assert run(["demo", "--quick", "--device", "cuda", "--store", str(tmp_path / "store")]) == 0, (
        capsys.readouterr().err
    )
    assert re.search("cuda", capsys.readouterr().out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["labels", "lines", "prefix"])
def test_two_gpus_with_parts_make_the_version_that_one_makes(tmp_path: Path, name: str) -> None:
    from turret.store import Store
    from turret.workspace.resident import read_adapter

    parts.save(tmp_path)
    status, _, err = ended(launch(parts.__file__, str(tmp_path), "train", name), 300)
    assert status == 0, err
    Workspace(tmp_path / "whole").train(parts.recipe(tmp_path, name, shard=False))
    one, two = (read_adapter(Store(tmp_path / store), name)[1].tensors for store in ("whole", "parts"))
    for key, value in one.items():
        near(two[key], value, 1e-3)
