"""Gates: limits on the stored metrics of a version, checked before an alias moves to it.

Grammar: `gate = [ split "." ] metric relation number`

- `split`: a split of the version's metrics, or `forgetting`; default `test`
- `metric`: a name, or a path into a report such as `per_class.tech.f1`, which needs the split in front
- `relation`: `>=`, `>`, `<=` or `<`; an alias has at most one gate per split, metric and relation
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from sqlalchemy import ColumnElement, Connection, delete, select

from turret.database import gates, upsert
from turret.errors import BadReference, GateFailed, NotFound
from turret.json_types import JsonObject, Plain
from turret.reference import Reference
from turret.store import catalog, golden
from turret.store.catalog import Version, now
from turret.store.golden import Golden
from turret.tasks.shapes import SplitMetrics

FORGETTING = "forgetting"  # the metrics that `workspace.forgetting` measures
_RELATIONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
GATE = re.compile(
    r" *([^ <>=\x00-\x1f][^<>=\x00-\x1f]{0,199}?) *(>=|<=|>|<)"
    r" *([+-]?([0-9]{1,25}\.?[0-9]{0,25}|\.[0-9]{1,25})([eE][+-]?[0-9]{1,2})?) *"
)


@dataclass(frozen=True, order=True)
class Gate:
    """One limit; `alias` is empty for a gate that was given with a promote and is not stored."""

    alias: str
    split: str
    metric: str
    relation: str
    threshold: float

    def __str__(self) -> str:
        return f"{self.split}.{self.metric}{self.relation}{repr(self.threshold).removesuffix('.0')}"

    @classmethod
    def parse(cls, text: str, alias: str = "") -> Gate:
        """Parse a gate such as `accuracy>=0.9`; raises BadReference."""
        found = GATE.fullmatch(text)
        if found is None:
            raise BadReference(
                f"bad gate {ascii(text)[:60]}: expected a metric, one of >= > <= < and a number, such as accuracy>=0.9 "
                "or test.loss<0.4"
            )
        split, metric = _split_and_metric(found[1])
        return cls(alias, split, metric, found[2], float(found[3]))

    def as_json(self) -> JsonObject:
        return {**asdict(self), "gate": str(self)}


def check_gates(version: Version, alias: str, required: Iterable[Gate]) -> None:
    """Raise GateFailed, which names every gate that the stored metrics of the version do not pass."""
    results = [(gate, *judge_gate(version, gate)) for gate in required]
    failed = [f"{gate} is required, {found}" for gate, passes, found in results if not passes]
    if failed:
        raise GateFailed(
            f"{version} may not become {version.name}@{alias}: {'; '.join(failed)}: promote another version, or change "
            f"the gate with `turret gate {version.name} {alias}`"
        )


def judge_gate(version: Version, gate: Gate) -> tuple[bool, str]:
    """Whether the stored metrics of the version pass the gate, and the value found."""
    value = _value(version.metrics, gate)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return False, _missing(version.metrics, gate)
    return _RELATIONS[gate.relation](value, gate.threshold), f"found {value!r}"


def metric_gates_of(connection: Connection, name: str, alias: str | None = None) -> Sequence[Gate]:
    """The gates of an alias, or of all aliases of a name."""
    query = select(gates).where(gates.c.adapter_id == catalog.adapter_of(connection, name))
    if alias is not None:
        query = query.where(gates.c.alias == alias)
    rows = connection.execute(query)
    return sorted(Gate(row.alias, row.split, row.metric, row.relation, row.threshold) for row in rows)


def add(connection: Connection, name: str, gate: Gate) -> None:
    """Add a gate; it replaces one with the same split, metric and relation."""
    adapter_id = catalog.adapter_of(connection, name)
    upsert(connection, gates, [{"adapter_id": adapter_id, **asdict(gate), "created": now()}], change="set")


def remove(connection: Connection, name: str, alias: str, text: str) -> None:
    """Remove a gate, or all gates of a metric; raises NotFound, which lists the gates of the alias."""
    known = metric_gates_of(connection, name, alias)
    if any(sign in text for sign in "<>="):
        matching = [gate for gate in known if gate == Gate.parse(text, alias)]
    else:
        matching = [gate for gate in known if (gate.split, gate.metric) == _split_and_metric(text.strip())]
    if not matching:
        existing = f"it has {', '.join(map(str, known))}" if known else "it has none"
        raise NotFound(f"no gate {ascii(text)[:60]} on {name}@{alias}: {existing}")
    adapter_id = catalog.adapter_of(connection, name)
    for gate in matching:
        connection.execute(delete(gates).where(_same(adapter_id, gate)))


def _same(adapter_id: int, gate: Gate) -> ColumnElement[bool]:
    """The row with the key of this gate: all but the threshold."""
    same = gates.c.adapter_id == adapter_id
    for column in ("alias", "split", "metric", "relation"):
        same &= gates.c[column] == getattr(gate, column)
    return same


def _split_and_metric(text: str) -> tuple[str, str]:
    split, dot, metric = text.partition(".")
    return (split, metric) if dot and split and metric else ("test", text)


def _value(metrics: SplitMetrics, gate: Gate) -> Plain:
    value: Plain = metrics.get(gate.split)
    for key in gate.metric.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _missing(metrics: SplitMetrics, gate: Gate) -> str:
    if gate.split not in metrics:
        return f"there are no metrics of {gate.split} (stored: {', '.join(metrics) or 'none'})"
    numbers = [k for k, v in metrics[gate.split].items() if isinstance(v, int | float) and not isinstance(v, bool)]
    return f"{gate.split} has no such metric (it has {', '.join(numbers) or 'none'})"


# --- gate status ------------------------------------------------------------------------------------------------------
# Whether the version that an alias names passes the gates of the alias now.


@dataclass(frozen=True)
class GateStatus:
    """A gate of an alias, and whether the version that the alias names passes it."""

    gate: Gate | Golden
    holder: str | None  # "news@2"; None if the alias names nothing
    passes: bool | None  # None without a holder, or if the golden examples were never replayed on it
    found: str  # the value that was judged, for people

    def as_json(self) -> JsonObject:
        return {**self.gate.as_json(), "holder": self.holder, "passes": self.passes, "found": self.found}


def gates_of(connection: Connection, name: str, alias: str | None) -> Sequence[Gate | Golden]:
    """The gates and golden examples of an alias, or of all aliases of a name."""
    return [*metric_gates_of(connection, name, alias), *golden.golden_sets_of(connection, name, alias)]


def gate_statuses(connection: Connection, name: str, alias: str | None = None) -> list[GateStatus]:
    """The status of all gates of an alias, or of all aliases of a name; raises NotFound for an unknown name."""
    every, holders = gates_of(connection, name, alias), dict[str, Version]()
    for each in {gate.alias for gate in every}:
        with suppress(NotFound):
            holders[each] = catalog.find(connection, Reference(name, alias=each))
    return [_status_of(connection, gate, holders.get(gate.alias)) for gate in every]


def _status_of(connection: Connection, gate: Gate | Golden, holder: Version | None) -> GateStatus:
    if holder is None:
        return GateStatus(gate, None, None, f"{gate.alias} names no version yet")
    found = judge_gate(holder, gate) if isinstance(gate, Gate) else golden.judge_golden(connection, holder, gate)
    return GateStatus(gate, str(holder), *found)
