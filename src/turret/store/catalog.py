"""Rows of names, versions and their files: add, find, list and remove versions."""

from __future__ import annotations

import getpass
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, Text, cast, delete, func, insert, or_, select, update

from turret import audit
from turret.access import acting_name
from turret.amounts import size
from turret.database import (
    access_of,
    adapters,
    aliases,
    experiments,
    files,
    insert_row,
    seen_adapters,
    seen_versions,
    tokens,
    versions,
)
from turret.errors import Corrupt, NotFound
from turret.json_types import JsonObject, JsonValue, Plain, mapping_of
from turret.manifest import BaseSpec, Lineage, Manifest, MethodSpec, base_in, lineage_in, method_in, task_in
from turret.notebook import as_html, metrics_table
from turret.postgres import plain_text
from turret.reference import Reference
from turret.store.blobs import Blob
from turret.tasks.shapes import Metrics, SplitMetrics, TaskSpec
from turret.timestamp import timestamp, to_minute

PRODUCTION = "production"  # the alias that a plain name means, if it exists
NO_VERSION = "no version left"


@dataclass(frozen=True)
class Version:
    """One stored adapter. It never changes, except for its `aliases`."""

    name: str
    number: int
    digest: str
    created: str  # ISO 8601, UTC
    run: str | None  # the id of the training that made it
    bytes: int
    metrics: SplitMetrics
    manifest: Manifest = field(repr=False)
    aliases: tuple[str, ...] = ()
    who: str | None = None  # the user that stored it
    comparison: str | None = None  # the folder of the comparison that trained it; then a plain name never means it

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    @property
    def reference(self) -> Reference:
        """The reference to exactly this version, `name@number`."""
        return Reference(self.name, version=self.number)

    @property
    def base(self) -> BaseSpec:
        """What the manifest says of the base."""
        return base_in(self.manifest)

    @property
    def method(self) -> MethodSpec:
        """What the manifest says of the method."""
        return method_in(self.manifest)

    @property
    def task(self) -> TaskSpec:
        """What the manifest says of the task."""
        return task_in(self.manifest)

    @property
    def lineage(self) -> Lineage:
        """What the manifest says of the weights' origin."""
        return lineage_in(self.manifest)

    def _repr_html_(self) -> str:
        facts = {
            "base": str(self.base.get("id")),
            "method": str(self.method.get("kind")),
            "task": str(self.task.get("kind")),
        }
        more = {"stored": to_minute(self.created), "size": size(self.bytes), "aliases": ", ".join(self.aliases)}
        return as_html(str(self), facts | more, metrics_table(self.metrics))

    def as_json(self) -> JsonObject:
        """The version as `turret list --json` prints it."""
        return {
            "version": str(self),
            "digest": self.digest,
            "created": self.created,
            "who": self.who,
            "aliases": list(self.aliases),
            "base": self.base.get("id"),
            "method": self.method.get("kind"),
            "task": self.task.get("kind"),
            "metrics": dict(self.metrics),
            "bytes": self.bytes,
            "run": self.run,
            "comparison": self.comparison,
        }


@dataclass(frozen=True)
class Compared:
    """Versions of one name that one comparison trained and that no alias names: one line of a list."""

    name: str
    comparison: str  # its folder in the store
    versions: tuple[Version, ...]  # by number, at least one

    def __str__(self) -> str:
        first, last = self.versions[0].number, self.versions[-1].number
        return f"{self.name}@{first}" if first == last else f"{self.name}@{first} to @{last}"

    @property
    def bytes(self) -> int:
        return sum(version.bytes for version in self.versions)

    @property
    def created(self) -> str:
        """When its newest version was stored."""
        return self.versions[-1].created

    @property
    def methods(self) -> tuple[str, ...]:
        """The kinds of its methods, sorted."""
        return tuple(sorted({str(version.method.get("kind")) for version in self.versions}))

    def as_json(self) -> JsonObject:
        return {
            "name": self.name,
            "comparison": self.comparison,
            "first": str(self.versions[0]),
            "last": str(self.versions[-1]),
            "versions": len(self.versions),
            "methods": list(self.methods),
            "bytes": self.bytes,
            "created": self.created,
        }


