"""The attention function alone changes nothing: every family gives its own logits through it, padded or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import DECODERS, ENCODERS, FAMILIES, GENERATORS, build

from turret.adapters import attach, attachment, classify_logits, detach, target_logits
from turret.methods import Head

LENGTHS = (9, 3, 14, 1)


def rows(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 120, (n,), generator=generator) for n in lengths]


def padded(inputs: list[torch.Tensor], pad: int, left: bool = False) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of rows, each (B, T)."""
    width = max(len(row) for row in inputs)
    ids = torch.full((len(inputs), width), pad)
    mask = torch.zeros(len(inputs), width, dtype=torch.long)
    for index, row in enumerate(inputs):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def with_eos(model: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """An encoder-decoder's classifier reads the end-of-sequence token, which must come once, at the end."""
    if model.config.is_encoder_decoder:
        return [torch.cat([row[:-1], torch.tensor([model.config.eos_token_id])]) for row in inputs]
    return inputs


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


def own_target_logits(model: Any, sources: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    """The plain way, row by row through the model's own forward: (sum of T_i, V)."""
    parts = []
    for source, target in zip(sources, targets, strict=True):
        if model.config.is_encoder_decoder:
            start = torch.tensor([model.config.decoder_start_token_id])
            decoder = torch.cat([start, target[:-1]])[None]
            mask = torch.ones_like(source)[None]
            out = model(input_ids=source[None], attention_mask=mask, decoder_input_ids=decoder)
            parts.append(out.logits[0])
        else:
            row = torch.cat([source, target])[None]
            out = model(input_ids=row, attention_mask=torch.ones_like(row))
            parts.append(out.logits[0, len(source) - 1 : -1])
    return torch.cat(parts)


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
