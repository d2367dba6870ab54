"""The proof of a bundle: a fresh process loads it onto its base and must give the trained model's outputs.

`probe` records outputs of the trained model. `prove` starts `turret.train.reload` in a fresh process, which compares.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor

from turret.adapters import packed
from turret.bases import Base
from turret.bases.base import Dtype
from turret.bases.quantized import Quantization
from turret.data import Example
from turret.errors import ProofFailed
from turret.families.family import HeadKind, Pooling
from turret.json_types import JsonObject
from turret.process import environment
from turret.tasks import Task
from turret.train.batches import EncodedRows, spread
from turret.transformer import Model

ROWS = 4  # examples in a probe
TARGET_TOKENS = 16  # of each, at most
TIMEOUT = 900.0  # seconds
# The largest difference of an output, divided by the largest output: in float32 by the kinds of the two devices,
# because other libraries sum in another order; in a narrow precision its own rounding is larger than that.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
TOLERANCE_FLOAT32 = {
    ("cpu", "cpu"): 1e-5,
    ("cuda", "cuda"): 1e-4,
    ("cpu", "cuda"): 1e-4,
    ("mps", "mps"): 1e-3,
    ("cpu", "mps"): 1e-3,
}


NAMES: Mapping[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class ProofRequest(TypedDict):
    """What the fresh process of a proof loads and compares."""

    bundle: str
    base: str
    fingerprint: str
    dtype: Dtype
    quantization: Quantization
    head: HeadKind
    labels: int | None
    device: str
    tolerance: float
    threads: int


@dataclass(frozen=True)
class Probe:
    """Inputs, and the trained model's outputs for them."""

    sources: list[Tensor]  # (T,) int64 each
    targets: list[Tensor]  # empty for classification
    outputs: Tensor  # (B, C) or (N, V), float32 on the CPU


def probe(model: Model, task: Task, examples: Sequence[Example], rows: int = ROWS) -> Probe:
    """Record the outputs of the attached, trained model for at most `rows` of the examples."""
    items = EncodedRows(task, examples).take(spread(len(examples), rows))
    sources = [item.source for item in items]
    if task.pooling is not None:
        sources = [text.clone() for item in items for text in packed.texts_in((item.source, item.read))]
    targets = [item.target[:TARGET_TOKENS] for item in items if item.target is not None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return Probe(sources, targets, answer(model, sources, targets, pooling=task.pooling))
    finally:
        model.train(training)


def answer(
    model: Model,
    sources: list[Tensor],
    targets: list[Tensor],
    slot: int | None = None,
    pooling: Pooling | None = None,
) -> Tensor:
    """The outputs of one slot (None: the active one): (B, C) or of all tokens (N, C), or (N, V) with targets.

    With a pooling they are vectors (B, D).

    They are float32 on the CPU.
    """
    slots = None if slot is None else [slot] * len(sources)
    if targets:
        return packed.target_logits(model, sources, targets, slots).float().cpu()
    if pooling is not None:
        return packed.pooled(model, sources, pooling, slots).float().cpu()
    read = [torch.arange(len(source)) for source in sources]
    return packed.head_logits(model, list(zip(sources, read, strict=True)), slots).float().cpu()


def tolerance(dtype: torch.dtype, one: torch.device, other: torch.device) -> float:
    """The largest difference that is allowed between the outputs of one model on two devices, or twice on one.

    It is divided by the largest output.
    """
    if dtype != torch.float32:
        return TOLERANCE[dtype]
    first, second = sorted((one.type, other.type))
    return TOLERANCE_FLOAT32[first, second]


def make_room(model: Model) -> None:
    """Move a model from its GPU to the CPU: the fresh process of a proof loads the base on the same GPU."""
    if model.device.type != "cpu":
        model.to("cpu")
        torch.cuda.empty_cache()


def prove(
    bundle: Path,
    base: Base,
    expected: Probe,
    *,
    device: torch.device | None = None,
    taken_on: torch.device | None = None,
    timeout: float = TIMEOUT,
) -> JsonObject:
    """Load `bundle` onto `base.id` in a fresh process and compare its outputs with the probe's.

    Args:
        device: where the fresh process computes; None: the base's device now.
        taken_on: where the probe was taken; None: on `device`.

    Returns:
        The report of `turret.train.reload`.

    Raises:
        ProofFailed: the outputs are not the trained model's or equal the bare base's, a tensor has no effect, or the
            base on disk has another fingerprint.
    """
    device = base.model.device if device is None else device
    with tempfile.TemporaryDirectory(prefix="turret-proof-") as temporary:
        folder = Path(temporary)
        tensors = {f"source.{i}": each.contiguous() for i, each in enumerate(expected.sources)}
        tensors |= {f"target.{i}": each.contiguous() for i, each in enumerate(expected.targets)}
        save_file({**tensors, "outputs": expected.outputs.contiguous()}, folder / "probe.safetensors")
        request: ProofRequest = {
            "bundle": str(bundle.resolve()),
            "base": base.id,
            "fingerprint": base.fingerprint,
            "dtype": NAMES[base.dtype],
            "quantization": base.quantization,
            "head": base.head,
            "labels": None if expected.targets else int(expected.outputs.shape[1]),
            "device": str(device),
            "tolerance": tolerance(base.dtype, device, taken_on or device),
            "threads": torch.get_num_threads(),
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        problem = _run(folder, timeout)
        path = folder / "report.json"
        if not path.exists():
            raise ProofFailed(f"the bundle was not stored, because its proof wrote no report ({problem}): try again")
        report: JsonObject = json.loads(path.read_text(encoding="utf-8"))
    if report["problem"]:
        raise ProofFailed(f"the bundle was not stored, because read back in a fresh process {report['problem']}")
    return report


def _run(folder: Path, timeout: float) -> str:
    """Run the process. Returns how it ended, for the error if it wrote no report."""
    command = [sys.executable, "-P", "-m", "turret.train.reload", str(folder)]
    try:
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {timeout:.0f} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {done.returncode}"
