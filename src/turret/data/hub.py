"""Reads data sets of the Hugging Face Hub with `datasets`: `owner/name`, or `owner/name:configuration`.

Code that comes with a data set is never run; current versions of `datasets` cannot run it.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies

from turret.data.table import Table, TableRow
from turret.errors import DataError, one_line, shown

if TYPE_CHECKING:
    import datasets

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.+-]+)?", re.ASCII)
_BATCH = 256
_PATIENCE = 5.0  # seconds for a first connection


def looks_like_id(source: str) -> bool:
    """Whether a source has the form of an id on the Hub."""
    return len(source) < 200 and ".." not in source and _ID.fullmatch(source) is not None


def load(source: str) -> dict[str, Table]:
    """Split -> table of a data set on the Hub, which is downloaded once into the cache of `datasets`.

    Raises:
        DataError: there is no such data set, or no connection.
    """
    import datasets

    name, _, configuration = source.partition(":")
    try:
        _check_reachable(name)
        loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the client's errors have no common class
        raise DataError(
            f"data {shown(source)} is not a file here, and the Hub did not give it ({_reason(error)}): check the name "
            "(owner/name, or owner/name:configuration) and the connection, or give a file or a folder"
        ) from None
    return {str(split): _table(f"{source} {split}", part) for split, part in loaded.items()}


def _check_reachable(name: str) -> None:
    """Raise ConnectionError at once if there is no connection and no cached copy. The client retries for 30 seconds."""
    import datasets
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT)
    cached = (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).exists()
    if cached or constants.HF_HUB_OFFLINE or not host.hostname:
        return
    if not can_connect(host.hostname, host.port or 443):
        raise ConnectionError(f"{host.hostname} cannot be reached")


def can_connect(host: str, port: int) -> bool:
    """Whether a host answers, or there is a proxy; then the proxy decides, and the download says so."""
    if getproxies():
        return True
    try:
        socket.create_connection((host, port), timeout=_PATIENCE).close()
    except OSError:
        return False
    return True


def _reason(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, 90)


def _table(name: str, part: datasets.Dataset) -> Table:
    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        number = 0
        narrow = part.select_columns(list(dict.fromkeys(columns)))
        for batch in narrow.iter(batch_size=_BATCH):
            for row in zip(*(batch[column] for column in columns), strict=True):
                number += 1
                yield number, row

    return Table(name, tuple(part.column_names), read, classes=_classes(part.features), unit="row")


def _classes(features: datasets.Features) -> dict[str, list[str]]:
    """Names of class numbers, by column of classes or of lists of classes."""
    found = {
        column: getattr(f, "names", None) or getattr(getattr(f, "feature", None), "names", None)
        for column, f in features.items()
    }
    return {column: [str(name) for name in names] for column, names in found.items() if names}
