"""Makes the catalogs of new stores in a test session by the statements that the first one took.

That takes a tenth of a second of processor time for each new store, a fifth of the whole time of many tests.
Only a new store is made so: an older one is migrated as ever. `tests/test_database.py` makes catalogs as users do, and
holds the result of both to be the same.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, event

from turret import database

READS = ("SELECT", "PRAGMA", "SHOW")  # statements that make nothing


class RecordedMigrations:
    """Stands for `turret.database._migrate` in tests.

    Attributes:
        run: makes or migrates the catalog.
    """

    def __init__(self) -> None:
        self.run = database._migrate
        self._statements: dict[str, list[tuple[str, Any]]] = {}  # dialect -> statements and their parameters

    def __call__(self, connection: Connection) -> None:
        dialect = connection.dialect.name
        if database._schema_of(connection) is not None:
            self.run(connection)
        elif dialect in self._statements:
            self._repeat(connection, self._statements[dialect])
        else:
            self._statements[dialect] = self._recorded(connection)

    def _recorded(self, connection: Connection) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []

        def seen(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
            if not statement.lstrip().startswith(READS):
                found.append((statement, parameters))

        event.listen(connection, "before_cursor_execute", seen)
        try:
            self.run(connection)
        finally:
            event.remove(connection, "before_cursor_execute", seen)
        return found

    @staticmethod
    def _repeat(connection: Connection, statements: list[tuple[str, Any]]) -> None:
        if connection.dialect.name == "postgresql" and not any(parameters for _, parameters in statements):
            together = ";\n".join(statement for statement, _ in statements)
            connection.connection.cursor().execute(together)  # in one message
            return
        for statement, parameters in statements:
            connection.exec_driver_sql(statement, parameters or None)
