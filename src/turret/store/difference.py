"""Compare two versions: their manifests, their metrics, and the distance of their weights."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from turret.json_types import JsonMapping, JsonObject, JsonValue
from turret.store.catalog import Version
from turret.store.weights import Weights, apart

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
    settings_a, settings_b = (dict(_settings(version.manifest)) for version in (a, b))
    keys = list(dict.fromkeys((*settings_a, *settings_b)))
    groups, moved, rest = apart(files_a, files_b)
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


def _settings(manifest: JsonMapping) -> Iterator[tuple[str, JsonValue]]:
    for section in SECTIONS:
        yield from _leaves(section, manifest.get(section))


def _leaves(name: str, value: JsonValue) -> Iterator[tuple[str, JsonValue]]:
    if name == "lineage.recipe" and isinstance(value, str):
        try:
            value = tomllib.loads(value)
        except tomllib.TOMLDecodeError:
            yield name, value
            return
    if isinstance(value, Mapping):
        for key, inside in value.items():
            if name != "task.calibration" or key != "scores":  # hundreds of numbers that say nothing side by side
                yield from _leaves(f"{name}.{key}", inside)
    else:
        yield name, value


def _metrics(a: JsonMapping, b: JsonMapping) -> dict[str, dict[str, Change]]:
    found: dict[str, dict[str, Change]] = {}
    for split in dict.fromkeys((*a, *b)):
        left, right = (dict(_numbers("", some.get(split) or {})) for some in (a, b))
        found[split] = {}
        for name in dict.fromkeys((*left, *right)):
            one, other = left.get(name), right.get(name)
            found[split][name] = (one, other, None if one is None or other is None else other - one)
    return found


def _numbers(name: str, value: JsonValue) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _numbers(f"{name}.{key}" if name else str(key), inside)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
