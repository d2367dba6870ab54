"""Panels: named, versioned lists of questions, each answered by an adapter."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"


def upgrade() -> None:
    op.create_table(
        "panels",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("tenant", _bytewise(64), nullable=False, server_default="default"),
        sa.Column("name", _bytewise(100), nullable=False),
        sa.Column("last_number", sa.Integer(), nullable=False),
        sa.Column("production", sa.Integer()),
        sa.Column("created", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_panels"),
        sa.UniqueConstraint("tenant", "name", name="uq_panels_tenant_name"),
    )
    op.create_table(
        "panel_versions",
        sa.Column("panel_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("questions", sa.JSON(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("who", sa.String(100)),
        sa.ForeignKeyConstraint(["panel_id"], ["panels.id"], name="fk_panel_versions_panel_id"),
        sa.PrimaryKeyConstraint("panel_id", "number", name="pk_panel_versions"),
    )
    op.create_table(
        "panel_moves",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("panel_id", sa.Integer(), nullable=False),
        sa.Column("verb", sa.String(16), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("before", sa.Integer()),
        sa.Column("moved", sa.String(32), nullable=False),
        sa.Column("who", sa.String(100)),
        sa.ForeignKeyConstraint(["panel_id"], ["panels.id"], name="fk_panel_moves_panel_id"),
        sa.PrimaryKeyConstraint("id", name="pk_panel_moves"),
    )
    op.create_index("ix_panel_moves_panel_id", "panel_moves", ["panel_id"])


def _bytewise(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
