"""The tables of `turret.store.client_files` and `turret.store.batches`."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, Connection, Integer, String, Table, Text, select

from turret.access import DEFAULT
from turret.database import bytewise, metadata

client_files = Table(
    "client_files",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", bytewise(200), nullable=False, index=True),
    Column("name", String(255), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("digest", String(80), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("upload", String(32), nullable=False),
    Column("created", Integer, nullable=False),
)
batches = Table(
    "batches",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("owner", bytewise(200), nullable=False, index=True),
    Column("state", String(16), nullable=False, index=True),
    Column("endpoint", String(64), nullable=False),
    Column("input_file", String(40), nullable=False),
    Column("output_file", String(40)),
    Column("error_file", String(40)),
    Column("notes", JSON),
    Column("error", Text),
    Column("created", Integer, nullable=False),
    Column("times", JSON, nullable=False),
    Column("total", Integer, nullable=False),
    Column("done", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("taken", Integer, nullable=False, server_default="0"),
    Column("unanswered", JSON, nullable=False, server_default="{}"),
    Column("asking", JSON, nullable=False, server_default="[]"),
    Column("bytes", BigInteger, nullable=False, server_default="0"),
)
batch_parts = Table(
    "batch_parts",
    metadata,
    Column("batch", String(40), primary_key=True),
    Column("first", Integer, primary_key=True),
    Column("answers", Text, nullable=False),
    Column("errors", Text, nullable=False),
)
ENDED = ("completed", "failed", "cancelled", "expired")  # states of a batch


def tenant_of(owner: str) -> str | None:
    """The tenant of an owner of files and batches; None on a server without tokens."""
    tenant, slash, _ = owner.removeprefix("token ").partition("/")
    return tenant if slash else DEFAULT if owner else None


def used(connection: Connection) -> set[tuple[str, str]]:
    """Digest and upload of every content that is in use."""
    rows = connection.execute(select(client_files.c.digest, client_files.c.upload))
    return {(row.digest, row.upload) for row in rows}
