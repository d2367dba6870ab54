"""S3 through s3fs, with an end to every request: no store may wait for a server that accepts and says nothing.

- a try ends when the server was silent for `TRY_SECONDS`; botocore and s3fs each make two, so a request has four
- a request ends after `REQUEST_SECONDS` whatever happened, and a second more for each `BYTES_A_SECOND` that it sends:
  a server that takes no bytes is not silent for botocore

Imported by `turret.store.objects` when the first S3 store is used.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

CONNECT_SECONDS = 5.0
TRY_SECONDS = 7.0
REQUEST_SECONDS = 40.0
BYTES_A_SECOND = 64 << 10


class Silent(Exception):
    """The server took too long; not one of the errors that s3fs tries again after."""


class S3(S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """The filesystem of one store: no list of objects is kept, and no other store shares it."""

    cachable = False
    retries = 2

    def __init__(self) -> None:
        limits = {"connect_timeout": CONNECT_SECONDS, "read_timeout": TRY_SECONDS}
        tries = {"total_max_attempts": 2, "mode": "standard"}
        super().__init__(use_listings_cache=False, config_kwargs={**limits, "retries": tries})

    async def _call_s3(self, method: str, *more: Any, **said: Any) -> Any:
        seconds = REQUEST_SECONDS + len(said.get("Body") or b"") / BYTES_A_SECOND
        try:
            return await asyncio.wait_for(super()._call_s3(method, *more, **said), seconds)
        except TimeoutError as error:
            raise Silent(f"no answer to {method} in {seconds:.0f} s") from error

    call_s3 = sync_wrapper(_call_s3)
