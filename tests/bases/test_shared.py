"""Another model on a base's weights is the model that a load gives, and its adapters leave the others alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from four_bits import base_in_four_bits, needs_bitsandbytes
from marks import pairs
from small_models import FAMILIES, GENERATORS, RELATIVES, build, save_base, tokenizer

from turret import adapters, bases
from turret.bases import Base
from turret.bases.base import share_weights
from turret.errors import AdapterError
from turret.methods import Full, LoRA

CLASSIFIERS = [family for family in (*FAMILIES, *RELATIVES) if family != "pegasus"]  # transformers has no such class


def addresses(base: Base) -> dict[str, int]:
    return {name: each.data_ptr() for name, each in base.model.named_parameters()}


def same(one: Base, other: Base) -> bool:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    alike = [
        name for name, each in ours.items() if each.dtype == theirs[name].dtype and torch.equal(each, theirs[name])
    ]
    return set(ours) == set(theirs) == set(alike)


@pytest.mark.parametrize(("family", "dtype"), pairs(list(CLASSIFIERS), ["float32", "bfloat16"]))
def test_a_classifier_is_the_one_that_a_load_gives(family: str, dtype: str, tmp_path: Path) -> None:
    folder = str(save_base(family, tmp_path))
    loaded = bases.load(folder, task="classify", num_labels=5, dtype=dtype, seed=7)
    base = bases.load(folder, task="classify", dtype=dtype, seed=3)
    shared = share_weights(base, num_labels=5, seed=7)

    assert same(shared, loaded)
    assert not same(share_weights(base, num_labels=5, seed=8), loaded)  # the head is drawn from the seed
    assert (shared.fresh, shared.model.config.num_labels) == (loaded.fresh, 5)
    own = {name for name, where in addresses(shared).items() if where != addresses(base)[name]}
    assert own == set(shared.fresh)  # all other weights are in memory once


@pytest.mark.parametrize("family", GENERATORS)
def test_a_model_that_generates_shares_every_weight(family: str, tmp_path: Path) -> None:
    base = bases.load(str(save_base(family, tmp_path)), task="generate", dtype="float32")
    shared = share_weights(base)

    assert addresses(shared) == addresses(base)
    assert same(shared, bases.load(base.id, task="generate", dtype="float32"))


def test_a_head_of_the_checkpoint_is_kept_if_it_has_these_outputs(tmp_path: Path) -> None:
    build("bert", "classify", num_labels=3).save_pretrained(tmp_path)
    tokenizer("bert").save_pretrained(tmp_path)
    base = bases.load(str(tmp_path), task="classify", dtype="float32")

    assert share_weights(base, num_labels=3).fresh == ()
    loaded = bases.load(base.id, task="classify", num_labels=4, dtype="float32", seed=1)
    assert same(share_weights(base, num_labels=4, seed=1), loaded)
    assert share_weights(base, num_labels=4).fresh == ("classifier.bias", "classifier.weight")


@pytest.mark.parametrize("method", [LoRA(r=2), Full()])
def test_an_adapter_on_one_model_leaves_the_others_as_they_are(method: LoRA | Full, tmp_path: Path) -> None:
    base = bases.load(str(save_base("bert", tmp_path)), task="classify", dtype="float32")
    one, other = share_weights(base, num_labels=2), share_weights(base, num_labels=2)
    ids = torch.tensor([[1, 5, 9, 4]])
    before = other.model(input_ids=ids).logits
    modules = {path: id(each) for path, each in other.model.named_modules()}

    adapters.attach(one.model, method)
    with torch.no_grad():
        for each in adapters.trainable_parameters(one.model).values():
            each.add_(1.0)

    assert not torch.equal(one.model(input_ids=ids).logits, before)  # the adapter has an effect
    assert torch.equal(other.model(input_ids=ids).logits, before)
    assert {path: id(each) for path, each in other.model.named_modules()} == modules
    adapters.detach(one.model)
    assert same(one, other)


@needs_bitsandbytes
def test_a_base_in_four_bits_is_shared_with_its_scales(tmp_path: Path) -> None:
    base = base_in_four_bits("llama", tmp_path)
    shared = share_weights(base, num_labels=4, seed=3)
    layer, own = (each.model.get_submodule("model.layers.0.mlp.up_proj") for each in (shared, base))

    assert layer is not own
    assert layer.weight is own.weight
    assert layer.weight.quant_state.absmax.data_ptr() == own.weight.quant_state.absmax.data_ptr()
    again = base_in_four_bits("llama", tmp_path, num_labels=4, seed=3)
    ids = torch.tensor([[1, 5, 9, 4]])
    assert torch.equal(shared.model(input_ids=ids).logits, again.model(input_ids=ids).logits)


def test_a_base_with_an_adapter_is_not_shared(tmp_path: Path) -> None:
    base = bases.load(str(save_base("bert", tmp_path)), task="classify", dtype="float32")
    adapters.attach(base.model, "lora")
    with pytest.raises(AdapterError, match="already carries an adapter"):
        share_weights(base)


def test_a_draw_leaves_the_global_generator_as_it_was(tmp_path: Path) -> None:
    base = bases.load(str(save_base("bert", tmp_path)), task="classify", dtype="float32")
    before = torch.get_rng_state()
    share_weights(base, num_labels=4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
