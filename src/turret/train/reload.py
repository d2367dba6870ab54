"""The fresh process behind `turret.train.proof`: `python -m turret.train.reload FOLDER`.

Reads request.json and probe.safetensors in FOLDER, loads base and bundle from disk, compares, and writes report.json.
Its `problem` is None, or the end of a sentence that begins "read back in a fresh process". Trusts nothing of the
process that trained.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from turret import adapters, bases
from turret.adapters import Adapter
from turret.errors import TurretError
from turret.methods import Full, Head
from turret.train.proof import answer


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
    adapter = adapters.read_bundle(Path(request["bundle"]))
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
    with torch.no_grad():
        bare = _without(base.model, adapter, sources, targets)
        adapters.mount(base.model, adapter, fingerprint=base.fingerprint)
        outputs = answer(base.model, sources, targets)
    expected, largest = probe["outputs"], float(probe["outputs"].abs().max())
    error = float((outputs - expected).abs().max()) / largest
    effect = float((outputs - bare).abs().max()) / largest
    idle = _idle(base.model, adapter, sources, targets)
    report = {
        "rows": len(sources),
        "error": error,  # of the largest output
        "effect": effect,  # how far the adapter moves the outputs from the bare base's, of the largest output
        "tensors": len(adapter.tensors) + len(adapter.head),
        "fingerprint": base.fingerprint,
        "problem": None,
    }
    if not error <= request["tolerance"]:
        report["problem"] = f"its outputs differ by {error:.1e} of the largest, allowed is {request['tolerance']:.0e}"
    elif effect == 0:
        report["problem"] = "it gives exactly what the bare base gives: the adapter has no effect; train longer"
    elif idle:
        report["problem"] = f"{len(idle)} of its tensors take no part in the outputs, the first is {idle[0]}"
    return report


def _listed(probe: dict[str, Tensor], kind: str) -> list[Tensor]:
    count = sum(name.startswith(kind + ".") for name in probe)
    return [probe[f"{kind}.{i}"] for i in range(count)]


def _without(model: Any, adapter: Adapter, sources: list[Tensor], targets: list[Tensor]) -> Tensor:
    """What the base gives without the adapter: under the adapter's own head, where that is only a part of it."""
    if adapter.head and not isinstance(adapter.method, (Full, Head)):
        adapters.mount(model, replace(adapter, method=Head(), tensors={}))
        slot = 1
    else:
        adapters.attach(model, Head())
        slot = 0
    try:
        return answer(model, sources, targets, slot)
    finally:
        adapters.detach(model)
        model.eval()


def _idle(model: Any, adapter: Adapter, sources: list[Tensor], targets: list[Tensor]) -> list[str]:
    """Which stored tensors were not mounted, or else which mounted ones autograd does not find behind the outputs."""
    mounted = adapters.extract(model)
    stored, there = {**adapter.tensors, **adapter.head}, {**mounted.tensors, **mounted.head}
    lost = [name for name in stored if name not in there or not torch.equal(stored[name].float(), there[name].float())]
    if lost or isinstance(adapter.method, Full):  # a full fine-tuning replaces also what a task does not use
        return lost
    owned = _owned(model)
    for parameter in owned.values():
        parameter.requires_grad_(True)
    total = answer(model, sources, targets).square().sum()
    gradients = torch.autograd.grad(total, list(owned.values()), allow_unused=True)
    return [name for name, gradient in zip(owned, gradients, strict=True) if gradient is None]


def _owned(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of slot 1, known by where they sit."""
    attached = adapters.attachment(model)
    parts: dict[str, nn.Module] = {f"prefix.{name}": each for name, each in attached.prefixes.items()}
    routed: dict[str, Any] = {**attached.linears, **attached.heads}
    parts |= {path: each.slots["1"] for path, each in routed.items() if "1" in each.slots}
    return {f"{path}.{name}": each for path, part in parts.items() for name, each in part.named_parameters()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
