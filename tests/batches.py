"""Rows of random token ids, padded batches of them, and the plain way to a model's own target logits."""

from __future__ import annotations

from typing import Any

import torch

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


def without_dropout(model: Any) -> Any:
    """The same model with every dropout at zero, wherever its family keeps the rate."""
    for module in model.modules():
        for name in ("p", "dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model
