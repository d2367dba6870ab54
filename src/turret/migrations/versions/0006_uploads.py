"""Uploads: the copy of each content that versions list, and the puts that are writing files."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    with op.batch_alter_table("files") as files:
        files.add_column(sa.Column("upload", sa.String(32), nullable=False, server_default=""))
    # Without a default, a process of format 0005 fails when it lists files, since it does not set `upload`.
    with op.batch_alter_table("files") as files:
        files.alter_column("upload", existing_type=sa.String(32), existing_nullable=False, server_default=None)
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("since", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_uploads"),
    )
