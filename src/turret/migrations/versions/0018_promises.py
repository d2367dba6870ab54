"""Promises about the errors of versions, the answers they cover, and the outcomes of these."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    op.create_table(
        "promises",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("tenant", _bytewise(64), nullable=False),
        sa.Column("digest", sa.String(80), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        *(sa.Column(name, sa.Float(), nullable=False) for name in ("error", "confidence", "threshold")),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in ("examples", "counted", "wrong", "decided")),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("split", sa.String(100), nullable=False),
        sa.Column("data_digest", sa.String(80), nullable=False),
        sa.Column("when_broken", sa.String(16), nullable=False),
        *(sa.Column(name, sa.Float(), nullable=False) for name in ("outcome_ttl", "missing_bound")),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("who", sa.String(100)),
        sa.Column("broken", sa.String(32)),
        sa.Column("verdict", sa.JSON()),
    )
    op.create_index("ix_promises_tenant_digest", "promises", ["tenant", "digest"])
    op.create_table(
        "promise_answers",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("promise_id", sa.Integer(), sa.ForeignKey("promises.id"), nullable=False, index=True),
        sa.Column("receipt", sa.String(120), nullable=False, unique=True),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("probability", sa.Float(), nullable=False),
        sa.Column("decided", sa.Integer(), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
    )
    op.create_table(
        "promise_outcomes",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("promise_id", sa.Integer(), nullable=False, index=True),
        sa.Column("answer_id", sa.Integer(), nullable=False, unique=True),
        sa.Column("wrong", sa.Integer(), nullable=False),
        sa.Column("right_label", sa.Text()),
        sa.Column("at", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(["promise_id"], ["promises.id"]),
        sa.ForeignKeyConstraint(["answer_id"], ["promise_answers.id"]),
    )


def _bytewise(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
