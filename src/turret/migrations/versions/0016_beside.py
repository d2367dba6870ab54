"""Whether the process of a queued run trains others too."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    with op.batch_alter_table("queue") as queue:
        queue.add_column(sa.Column("beside", sa.Boolean(), nullable=False, server_default=sa.false()))
