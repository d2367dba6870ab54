"""Tenants: adapters, tokens, runs and replays have an owner. What there is belongs to `default`."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def bytewise(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def tenant() -> sa.Column[str]:
    return sa.Column("tenant", bytewise(64), nullable=False, server_default="default")


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        _rebuild_adapters()
    else:
        op.add_column("adapters", tenant())
        op.drop_constraint("uq_adapters_name", "adapters", type_="unique")
        op.create_unique_constraint("uq_adapters_tenant_name", "adapters", ["tenant", "name"])
    with op.batch_alter_table("tokens") as tokens:
        tokens.add_column(tenant())
        for name, kind in (
            ("adapters", sa.JSON()),
            ("bases", sa.JSON()),
            ("expires", sa.String(32)),
            ("former_hash", sa.String(80)),
            ("former_until", sa.String(32)),
        ):
            tokens.add_column(sa.Column(name, kind))
        tokens.drop_constraint("uq_tokens_name", type_="unique")
        tokens.create_unique_constraint("uq_tokens_tenant_name", ["tenant", "name"])
    op.add_column("runs", tenant())
    op.add_column("replays", tenant())


def _rebuild_adapters() -> None:
    """SQLite cannot drop a constraint. Other tables refer to this one, so their check waits for the commit."""
    op.execute("PRAGMA defer_foreign_keys = ON")
    op.execute("CREATE TEMPORARY TABLE former_adapters AS SELECT * FROM adapters")
    op.drop_table("adapters")
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer(), nullable=False),
        tenant(),
        sa.Column("name", bytewise(100), nullable=False),
        sa.Column("last_number", sa.Integer(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_adapters"),
        sa.UniqueConstraint("tenant", "name", name="uq_adapters_tenant_name"),
    )
    op.execute(
        "INSERT INTO adapters (id, name, last_number, created)"
        " SELECT id, name, last_number, created FROM former_adapters"
    )
    op.execute("DROP TABLE former_adapters")
