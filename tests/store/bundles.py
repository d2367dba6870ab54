"""Write a folder that the store takes for a bundle."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path


def write_bundle(folder: Path, content: bytes, more: Mapping[str, bytes] | None = None) -> Path:
    """A new folder under `folder` with tensors, a configuration and the manifest that names them."""
    bundle = folder / uuid.uuid4().hex
    bundle.mkdir(parents=True)
    files = {"adapter_model.safetensors": content, "adapter_config.json": b"{}", **(more or {})}
    entries = {}
    for name, data in files.items():
        (bundle / name).write_bytes(data)
        entries[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    manifest = {"digest": f"sha256:{digest}", "files": entries, "base": {"id": "tiny"}, "method": {"kind": "lora"}}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle
