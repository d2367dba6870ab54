"""Which versions exist under which name and alias, as rows. Refuses to know files: it holds their digests only."""

from __future__ import annotations

import getpass
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

from sqlalchemy import Connection, Row, Select, Text, cast, delete, func, insert, or_, select, update

from turret.database import adapters, aliases, experiments, files, versions
from turret.errors import Corrupt, NotFound
from turret.reference import Reference
from turret.store.blobs import Blob

PRODUCTION = "production"  # the alias that a plain name means, where it exists


@dataclass(frozen=True)
class Version:
    """One stored adapter, which never changes; only `aliases` do."""

    name: str
    number: int
    digest: str
    created: str  # ISO 8601, UTC
    run: str | None  # the training that made it
    bytes: int
    metrics: Mapping[str, Any]
    manifest: Mapping[str, Any] = field(repr=False)
    aliases: tuple[str, ...] = ()
    who: str | None = None  # stored it

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    def part(self, key: str) -> Mapping[str, Any]:
        """A section of the manifest; empty where it has none, or none that makes sense."""
        return _mapping(self.manifest.get(key))

    def as_json(self) -> dict[str, Any]:
        """What `turret list --json` says of a version."""
        said = {key: self.part(key) for key in ("base", "method", "task")}
        return {
            "version": str(self),
            "digest": self.digest,
            "created": self.created,
            "who": self.who,
            "aliases": list(self.aliases),
            "base": said["base"].get("id"),
            "method": said["method"].get("kind"),
            "task": said["task"].get("kind"),
            "metrics": dict(self.metrics),
            "bytes": self.bytes,
            "run": self.run,
        }


@dataclass(frozen=True)
class Deleted:
    """A version that is not listed any more."""

    version: str
    digest: str
    aliases: tuple[str, ...]  # named it, and are taken away
    bytes: int  # of its files; those that no other version has go with the next gc

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "aliases": list(self.aliases)}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


_ACTING: ContextVar[str | None] = ContextVar("acting", default=None)


@contextmanager
def acting(name: str | None) -> Iterator[None]:
    """Whatever is done inside is this one's doing; None: the user of the process."""
    before = _ACTING.set(name)
    try:
        yield
    finally:
        _ACTING.reset(before)


def who() -> str | None:
    """Who is at work: whom `acting` names, else TURRET_USER where it is set, else the user as the system calls them."""
    try:
        said = _ACTING.get() or os.environ.get("TURRET_USER") or getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user without a name
        return None
    return "".join(c for c in said if c.isprintable())[:100] or None


def add(
    connection: Connection,
    name: str,
    manifest: Mapping[str, Any],
    content: Mapping[str, Blob],
    *,
    run: str | None,
    metrics: Mapping[str, Any],
) -> int:
    """The number of a new version; or of the one there, if this content is stored under this name already."""
    digest = str(manifest["digest"])
    adapter = connection.execute(select(adapters).where(adapters.c.name == name)).first()
    if adapter is None:
        row = {"name": name, "last_number": 0, "created": now()}
        adapter_id, last = connection.execute(insert(adapters).values(row)).inserted_primary_key[0], 0  # type: ignore[index]
    else:
        adapter_id, last = adapter.id, adapter.last_number
    same = (versions.c.adapter_id == adapter_id) & (versions.c.digest == digest)
    if (existing := connection.execute(select(versions.c.number).where(same)).scalar()) is not None:
        return int(existing)
    row = {
        "adapter_id": adapter_id,
        "number": last + 1,
        "digest": digest,
        "created": now(),
        "run": run,
        "bytes": sum(blob.bytes for blob in content.values()),
        "metrics": plain(metrics),
        "manifest": plain(manifest),
        "who": who(),
    }
    version_id = connection.execute(insert(versions).values(row)).inserted_primary_key[0]  # type: ignore[index]
    rows = [
        {"version_id": version_id, "path": path, "digest": blob.digest, "bytes": blob.bytes, "upload": blob.upload}
        for path, blob in content.items()
    ]
    connection.execute(insert(files), rows)
    connection.execute(update(adapters).where(adapters.c.id == adapter_id).values(last_number=last + 1))
    return int(last + 1)


