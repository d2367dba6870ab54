"""The check of a base whose architecture is not listed: hooked, it must give its own outputs, or it is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turret.adapters.hooks import detach, hook_model
from turret.adapters.packed import classify_logits, target_logits
from turret.errors import AdapterError, UnknownFamily
from turret.families import FAMILIES, generic
from turret.families.family import Family, Kind

if TYPE_CHECKING:
    from turret.transformer import Model

LENGTHS = (9, 3, 14, 1)  # tokens of the rows that are asked
FURTHEST = {4: 1e-3, 2: 3e-2}  # of the largest output, by bytes of a weight: float32 gives about 1e-6


@torch.no_grad()
def recognised(model: Model, kind: Kind) -> tuple[Family, float]:
    """The first guess under which the hooked model gives its own outputs, which is listed from now on.

    Args:
        model: in eval mode, with nothing attached; it is given back as it was.

    Returns:
        The family, and the largest difference over the largest output.

    Raises:
        UnknownFamily: under every guess the outputs differ; it says by how much at best.
    """
    best, why = float("inf"), "no module of it looks up transformers' attention functions"
    own: Tensor | None = None  # what the model itself says, asked once
    for family in generic.guesses(model, kind):
        FAMILIES[family.name] = family
        try:
            own = _own(model, kind) if own is None else own
            found = _hooked(model, kind)
        except (AdapterError, AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
            why = " ".join(str(error).split())[:120]
        else:
            off = float((found - own).abs().max() / own.abs().max().clamp(min=1e-12))
            if off <= FURTHEST[model.get_input_embeddings().weight.element_size()]:
                return family, off
            best = min(best, off)
        del FAMILIES[family.name]
    reason = why if best == float("inf") else f"its outputs differ by {100 * best:.2g}% of the largest at best"
    raise UnknownFamily(
        f"architecture {generic.name_of(model)!r} is not listed and cannot be served by the plain hooks: {reason}; "
        "use a base of a listed family"
    )


def _rows(model: Model) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = model.get_input_embeddings().weight.shape[0]
    return [torch.randint(words // 4, words, (length,), generator=generator) for length in LENGTHS]


def _own(model: Model, kind: Kind) -> Tensor:
    """What the model itself says, a row at a time."""
    parts = []
    for row in _rows(model):
        logits = model(input_ids=row[None], attention_mask=torch.ones_like(row)[None]).logits
        parts.append(logits[0] if _writes(model, kind) else logits)
    return torch.cat(parts).float()


def _hooked(model: Model, kind: Kind) -> Tensor:
    """What it says with the hooks on, all rows in one pass."""
    rows = _rows(model)
    hook_model(model, plain=True)
    try:
        if not _writes(model, kind):
            return classify_logits(model, rows, [0] * len(rows)).float()
        start = [row[:1] for row in rows]
        return target_logits(model, start, [torch.cat([row[1:], row[:1]]) for row in rows], [0] * len(rows)).float()
    finally:
        detach(model)


def _writes(model: Model, kind: Kind) -> bool:
    return kind == "decoder" and model.get_output_embeddings() is not None
