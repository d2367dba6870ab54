"""Alembic's entry: brings the connection it is given to the newest schema, inside the transaction it is given."""

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
