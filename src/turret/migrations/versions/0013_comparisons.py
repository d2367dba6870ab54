"""Which comparison trained a version, so that a plain name never means it.

A folder store has the results of its comparisons next to the catalog, with the run of each training. A version that
such a run made, and that no alias ever named, belongs to the comparison. Other catalogs cannot tell; there, the
versions of earlier comparisons stay versions of their own.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.add_column("versions", sa.Column("comparison", sa.String(255)))
    connection = op.get_bind()
    if connection.dialect.name != "sqlite":
        return
    file = next(row.file for row in connection.exec_driver_sql("PRAGMA database_list") if row.name == "main")
    mark = sa.text(
        "UPDATE versions SET comparison = :comparison WHERE run = :run AND id NOT IN "
        "(SELECT version_id FROM alias_history WHERE version_id IS NOT NULL)"
    )
    for comparison, run in _trained(Path(file).parent) if file else ():
        connection.execute(mark, {"comparison": comparison, "run": run})


def _trained(root: Path) -> Iterator[tuple[str, str]]:
    """The comparison and the run of every training that a comparison or control study in a folder store has kept."""
    for home in (root, *(root / "tenants").glob("*")):
        for kind in ("comparisons", "controls"):
            for path in (home / kind).glob("*/cells/*/result.json"):
                try:
                    run = json.loads(path.read_text(encoding="utf-8"))["run"]
                except (OSError, ValueError, KeyError, TypeError):  # damaged, or of the base, which has no run
                    continue
                if isinstance(run, str):
                    yield f"{kind}/{path.parents[2].name}", run
