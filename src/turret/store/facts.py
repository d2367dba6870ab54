"""Everything that the store knows about one version, as `turret show --json` prints it."""

from __future__ import annotations

from collections.abc import Mapping

from turret.database import Database
from turret.json_types import JsonObject
from turret.store import aliases, golden, runs
from turret.store.blobs import Blob
from turret.store.catalog import Version


def facts_of(database: Database, version: Version, content: Mapping[str, Blob]) -> JsonObject:
    """Files, metrics, aliases and their moves, manifest, and the run of a version.

    Args:
        content: path in the bundle -> its stored copy.
    """
    with database.reading() as connection:
        moves = aliases.moves(connection, version.name)
        replays = golden.replays_of(connection, version)
    return {
        "version": str(version),
        "digest": version.digest,
        "created": version.created,
        "who": version.who,
        "aliases": list(version.aliases),
        "bytes": version.bytes,
        "metrics": dict(version.metrics),
        "files": {path: {"digest": blob.digest, "bytes": blob.bytes} for path, blob in content.items()},
        "manifest": dict(version.manifest),
        "alias_history": moves,
        "replays": [replay.as_json() for replay in replays.values()],
        "run": runs.find(database, version.run) if version.run else None,
        "comparison": version.comparison,
    }
