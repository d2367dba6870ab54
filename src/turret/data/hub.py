"""Data sets of the Hugging Face Hub, through `datasets`: `owner/name`, or `owner/name:configuration`. Loads no torch
by itself. Code that comes with a data set is never run (`datasets` no longer can)."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from turret.data.files import Row, Table
from turret.errors import DataError, one_line, shown

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.+-]+)?", re.ASCII)
_BATCH = 256
_PATIENCE = 5.0  # seconds for a first connection


def looks_like_id(source: str) -> bool:
    return len(source) < 200 and ".." not in source and _ID.fullmatch(source) is not None


def load(source: str) -> dict[str, Table]:
    """The splits of a data set on the Hub; downloaded once, then read from the cache of `datasets`."""
    import datasets

    name, _, configuration = source.partition(":")
    try:
        _check_reachable(name)
        loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the client raises anything from OSError to its own trees
        raise DataError(
            f"data {shown(source)} is no file here, and the Hub did not give it ({_reason(error)}): check the name "
            "(owner/name, or owner/name:configuration) and the connection, or give a file or a folder"
        ) from None
    return {str(split): _table(f"{source} {split}", part) for split, part in loaded.items()}


def _check_reachable(name: str) -> None:
    """Fail at once where the client would try again for half a minute: no way to the Hub, and nothing in the cache."""
    import datasets
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT)
    cached = (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).exists()
    if cached or constants.HF_HUB_OFFLINE or getproxies() or not host.hostname:
        return
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=_PATIENCE).close()
    except OSError:
        raise ConnectionError(f"{host.hostname} cannot be reached") from None


def _reason(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, 90)


def _table(name: str, part: Any) -> Table:
    def read(wanted: Sequence[str]) -> Iterator[Row]:
        number = 0
        narrow = part.select_columns(list(dict.fromkeys(wanted)))
        for batch in narrow.iter(batch_size=_BATCH):
            for row in zip(*(batch[column] for column in wanted), strict=True):
                number += 1
                yield number, row

    return Table(name, tuple(part.column_names), read, classes=_classes(part.features), unit="row")


def _classes(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of class numbers, of a column of classes or of lists of classes."""
    found = {column: getattr(f, "names", None) or getattr(getattr(f, "feature", None), "names", None)
             for column, f in features.items()}  # fmt: skip
    return {column: [str(name) for name in names] for column, names in found.items() if names}
