"""The memory of a training on a GPU is predicted from shapes alone; a base that cannot fit is refused."""

from __future__ import annotations

from typing import Any

import pytest
import small_models
import tiny_training as tiny
import torch
from batches import without_dropout
from pretend_gpu import pretend_gpu, to_gpu
from small_models import config
from transformers import LlamaConfig

from turret import adapters
from turret.bases.meta_model import model_of
from turret.data import Labelled
from turret.methods import Full, LoRA, Prefix
from turret.ops.gpu.ops import gpu_paths_on_meta
from turret.train import memory
from turret.train.batches import EncodedRow, encode
from turret.train.initialize import attach
from turret.train.losses import backward, loss_of
from turret.train.memory import SavedForBackward, Work, predict_on_gpu, refusal, saved_by

WORK = Work(rows=2, source=24, target=8, written=8)
LARGE = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip
SEVEN = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32000, tie_word_embeddings=False,
)  # fmt: skip


def bare(family: str, task: Any) -> Any:
    return model_of(config(family, **({"num_labels": 3} if task == "classify" else {})), task)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2", "qwen3", "t5", "bart", "modernbert"])
@pytest.mark.parametrize("method", [LoRA(r=4), Prefix(num_virtual_tokens=4)], ids=["lora", "prefix"])
def test_every_component_is_predicted_without_a_number_of_the_base(family: str, method: Any) -> None:
    task: Any = "classify" if family in small_models.ENCODERS else "generate"
    work = Work(2, 24) if task == "classify" else WORK
    found = predict_on_gpu(bare(family, task), method, work, torch.float32)
    model = small_models.build(family, task)
    adapters.attach(model, method)
    count = sum(each.numel() for each in adapters.trainable_parameters(model).values())
    assert found.trainable == found.gradients == 4 * count
    assert found.optimiser == 8 * count
    adapters.detach(model)
    assert found.weights == sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    assert found.activations > 10_000
    assert found.total == found.weights + found.above_base + found.runtime


