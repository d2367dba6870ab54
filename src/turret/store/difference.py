"""Compare two versions: their manifests, their metrics, and the distance of their weights."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from turret.errors import Corrupt
from turret.json_types import JsonObject, JsonValue, Plain
from turret.manifest import Manifest
from turret.methods.lora import lora_scaling
from turret.store.catalog import Version
from turret.tasks.shapes import Metrics, SplitMetrics

# --- weights ----------------------------------------------------------------------------------------------------------
# The distance between the weights of two bundles, with numpy alone.
#
# For a group of tensors, in float64:
#
#     distance = sqrt(sum |W_b - W_a|_F^2) / sqrt(sum |W_a|_F^2)
#
# over its effective weights W: for LoRA the product `scaling * B A`, for any ranks; otherwise the tensor itself.
# Tensors that only one bundle has, or whose shapes differ, are named and not compared.


_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
_DTYPES |= {"I8": "|i1", "U8": "|u1", "BOOL": "|b1"}
_CHUNK = 1 << 20  # numbers that are converted to float64 at once
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Weights:
    """The distance of a group of tensors in the second version from the first."""

    group: str  # a module name, with `*` for the number of a layer
    tensors: int
    norm: float  # in the first version
    distance: float | None  # relative to `norm`; None if only `norm` is 0


def weight_distance(
    a: Mapping[str, Path], b: Mapping[str, Path]
) -> tuple[tuple[Weights, ...], Weights | None, tuple[str, ...]]:
    """Compare the tensors of two bundles, given as files by path.

    Returns:
        The groups, all compared tensors together (None if there are none), and the names of tensors not compared.
    """
    left, right = _effective(a), _effective(b)
    sums: dict[str, list[tuple[float, float]]] = {}
    rest = sorted(set(left) ^ set(right))
    for name in sorted(set(left) & set(right)):
        if type(left[name]) is not type(right[name]) or left[name].shape != right[name].shape:
            rest.append(name)
        else:
            sums.setdefault(_group(name), []).append(_distance(left[name], right[name]))
    groups = tuple(_weights(group, some) for group, some in sums.items())
    every = [each for some in sums.values() for each in some]
    return groups, _weights("all", every) if every else None, tuple(rest)


def _weights(group: str, sums: list[tuple[float, float]]) -> Weights:
    moved, norm = (math.sqrt(math.fsum(each[place] for each in sums)) for place in (0, 1))
    return Weights(group, len(sums), norm, moved / norm if norm else None if moved else 0.0)


def _group(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.removeprefix("base_model.model.").split("."))


@dataclass(frozen=True)
class _Plain:
    """A stored tensor."""

    values: NDArray[np.generic]
    bfloat16: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def chunks(self) -> Iterator[Floats]:
        flat = self.values.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            yield self._numbers(flat[start : start + _CHUNK])

    def whole(self) -> Floats:
        return self._numbers(self.values)

    def _numbers(self, values: NDArray[np.generic]) -> Floats:
        if self.bfloat16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float64)


@dataclass(frozen=True)
class _Product:
    """`B A` with the scaling folded into B: A (R, D_in), B (D_out, R). It is never multiplied out."""

    A: Floats
    B: Floats

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.B.shape[0], self.A.shape[1])


def _effective(files: Mapping[str, Path]) -> dict[str, _Plain | _Product]:
    """Name -> effective weight; the factors of LoRA are under the name of their layer."""
    found: dict[str, _Plain | _Product] = {}
    for path, file in files.items():
        if path.endswith(".safetensors"):
            found |= _read_tensors(file)
    config = json.loads(files["adapter_config.json"].read_bytes()) if "adapter_config.json" in files else {}
    if isinstance(config, dict) and config.get("peft_type") == "LORA":
        r, alpha = float(config.get("r") or 1), float(config.get("lora_alpha") or 1)
        scaling = lora_scaling(alpha, r, bool(config.get("use_rslora")))
        for name in [name for name in found if name.endswith(".lora_A.weight")]:
            layer = name.removesuffix(".lora_A.weight")
            A, B = found[name], found.get(f"{layer}.lora_B.weight")
            if isinstance(A, _Plain) and isinstance(B, _Plain) and A.values.ndim == B.values.ndim == 2:
                del found[name], found[f"{layer}.lora_B.weight"]
                found[layer] = _Product(A.whole(), scaling * B.whole())
    return found


def _read_tensors(path: Path) -> dict[str, _Plain | _Product]:
    """All tensors of a safetensors file, memory-mapped."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass  # checks that offsets, sizes and dtypes of the header agree
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise Corrupt(
            f"stored file {path} is not a readable safetensors file ({error}): train or import again"
        ) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found: dict[str, _Plain | _Product] = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _DTYPES:
            continue
        shape, start = tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        values = np.memmap(path, dtype, "r", start, shape) if math.prod(shape) else np.empty(shape, dtype)
        found[name] = _Plain(values, entry["dtype"] == "BF16")
    return found


