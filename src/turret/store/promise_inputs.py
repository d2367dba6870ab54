"""What is kept to notice that texts have changed: embeddings of the examples of a promise, and of live texts.

`promise_watches` has a row for each promise whose inputs are watched. `promise_inputs` has embeddings as float16
(`turret.experiments.input_drift`), and no text. Round 0 is the held-out examples; a later one is the live texts of that
round, and only the current one is kept. All of it goes when a newer promise replaces this one, or at a gc when no
version with the digest is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    String,
    Table,
    delete,
    func,
    insert,
    select,
    update,
)

from turret.database import metadata
from turret.store.catalog import now

REFERENCE = 0  # the round of the held-out examples
SPARE = 2  # rows of a round for each reference: a text that comes twice is kept twice, and used once

watches = Table(
    "promise_watches",
    metadata,
    Column("promise_id", ForeignKey("promises.id"), primary_key=True, autoincrement=False),
    Column("size", Integer, nullable=False),
    Column("examples", Integer, nullable=False),
    Column("round", Integer, nullable=False),
    Column("earlier", Integer, nullable=False),
    Column("drifted", String(32)),
    Column("evidence", Float),
)
inputs = Table(
    "promise_inputs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("promise_id", ForeignKey("promises.id"), nullable=False, index=True),
    Column("round", Integer, nullable=False),
    Column("vector", LargeBinary, nullable=False),
    Column("at", String(32), nullable=False),
)


@dataclass(frozen=True)
class InputWatch:
    """How far the inputs of a promise were watched.

    Args:
        size: numbers of an embedding.
        examples: held-out examples that live texts are compared with.
        round: the current one, from 1.
        earlier: live texts of the rounds before; of all once they have drifted.
        drifted: when the texts were found to have changed.
        evidence: the e-value then.
    """

    promise_id: int
    size: int
    examples: int
    round: int
    earlier: int
    drifted: str | None
    evidence: float | None


def keep(connection: Connection, promise_id: int, vectors: Sequence[bytes]) -> None:
    """Begin to watch the inputs of a new promise. vectors: of its examples; none: its inputs are not watched."""
    if not vectors:
        return
    row = {"promise_id": promise_id, "size": len(vectors[0]) // 2, "examples": len(vectors), "round": 1, "earlier": 0}
    connection.execute(insert(watches).values(row))
    _add(connection, promise_id, REFERENCE, vectors)


def watch_of(connection: Connection, promise_id: int) -> InputWatch | None:
    """How far the inputs of a promise were watched; None if they are not."""
    query = select(*(watches.c[each.name] for each in fields(InputWatch))).where(watches.c.promise_id == promise_id)
    row = connection.execute(query).first()
    return None if row is None else InputWatch(**row._mapping)


def vectors_of(connection: Connection, watch: InputWatch, number: int, after: int = 0) -> list[tuple[int, bytes]]:
    """Id and embedding of each text of a round, in the order in which they came.

    Args:
        number: of the round.
        after: only those with a larger id.
    """
    query = select(inputs.c.id, inputs.c.vector).where(_of(watch.promise_id, number), inputs.c.id > after)
    return [(row.id, bytes(row.vector)) for row in connection.execute(query.order_by(inputs.c.id))]


def add(connection: Connection, promise_id: int, vector: bytes) -> bool:
    """Add a live text to the current round; False if the promise is watched no more, or the round is full."""
    watch = watch_of(connection, promise_id)
    if watch is None or watch.drifted is not None or len(vector) != 2 * watch.size:
        return False
    if rows_of(connection, watch) >= SPARE * watch.examples:
        return False
    _add(connection, promise_id, watch.round, [vector])
    return True


def rows_of(connection: Connection, watch: InputWatch) -> int:
    """How many live texts of the current round are kept."""
    query = select(func.count()).select_from(inputs).where(_of(watch.promise_id, watch.round))
    return int(connection.execute(query).scalar_one())


def begin_round(connection: Connection, watch: InputWatch, texts: int) -> None:
    """Go on to the next round, unless another process has. texts: that this round has used."""
    values = {"round": watch.round + 1, "earlier": watch.earlier + texts}
    if connection.execute(update(watches).where(_same(watch)).values(values)).rowcount:
        connection.execute(delete(inputs).where(_of(watch.promise_id, watch.round)))


def mark_drifted(connection: Connection, watch: InputWatch, evidence: float, texts: int) -> bool:
    """Record once that the texts have changed; False if it was recorded already, or the promise was replaced.

    The embeddings are not needed any more.

    Args:
        texts: live ones that were compared, in all rounds.
    """
    values = {"drifted": now(), "evidence": evidence, "earlier": texts}
    if not connection.execute(update(watches).where(_same(watch)).values(values)).rowcount:
        return False
    connection.execute(delete(inputs).where(inputs.c.promise_id == watch.promise_id))
    return True


def forget(connection: Connection, promise_ids: Sequence[int]) -> int:
    """Remove all that is kept for these promises. Returns the bytes of the embeddings."""
    size = sum(bytes_of(connection, each) for each in promise_ids)
    for table in (inputs, watches):
        connection.execute(delete(table).where(table.c.promise_id.in_(promise_ids)))
    return size


def bytes_of(connection: Connection, promise_id: int) -> int:
    """Bytes of the embeddings of a promise."""
    size = select(func.sum(func.length(inputs.c.vector))).where(inputs.c.promise_id == promise_id)
    return int(connection.execute(size).scalar() or 0)


def _add(connection: Connection, promise_id: int, number: int, vectors: Sequence[bytes]) -> None:
    row = {"promise_id": promise_id, "round": number, "at": now()}
    connection.execute(insert(inputs), [row | {"vector": each} for each in vectors])


def _of(promise_id: int, number: int) -> ColumnElement[bool]:
    return (inputs.c.promise_id == promise_id) & (inputs.c.round == number)


def _same(watch: InputWatch) -> ColumnElement[bool]:
    mine = (watches.c.promise_id == watch.promise_id) & (watches.c.round == watch.round)
    return mine & watches.c.drifted.is_(None)
