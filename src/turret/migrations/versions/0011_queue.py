"""The queue of trainings: its rows, the limits of tenants, and the logs of runs."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.create_table(
        "queue",
        sa.Column("run", sa.String(40), nullable=False),
        sa.Column("tenant", _bytewise(64), nullable=False, server_default="default"),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("queued", sa.String(32), nullable=False),
        sa.Column("started", sa.String(32)),
        sa.Column("due", sa.Float(), nullable=False),
        sa.Column("cancelled", sa.String(32)),
        sa.Column("who", sa.String(100)),
        sa.Column("recipe", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("run", name="pk_queue"),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name="fk_queue_run"),
    )
    op.create_index("ix_queue_tenant", "queue", ["tenant"])
    op.create_table(
        "queue_limits",
        sa.Column("tenant", _bytewise(64), nullable=False, server_default="default"),
        sa.Column("running", sa.Integer()),
        sa.Column("waiting", sa.Integer()),
        sa.PrimaryKeyConstraint("tenant", name="pk_queue_limits"),
    )
    op.create_table(
        "run_log",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run", sa.String(40), nullable=False),
        sa.Column("tenant", _bytewise(64), nullable=False, server_default="default"),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("line", sa.String(500), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_run_log"),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name="fk_run_log_run"),
    )
    op.create_index("ix_run_log_run", "run_log", ["run"])


def _bytewise(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