def fold_comparisons(versions: Iterable[Version]) -> tuple[list[Version], list[Compared]]:
    """The versions that stand for themselves, and a line for each comparison with all others."""
    own = list[Version]()
    compared = dict[tuple[str, str], list[Version]]()
    for version in versions:
        if version.comparison is None or version.aliases:
            own.append(version)
        else:
            compared.setdefault((version.name, version.comparison), []).append(version)
    return own, [Compared(*key, tuple(those)) for key, those in compared.items()]


@dataclass(frozen=True)
class Deleted:
    """A version that was removed from the catalog."""

    version: str
    digest: str
    aliases: tuple[str, ...]  # aliases that named it, removed with it
    bytes: int  # of its files; the next gc removes those that no other version has

    def as_json(self) -> JsonObject:
        return {**asdict(self), "aliases": list(self.aliases)}


def now() -> str:
    """The time as the catalog stores it: ISO 8601 in UTC, with milliseconds."""
    return timestamp(datetime.now(UTC))


def who() -> str | None:
    """The user of a change: the name in `acting`, else TURRET_USER, else the user name of the system."""
    try:
        name = acting_name() or os.environ.get("TURRET_USER") or getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user without a name, as in a container
        return None
    return "".join(c for c in name if c.isprintable())[:100] or None


def add(
    connection: Connection,
    name: str,
    manifest: Manifest,
    content: Mapping[str, Blob],
    *,
    run: str | None,
    metrics: SplitMetrics,
    comparison: str | None = None,
) -> int:
    """Add a version and return its number; content that is already stored under the name keeps its number.

    Args:
        content: path in the bundle -> its stored copy.
        run: the id of the training that made it.
        metrics: split -> metric -> value.
        comparison: the folder of the comparison that trained it; None makes a version of its own, also of the content
            that a comparison has stored before.
    """
    digest = str(manifest["digest"])
    tenant = access_of(connection).tenant
    own = (adapters.c.tenant == tenant) & (adapters.c.name == name)
    adapter = connection.execute(select(adapters).where(own)).first()
    if adapter is None:
        new: JsonObject = {"tenant": tenant, "name": name, "last_number": 0, "created": now()}
        adapter_id, last = insert_row(connection, adapters, new), 0
    else:
        adapter_id, last = adapter.id, adapter.last_number
    same = (versions.c.adapter_id == adapter_id) & (versions.c.digest == digest)
    if (existing := connection.execute(select(versions).where(same)).first()) is not None:
        if comparison is None:
            make_own(connection, existing.id)
        return int(existing.number)
    row: JsonObject = {
        "adapter_id": adapter_id,
        "number": last + 1,
        "digest": digest,
        "created": now(),
        "run": run,
        "bytes": sum(blob.bytes for blob in content.values()),
        "metrics": plain(metrics),
        "manifest": plain(manifest, plain_text),
        "who": who(),
        "comparison": comparison,
    }
    version_id = insert_row(connection, versions, row)
    rows = [
        {"version_id": version_id, "path": path, "digest": blob.digest, "bytes": blob.bytes, "upload": blob.upload}
        for path, blob in content.items()
    ]
    connection.execute(insert(files), rows)
    connection.execute(update(adapters).where(adapters.c.id == adapter_id).values(last_number=last + 1))
    after = {key: row[key] for key in ("digest", "run", "bytes")}
    audit.record(connection, "put", f"{name}@{last + 1}", name, after=after, at=str(row["created"]), who=who())
    return int(last + 1)


def find(connection: Connection, reference: Reference) -> Version:
    """The version that a reference means now; raises NotFound, which lists what exists."""
    adapter_id = adapter_of(connection, reference.name)
    query = _versions(connection).where(versions.c.adapter_id == adapter_id)
    if reference.version is not None:
        query = query.where(versions.c.number == reference.version)
    else:
        version_id = pointed_at(connection, adapter_id, reference.alias or PRODUCTION, seen=True)
        if version_id is None and reference.alias is None:
            query = query.where(versions.c.comparison.is_(None)).order_by(versions.c.number.desc()).limit(1)
        else:
            query = query.where(versions.c.id == version_id)
    row = connection.execute(query).mappings().first()
    if row is None:
        has = summary(connection, adapter_id)
        if str(reference) == reference.name and has != NO_VERSION:
            choose = f"`turret promote {reference.name}@NUMBER production`"
            has = f"only versions of comparisons ({has}): choose one with {choose}"
        raise NotFound(f"no {reference}: {reference.name} has {has}")
    return _version(row, _aliases(connection, adapter_id).get(row["id"], ()))


