"""The fresh process behind `turret.train.proof`: `python -m turret.train.reload FOLDER`.

Reads request.json and probe.safetensors in FOLDER, loads base and bundle from disk, compares, and writes report.json.
Its `problem` is None, or the end of a sentence that begins "read back in a fresh process". Trusts nothing of the
process that trained.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from turret import bases, bundles
from turret.errors import TurretError
from turret.train.adapter_effect import effect_of


def main(folder: Path) -> None:
    """Answer the request in a folder."""
    started = time.perf_counter()
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    report: dict[str, Any] = {"problem": None}
    try:
        report |= examine(request, load_file(folder / "probe.safetensors"))
    except TurretError as error:
        report["problem"] = f"it could not be used: {error}"
    report["seconds"] = time.perf_counter() - started
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def examine(request: dict[str, Any], probe: dict[str, Tensor]) -> dict[str, Any]:
    """Load base and bundle as anyone would, and look at what they give."""
    adapter = bundles.read_bundle(Path(request["bundle"]))
    base = bases.load(
        request["base"],
        task="generate" if request["labels"] is None else "classify",
        num_labels=request["labels"],
        dtype=request["dtype"],
        verify=True,  # hash the weights, whatever a cache remembers
    )
    if base.fingerprint != request["fingerprint"]:
        given = f"{request['fingerprint'][:19]} became {base.fingerprint[:19]}"
        return {"problem": f"its base had other weights ({given}): something wrote to {request['base']}"}
    sources, targets = _listed(probe, "source"), _listed(probe, "target")
    found = effect_of(base, adapter, sources, targets)
    expected, largest = probe["outputs"], float(probe["outputs"].abs().max())
    error = float((found.outputs - expected).abs().max()) / largest
    report = {
        "rows": len(sources),
        "error": error,  # of the largest output
        "effect": found.effect,
        "tensors": len(adapter.tensors) + len(adapter.head),
        "fingerprint": base.fingerprint,
        "problem": None,
    }
    if not error <= request["tolerance"]:
        report["problem"] = f"its outputs differ by {error:.1e} of the largest, allowed is {request['tolerance']:.0e}"
    else:
        report["problem"] = found.problem()
    return report


def _listed(probe: dict[str, Tensor], kind: str) -> list[Tensor]:
    count = sum(name.startswith(kind + ".") for name in probe)
    return [probe[f"{kind}.{i}"] for i in range(count)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
