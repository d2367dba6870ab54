"""Where a store is: one folder, or the URL of a catalog that says where its files go. Knows words, opens nothing.

    store   = folder | "postgresql://" [ user [ ":" password ] "@" ] hosts "/" database "?" keys
    keys    = key "=" value *( "&" key "=" value )

- `files` (needed): an absolute folder, or `s3://bucket/prefix`; where the content of all bundles goes
- `local`: an absolute folder on this machine, under which the run folders are; `.turret` where left out
- every other key is libpq's: `sslmode`, `connect_timeout`, `host` (a socket's folder), `options`, …
- what is special in a user, password or value is percent-encoded; a password is never shown again
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from turret.errors import BadLocation

EXAMPLE = "postgresql://user@host/database?files=s3://bucket/prefix"
LOCAL = Path(".turret")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)")  # a drive of Windows has one letter
_BUCKET = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,62})((?:/[^/?#]+)*)/?")
_KEY = re.compile(r"[a-z_]+=")
_SECRETS = ("password", "sslpassword")
_SAME = ("host", "port", "options")  # with hosts and database: which catalog it is, whoever asks and however


@dataclass(frozen=True)
class Location:
    """A store's place, read but not looked at."""

    shown: str  # as it was given, without a password
    local: Path  # the folder on this machine: the whole of a folder store; of any other, the run folders
    files: Path | str  # the folder that `blobs/` is in, or s3://bucket/prefix
    catalog: str | None = field(default=None, repr=False)  # for libpq, with its password; None: turret.db in the folder

    def __str__(self) -> str:
        return self.shown

    @classmethod
    def parse(cls, said: Location | Path | str) -> Location:
        """Raises BadLocation, which never repeats a password."""
        if isinstance(said, Location):
            return said
        url = _URL.match(str(said))
        if url is None:
            return cls(str(Path(said)), Path(said), Path(said))
        if not url[2]:
            raise BadLocation(f"store {url[1]}:/...: a URL has two slashes, and in Python it is a str, not a Path")
        text = str(said)
        if not _clear(text):
            raise BadLocation(
                f"store {url[1]}://...: cannot tell its parts: write % codes for what is special in a user or password "
                "(%40 for @, %2F for /, %3F for ?, %23 for #), or leave the password to PGPASSWORD or ~/.pgpass"
            )
        if url[1] == "s3":
            raise BadLocation(
                "store s3://...: an object store keeps files and no catalog of them: name the catalog, and the files "
                f"in it, such as {EXAMPLE}"
            )
        if url[1] != "postgresql":
            raise BadLocation(f"store {url[1]}://...: expected a folder, or {EXAMPLE}")
        return _catalog(text)


def _clear(text: str) -> bool:
    """Whether what is special stands where it divides, so that no part of a password is taken for something else."""
    try:
        users = urlsplit(text).netloc
    except ValueError:
        return False
    keys = text.partition("?")[2].split("&") if "?" in text else []
    whole = all(_KEY.match(each) for each in keys)
    return whole and "#" not in text and text.isprintable() and text.count("@") == users.count("@") <= 1


def _catalog(text: str) -> Location:
    parts = urlsplit(text)
    users, at, hosts = parts.netloc.rpartition("@")
    user, colon, _ = users.partition(":")
    database = unquote(parts.path.removeprefix("/"))
    base = f"postgresql://{user}{colon and ':***'}{at}{hosts}{parts.path}"
    if not database or "/" in database:
        raise BadLocation(f"store {base}: names no database: expected {EXAMPLE}")
    pairs = [pair.partition("=") for pair in parts.query.split("&") if pair]
    keys = [key for key, _, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise BadLocation(f"store {base}: says {ascii(twice[0])[:40]} twice")
    shown = "&".join(f"{key}={'***' if key in _SECRETS else value}" for key, _, value in pairs)
    shown = f"{base}?{shown}" if shown else base
    values = {key: unquote(value) for key, (_, _, value) in zip(keys, pairs, strict=True)}
    files, local = values.pop("files", ""), values.pop("local", "")
    if not files:
        raise BadLocation(f"store {shown}: lacks where its files go: add ?files=s3://bucket/prefix or ?files=/folder")
    if local and not Path(local).is_absolute():
        raise BadLocation(f"store {shown}: local={local[:80]} is not an absolute folder")
    rest = "&".join(f"{key}={value}" for key, _, value in pairs if key in values)
    catalog = f"postgresql://{parts.netloc}{parts.path}?{rest}" if rest else f"postgresql://{parts.netloc}{parts.path}"
    which = "\n".join([hosts, database, *(f"{key}={values[key]}" for key in _SAME if key in values)])
    own = f"{re.sub('[^A-Za-z0-9._-]', '-', database)[:40]}-{hashlib.sha256(which.encode()).hexdigest()[:8]}"
    return Location(shown, (Path(local) if local else LOCAL) / own, _files(files, shown), catalog)


def _files(files: str, shown: str) -> Path | str:
    bucket = _BUCKET.fullmatch(files)
    if bucket and not {".", ".."} & set(bucket[2].split("/")):
        return f"s3://{bucket[1]}{bucket[2]}"
    if _URL.match(files) or not Path(files).is_absolute():
        raise BadLocation(f"store {shown}: files={files[:80]}: expected s3://bucket/prefix or an absolute folder")
    return Path(files)
