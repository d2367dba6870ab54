"""The proof of a bundle: a fresh process loads it onto its base and must give the trained model's outputs.

`probe` records outputs of the trained model. `prove` starts a fresh process, in which `read_back` compares.
`effect_of` checks that an adapter changes its base's outputs, and that every one of its tensors affects them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from turret import adapters, bases, bundles
from turret.adapters import Adapter, packed
from turret.bases import Base
from turret.bases.base import Dtype
from turret.bases.quantized import Quantization
from turret.data import Example
from turret.errors import ProofFailed, TurretError
from turret.families.family import HeadKind, Pooling
from turret.json_types import JsonObject
from turret.methods import Head
from turret.process import environment
from turret.tasks import Task
from turret.train.batches import EncodedRows, spread_indices
from turret.train.evaluation import evaluation_mode
from turret.transformer import Model

ROWS = 4  # examples in a probe
TARGET_TOKENS = 16  # of each, at most
TIMEOUT = 900.0  # seconds
# The package imports this module, so `python -m` would have it twice.
FRESH = "import sys; from turret.train.proof import read_back; read_back(sys.argv[1])"
# The largest difference of an output, divided by the largest output: in float32 by the kind of the less exact device,
# because other libraries sum in another order; in a narrow precision its own rounding is larger than that.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
TOLERANCE_FLOAT32 = {"cpu": 1e-5, "cuda": 1e-4, "mps": 1e-3}
NAMES: Mapping[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class LoadedBase(TypedDict):
    """How the fresh process loads the base: arguments of `bases.load`."""

    base: str
    task: HeadKind
    num_labels: int | None
    dtype: Dtype
    quantization: Quantization
    device: str


class ProofRequest(TypedDict):
    """What the fresh process of a proof loads and compares."""

    bundle: str
    load: LoadedBase
    fingerprint: str
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
    items = EncodedRows(task, examples).take(spread_indices(len(examples), rows))
    sources = [item.source for item in items]
    if task.pooling is not None:
        sources = [text.clone() for item in items for text in packed.texts_in((item.source, item.read))]
    targets = [item.target[:TARGET_TOKENS] for item in items if item.target is not None]
    with evaluation_mode(model, None):
        return Probe(sources, targets, answer(model, sources, targets, pooling=task.pooling))


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
        return packed.pooled_states(model, sources, pooling, slots).float().cpu()
    read = [torch.arange(len(source)) for source in sources]
    return packed.head_logits(model, list(zip(sources, read, strict=True)), slots).float().cpu()


def tolerance(dtype: torch.dtype, one: torch.device, other: torch.device) -> float:
    """The largest difference that is allowed between the outputs of one model on two devices, or twice on one.

    It is divided by the largest output.
    """
    if dtype != torch.float32:
        return TOLERANCE[dtype]
    return max(TOLERANCE_FLOAT32[one.type], TOLERANCE_FLOAT32[other.type])


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
        The report of `read_back`.

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
            "load": {
                "base": base.id,
                "task": base.head,
                "num_labels": None if expected.targets else int(expected.outputs.shape[1]),
                "dtype": NAMES[base.dtype],
                "quantization": base.quantization,
                "device": str(device),
            },
            "fingerprint": base.fingerprint,
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
    command = [sys.executable, "-P", "-c", FRESH, str(folder)]
    try:
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {timeout:.0f} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {done.returncode}"


# --- the effect of an adapter -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterEffect:
    """An adapter's outputs, compared with the bare base's.

    Args:
        outputs: (B, C) or (N, V), float32.
        effect: largest difference from the base's outputs, divided by the largest output.
        idle: names of the tensors that do not affect the outputs.
    """

    outputs: Tensor
    effect: float
    idle: list[str]

    def problem(self) -> str | None:
        """What is wrong, as the end of a sentence about the adapter; None if nothing is."""
        if not bool(torch.isfinite(self.outputs).all()):
            return "its outputs are not finite numbers"
        if not self.effect > 0:
            return "its outputs equal the bare base's: the adapter has no effect; train longer"
        if self.idle:
            return f"{len(self.idle)} of its tensors do not affect the outputs, the first is {self.idle[0]}"
        return None


def effect_of(base: Base, adapter: Adapter, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> AdapterEffect:
    """Compare the outputs of a bare base with and without an adapter, which stays mounted.

    Args:
        base: a base with no adapter on it.
        sources: token ids (T,) of each row.
        targets: token ids of each row's target; empty for a classifier.

    Raises:
        AdapterError: a tensor does not fit the base.
        WrongBase: the adapter belongs to another base.
    """
    model: Model = base.model
    sources, targets = list(sources), list(targets)
    with torch.inference_mode(False), torch.enable_grad():  # the caller may be in either mode
        with torch.no_grad():
            bare = _bare_outputs(model, adapter, sources, targets)
            adapters.mount(model, adapter, fingerprint=base.fingerprint)
            # name the slot, as for the bare base: both round alike
            outputs = answer(model, sources, targets, 1, _pooling(adapter))
        effect = float((outputs - bare).abs().max()) / float(outputs.abs().max().clamp_min(1e-30))
        return AdapterEffect(outputs, effect, _idle(model, adapter, sources, targets))


def _bare_outputs(model: Model, adapter: Adapter, sources: list[Tensor], targets: list[Tensor]) -> Tensor:
    """The base's outputs without the adapter's tensors; with its head, unless the head is all it has."""
    if adapter.head and adapter.tensors and not adapter.method.every_weight:
        adapters.mount(model, replace(adapter, method=Head(), tensors={}))
        slot = 1
    else:
        adapters.attach(model, Head())
        slot = 0
    try:
        return answer(model, sources, targets, slot, _pooling(adapter))
    finally:
        adapters.detach(model)
        model.eval()


def _idle(model: Model, adapter: Adapter, sources: list[Tensor], targets: list[Tensor]) -> list[str]:
    """The stored tensors that were not mounted; if all were, those that have no gradient from the outputs."""
    mounted = adapters.extract(model)
    stored, present = {**adapter.tensors, **adapter.head}, {**mounted.tensors, **mounted.head}
    lost = [
        name for name in stored if name not in present or not torch.equal(stored[name].float(), present[name].float())
    ]
    if lost or adapter.method.every_weight:  # full fine-tuning also copies weights that the task does not use
        return lost
    owned = _slot_parameters(model)
    for parameter in owned.values():
        parameter.requires_grad_(True)
    total = answer(model, sources, targets, pooling=_pooling(adapter)).square().sum()
    gradients = torch.autograd.grad(total, list(owned.values()), allow_unused=True)
    return [name for name, gradient in zip(owned, gradients, strict=True) if gradient is None]


def _pooling(adapter: Adapter) -> Pooling | None:
    """Of an adapter whose outputs are vectors."""
    return adapter.task.get("pooling")


def _slot_parameters(model: Model) -> dict[str, Tensor]:
    """The numbers of the attached adapter, by their path."""
    attached, slot = adapters.attachment(model), str(adapters.ATTACHED)
    if attached.guest is not None:
        heads = {path: each.slots[slot] for path, each in attached.heads.items() if slot in each.slots}
        own = {f"{path}.{name}": each for path, part in heads.items() for name, each in part.named_parameters()}
        return {**attached.guest.parameters, **own}
    parts: dict[str, nn.Module] = {f"prefix.{name}": each for name, each in attached.prefixes.items()}
    for routed in (attached.linears, attached.heads, attached.wholes):
        parts |= {path: each.slots[slot] for path, each in routed.items() if slot in each.slots}
    scaling = {path: layer.scaled.get(adapters.ATTACHED) for path, layer in attached.linears.items()}
    scaled = {path: layer.tensors for path, layer in scaling.items() if layer is not None}
    return {
        **{f"{path}.{name}": each for path, part in parts.items() for name, each in part.named_parameters()},
        **{f"{path}.{number}": each for path, own in scaled.items() for number, each in enumerate(own)},
    }


# --- read back from disk ----------------------------------------------------------------------------------------------
# In a fresh process, or on a base in memory.


def read_back(place: str) -> None:
    """Load the base and the bundle that request.json in a folder names, compare, and write report.json there.

    The report's `problem` is None, or the end of a sentence that begins "read back in a fresh process".
    """
    started, folder = time.perf_counter(), Path(place)
    request: ProofRequest = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    report: JsonObject = {"problem": None}
    try:
        report |= examine(request, load_file(folder / "probe.safetensors"))
    except TurretError as error:
        report["problem"] = f"it could not be used: {error}"
    report["seconds"] = time.perf_counter() - started
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def examine(request: ProofRequest, probe: dict[str, Tensor]) -> JsonObject:
    """Load base and bundle, and compare their outputs with the probe's. Returns the report."""
    adapter = bundles.read_bundle(Path(request["bundle"]))
    base = bases.load(**request["load"], verify=True)  # hash the weights instead of trusting the cached fingerprint
    if base.fingerprint != request["fingerprint"]:
        given = f"{request['fingerprint'][:19]} became {base.fingerprint[:19]}"
        return {"problem": f"its base had other weights ({given}): something wrote to {request['load']['base']}"}
    expected = Probe(_rows(probe, "source"), _rows(probe, "target"), probe["outputs"])
    return _compare_outputs(base, adapter, expected, request["tolerance"])


