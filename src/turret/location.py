"""The location of a store: a folder, or the URL of a catalog whose query names the place of the files.

    store   = folder | "postgresql://" [ user [ ":" password ] "@" ] hosts "/" database "?" keys
    keys    = key "=" value *( "&" key "=" value )

- `files` (required): an absolute folder, or `s3://bucket/prefix`, for the content of all bundles
- `local`: an absolute folder on this machine for the run folders; default `.turret`
- all other keys go to libpq: `sslmode`, `connect_timeout`, `host` (the folder of a socket), `options`, ...
- special characters in a user, password or value are percent-encoded; a password is never shown

Parsing opens nothing.
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
_IDENTIFYING = ("host", "port", "options")  # with hosts and database they tell which catalog it is, for any user


@dataclass(frozen=True)
class Location:
    """The parsed location of a store."""

    shown: str  # as the user gave it, without a password
    local: Path  # on this machine: all of a folder store; the run folders of a store with a catalog URL
    files: Path | str  # the folder of `blobs/`, or s3://bucket/prefix
    catalog: str | None = field(default=None, repr=False)  # libpq URL with password; None: turret.db in `local`
    given: str = field(default="", repr=False, compare=False)  # as the user gave it, with a password, for processes

    def __str__(self) -> str:
        return self.shown

    @classmethod
    def parse(cls, location: Location | Path | str) -> Location:
        """Parse a folder or a URL.

        Raises:
            BadLocation: it is neither; the text never contains a password.
        """
        if isinstance(location, Location):
            return location
        url = _URL.match(str(location))
        if url is None:
            return cls(str(Path(location)), Path(location), Path(location), given=str(location))
        if not url[2]:
            raise BadLocation(f"store {url[1]}:/...: a URL has two slashes, and in Python it is a str, not a Path")
        text = str(location)
        if not _unambiguous(text):
            raise BadLocation(
                f"store {url[1]}://...: cannot tell its parts: percent-encode special characters in user and password "
                "(%40 for @, %2F for /, %3F for ?, %23 for #), or put the password into PGPASSWORD or ~/.pgpass"
            )
        if url[1] == "s3":
            raise BadLocation(
                "store s3://...: an object store holds files but no catalog: give the URL of a catalog that names it, "
                f"such as {EXAMPLE}"
            )
        if url[1] != "postgresql":
            raise BadLocation(f"store {url[1]}://...: expected a folder, or {EXAMPLE}")
        return _catalog(text)


def _unambiguous(text: str) -> bool:
    """Whether every separator is a real one, so that no part of a password can be read as another part."""
    try:
        netloc = urlsplit(text).netloc
    except ValueError:
        return False
    keys = text.partition("?")[2].split("&") if "?" in text else []
    named = all(_KEY.match(each) for each in keys)
    return named and "#" not in text and text.isprintable() and text.count("@") == netloc.count("@") <= 1


def _catalog(text: str) -> Location:
    parts = urlsplit(text)
    credentials, at, hosts = parts.netloc.rpartition("@")
    user, colon, _ = credentials.partition(":")
    database = unquote(parts.path.removeprefix("/"))
    base = f"postgresql://{user}{colon and ':***'}{at}{hosts}{parts.path}"
    if not database or "/" in database:
        raise BadLocation(f"store {base}: no database name: expected {EXAMPLE}")
    pairs = [pair.partition("=") for pair in parts.query.split("&") if pair]
    keys = [key for key, _, _ in pairs]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise BadLocation(f"store {base}: key {ascii(repeated[0])[:40]} is given twice")
    shown = "&".join(f"{key}={'***' if key in _SECRETS else value}" for key, _, value in pairs)
    shown = f"{base}?{shown}" if shown else base
    values = {key: unquote(value) for key, (_, _, value) in zip(keys, pairs, strict=True)}
    files, local = values.pop("files", ""), values.pop("local", "")
    if not files:
        raise BadLocation(f"store {shown}: no place for the files: add ?files=s3://bucket/prefix or ?files=/folder")
    if local and not Path(local).is_absolute():
        raise BadLocation(f"store {shown}: local={local[:80]} is not an absolute folder")
    libpq_keys = "&".join(f"{key}={value}" for key, _, value in pairs if key in values)
    catalog = f"postgresql://{parts.netloc}{parts.path}{'?' if libpq_keys else ''}{libpq_keys}"
    identity = "\n".join([hosts, database, *(f"{key}={values[key]}" for key in _IDENTIFYING if key in values)])
    own_folder = f"{re.sub('[^A-Za-z0-9._-]', '-', database)[:40]}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    return Location(shown, (Path(local) if local else LOCAL) / own_folder, _files(files, shown), catalog, text)


def _files(files: str, shown: str) -> Path | str:
    bucket = _BUCKET.fullmatch(files)
    if bucket and not {".", ".."} & set(bucket[2].split("/")):
        return f"s3://{bucket[1]}{bucket[2]}"
    if _URL.match(files) or not Path(files).is_absolute():
        raise BadLocation(f"store {shown}: files={files[:80]}: expected s3://bucket/prefix or an absolute folder")
    return Path(files)
