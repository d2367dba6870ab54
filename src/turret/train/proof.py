"""The proof of a bundle: a fresh process reads it back onto its base and must give what the trained model gave.

`probe` asks the trained model; `prove` starts the process (`turret.train.reload`) and judges nothing itself. Refuses to
know the store: a bundle that is not proven is not stored, and that is the caller's business.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from turret.adapters import packed
from turret.errors import ProofFailed
from turret.process import environment
from turret.train.batches import Item, Items

ROWS = 4  # examples that are asked
TARGET_TOKENS = 16  # of each, at most
TIMEOUT = 900.0  # seconds
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # of the largest output


@dataclass(frozen=True)
class Probe:
    """Inputs, and what the trained model says to them."""

    sources: list[Tensor]  # (n,) int64 each
    targets: list[Tensor]  # empty for classification
    outputs: Tensor  # (B, C) or (N, V), float32 on the CPU


def probe(model: Any, task: Any, examples: Sequence[Any], rows: int = ROWS) -> Probe:
    """Ask the attached, trained model about a few examples, spread over all that are given."""
    places = [place * len(examples) // rows for place in range(rows)] if len(examples) > rows else range(len(examples))
    items = Items(task, examples).take(places)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return Probe(*_ask(model, items))
    finally:
        model.train(training)


def _ask(model: Any, items: Sequence[Item]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    sources = [item.source for item in items]
    targets = [item.target[:TARGET_TOKENS] for item in items if item.target is not None]
    return sources, targets, answer(model, sources, targets)


def answer(model: Any, sources: list[Tensor], targets: list[Tensor], slot: int | None = None) -> Tensor:
    """The outputs of one slot (the active one where left out): (B, C), or (N, V) where there are targets."""
    slots = None if slot is None else [slot] * len(sources)
    if targets:
        return packed.target_logits(model, sources, targets, slots).float().cpu()
    return packed.classify_logits(model, sources, slots).float().cpu()


def prove(bundle: Path, base: Any, asked: Probe, *, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Have a fresh process read `bundle` onto `base.id` and answer the probe; returns its report.

    Raises ProofFailed, in one line, unless the outputs are the trained model's, differ from the bare base's, every
    tensor took part in them, and the base on disk still has its fingerprint.
    """
    with tempfile.TemporaryDirectory(prefix="turret-proof-") as beside:
        folder = Path(beside)
        tensors = {f"source.{i}": each.contiguous() for i, each in enumerate(asked.sources)}
        tensors |= {f"target.{i}": each.contiguous() for i, each in enumerate(asked.targets)}
        save_file({**tensors, "outputs": asked.outputs.contiguous()}, folder / "probe.safetensors")
        request = {
            "bundle": str(bundle.resolve()),
            "base": base.id,
            "fingerprint": base.fingerprint,
            "dtype": str(base.dtype).removeprefix("torch."),
            "labels": None if asked.targets else int(asked.outputs.shape[1]),
            "tolerance": TOLERANCE[base.dtype],
            "threads": torch.get_num_threads(),
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        problem = _run(folder, timeout)
        report = folder / "report.json"
        if not report.exists():
            raise ProofFailed(f"the bundle was not stored, because its proof gave no answer ({problem}): try again")
        said: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    if said["problem"]:
        raise ProofFailed(f"the bundle was not stored, because read back in a fresh process {said['problem']}")
    return said


def _run(folder: Path, timeout: float) -> str:
    """Run the process; returns what is known of its end, for the case that it wrote no report."""
    command = [sys.executable, "-P", "-m", "turret.train.reload", str(folder)]
    try:
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {timeout:.0f} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {done.returncode}"
