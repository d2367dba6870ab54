"""Small folders that the store accepts as bundles."""

from __future__ import annotations

import hashlib
import json
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64"}


def write_bundle(
    folder: Path, content: bytes, more: Mapping[str, bytes] | None = None, said: Mapping[str, Any] | None = None
) -> Path:
    """A new folder under `folder` with tensors, a configuration and a manifest, which also has the sections `said`."""
    bundle = folder / uuid.uuid4().hex
    bundle.mkdir(parents=True)
    files = {"adapter_model.safetensors": content, "adapter_config.json": b"{}", **(more or {})}
    entries = {}
    for name, data in files.items():
        (bundle / name).write_bytes(data)
        entries[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest = {"files": entries, "base": {"id": "tiny"}, "method": {"kind": "lora"}, **(said or {})}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps({"digest": f"sha256:{digest}", **manifest}))
    return bundle


def safetensors(tensors: Mapping[str, Any]) -> bytes:
    """A safetensors file with these arrays; uint16 stands for the bits of bfloat16."""
    header, data = {}, b""
    for name, values in tensors.items():
        array = np.ascontiguousarray(values)
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": TYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def tensors(seed: int, size: int = 4) -> bytes:
    """A small safetensors file, different for each seed."""
    return safetensors({"a": np.random.default_rng(seed).normal(size=size).astype(np.float32)})
