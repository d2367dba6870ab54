"""A full fine-tuning looks its tokens up with a gradient of its own, which is torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import rows
from small_models import FAMILIES, GENERATORS, build
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from turret.adapters import attach, classify_logits, target_logits, trainable_parameters
from turret.adapters.tuners.full import look_up
from turret.methods import Full
from turret.train.adamw import AdamW


def gradients(family: str, *, kept: bool, torchs: bool) -> dict[str, Tensor]:
    """The gradients of two micro-batches, by name.

    Args:
        kept: they lie in the optimiser's row.
        torchs: the embedding has torch's own gradient.
    """
    generates = family in GENERATORS
    model: Any = attach(build(family, "generate" if generates else "classify"), Full()).eval()
    if torchs:
        for module in model.modules():
            for number, hook in list(module._forward_hooks.items()):
                if hook is look_up:
                    del module._forward_hooks[number]
    parameters = trainable_parameters(model)
    optimiser = AdamW(parameters) if kept else None
    for seed in (0, 1):
        ids = [torch.cat([each, each[:1]]) for each in rows(seed)]  # a token that comes twice
        logits = target_logits(model, ids, rows(2)) if generates else classify_logits(model, ids)
        logits.float().logsumexp(-1).mean().backward()
    assert optimiser is None or optimiser.gradients.abs().sum() > 0
    return {name: each.grad.clone() for name, each in parameters.items() if each.grad is not None}


def large_gradients(*, torchs: bool) -> int:
    """How often torch made a gradient as large as an embedding."""
    with profile(activities=[ProfilerActivity.CPU]) as called:
        gradients("bert", kept=True, torchs=torchs)
    return sum(each.count for each in called.key_averages() if each.key == "aten::embedding_dense_backward")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [True, False], ids=["in the row", "alone"])
def test_the_gradient_of_the_embedding_is_torchs(family: str, kept: bool) -> None:
    expected = gradients(family, kept=kept, torchs=True)
    found = gradients(family, kept=kept, torchs=False)
    assert found.keys() == expected.keys()
    for name, each in found.items():
        torch.testing.assert_close(each, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_no_gradient_as_large_as_the_vocabulary_is_made() -> None:
    # of words, positions and segments, in both micro-batches
    assert (large_gradients(torchs=True), large_gradients(torchs=False)) == (6, 4)


def test_the_padding_token_gets_no_gradient() -> None:
    model: Any = attach(build("bert", "classify"), Full()).train()
    words = model.get_input_embeddings()
    assert words.padding_idx is not None
    ids = torch.tensor([[words.padding_idx, 11, 11]])
    words(ids).sum().backward()
    assert words.weight.grad[words.padding_idx].abs().sum() == 0
    assert words.weight.grad[11].tolist() == [2.0] * words.weight.shape[1]