def adapter_of(connection: Connection, name: str) -> int:
    """The row id of a name; raises NotFound, which lists the names that exist."""
    seen = seen_adapters(connection)
    found = connection.execute(select(adapters.c.id).where(adapters.c.name == name, seen)).scalar()
    if found is None:
        names = select(adapters.c.name).where(seen).order_by(adapters.c.name).limit(8)
        known = connection.execute(names).scalars().all()
        existing = f"the store has {', '.join(known)}" if known else "the store is empty: `turret train` makes one"
        raise NotFound(f"no adapter named {name!r}: {existing}")
    return int(found)


def tenants(connection: Connection) -> list[str]:
    """Every tenant with an adapter or a token, sorted."""
    both = select(adapters.c.tenant).union(select(tokens.c.tenant))
    return sorted(connection.execute(both).scalars())


def row_of(connection: Connection, version: Version) -> int:
    """The row id of a listed version."""
    query = select(versions.c.id).join(adapters, versions.c.adapter_id == adapters.c.id)
    this = (adapters.c.name == version.name) & (versions.c.number == version.number)
    return int(connection.execute(query.where(this, seen_adapters(connection))).scalar_one())


def children(connection: Connection, version: Version) -> list[str]:
    """Versions whose lineage names this version as their parent."""
    names = (version.digest, str(version))
    text = cast(versions.c.manifest, Text)  # JSON functions of PostgreSQL fail if there is a \u0000 anywhere in it
    candidates = or_(*(text.contains(name, autoescape=True) for name in names))
    rows = connection.execute(_versions(connection).where(candidates)).mappings()
    return [f"{row['name']}@{row['number']}" for row in rows if lineage_in(row["manifest"]).get("parent") in names]


def in_experiment(connection: Connection, version: Version) -> bool:
    """Whether a running experiment uses the version."""
    query = select(experiments.c.arms).join(adapters, experiments.c.adapter_id == adapters.c.id)
    own = (adapters.c.name == version.name) & seen_adapters(connection)
    here = connection.execute(query.where(own, experiments.c.state == "running")).scalars()
    return any(arm["version"] == version.number for arms in here for arm in arms)


def make_own(connection: Connection, version_id: int) -> None:
    """Make a version of a comparison one of its own, which a plain name may mean."""
    connection.execute(update(versions).where(versions.c.id == version_id).values(comparison=None))


def keep_metrics(connection: Connection, version: Version, split: str, values: Metrics) -> None:
    """Record metrics that were measured after the version was stored; they replace those of the same split."""
    row = row_of(connection, version)
    before = connection.execute(select(versions.c.metrics).where(versions.c.id == row)).scalar_one()
    metrics = {**mapping_of(before), split: values}
    connection.execute(update(versions).where(versions.c.id == row).values(metrics=plain(metrics)))


def remove(connection: Connection, version: Version) -> Deleted:
    """Remove a version and the list of its files. No alias may name it."""
    row = row_of(connection, version)
    connection.execute(delete(files).where(files.c.version_id == row))
    connection.execute(delete(versions).where(versions.c.id == row))
    before = {"digest": version.digest, "run": version.run, "aliases": list(version.aliases)}
    audit.record(connection, "delete", str(version), version.name, before=before, at=now(), who=who())
    return Deleted(str(version), version.digest, version.aliases, version.bytes)


def list_versions(connection: Connection, name: str | None = None) -> list[Version]:
    """All versions, or those of one name, ordered by name and number."""
    query = _versions(connection).order_by(adapters.c.name, versions.c.number)
    if name is not None:
        query = query.where(adapters.c.name == name)
    pointing = _aliases(connection)
    return [_version(row, pointing.get(row["id"], ())) for row in connection.execute(query).mappings()]


def content_of(connection: Connection, version: Version) -> dict[str, Blob]:
    """Path in the bundle -> its stored copy; raises Corrupt for a path that leaves the bundle."""
    found = {path: blob for _, path, blob in contents(connection, version)}
    for path in found:
        if not plain_path(path):
            raise Corrupt(
                f"{version} lists a file {ascii(path)[:80]}, which is not a path inside a bundle: delete the version"
            )
    return found


