"""The conditions that limit a query to what its connection's `Access` sees.

Every query that finds an adapter by name, or lists adapters, versions, experiments, answers or runs has one of them. A
name of another tenant is therefore missed by the same query as a name that nobody has, in the same time.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from sqlalchemy import ColumnElement, Connection, and_, func, or_, select, true

from turret.access import Access
from turret.database import ACCESS, TRAINING, adapters, experiments, jobs, versions

KEPT = 1024  # accesses whose conditions are kept


def access_of(connection: Connection) -> Access:
    """The access of a connection. Raises KeyError for a connection that `Database` did not give out."""
    found: Access = connection.get_execution_options()[ACCESS]
    return found


def see_as(connection: Connection, access: Access) -> None:
    """Limit the rest of a transaction further, to one access of the same tenant."""
    if access.tenant != access_of(connection).tenant:
        raise ValueError(f"a transaction of tenant {access_of(connection).tenant} cannot become {access.tenant}'s")
    connection.execution_options(**{ACCESS: access})


def seen_adapters(connection: Connection) -> ColumnElement[bool]:
    """Rows of `adapters` that may be seen."""
    return _adapters(access_of(connection))


def seen_versions(connection: Connection) -> ColumnElement[bool]:
    """Rows of `versions` on a base that may be used. The query must also limit `adapters`."""
    return _versions(access_of(connection))


# Building a condition takes longer than finding a row, and an access never changes.
@lru_cache(KEPT)
def _adapters(access: Access) -> ColumnElement[bool]:
    seen = and_(adapters.c.tenant == access.tenant, _like(adapters.c.name, access.adapters))
    if "*" not in access.bases:
        on_base = select(versions.c.id).where(versions.c.adapter_id == adapters.c.id, _versions(access))
        seen &= on_base.correlate(adapters).exists()
    return seen


@lru_cache(KEPT)
def _versions(access: Access) -> ColumnElement[bool]:
    return _like(versions.c.manifest[("base", "id")].as_string(), access.bases)


def seen_experiments(connection: Connection) -> ColumnElement[bool]:
    """Rows of `experiments` of adapters that may be seen, for a query without `adapters`."""
    own = select(experiments.c.id).join(adapters, experiments.c.adapter_id == adapters.c.id)
    return experiments.c.id.in_(own.where(seen_adapters(connection)))


def seen_runs(connection: Connection, kind: str = TRAINING) -> ColumnElement[bool]:
    """Trainings that may be seen, by the name that they train; with limited bases only if that has a version.

    Args:
        kind: of jobs; studies are seen by the same rule.
    """
    access = access_of(connection)
    own = and_(jobs.c.kind == kind, jobs.c.tenant == access.tenant, _like(jobs.c.name, access.adapters))
    if "*" in access.bases:
        return own
    return own & jobs.c.name.in_(select(adapters.c.name).where(seen_adapters(connection)))


def _like(column: ColumnElement[str], patterns: Iterable[str]) -> ColumnElement[bool]:
    """The column equals a pattern, or starts with one that ends in `*`, byte by byte."""
    if "*" in patterns:
        return true()
    starts = [each[:-1] for each in patterns if each.endswith("*")]
    names = [each for each in patterns if not each.endswith("*")]
    return or_(column.in_(names), *(func.substr(column, 1, len(each)) == each for each in starts))
