"""The fresh process of `turret.train.proof`: `python -m turret.train.reload FOLDER`.

It reads request.json and probe.safetensors in FOLDER, loads base and bundle from disk, compares their outputs with the
probe's, and writes report.json. The report's `problem` is None, or the end of a sentence that begins "read back in a
fresh process".
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
from turret.errors import TurretError
from turret.json_types import JsonMapping, JsonObject
from turret.train.adapter_effect import effect_of


def main(folder: Path) -> None:
    """Answer the request in a folder."""
    started = time.perf_counter()
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    report: JsonObject = {"problem": None}
    try:
        report |= examine(request, load_file(folder / "probe.safetensors"))
    except TurretError as error:
        report["problem"] = f"it could not be used: {error}"
    report["seconds"] = time.perf_counter() - started
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def examine(request: JsonMapping, probe: dict[str, Tensor]) -> JsonObject:
    """Load base and bundle, and compare their outputs with the probe's. Returns the report."""
    adapter = bundles.read_bundle(Path(request["bundle"]))
    base = bases.load(
        request["base"],
        task="generate" if request["labels"] is None else "classify",
        num_labels=request["labels"],
        dtype=request["dtype"],
        quantization=request.get("quantization", "none"),
        device=request["device"],
        verify=True,  # hash the weights instead of trusting the cached fingerprint
    )
    if base.fingerprint != request["fingerprint"]:
        given = f"{request['fingerprint'][:19]} became {base.fingerprint[:19]}"
        return {"problem": f"its base had other weights ({given}): something wrote to {request['base']}"}
    sources, targets = _rows(probe, "source"), _rows(probe, "target")
    measured = effect_of(base, adapter, sources, targets)
    expected, largest = probe["outputs"], float(probe["outputs"].abs().max())
    error = float((measured.outputs - expected).abs().max()) / largest
    if error <= request["tolerance"]:
        problem = measured.problem()
    else:  # or NaN
        problem = f"its outputs differ by {error:.1e} of the largest, allowed is {request['tolerance']:.0e}"
    return {
        "rows": len(sources),
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
