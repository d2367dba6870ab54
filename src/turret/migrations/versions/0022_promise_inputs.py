"""Embeddings of the examples of promises and of live texts, to notice that texts have changed."""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"


def upgrade() -> None:
    op.create_table(
        "promise_watches",
        sa.Column("promise_id", sa.Integer(), autoincrement=False, nullable=False),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in ("size", "examples", "round", "earlier")),
        sa.Column("drifted", sa.String(32)),
        sa.Column("evidence", sa.Float()),
        sa.ForeignKeyConstraint(["promise_id"], ["promises.id"], name="fk_promise_watches_promise_id"),
        sa.PrimaryKeyConstraint("promise_id", name="pk_promise_watches"),
    )
    op.create_table(
        "promise_inputs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("promise_id", sa.Integer(), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_promise_inputs"),
        sa.ForeignKeyConstraint(["promise_id"], ["promises.id"], name="fk_promise_inputs_promise_id"),
    )
    op.create_index("ix_promise_inputs_promise_id", "promise_inputs", ["promise_id"])