def find(connection: Connection, reference: Reference) -> Version:
    """The version that the reference means now; raises NotFound saying what there is."""
    adapter_id = adapter_of(connection, reference.name)
    query = _versions().where(versions.c.adapter_id == adapter_id)
    if reference.version is not None:
        row = connection.execute(query.where(versions.c.number == reference.version)).first()
    else:
        alias = pointed_at(connection, adapter_id, reference.alias or PRODUCTION)
        if alias is not None:
            row = connection.execute(query.where(versions.c.id == alias)).first()
        elif reference.alias is None:
            row = connection.execute(query.order_by(versions.c.number.desc()).limit(1)).first()
        else:
            row = None
    if row is None:
        raise NotFound(f"no {reference}: {reference.name} has {there(connection, adapter_id)}")
    return _version(row, _aliases(connection, adapter_id).get(row.id, ()))


def adapter_of(connection: Connection, name: str) -> int:
    """The row of the name; raises NotFound saying which names there are."""
    found = connection.execute(select(adapters.c.id).where(adapters.c.name == name)).scalar()
    if found is None:
        known = connection.execute(select(adapters.c.name).order_by(adapters.c.name).limit(8)).scalars().all()
        those = f"the store has {', '.join(known)}" if known else "the store is empty: `turret train` makes one"
        raise NotFound(f"no adapter named {name!r}: {those}")
    return int(found)


def row_of(connection: Connection, version: Version) -> int:
    """The row of a version that is listed."""
    query = select(versions.c.id).join(adapters, versions.c.adapter_id == adapters.c.id)
    return int(
        connection.execute(
            query.where(adapters.c.name == version.name, versions.c.number == version.number)
        ).scalar_one()
    )


def children(connection: Connection, version: Version) -> list[str]:
    """The versions whose lineage says that they were made from it."""
    names = (version.digest, str(version))
    text = cast(versions.c.manifest, Text)  # its JSON functions make PostgreSQL stumble over a \u0000 anywhere in it
    near = or_(*(text.contains(name, autoescape=True) for name in names))
    rows = connection.execute(_versions().where(near))
    return [f"{row.name}@{row.number}" for row in rows if _parent(row.manifest) in names]


def _parent(manifest: Mapping[str, Any]) -> Any:
    lineage = manifest.get("lineage")
    return lineage.get("parent") if isinstance(lineage, Mapping) else None


def tried(connection: Connection, version: Version) -> bool:
    """Whether an experiment runs with it."""
    query = select(experiments.c.arms).join(adapters, experiments.c.adapter_id == adapters.c.id)
    here = connection.execute(query.where(adapters.c.name == version.name, experiments.c.state == "running")).scalars()
    return any(arm["version"] == version.number for arms in here for arm in arms)


def remove(connection: Connection, version: Version) -> Deleted:
    """Take the version and the list of its files away; no alias may name it any more."""
    row = row_of(connection, version)
    connection.execute(delete(files).where(files.c.version_id == row))
    connection.execute(delete(versions).where(versions.c.id == row))
    return Deleted(str(version), version.digest, version.aliases, version.bytes)


def listed(connection: Connection, name: str | None = None) -> list[Version]:
    """All versions, by name and number."""
    query = _versions().order_by(adapters.c.name, versions.c.number)
    if name is not None:
        query = query.where(adapters.c.name == name)
    pointing = _aliases(connection)
    return [_version(row, pointing.get(row.id, ())) for row in connection.execute(query)]


