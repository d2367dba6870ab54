"""The oldest schema that is read. Nothing is done to reach it.

A catalog is never older, and a new one is made from the tables of `turret.database`, in the newest schema.
"""

revision = "0012"
down_revision = None


def upgrade() -> None:
    """Do nothing: no catalog is before this schema."""
