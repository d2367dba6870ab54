"""Files that clients sent to a server, and their batches."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def _bytewise(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "client_files",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("owner", _bytewise(200), nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("digest", sa.String(80), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("upload", sa.String(32), nullable=False),
        sa.Column("created", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_client_files"),
    )
    op.create_index("ix_client_files_owner", "client_files", ["owner"])
    op.create_table(
        "batches",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("owner", _bytewise(200), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("input_file", sa.String(40), nullable=False),
        sa.Column("output_file", sa.String(40)),
        sa.Column("error_file", sa.String(40)),
        sa.Column("notes", sa.JSON()),
        sa.Column("error", sa.Text()),
        sa.Column("created", sa.Integer(), nullable=False),
        sa.Column("times", sa.JSON(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("done", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(32)),
        sa.Column("until", sa.Float()),
        sa.PrimaryKeyConstraint("id", name="pk_batches"),
    )
    op.create_index("ix_batches_owner", "batches", ["owner"])
    op.create_index("ix_batches_state", "batches", ["state"])
    op.create_table(
        "batch_parts",
        sa.Column("batch", sa.String(40), nullable=False),
        sa.Column("first", sa.Integer(), nullable=False),
        sa.Column("answers", sa.Text(), nullable=False),
        sa.Column("errors", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("batch", "first", name="pk_batch_parts"),
    )