def content_of(connection: Connection, version: Version) -> dict[str, Blob]:
    """Path in the bundle -> content."""
    query = (
        select(files.c.path, files.c.digest, files.c.bytes, files.c.upload)
        .join(versions, files.c.version_id == versions.c.id)
        .join(adapters, versions.c.adapter_id == adapters.c.id)
        .where(adapters.c.name == version.name, versions.c.number == version.number)
        .order_by(files.c.path)
    )
    found = {row.path: Blob(row.digest, row.bytes, row.upload) for row in connection.execute(query)}
    for path in found:
        if not plain_path(path):
            raise Corrupt(
                f"{version} lists a file {ascii(path)[:80]}, which is no path inside a bundle: delete the version"
            )
    return found


def contents(connection: Connection) -> list[tuple[str, str, Blob]]:
    """(reference, path in the bundle, content) of every file of every version."""
    query = (
        select(adapters.c.name, versions.c.number, files.c.path, files.c.digest, files.c.bytes, files.c.upload)
        .join(versions, files.c.version_id == versions.c.id)
        .join(adapters, versions.c.adapter_id == adapters.c.id)
        .order_by(adapters.c.name, versions.c.number, files.c.path)
    )
    rows = connection.execute(query)
    return [(f"{row.name}@{row.number}", row.path, Blob(row.digest, row.bytes, row.upload)) for row in rows]


def plain_path(path: str) -> bool:
    """Whether it stays inside a bundle, whatever the system."""
    inside = PurePosixPath(path)
    odd = inside.is_absolute() or ".." in inside.parts or "\\" in path or ":" in path or not path.isprintable()
    return path not in ("", ".") and not odd and str(inside) == path


def _versions() -> Select[Any]:
    return select(adapters.c.name, versions).join(adapters, versions.c.adapter_id == adapters.c.id)


def _version(row: Row[Any], pointing: tuple[str, ...]) -> Version:
    shared = {key: getattr(row, key) for key in ("name", "number", "digest", "created", "run", "bytes", "who")}
    metrics = {split: values for split, values in _mapping(row.metrics).items() if isinstance(values, Mapping)}
    return Version(**shared, metrics=metrics, manifest=_mapping(row.manifest), aliases=pointing)


def _mapping(value: Any) -> Mapping[str, Any]:
    """What a row says, or nothing where it was not written by us; `verify` tells."""
    return value if isinstance(value, Mapping) else {}


def pointed_at(connection: Connection, adapter_id: int, alias: str) -> int | None:
    """The row of the version that the alias names now."""
    query = select(aliases.c.version_id).where(aliases.c.adapter_id == adapter_id, aliases.c.alias == alias)
    return connection.execute(query).scalar()


def _aliases(connection: Connection, adapter_id: int | None = None) -> dict[int, tuple[str, ...]]:
    """Version id -> the aliases that point at it, by name."""
    query = select(aliases.c.version_id, aliases.c.alias).order_by(aliases.c.alias)
    if adapter_id is not None:
        query = query.where(aliases.c.adapter_id == adapter_id)
    pointing: dict[int, tuple[str, ...]] = {}
    for row in connection.execute(query):
        pointing[row.version_id] = (*pointing.get(row.version_id, ()), row.alias)
    return pointing


def there(connection: Connection, adapter_id: int) -> str:
    """What a name has, for an error: `versions 1 to 3 and aliases production`."""
    query = select(func.min(versions.c.number), func.max(versions.c.number))
    first, last = connection.execute(query.where(versions.c.adapter_id == adapter_id)).one()
    if first is None:
        return "no version left"
    numbers = f"versions {first} to {last}" if first != last else f"version {first}"
    names = sorted({alias for some in _aliases(connection, adapter_id).values() for alias in some})
    called = f"{'alias' if len(names) == 1 else 'aliases'} {', '.join(names)}"
    return f"{numbers} and {called if names else 'no alias'}"


def plain(value: Any) -> Any:
    """The value as strict JSON can say it: mappings, lists, and null for what is not a finite number."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
