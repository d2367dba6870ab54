"""Run by Alembic: migrates the given connection to the newest schema, inside the caller's transaction."""

from alembic import context

from turret.database import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
