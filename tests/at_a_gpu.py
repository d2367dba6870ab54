"""What the tests on a real GPU share: bases and tables on disk, and the comparison of results."""

from __future__ import annotations

import csv
from pathlib import Path

import small_models
import torch


def write_inputs(where: Path) -> None:
    """Small bases `bert` and `llama`, and the tables `films.csv` (text, label) and `lines.csv` (document, summary)."""
    for family in ("bert", "llama"):
        small_models.save_base(family, where / family)
    for name, head in (("films", ("text", "label")), ("lines", ("document", "summary"))):
        with (where / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(head)
            for row in range(48):
                text = f"{'great film' if row % 2 else 'dull story'}, number {row}"
                answer = ("good" if row % 2 else "bad") if name == "films" else ("a pleasure" if row % 2 else "boring")
                table.writerow([text, answer])


def near(one: torch.Tensor, other: torch.Tensor, allowed: float) -> None:
    """Assert that two results differ by at most this part of the largest value."""
    one, other = one.detach().float().cpu(), other.detach().float().cpu()
    assert float((one - other).abs().max()) <= allowed * float(other.abs().max())
