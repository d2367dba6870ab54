"""One table of jobs instead of runs, queue and the claims of batches, and one lease for all of them."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"

QUEUED = ("queued", "priority", "tries", "due", "cancelled", "who", "recipe", "beside")
ENDED = "('completed', 'failed', 'cancelled', 'expired')"


def upgrade() -> None:
    op.rename_table("runs", "jobs")
    op.drop_index("ix_runs_recipe_digest", "jobs")
    op.create_index("ix_jobs_recipe_digest", "jobs", ["recipe_digest"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE jobs RENAME CONSTRAINT pk_runs TO pk_jobs")
    for column in (
        sa.Column("kind", sa.String(16), nullable=False, server_default="training"),
        sa.Column("owner", _bytewise(200), nullable=False, server_default=""),
        sa.Column("queued", sa.String(32)),
        sa.Column("priority", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("tries", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("due", sa.Float(), nullable=False, server_default="0"),
        sa.Column("cancelled", sa.String(32)),
        sa.Column("who", sa.String(100)),
        sa.Column("recipe", sa.Text()),
        sa.Column("spec", sa.JSON()),
        sa.Column("beside", sa.Boolean(), nullable=False, server_default=sa.false()),
    ):
        op.add_column("jobs", column)
    op.create_index("ix_jobs_state_kind", "jobs", ["state", "kind"])
    op.create_table(
        "job_turns",
        sa.Column("name", _bytewise(300), primary_key=True),
        sa.Column("turn", sa.BigInteger(), nullable=False),
    )
    _move_queue()
    _move_batches()
    op.add_column("leases", sa.Column("seconds", sa.Float(), nullable=False, server_default="30"))
    op.execute("UPDATE leases SET name = 'jobs/' || substr(name, 6) WHERE name LIKE 'runs/%'")


def _move_queue() -> None:
    of_run = ", ".join(f"{name} = (SELECT {name} FROM queue WHERE queue.run = jobs.id)" for name in QUEUED)
    op.execute(f"UPDATE jobs SET {of_run} WHERE id IN (SELECT run FROM queue)")
    last = "SELECT tenant, max(started) AS at FROM queue WHERE started IS NOT NULL GROUP BY tenant"
    op.execute(
        "INSERT INTO job_turns (name, turn) SELECT 'work tenant ' || tenant, row_number() OVER (ORDER BY at, tenant) "
        f"FROM ({last}) AS last"
    )
    op.drop_table("queue")


def _move_batches() -> None:
    """A batch that a server works on goes on when its lease ends, which nobody has."""
    tenant = "CASE WHEN owner LIKE '%/%' THEN substr(owner, 7, {slash} - 7) ELSE 'default' END"
    sqlite = op.get_bind().dialect.name == "sqlite"
    tenant = tenant.format(slash="instr(owner, '/')" if sqlite else "strpos(owner, '/')")
    state = (
        "CASE WHEN state IN ('completed', 'expired') THEN 'finished' WHEN state IN ('failed', 'cancelled') THEN state "
        "WHEN worker IS NULL THEN 'waiting' ELSE 'running' END"
    )
    moment = "strftime('%Y-%m-%dT%H:%M:%S.000Z', created, 'unixepoch')"
    if not sqlite:
        moment = "to_char(to_timestamp(created) AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.000\"Z\"')"
    op.execute(
        "INSERT INTO jobs (id, kind, tenant, owner, name, state, recipe_digest, data_digest, created, queued, due) "
        f"SELECT id, 'batch', {tenant}, owner, '', {state}, '', '', {moment}, {moment}, coalesce(due, 0) FROM batches"
    )
    op.execute("UPDATE jobs SET cancelled = created WHERE id IN (SELECT id FROM batches WHERE state = 'cancelling')")
    op.execute("INSERT INTO job_turns (name, turn) SELECT 'batch ' || name, turn FROM batch_turns")
    op.drop_table("batch_turns")
    with op.batch_alter_table("batches") as batches:
        for name in ("worker", "until", "due"):
            batches.drop_column(name)


def _bytewise(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
