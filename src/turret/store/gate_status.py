"""Whether the version that an alias names passes the alias's gates now, gate by gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from turret.errors import NotFound
from turret.reference import Reference
from turret.store import catalog, gates, golden
from turret.store.catalog import Version
from turret.store.gates import Gate
from turret.store.golden import Golden


@dataclass(frozen=True)
class GateStatus:
    """A gate of an alias, and how the version that holds the alias stands before it."""

    gate: Gate | Golden
    holder: str | None  # "news@2"; None where the alias names nothing
    passes: bool | None  # None where there is no holder, or the golden examples were never put to it
    found: str  # what it was judged by, for people

    def as_json(self) -> dict[str, Any]:
        return {**self.gate.as_json(), "holder": self.holder, "passes": self.passes, "found": self.found}


def of(connection: Connection, name: str, alias: str | None = None) -> list[GateStatus]:
    """Of all gates of a name's alias, or of all its aliases. Raises NotFound for a name that is not there."""
    wanted: list[Gate | Golden] = [*gates.of(connection, name, alias), *golden.of(connection, name, alias)]
    holders = {each: _holder(connection, name, each) for each in {gate.alias for gate in wanted}}
    return [_status_of(connection, gate, holders[gate.alias]) for gate in wanted]


def _holder(connection: Connection, name: str, alias: str) -> Version | None:
    try:
        return catalog.find(connection, Reference(name, alias=alias))
    except NotFound:
        return None


def _status_of(connection: Connection, gate: Gate | Golden, holder: Version | None) -> GateStatus:
    if holder is None:
        return GateStatus(gate, None, None, f"{gate.alias} names nothing yet")
    judged = gates.judged(holder, gate) if isinstance(gate, Gate) else golden.judged(connection, holder, gate)
    return GateStatus(gate, str(holder), *judged)