def prove_here(bundle: Path, base: Base, expected: Probe) -> JsonObject:
    """Read `bundle` from disk onto a base that stays in memory, and compare its outputs with the probe's.

    Args:
        base: a model with nothing attached, of the weights that the other trainings use.

    Returns:
        The report of the comparison.

    Raises:
        ProofFailed: the outputs are not the trained model's or equal the bare base's, or a tensor has no effect.
    """
    device = base.model.device
    report = _compare_outputs(base, bundles.read_bundle(bundle), expected, tolerance(base.dtype, device, device))
    if report["problem"]:
        raise ProofFailed(f"the bundle was not stored, because read back from disk {report['problem']}")
    return report


def _compare_outputs(base: Base, adapter: Adapter, expected: Probe, allowed: float) -> JsonObject:
    """The report of a comparison. allowed: the largest difference of an output, of the largest output."""
    measured = effect_of(base, adapter, expected.sources, expected.targets)
    error = float((measured.outputs - expected.outputs).abs().max()) / float(expected.outputs.abs().max())
    if error <= allowed:
        problem = measured.problem()
    else:  # or NaN
        problem = f"its outputs differ by {error:.1e} of the largest, allowed is {allowed:.0e}"
    return {
        "rows": len(expected.sources),
        "error": error,  # of the largest output
        "effect": measured.effect,
        "tensors": len(adapter.tensors) + len(adapter.head),
        "fingerprint": base.fingerprint,
        "problem": problem,
    }


def _rows(probe: dict[str, Tensor], kind: str) -> list[Tensor]:
    count = sum(name.startswith(kind + ".") for name in probe)
    return [probe[f"{kind}.{i}"] for i in range(count)]
