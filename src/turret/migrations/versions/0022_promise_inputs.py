"""Embeddings of the examples of promises and of live texts, to notice that texts have changed."""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"


def upgrade() -> None:
    op.create_table(
        "promise_watches",
        sa.Column("promise_id", sa.Integer(), sa.ForeignKey("promises.id"), autoincrement=False, primary_key=True),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in ("size", "examples", "round", "earlier")),
        sa.Column("drifted", sa.String(32)),
        sa.Column("evidence", sa.Float()),
    )
    op.create_table(
        "promise_inputs",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("promise_id", sa.Integer(), sa.ForeignKey("promises.id"), nullable=False, index=True),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
    )
