"""When, where and with what a training was made, as its report says it. Runs in the process of that training."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import turret

PACKAGES = ("turret", "torch", "transformers", "peft")


def provenance(model: Any, int8: bool) -> dict[str, Any]:
    """Date, device, threads, precision, versions and commit. model: with its base loaded."""
    weight = next(model.parameters())
    kinds = sorted({str(each.dtype).removeprefix("torch.") for each in model.parameters() if each.is_floating_point()})
    precision = " and ".join(kinds) + (", products in int8" if int8 else "")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "device": _device(weight.device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": commit(Path(turret.__file__).parents[2]),
    }


def commit(folder: Path) -> str | None:
    """The commit that is checked out in a folder with the package's source; None of an installed package."""
    if not (folder / ".git").exists():
        return None
    try:
        said = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {_processor()}"


def _processor() -> str:
    """Its name with family and model, because one name covers several generations."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    pairs = (line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines() if ":" in line)
    told = {key.strip(): value.strip() for key, value in pairs}
    name = told.get("model name", platform.machine())
    return f"{name} (family {told['cpu family']}, model {told['model']})" if "cpu family" in told else name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
