"""Whether a person may sign in by a token."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    with op.batch_alter_table("tokens") as tokens:
        tokens.add_column(sa.Column("sign_in", sa.Boolean(), nullable=False, server_default=sa.true()))
