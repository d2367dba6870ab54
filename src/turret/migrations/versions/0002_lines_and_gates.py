"""Columns of the alias history for rollbacks, and the table of gates."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("alias_history", sa.Column("number", sa.Integer()))
    op.add_column("alias_history", sa.Column("verb", sa.String(16)))
    op.add_column("alias_history", sa.Column("before", sa.Integer()))
    op.execute(
        "UPDATE alias_history SET verb = 'promote',"
        " number = (SELECT versions.number FROM versions WHERE versions.id = alias_history.version_id),"
        " before = (SELECT max(earlier.id) FROM alias_history AS earlier WHERE earlier.id < alias_history.id"
        " AND earlier.adapter_id = alias_history.adapter_id AND earlier.alias = alias_history.alias)"
    )
    op.create_table(
        "gates",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("alias", sa.String(32).with_variant(sa.String(32, collation="C"), "postgresql"), nullable=False),
        sa.Column("split", sa.String(100), nullable=False),
        sa.Column("metric", sa.String(200), nullable=False),
        sa.Column("relation", sa.String(2), nullable=False),
        sa.Column("threshold", sa.Float(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("adapter_id", "alias", "split", "metric", "relation", name="pk_gates"),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_gates_adapter_id"),
    )
