"""`turret.save`: what is attached to a model, as a bundle, for a program that has its own loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from turret.adapters.adapter import Adapter, BaseInfo, extract
from turret.adapters.attach import attachment
from turret.adapters.bundle import save_bundle
from turret.fingerprint import body, hashed


def save(
    model: Any,
    folder: str | Path,
    *,
    base: str | None = None,
    task: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the adapter on `model` as a bundle into a new folder, and return its manifest.

    base: the base's id, where the model's own name is not it. task, generation: what answering will need, such as
    {"kind": "classify", "labels": [...]}. The fingerprint is that of the weights the model had when it was attached to.
    """
    attached = attachment(model)
    tensors, head, method = extract(model)
    fingerprint = hashed(body(attached.originals.items(), model, attached.family))
    name = base or getattr(model.config, "_name_or_path", "") or attached.family.name
    info = BaseInfo(name, fingerprint, attached.family.name)
    return save_bundle(Adapter(method, tensors, head, info, task or {}, generation or {}), folder)