def contents(connection: Connection, version: Version | None = None) -> list[tuple[str, str, Blob]]:
    """Reference, path in the bundle, and stored copy of every file of one version, or of all."""
    query = (
        select(adapters.c.name, versions.c.number, files.c.path, files.c.digest, files.c.bytes, files.c.upload)
        .join(versions, files.c.version_id == versions.c.id)
        .join(adapters, versions.c.adapter_id == adapters.c.id)
        .where(seen_adapters(connection), seen_versions(connection))
        .order_by(adapters.c.name, versions.c.number, files.c.path)
    )
    if version is not None:
        query = query.where(adapters.c.name == version.name, versions.c.number == version.number)
    rows = connection.execute(query)
    return [(f"{row.name}@{row.number}", row.path, Blob(row.digest, row.bytes, row.upload)) for row in rows]


def plain_path(path: str) -> bool:
    """Whether a relative path stays inside a bundle, on any operating system."""
    inside = PurePosixPath(path)
    odd = inside.is_absolute() or ".." in inside.parts or "\\" in path or ":" in path or not path.isprintable()
    return path not in ("", ".") and not odd and str(inside) == path


def _versions(connection: Connection) -> Select[Any]:  # Any: SQLAlchemy does not know the types of a table's columns
    query = select(adapters.c.name, versions).join(adapters, versions.c.adapter_id == adapters.c.id)
    return query.where(seen_adapters(connection), seen_versions(connection))


_COLUMNS = ("name", "number", "digest", "created", "run", "bytes", "who", "comparison")


def _version(row: RowMapping, pointing: tuple[str, ...]) -> Version:
    columns = {key: row[key] for key in _COLUMNS}
    metrics = {split: values for split, values in mapping_of(row["metrics"]).items() if isinstance(values, Mapping)}
    manifest: JsonValue = mapping_of(row["manifest"])
    return Version(**columns, metrics=metrics, manifest=manifest, aliases=pointing)


def pointed_at(connection: Connection, adapter_id: int, alias: str, *, seen: bool = False) -> int | None:
    """The row id of the version that the alias names; None if it names none, or with `seen` if that is not seen."""
    query = select(aliases.c.version_id).where(aliases.c.adapter_id == adapter_id, aliases.c.alias == alias)
    if seen:
        query = query.join(versions, aliases.c.version_id == versions.c.id).where(seen_versions(connection))
    return connection.execute(query).scalar()


def _aliases(connection: Connection, adapter_id: int | None = None) -> dict[int, tuple[str, ...]]:
    """Row id of a version -> the aliases that name it, sorted."""
    query = select(aliases.c.version_id, aliases.c.alias).order_by(aliases.c.alias)
    if adapter_id is not None:
        query = query.where(aliases.c.adapter_id == adapter_id)
    if adapter_id is None or not access_of(connection).whole:
        query = query.join(versions, aliases.c.version_id == versions.c.id)
        query = query.join(adapters, versions.c.adapter_id == adapters.c.id)
        query = query.where(seen_adapters(connection), seen_versions(connection))
    pointing: dict[int, tuple[str, ...]] = {}
    for row in connection.execute(query):
        pointing[row.version_id] = (*pointing.get(row.version_id, ()), row.alias)
    return pointing


def summary(connection: Connection, adapter_id: int) -> str:
    """The versions and aliases of a name, for an error: `versions 1 to 3 and aliases production`."""
    query = select(func.min(versions.c.number), func.max(versions.c.number))
    seen = (versions.c.adapter_id == adapter_id) & seen_versions(connection)
    first, last = connection.execute(query.where(seen)).one()
    if first is None:
        return NO_VERSION
    numbers = f"versions {first} to {last}" if first != last else f"version {first}"
    names = sorted({alias for some in _aliases(connection, adapter_id).values() for alias in some})
    called = f"{'alias' if len(names) == 1 else 'aliases'} {', '.join(names)}"
    return f"{numbers} and {called if names else 'no alias'}"


def plain(value: JsonValue, text: Callable[[str], str] = str) -> JsonValue:
    """Convert a value to strict JSON: plain dicts and lists, `text` of each text, and null for NaN and infinity."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return plain_object(value, text)
    if isinstance(value, list | tuple):
        return [plain(item, text) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def plain_object(fields: Mapping[str, Plain], text: Callable[[str], str] = str) -> JsonObject:
    """Convert a mapping to strict JSON, see `plain`."""
    return {text(str(key)): plain(item, text) for key, item in fields.items()}
