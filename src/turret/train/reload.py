"""Reads a bundle back from disk and compares its outputs with a probe's: in a fresh process, or on a base in memory.

`python -m turret.train.reload FOLDER` is the fresh process of `turret.train.proof`. It reads request.json and
probe.safetensors in FOLDER, loads base and bundle from disk, compares, and writes report.json. The report's `problem`
is None, or the end of a sentence that begins "read back in a fresh process".
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from turret import bases, bundles
from turret.adapters import Adapter
from turret.bases import Base
from turret.errors import ProofFailed, TurretError
from turret.json_types import JsonObject
from turret.train.proof import Probe, ProofRequest, effect_of, tolerance


def main(folder: Path) -> None:
    """Answer the request in a folder."""
    started = time.perf_counter()
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
    base = bases.load(
        request["base"],
        task=request["head"],
        num_labels=request["labels"],
        dtype=request["dtype"],
        quantization=request.get("quantization", "none"),
        device=request["device"],
        verify=True,  # hash the weights instead of trusting the cached fingerprint
    )
    if base.fingerprint != request["fingerprint"]:
        given = f"{request['fingerprint'][:19]} became {base.fingerprint[:19]}"
        return {"problem": f"its base had other weights ({given}): something wrote to {request['base']}"}
    expected = Probe(_rows(probe, "source"), _rows(probe, "target"), probe["outputs"])
    return _compared(base, adapter, expected, request["tolerance"])


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
    report = _compared(base, bundles.read_bundle(bundle), expected, tolerance(base.dtype, device, device))
    if report["problem"]:
        raise ProofFailed(f"the bundle was not stored, because read back from disk {report['problem']}")
    return report


def _compared(base: Base, adapter: Adapter, expected: Probe, allowed: float) -> JsonObject:
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