def _distance(a: _Plain | _Product, b: _Plain | _Product) -> tuple[float, float]:
    """|W_b - W_a|_F^2 and |W_a|_F^2."""
    if isinstance(a, _Plain) and isinstance(b, _Plain):
        moved = norm = 0.0
        for one, other in zip(a.chunks(), b.chunks(), strict=True):
            moved += float(np.square(other - one).sum())
            norm += float(np.square(one).sum())
        return moved, norm
    assert isinstance(a, _Product)
    assert isinstance(b, _Product)
    norm = _squared_norm(a.B, a.A)
    if np.array_equal(a.A, b.A) and np.array_equal(a.B, b.B):
        return 0.0, norm
    return _squared_norm(np.hstack((b.B, -a.B)), np.vstack((b.A, a.A))), norm


def _squared_norm(B: Floats, A: Floats) -> float:
    """|B A|_F^2 = |R A|_F^2 for B = Q R: needs no (D_out, D_in), and squares do not cancel."""
    return float(np.square(np.linalg.qr(B, mode="r") @ A).sum())


# --- difference -------------------------------------------------------------------------------------------------------


SECTIONS = ("base", "method", "task", "generation", "lineage")
Change = tuple[float | None, float | None, float | None]  # in the first version, in the second, and the difference


@dataclass(frozen=True)
class Difference:
    """How the second version differs from the first."""

    versions: tuple[str, str]
    differs: Mapping[str, tuple[JsonValue, JsonValue]]  # key of the manifest -> both values
    metrics: Mapping[str, Mapping[str, Change]]  # split -> metric -> change
    bytes: tuple[int, int]
    weights: tuple[Weights, ...]
    moved: Weights | None  # all compared tensors together
    not_compared: tuple[str, ...]  # names of tensors

    def as_json(self) -> JsonObject:
        return {
            "versions": list(self.versions),
            "differs": {key: list(both) for key, both in self.differs.items()},
            "metrics": {
                split: {name: dict(zip(("a", "b", "difference"), row, strict=True)) for name, row in rows.items()}
                for split, rows in self.metrics.items()
            },
            "bytes": list(self.bytes),
            "weights": [asdict(each) for each in self.weights],
            "moved": None if self.moved is None else asdict(self.moved),
            "not_compared": list(self.not_compared),
        }


def difference(a: Version, b: Version, files_a: Mapping[str, Path], files_b: Mapping[str, Path]) -> Difference:
    """Compare two versions, given their files by path."""
    settings_a, settings_b = (_settings(version.manifest) for version in (a, b))
    keys = list(dict.fromkeys((*settings_a, *settings_b)))
    groups, moved, rest = weight_distance(files_a, files_b)
    return Difference(
        versions=(str(a), str(b)),
        differs={
            key: (settings_a.get(key), settings_b.get(key))
            for key in keys
            if settings_a.get(key) != settings_b.get(key)
        },
        metrics=_metrics(a.metrics, b.metrics),
        bytes=(a.bytes, b.bytes),
        weights=groups,
        moved=moved,
        not_compared=rest,
    )


def _settings(manifest: Manifest) -> dict[str, JsonValue]:
    sections: JsonObject = {section: manifest.get(section) for section in SECTIONS}
    return dict(_leaves("", sections))


def _leaves(name: str, value: Plain) -> Iterator[tuple[str, JsonValue]]:
    """The path and value of all that is no mapping."""
    if name == "lineage.recipe" and isinstance(value, str):
        try:
            value = tomllib.loads(value)
        except tomllib.TOMLDecodeError:
            yield name, value
            return
    if isinstance(value, Mapping):
        for key, inside in value.items():
            hundreds = name.startswith("task.calibration") and key == "scores"  # they say nothing side by side
            if not hundreds:
                yield from _leaves(f"{name}.{key}" if name else str(key), inside)
    else:
        yield name, value


def _metrics(a: SplitMetrics, b: SplitMetrics) -> dict[str, dict[str, Change]]:
    found: dict[str, dict[str, Change]] = {}
    for split in dict.fromkeys((*a, *b)):
        left, right = (_numbers(some.get(split) or {}) for some in (a, b))
        found[split] = {}
        for name in dict.fromkeys((*left, *right)):
            one, other = left.get(name), right.get(name)
            found[split][name] = (one, other, None if one is None or other is None else other - one)
    return found


def _numbers(values: Metrics) -> dict[str, float]:
    every = _leaves("", values)
    return {name: each for name, each in every if isinstance(each, int | float) and not isinstance(each, bool)}
