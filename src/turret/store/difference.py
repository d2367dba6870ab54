"""Two versions side by side: what they were made from, what they reach, and how far their weights are apart."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turret.store.catalog import Version
from turret.store.weights import Weights, apart

SECTIONS = ("base", "method", "task", "generation", "lineage")
Change = tuple[float | None, float | None, float | None]  # of the first, of the second, how much more


@dataclass(frozen=True)
class Difference:
    """The second version beside the first."""

    versions: tuple[str, str]
    differs: Mapping[str, tuple[Any, Any]]  # key of the manifest -> both values
    metrics: Mapping[str, Mapping[str, Change]]  # split -> name ->
    bytes: tuple[int, int]
    weights: tuple[Weights, ...]
    moved: Weights | None  # all that was compared
    not_compared: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
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
    """Compare two versions, given their files."""
    facts_a, facts_b = (dict(_facts(version.manifest)) for version in (a, b))
    keys = list(dict.fromkeys((*facts_a, *facts_b)))
    groups, moved, rest = apart(files_a, files_b)
    return Difference(
        versions=(str(a), str(b)),
        differs={key: (facts_a.get(key), facts_b.get(key)) for key in keys if facts_a.get(key) != facts_b.get(key)},
        metrics=_metrics(a.metrics, b.metrics),
        bytes=(a.bytes, b.bytes),
        weights=groups,
        moved=moved,
        not_compared=rest,
    )


def _facts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section in SECTIONS:
        yield from _leaves(section, manifest.get(section))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if name == "lineage.recipe" and isinstance(value, str):
        try:
            value = tomllib.loads(value)
        except tomllib.TOMLDecodeError:
            yield name, value
            return
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _leaves(f"{name}.{key}", inside)
    else:
        yield name, value


def _metrics(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Change]]:
    found: dict[str, dict[str, Change]] = {}
    for split in dict.fromkeys((*a, *b)):
        left, right = (dict(_numbers("", some.get(split) or {})) for some in (a, b))
        found[split] = {}
        for name in dict.fromkeys((*left, *right)):
            one, other = left.get(name), right.get(name)
            found[split][name] = (one, other, None if one is None or other is None else other - one)
    return found


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _numbers(f"{name}.{key}" if name else str(key), inside)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
