"""Which alarms were delivered, by the row of the audit log that they tell of."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"


def upgrade() -> None:
    op.create_table(
        "alarms",
        sa.Column("audit_id", sa.Integer(), sa.ForeignKey("audit.id"), autoincrement=False, primary_key=True),
        sa.Column("sent", sa.String(32), nullable=False),
    )