@pytest.mark.parametrize("family", ["bert", "llama", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [LoRA(r=4, lora_dropout=0.0), Prefix(num_virtual_tokens=4)], ids=["lora", "prefix"])
@pytest.mark.parametrize("programs", [False, True], ids=["modules", "programs"])
def test_what_a_pass_saves_on_a_gpu_is_what_was_predicted_from_shapes(family: str, method: Any, programs: bool) -> None:
    task: Any = "classify" if family in small_models.ENCODERS else "generate"
    work = Work(2, 24) if task == "classify" else WORK
    bytes_saved = []
    for model in (bare(family, task), without_dropout(small_models.build(family, task))):
        on_gpu = not next(model.parameters()).is_meta
        model.to(torch.bfloat16 if programs else torch.float32)
        with pretend_gpu(programs) if on_gpu else memory._Shapes(), gpu_paths_on_meta(programs):
            adapters.attach(to_gpu(model) if on_gpu else without_dropout(model), method)
            model.train()
            bytes_saved.append(saved_by(model, work)[0].bytes)
    assert bytes_saved[0] == pytest.approx(bytes_saved[1], rel=0.1)


def test_longer_texts_more_rows_and_wider_bases_take_more() -> None:
    def activations(work: Work, family: str = "llama") -> int:
        return predict_on_gpu(bare(family, "generate"), LoRA(r=4), work, torch.float32).activations

    one, long, many = (activations(each) for each in (Work(1, 128, 32), Work(1, 512, 128), Work(4, 128, 32)))
    assert 3.5 * one < long < 8 * one  # attention is fused: its scores are not saved, only one mask of their size
    assert 3.2 * one < many < 4.5 * one


def test_half_the_bytes_in_bfloat16_and_an_eighth_in_4_bits() -> None:
    wide = predict_on_gpu(model_of(SEVEN, "generate"), LoRA(r=16), Work(1, 64, 16), torch.float32)
    half = predict_on_gpu(model_of(SEVEN, "generate"), LoRA(r=16), Work(1, 64, 16), torch.bfloat16)
    narrow = predict_on_gpu(model_of(SEVEN, "generate"), LoRA(r=16), Work(1, 64, 16), torch.bfloat16, nf4=True)
    assert half.weights == pytest.approx(wide.weights / 2, rel=1e-3)
    assert 3.5e9 < narrow.weights < 4.2e9


def test_8_billion_weights_in_bfloat16_do_not_fit_on_12_gb_and_4_bits_are_named() -> None:
    found = predict_on_gpu(model_of(LARGE, "generate"), LoRA(r=16), Work(1, 512, 128), torch.bfloat16)
    said = refusal(found, 12_000_000_000, "some/8B", "cuda:0")
    assert said is not None
    assert said.startswith("some/8B does not fit on cuda:0 with 12.0 GB free: its weights take 16.1 GB")
    assert 'base_quantization to "nf4"' in said
    assert len(said) < 300
    assert refusal(found, 24_000_000_000, "some/8B", "cuda:0") is None
    small = predict_on_gpu(model_of(LARGE, "generate"), LoRA(r=16), Work(1, 512, 128), torch.bfloat16, nf4=True)
    assert refusal(small, 12_000_000_000, "some/8B", "cuda:0") is None


def test_full_fine_tuning_keeps_16_bytes_a_weight_besides_the_base() -> None:
    found = predict_on_gpu(bare("bert", "classify"), Full(), Work(2, 24), torch.float32)
    assert found.trainable + found.gradients + found.optimiser == 4 * found.trainable
    assert found.trainable == pytest.approx(found.weights, rel=0.02)


def test_a_prediction_leaves_a_recipes_pass_within_its_limits() -> None:
    recipe = tiny.recipe(train__micro_batch_tokens=100, task__max_tokens=40, task__max_target_tokens=10)
    assert Work.of(recipe, bare("llama", "generate")) == Work(2, 40, 10, 10)
    assert Work.of(recipe, bare("bert", "classify")) == Work(2, 40, 0, 0)


def test_the_work_of_real_batches_is_that_of_their_largest_pass() -> None:
    recipe = tiny.recipe(task__max_target_tokens=10)

    def item(source: int, target: int | None) -> EncodedRow:
        ends = None if target is None else torch.zeros(target, dtype=torch.long)
        return EncodedRow(Labelled("", ""), torch.zeros(source, dtype=torch.long), ends)

    texts = [[item(9, None), item(4, None)], [item(5, None)] * 4, [item(30, None)]]
    assert Work.of_items(recipe, texts, 20) == Work(1, 32, 0, 0, 32)
    assert Work.of_items(recipe, texts[:2], 20) == Work(4, 8, 0, 0, 16)
    assert Work.of_items(recipe, texts[:2], 12) == Work(2, 8, 0, 0, 16), "a batch in two passes"
    assert Work.of_items(recipe, [[item(6, 3), item(5, 1)]], 20) == Work(2, 8, 8, 10, 8)


@pytest.mark.parametrize("task", ["classify", "generate"])
def test_the_work_of_real_batches_predicts_what_their_largest_pass_saves(task: Any) -> None:
    """Texts of many lengths. The prediction covers the real pass, and is not many times larger."""
    on, data = tiny.base("llama", task), tiny.dataset(task, 24)
    recipe = tiny.recipe()
    asked = tiny.task_of(recipe, data, on)
    batch = encode(asked, data.train)
    work = Work.of_items(recipe, [batch], 10_000)
    predicted = predict_on_gpu(bare("llama", task), recipe.method, work, torch.float32, attention=False)
    attach(recipe, on, asked, None)
    on.model.train()
    saved = SavedForBackward(on.model)
    with saved.counting():
        loss = loss_of(on.model, asked, batch)
    backward(loss)
    assert saved.bytes < predicted.activations < 4 * saved.bytes
