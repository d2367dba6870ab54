"""What a version's metrics must reach before an alias may be moved to it. Refuses to know how a metric is measured.

Grammar: `gate = [ split "." ] metric relation number`

- `split`: as the version's metrics name it; `test` where left out
- `metric`: a name, or a path such as `per_class.tech.f1` into a report (then the split is said)
- `relation`: `>=`, `>`, `<=` or `<`; a name's alias has at most one gate a split, metric and relation
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from turret.database import gates
from turret.errors import BadReference, GateFailed, NotFound
from turret.store import catalog
from turret.store.catalog import Version, now

_HOLDS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_GATE = re.compile(r" *([^<>=\x00-\x1f]{1,200}?) *(>=|<=|>|<) *([^<>=\s]{1,40}) *")


@dataclass(frozen=True, order=True)
class Gate:
    """One threshold; `alias` is empty for one that was given with a promote and is not kept."""

    alias: str
    split: str
    metric: str
    relation: str
    threshold: float

    def __str__(self) -> str:
        return f"{self.split}.{self.metric}{self.relation}{repr(self.threshold).removesuffix('.0')}"

    @classmethod
    def parse(cls, text: str, alias: str = "") -> Gate:
        """Raises BadReference."""
        found = _GATE.fullmatch(text)
        try:
            threshold = float(found[3]) if found else math.nan
        except ValueError:
            threshold = math.nan
        if found is None or not math.isfinite(threshold):
            raise BadReference(
                f"bad gate {ascii(text)[:60]}: expected a metric, one of >= > <= < and a number, such as accuracy>=0.9 "
                "or test.loss<0.4"
            )
        split, metric = _named(found[1])
        return cls(alias, split, metric, found[2], threshold)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "gate": str(self)}


def check(version: Version, alias: str, wanted: Iterable[Gate]) -> None:
    """Raises GateFailed naming every gate that the version's stored metrics do not pass."""
    found = [(gate, *judged(version, gate)) for gate in wanted]
    failed = [f"{gate} is wanted, {said}" for gate, passes, said in found if not passes]
    if failed:
        raise GateFailed(
            f"{version} may not become {version.name}@{alias}: {'; '.join(failed)}: promote another version, or change "
            f"the gate with `turret gate {version.name} {alias}`"
        )


def judged(version: Version, gate: Gate) -> tuple[bool, str]:
    """Whether the version's stored metrics pass the gate, and what was found."""
    value = _found(version.metrics, gate)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return False, f"and {_lacks(version.metrics, gate)}"
    return _HOLDS[gate.relation](value, gate.threshold), f"found {value!r}"


def of(connection: Connection, name: str, alias: str | None = None) -> Sequence[Gate]:
    """The gates of a name's alias, or of all its aliases."""
    query = select(gates).where(gates.c.adapter_id == catalog.adapter_of(connection, name))
    if alias is not None:
        query = query.where(gates.c.alias == alias)
    return sorted(_gate(row) for row in connection.execute(query))


def keep(connection: Connection, name: str, gate: Gate) -> None:
    """Add the gate, in place of one of the same metric and relation."""
    adapter_id = catalog.adapter_of(connection, name)
    columns = {"alias": gate.alias, "split": gate.split, "metric": gate.metric, "relation": gate.relation}
    same = gates.c.adapter_id == adapter_id
    for column, value in columns.items():
        same &= gates.c[column] == value
    connection.execute(delete(gates).where(same))
    row = {"adapter_id": adapter_id, **columns, "threshold": gate.threshold, "created": now()}
    connection.execute(insert(gates).values(row))


def drop(connection: Connection, name: str, alias: str, text: str) -> None:
    """Remove a gate, or all gates of a metric; raises NotFound saying which there are."""
    known = of(connection, name, alias)
    if any(sign in text for sign in "<>="):
        wanted = [gate for gate in known if gate == Gate.parse(text, alias)]
    else:
        wanted = [gate for gate in known if (gate.split, gate.metric) == _named(text.strip())]
    if not wanted:
        there = f"it has {', '.join(map(str, known))}" if known else "it has none"
        raise NotFound(f"no gate {ascii(text)[:60]} on {name}@{alias}: {there}")
    adapter_id = catalog.adapter_of(connection, name)
    for gate in wanted:
        this = (gates.c.adapter_id == adapter_id) & (gates.c.alias == alias) & (gates.c.split == gate.split)
        this &= (gates.c.metric == gate.metric) & (gates.c.relation == gate.relation)
        connection.execute(delete(gates).where(this))


def _named(text: str) -> tuple[str, str]:
    split, dot, metric = text.partition(".")
    return (split, metric) if dot and split and metric else ("test", text)


def _gate(row: Any) -> Gate:
    return Gate(row.alias, row.split, row.metric, row.relation, row.threshold)


def _found(metrics: Mapping[str, Any], gate: Gate) -> Any:
    value: Any = metrics.get(gate.split)
    for key in gate.metric.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _lacks(metrics: Mapping[str, Any], gate: Gate) -> str:
    if gate.split not in metrics:
        return f"no metrics of {gate.split} are stored (there are those of {', '.join(metrics) or 'no split'})"
    numbers = [k for k, v in metrics[gate.split].items() if isinstance(v, int | float) and not isinstance(v, bool)]
    return f"{gate.split} has no such number (it has {', '.join(numbers) or 'none'})"
