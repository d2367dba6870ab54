"""A base in parts on two processes trains, measures and proves the adapter that a whole base does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import base_in_parts as parts
import pytest
import small_models
import torch
import torch.distributed as dist
from several_launch import ended, launch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from turret import bases
from turret.adapters import layers
from turret.bases.device import CPU, ChosenDevice
from turret.bases.meta_model import model_of
from turret.bases.sharded import gather_once, load_in_parts, own_part
from turret.errors import BaseModelError, RecipeError, TrainingError
from turret.families import family_of
from turret.ops.table import without
from turret.recipe import Recipe
from turret.store import Store
from turret.train.memory import GATHERED, Work, in_parts, predict_on_gpu
from turret.workspace import Workspace
from turret.workspace.resident import read_adapter

STILL = [each for each in parts.CASES if each != "drawn"]  # without dropout
HERE = ChosenDevice(CPU, "as asked for")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("parts")
    parts.save(where)
    return where


def stored(folder: Path, store: str, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    version, adapter = read_adapter(Store(folder / store), name)
    return version, {**adapter.tensors, **adapter.head}


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """Two processes have trained all cases but `drawn`, in one start."""
    status, _, err = ended(
        launch(parts.__file__, str(folder), "train", *(each for each in parts.CASES if each != "drawn")), 400
    )
    assert status == 0, err
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", STILL)
def test_two_processes_with_parts_make_the_version_that_one_with_the_whole_base_makes(trained: Path, name: str) -> None:
    """The same adapter but for rounding, and the same metrics. Each was proven on the whole base.

    Two processes add the gradients of a batch in another order than one does. AdamW divides each gradient by its own
    size, so rounding of a gradient near zero grows to a visible part of a step. How far that goes is measured: the
    whole base also trains with its batches in two or more pieces, and by torch's products as a base in parts does. One
    such measurement is not the largest, so ten times as much is allowed. The control is a rate that differs by 2%.
    """
    whole = parts.recipe(trained, name, shard=False)
    rate = whole.train.lr
    assert isinstance(rate, float)
    Workspace(trained / "whole").train(whole)
    with without("kernels"):
        Workspace(trained / "pieces").train(whole.with_overrides({"train.micro_batch_tokens": "40"}))
    Workspace(trained / "other").train(whole.with_overrides({"train.lr": str(rate * 1.02)}))
    (one, expected), (two, got), (_, pieces), (_, other) = (
        stored(trained, store, name) for store in ("whole", "parts", "pieces", "other")
    )
    assert got.keys() == expected.keys()

    def furthest(tensors: dict[str, torch.Tensor]) -> float:
        return max(float((tensors[key] - value).abs().max()) for key, value in expected.items())

    assert furthest(got) < 10 * furthest(pieces) < furthest(other)
    assert max(float(each.abs().max()) for key, each in got.items() if "lora_A" not in key) > 1e-2
    for split in ("validation", "test"):
        numbers = [
            {key: each for key, each in version.metrics[split].items() if isinstance(each, float)}
            for version in (one, two)
        ]
        assert "loss" in numbers[0]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-5, abs=1e-5)
    assert 'shard = "fsdp2"' in two.lineage["recipe"]
    assert one.base == two.base


@pytest.mark.slow
def test_a_training_that_is_killed_goes_on_with_the_same_bits(folder: Path) -> None:
    whole = launch(parts.__file__, str(folder), "train", "drawn")
    assert ended(whole)[0] == 0
    status, _, err = ended(launch(parts.__file__, str(folder), "kill", "drawn"))
    assert status != 0
    said = re.findall(r"^turret: .*", err, re.MULTILINE)
    assert len(said) == 1, err
    assert said[0].startswith("turret: process 1 of 2 lost the others")
    status, _, err = ended(launch(parts.__file__, str(folder), "resume", "drawn"))
    assert status == 0, err
    (one, expected), (two, got) = (stored(folder, store, "drawn") for store in ("parts", "killed"))
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert one.digest == two.digest


@pytest.mark.slow
def test_no_process_has_a_whole_copy_of_the_base_while_it_loads(folder: Path) -> None:
    parts.save_wide(folder)
    status, _, err = ended(launch(parts.__file__, str(folder), "load"))
    assert status == 0, err
    for (part, loading, passing), (whole, *grown) in json.loads((folder / "load.json").read_text()):
        assert whole > 350e6
        assert part == pytest.approx(whole / 2, rel=0.01)  # the embeddings are small
        assert sum(grown) > 0.95 * whole
        assert loading < 0.75 * whole
        assert passing < 0.5 * whole  # two or three layers of forty, and holes in the heap


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of this process alone: the same code, and every part is whole."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gpt2"])
@torch.no_grad()
def test_what_is_read_in_parts_is_what_is_read_whole(mesh: Any, tmp_path: Path, family: str) -> None:
    task: Any = "classify" if family == "bert" else "generate"
    where = str(small_models.save_base(family, tmp_path / family))
    settings: dict[str, Any] = {"task": task, "num_labels": 3 if task == "classify" else None, "seed": 5}
    one = bases.load(where, dtype="float32", verify=True, **settings)
    two = load_in_parts(where, dtype="float32", mesh=mesh, device=HERE, **settings)
    assert (two.fingerprint, two.fresh, two.dtype, two.family) == (one.fingerprint, one.fresh, one.dtype, one.family)
    gather_once(two.model)
    expected = {**dict(one.model.named_parameters()), **dict(one.model.named_buffers())}
    got = {**dict(two.model.named_parameters()), **dict(two.model.named_buffers())}
    assert got.keys() == expected.keys()
    assert all(torch.equal(own_part(got[name]), value) for name, value in expected.items())
    ids = torch.tensor([[5, 9, 20, 7]])
    more = {"decoder_input_ids": ids} if family == "t5" else {}
    assert torch.equal(two.model(input_ids=ids, **more).logits, one.model(input_ids=ids, **more).logits)


def test_a_base_that_cannot_be_divided_is_one_line(mesh: Any, tmp_path: Path) -> None:
    where = small_models.save_base("llama", tmp_path / "llama")
    config = json.loads((where / "config.json").read_text())
    for changed, words in (
        ({"model_type": "olmo2"}, "its architecture olmo2 is not listed"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"it is quantized \(gptq\)"),
    ):
        (where / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(BaseModelError, match=f"cannot be read in parts: {words}; leave train.shard out"):
            load_in_parts(str(where), task="generate", mesh=mesh, device=HERE)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method.kind": "full"}, "method full trains a copy of every weight"),
        ({"method.kind": "peft", "method.peft_type": "IA3"}, "method peft is computed by PEFT"),
        ({"method.init_lora_weights": "pissa"}, "with init_lora_weights = pissa starts from whole weights"),
        ({"base_quantization": "nf4"}, 'divides plain weights, given base_quantization = "nf4"'),
        ({"train.lr": "auto"}, 'train.lr = "auto" tries rates in one process'),
        ({"train.device": "mps"}, "given train.device = mps"),
    ],
)
def test_what_cannot_train_in_parts_is_refused_before_anything_is_read(settings: dict[str, str], words: str) -> None:
    plain = Recipe(base="small", data="tiny.csv")
    assert plain.with_overrides({"train.shard": "fsdp2"}).train.shard == "fsdp2"
    with pytest.raises(RecipeError, match=re.escape(words)):
        plain.with_overrides({"train.shard": "fsdp2", **settings})


def test_one_process_is_told_to_start_several(folder: Path, tmp_path: Path) -> None:
    workspace, recipe = Workspace(tmp_path), parts.recipe(folder, "labels")
    for verb in (workspace.plan, workspace.train):
        with pytest.raises(TrainingError, match=r"this is one: start it with `torchrun --nproc-per-node 2 -m turret"):
            verb(recipe)


def test_the_predicted_memory_of_a_part_has_its_share_of_the_layers_and_a_few_whole_ones() -> None:
    config: Any = small_models.config("llama", num_hidden_layers=8, hidden_size=256, intermediate_size=512)
    model = model_of(config, "generate")
    whole = predict_on_gpu(model, parts.recipe(Path(), "lines").method, Work(1, 24, 8), torch.float32)
    half = in_parts(whole, model, 2)
    layer = sum(each.nbytes for each in model.model.layers[0].parameters() if each.ndim == 2)
    assert whole.weights - half.weights == 4 * layer
    assert half.activations - whole.activations == GATHERED * layer
    assert half.trainable == whole.trainable


def test_fsdp2_renames_a_layers_class_and_the_layer_still_computes_as_one_operation() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = small_models.build("llama", "generate")
        layer, names = model.model.layers[0], family_of(model.config).fast.layers
        assert layers.is_of_class(layer, names)
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        assert type(layer).__name__ not in names, "the control: it has a class of its own now"
        assert layers.is_of_class(layer, names)
        assert not layers.is_of_class(model.model.norm, names)
    finally:
        dist.destroy_process_group()
