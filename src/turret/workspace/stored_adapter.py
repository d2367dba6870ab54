"""Read an adapter from a store, and load the base that it was trained on."""

from __future__ import annotations

import tempfile
from pathlib import Path

from turret import bundles
from turret.adapters import Adapter
from turret.bases import Base
from turret.bases.base import Dtype
from turret.bases.quantized import QUANTIZATIONS, Quantization
from turret.errors import AdapterError
from turret.reference import Reference
from turret.store import Store, Version
from turret.tasks import stored_task
from turret.workspace.resident import ALONE, OwnProcess


def read_adapter(store: Store, reference: str | Reference) -> tuple[Version, Adapter]:
    """Read a version. Raises NotFound if it does not exist, Corrupt if its files are damaged."""
    with tempfile.TemporaryDirectory(prefix="turret-") as folder:
        bundle = Path(folder) / "bundle"
        return store.materialize(reference, bundle), bundles.read_bundle(bundle)


def load_base(
    adapter: Adapter,
    dtype: Dtype = "auto",
    quantization: Quantization | None = None,
    device: str = "cpu",
    place: OwnProcess = ALONE,
) -> Base:
    """Load the base of an adapter that stores its task. The caller checks the base's fingerprint.

    Args:
        quantization: None: as the adapter was trained.
        place: where the base may be in memory already.
    """
    task, labels = stored_task(adapter.task), adapter.task.get("labels") or ()
    return place.load(
        adapter.base.id,
        task=task.head,
        num_labels=task.num_labels(labels),
        dtype=dtype,
        quantization=quantization_of(adapter) if quantization is None else quantization,
        device=device,
    )


def quantization_of(adapter: Adapter) -> Quantization:
    """How the weights of its base were packed during training. Raises AdapterError if this version does not know it."""
    kept = adapter.base.quantization or "none"
    if kept not in QUANTIZATIONS:
        raise AdapterError(
            f"the adapter was trained on {adapter.base.id} in {kept[:40]}: this version knows "
            f"{', '.join(QUANTIZATIONS)}; upgrade turret"
        )
    return QUANTIZATIONS[kept]
