"""The table of the files that the store keeps beside its versions. See `turret.store.artifacts`."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Connection, String, Table, select

from turret.database import bytewise, metadata

artifacts = Table(
    "artifacts",
    metadata,
    Column("path", bytewise(700), primary_key=True),
    Column("digest", String(80), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("upload", String(32), nullable=False),
    Column("changed", String(32), nullable=False),
)


def used(connection: Connection) -> set[tuple[str, str]]:
    """Digest and upload of every content that is in use."""
    rows = connection.execute(select(artifacts.c.digest, artifacts.c.upload))
    return {(row.digest, row.upload) for row in rows}
