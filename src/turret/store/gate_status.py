"""Whether the version that an alias names passes the gates of the alias now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from turret.errors import NotFound
from turret.json_types import JsonObject
from turret.reference import Reference
from turret.store import catalog, gates, golden
from turret.store.catalog import Version
from turret.store.gates import Gate
from turret.store.golden import Golden


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
    return [*gates.of(connection, name, alias), *golden.of(connection, name, alias)]


def of(connection: Connection, name: str, alias: str | None = None) -> list[GateStatus]:
    """The status of all gates of an alias, or of all aliases of a name; raises NotFound for an unknown name."""
    every = gates_of(connection, name, alias)
    holders = {each: _holder(connection, name, each) for each in {gate.alias for gate in every}}
    return [_status_of(connection, gate, holders[gate.alias]) for gate in every]


def _holder(connection: Connection, name: str, alias: str) -> Version | None:
    try:
        return catalog.find(connection, Reference(name, alias=alias))
    except NotFound:
        return None


def _status_of(connection: Connection, gate: Gate | Golden, holder: Version | None) -> GateStatus:
    if holder is None:
        return GateStatus(gate, None, None, f"{gate.alias} names no version yet")
    judged = gates.judged(holder, gate) if isinstance(gate, Gate) else golden.judged(connection, holder, gate)
    return GateStatus(gate, str(holder), *judged)
