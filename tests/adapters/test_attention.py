"""The attention function alone changes nothing: every family gives its own logits through it, padded or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import own_target_logits, padded, rows, with_eos
from small_models import DECODERS, ENCODERS, FAMILIES, GENERATORS, build

from turret.adapters import attach, attachment, classify_logits, detach, target_logits
from turret.methods import Head


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_classifier_gives_its_own_logits_through_the_hook_padded_and_unpadded(family: str) -> None:
    model = build(family, "classify")
    inputs = with_eos(model, rows())
    batch = padded(inputs, model.config.pad_token_id)
    own = model(**batch).logits
    attach(model, Head())
    torch.testing.assert_close(model(**batch).logits, own, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(classify_logits(model, inputs), own, atol=2e-5, rtol=2e-5)
    detach(model)
    assert torch.equal(model(**batch).logits, own)


@pytest.mark.parametrize("family", GENERATORS)
@torch.no_grad()
def test_a_generator_gives_its_own_target_logits_through_the_hook_padded_and_unpadded(family: str) -> None:
    model = build(family, "generate")
    sources, targets = rows(1), rows(2, (5, 2, 1, 7))
    own = own_target_logits(model, sources, targets)
    attach(model, Head())
    torch.testing.assert_close(own_target_logits(model, sources, targets), own, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(target_logits(model, sources, targets), own, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", GENERATORS)
@torch.no_grad()
def test_cached_generation_through_the_hook_equals_the_models_own(family: str) -> None:
    model = build(family, "generate")
    left = family in DECODERS
    batch = padded(rows(3), model.config.pad_token_id, left=left)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    own = model.generate(**batch, **settings)
    attach(model, Head())
    assert torch.equal(model.generate(**batch, **settings), own)


@torch.no_grad()
def test_a_sliding_window_hides_what_lies_beyond_it_unpadded_as_padded() -> None:
    model = build("modernbert", "classify")
    assert "sliding_attention" in model.config.layer_types
    inputs = rows(4, (40, 25))  # wider than the window of 16
    batch = padded(inputs, model.config.pad_token_id)
    own = model(**batch).logits
    attach(model, Head())
    torch.testing.assert_close(classify_logits(model, inputs), own, atol=2e-5, rtol=2e-5)
    for site in attachment(model).sites:
        site.module.sliding_window = None
    assert (classify_logits(model, inputs) - own).abs().max() > 1e-3, "control: without the window the answer differs"


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_an_unpadded_row_is_the_same_whatever_stands_beside_it(family: str) -> None:
    model = attach(build(family, "classify"), Head())
    inputs = rows(5)
    together = classify_logits(model, inputs)
    alone = torch.cat([classify_logits(model, [row]) for row in inputs])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
