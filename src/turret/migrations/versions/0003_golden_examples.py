"""Golden examples and their replays, and the user of a stored version and of a moved alias."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("versions", sa.Column("who", sa.String(100)))
    op.add_column("alias_history", sa.Column("who", sa.String(100)))
    op.create_table(
        "golden_sets",
        sa.Column("digest", sa.String(80), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("examples", sa.Integer(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_golden_sets"),
    )
    op.create_table(
        "golden_gates",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("alias", sa.String(32).with_variant(sa.String(32, collation="C"), "postgresql"), nullable=False),
        sa.Column("golden", sa.String(80), nullable=False),
        sa.Column("share", sa.Float(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id", "alias", "golden", name="pk_golden_gates"),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_golden_gates_adapter_id"),
        sa.ForeignKeyConstraint(["golden"], ["golden_sets.digest"], name="fk_golden_gates_golden"),
    )
    op.create_table(
        "replays",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(80), nullable=False),
        sa.Column("golden", sa.String(80), nullable=False),
        sa.Column("passed", sa.Integer(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("first", sa.JSON()),
        sa.Column("replayed", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_replays"),
        sa.ForeignKeyConstraint(["golden"], ["golden_sets.digest"], name="fk_replays_golden"),
    )
    op.create_index("ix_replays_version", "replays", ["version"])
