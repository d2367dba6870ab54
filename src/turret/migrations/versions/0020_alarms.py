"""Which alarms were delivered, by the row of the audit log that they tell of."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    op.create_table(
        "alarms",
        sa.Column("audit_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("sent", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(["audit_id"], ["audit.id"], name="fk_alarms_audit_id"),
        sa.PrimaryKeyConstraint("audit_id", name="pk_alarms"),
    )
