"""What can be drawn of the examples that a promise's threshold was chosen on."""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"


def upgrade() -> None:
    op.add_column("promises", sa.Column("sureness", sa.JSON()))
