"""Date, device, precision and versions of a training, for its report. Runs in the process of that training."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from turret import quantized
from turret.json_types import JsonObject
from turret.transformer import Model
from turret.workspace.machine import installed

PACKAGES = ("turret", "torch", "transformers", "peft")


def provenance(model: Model, int8: bool) -> JsonObject:
    """Date, device, threads, precision, versions and commit."""
    weight = next(model.parameters())
    kinds = sorted({str(each.dtype).removeprefix("torch.") for each in model.parameters() if each.is_floating_point()})
    packed = ", weights in 4 bits" if quantized.any_packed(model) else ""
    precision = " and ".join(kinds) + packed + (", products in int8" if int8 else "")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "device": _device(weight.device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in PACKAGES}},
        "commit": commit(Path(__file__).parents[4]),
    }


def commit(folder: Path) -> str | None:
    """The commit of a source checkout; None for an installed package."""
    if not (folder / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {_processor()}"


def _processor() -> str:
    """The processor's name with family and model number, because one name covers several generations."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    pairs = (line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in pairs}
    name = info.get("model name", platform.machine())
    return f"{name} (family {info['cpu family']}, model {info['model']})" if "cpu family" in info else name
