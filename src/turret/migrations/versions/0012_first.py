"""The schema as it was when 0.1.0 was prepared: adapters and versions, runs, experiments, tenants, the queue."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = None


def bytewise(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("tenant", bytewise(64), server_default="default", nullable=False),
        sa.Column("name", bytewise(100), nullable=False),
        sa.Column("last_number", sa.Integer(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.UniqueConstraint("tenant", "name"),
    )
    op.create_table(
        "artifacts",
        sa.Column("path", bytewise(700), primary_key=True),
        sa.Column("digest", sa.String(80), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("upload", sa.String(32), nullable=False),
        sa.Column("changed", sa.String(32), nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("tenant", bytewise(64), nullable=False, index=True),
        sa.Column("adapter", bytewise(100)),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("who", sa.String(100)),
        sa.Column("verb", sa.String(32), nullable=False),
        sa.Column("what", sa.String(200), nullable=False),
        sa.Column("before", sa.JSON()),
        sa.Column("after", sa.JSON()),
    )
    op.create_table(
        "batch_parts",
        sa.Column("batch", sa.String(40), primary_key=True),
        sa.Column("first", sa.Integer(), primary_key=True),
        sa.Column("answers", sa.Text(), nullable=False),
        sa.Column("errors", sa.Text(), nullable=False),
    )
    op.create_table(
        "batches",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("owner", bytewise(200), nullable=False, index=True),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("input_file", sa.String(40), nullable=False),
        sa.Column("output_file", sa.String(40)),
        sa.Column("error_file", sa.String(40)),
        sa.Column("notes", sa.JSON()),
        sa.Column("error", sa.Text()),
        sa.Column("created", sa.Integer(), nullable=False),
        sa.Column("times", sa.JSON(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("done", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(32)),
        sa.Column("until", sa.Float()),
    )
    op.create_table(
        "budgets",
        sa.Column("name", bytewise(255), primary_key=True),
        sa.Column("unit", sa.String(16), primary_key=True),
        sa.Column("per_minute", sa.Integer(), nullable=False),
        sa.Column("level", sa.Float(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
    )
    op.create_table(
        "client_files",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("owner", bytewise(200), nullable=False, index=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("digest", sa.String(80), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("upload", sa.String(32), nullable=False),
        sa.Column("created", sa.Integer(), nullable=False),
    )
    op.create_table(
        "golden_sets",
        sa.Column("digest", sa.String(80), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("examples", sa.Integer(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
    )
    op.create_table(
        "leases",
        sa.Column("name", bytewise(255), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("process", sa.String(200), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
    )
    op.create_table(
        "queue_limits",
        sa.Column("tenant", bytewise(64), server_default="default", primary_key=True),
        sa.Column("running", sa.Integer()),
        sa.Column("waiting", sa.Integer()),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("recipe_digest", sa.String(80), nullable=False, index=True),
        sa.Column("data_digest", sa.String(80), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("ended", sa.String(32)),
        sa.Column("error", sa.Text()),
        sa.Column("result", sa.JSON()),
        sa.Column("tenant", bytewise(64), server_default="default", nullable=False),
    )
    op.create_table(
        "server_secrets",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("value", sa.String(64), nullable=False),
    )
    op.create_table(
        "sessions",
        sa.Column("hash", sa.String(64), primary_key=True),
        sa.Column("token", sa.String(80), nullable=False),
        sa.Column("ends", sa.Float(), nullable=False),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("tenant", bytewise(64), server_default="default", nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("hash", sa.String(80), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("revoked", sa.String(32)),
        sa.Column("requests_per_minute", sa.Integer()),
        sa.Column("tokens_per_minute", sa.Integer()),
        sa.Column("adapters", sa.JSON()),
        sa.Column("bases", sa.JSON()),
        sa.Column("expires", sa.String(32)),
        sa.Column("former_hash", sa.String(80)),
        sa.Column("former_until", sa.String(32)),
        sa.UniqueConstraint("hash"),
        sa.UniqueConstraint("tenant", "name"),
    )
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("since", sa.String(32), nullable=False),
    )
    op.create_table(
        "usage",
        sa.Column("tenant", bytewise(64), primary_key=True),
        sa.Column("adapter", bytewise(100), primary_key=True),
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("answers", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "experiments",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("alias", sa.String(32), nullable=False),
        sa.Column("salt", sa.String(64), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("arms", sa.JSON(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("who", sa.String(100)),
        sa.Column("ended", sa.String(32)),
        sa.Column("verdict", sa.JSON()),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"]),
        sa.UniqueConstraint("adapter_id", "number"),
    )
    op.create_table(
        "gates",
        sa.Column("adapter_id", sa.Integer(), sa.ForeignKey("adapters.id"), primary_key=True),
        sa.Column("alias", bytewise(32), primary_key=True),
        sa.Column("split", sa.String(100), primary_key=True),
        sa.Column("metric", sa.String(200), primary_key=True),
        sa.Column("relation", sa.String(2), primary_key=True),
        sa.Column("threshold", sa.Float(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
    )
    op.create_table(
        "golden_gates",
        sa.Column("adapter_id", sa.Integer(), sa.ForeignKey("adapters.id"), primary_key=True),
        sa.Column("alias", bytewise(32), primary_key=True),
        sa.Column("golden", sa.String(80), sa.ForeignKey("golden_sets.digest"), primary_key=True),
        sa.Column("share", sa.Float(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
    )
    op.create_table(
        "queue",
        sa.Column("run", sa.String(40), sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("tenant", bytewise(64), server_default="default", nullable=False, index=True),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("queued", sa.String(32), nullable=False),
        sa.Column("started", sa.String(32)),
        sa.Column("due", sa.Float(), nullable=False),
        sa.Column("cancelled", sa.String(32)),
        sa.Column("who", sa.String(100)),
        sa.Column("recipe", sa.Text(), nullable=False),
    )
    op.create_table(
        "replays",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("version", sa.String(80), nullable=False, index=True),
        sa.Column("golden", sa.String(80), sa.ForeignKey("golden_sets.digest"), nullable=False),
        sa.Column("passed", sa.Integer(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("first", sa.JSON()),
        sa.Column("replayed", sa.String(32), nullable=False),
        sa.Column("tenant", bytewise(64), server_default="default", nullable=False),
    )
    op.create_table(
        "run_log",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("run", sa.String(40), sa.ForeignKey("runs.id"), nullable=False, index=True),
        sa.Column("tenant", bytewise(64), server_default="default", nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("line", sa.String(500), nullable=False),
    )
    op.create_table(
        "versions",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(80), nullable=False, index=True),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("run", sa.String(40), index=True),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("manifest", sa.JSON(), nullable=False),
        sa.Column("who", sa.String(100)),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"]),
        sa.UniqueConstraint("adapter_id", "digest"),
        sa.UniqueConstraint("adapter_id", "number"),
    )
    op.create_table(
        "alias_history",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("adapter_id", sa.Integer(), sa.ForeignKey("adapters.id"), nullable=False, index=True),
        sa.Column("alias", bytewise(32), nullable=False),
        sa.Column("version_id", sa.Integer(), sa.ForeignKey("versions.id")),
        sa.Column("moved", sa.String(32), nullable=False),
        sa.Column("number", sa.Integer()),
        sa.Column("verb", sa.String(16)),
        sa.Column("before", sa.Integer()),
        sa.Column("who", sa.String(100)),
    )
    op.create_table(
        "aliases",
        sa.Column("adapter_id", sa.Integer(), sa.ForeignKey("adapters.id"), primary_key=True),
        sa.Column("alias", bytewise(32), primary_key=True),
        sa.Column("version_id", sa.Integer(), sa.ForeignKey("versions.id"), nullable=False, index=True),
        sa.Column("moved", sa.String(32), nullable=False),
    )
    op.create_table(
        "assignments",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("experiment_id", sa.Integer(), sa.ForeignKey("experiments.id"), nullable=False),
        sa.Column("unit", sa.String(32), nullable=False),
        sa.Column("receipt", sa.String(100), unique=True),
        sa.Column("arm", sa.String(16), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("probability", sa.Float(), nullable=False),
        sa.Column("first", sa.Integer(), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
    )
    op.create_index("ix_assignments_experiment_id_unit", "assignments", ["experiment_id", "unit"])
    op.create_table(
        "experiment_events",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("experiment_id", sa.Integer(), sa.ForeignKey("experiments.id"), nullable=False, index=True),
        sa.Column("verb", sa.String(16), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("who", sa.String(100)),
    )
    op.create_table(
        "experiment_health",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("experiment_id", sa.Integer(), sa.ForeignKey("experiments.id"), nullable=False, index=True),
        sa.Column("arm", sa.String(16), nullable=False),
        sa.Column("answers", sa.Integer(), nullable=False),
        sa.Column("errors", sa.Integer(), nullable=False),
        sa.Column("slow", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("compared", sa.Integer(), nullable=False),
        sa.Column("agreed", sa.Integer(), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
    )
    op.create_table(
        "experiment_splits",
        sa.Column("experiment_id", sa.Integer(), sa.ForeignKey("experiments.id"), primary_key=True),
        sa.Column("revision", sa.Integer(), primary_key=True),
        sa.Column("segments", sa.JSON(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
    )
    op.create_table(
        "files",
        sa.Column("version_id", sa.Integer(), sa.ForeignKey("versions.id"), primary_key=True),
        sa.Column("path", bytewise(255), primary_key=True),
        sa.Column("digest", sa.String(80), nullable=False, index=True),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("upload", sa.String(32), nullable=False),
    )
    op.create_table(
        "outcomes",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("assignment_id", sa.Integer(), nullable=False, unique=True),
        sa.Column("experiment_id", sa.Integer(), nullable=False),
        sa.Column("unit", sa.String(32), nullable=False),
        sa.Column("arm", sa.String(16), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("value", sa.Float(), nullable=False),
        sa.Column("counted", sa.Integer(), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(["assignment_id"], ["assignments.id"]),
        sa.ForeignKeyConstraint(["experiment_id"], ["experiments.id"]),
    )
    op.create_index("ix_outcomes_experiment_id_unit", "outcomes", ["experiment_id", "unit"])
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_keeps_{verb.lower()} BEFORE {verb} ON audit"
                " BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
            )
    else:
        op.execute(
            "CREATE FUNCTION turret_audit_keeps() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$"
        )
        op.execute(
            "CREATE TRIGGER audit_keeps BEFORE UPDATE OR DELETE OR TRUNCATE ON audit"
            " FOR EACH STATEMENT EXECUTE FUNCTION turret_audit_keeps()"
        )
