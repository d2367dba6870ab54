"""Batches keep each line by itself and take turns; what servers add to sums is counted once."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    for column in (
        sa.Column("taken", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("unanswered", sa.JSON(), nullable=False, server_default="{}"),
        sa.Column("asking", sa.JSON(), nullable=False, server_default="[]"),
        sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("due", sa.Float()),
    ):
        op.add_column("batches", column)
    op.execute("UPDATE batches SET taken = done")  # lines were answered in their order
    op.create_table(
        "batch_turns",
        sa.Column("name", _bytewise(200), primary_key=True),
        sa.Column("turn", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "flushes",
        sa.Column("writer", sa.String(40), primary_key=True),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
    )


def _bytewise(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
