"""Panels: named, versioned lists of questions, each answered by an adapter."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"


def upgrade() -> None:
    op.create_table(
        "panels",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("tenant", _bytewise(64), nullable=False, server_default="default"),
        sa.Column("name", _bytewise(100), nullable=False),
        sa.Column("last_number", sa.Integer(), nullable=False),
        sa.Column("production", sa.Integer()),
        sa.Column("created", sa.String(32), nullable=False),
        sa.UniqueConstraint("tenant", "name"),
    )
    op.create_table(
        "panel_versions",
        sa.Column("panel_id", sa.Integer(), sa.ForeignKey("panels.id"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True),
        sa.Column("questions", sa.JSON(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("who", sa.String(100)),
    )
    op.create_table(
        "panel_moves",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("panel_id", sa.Integer(), sa.ForeignKey("panels.id"), nullable=False, index=True),
        sa.Column("verb", sa.String(16), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("before", sa.Integer()),
        sa.Column("moved", sa.String(32), nullable=False),
        sa.Column("who", sa.String(100)),
    )


def _bytewise(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
