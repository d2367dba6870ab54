"""S3 through s3fs, with a time limit for every request, because a server may accept a connection and never answer.

- A try ends if the server is silent for `TRY_SECONDS`. botocore and s3fs each make two tries, so a request has four.
- A request ends after `REQUEST_SECONDS`, plus one second for each `BYTES_A_SECOND` that it sends. This is needed
  because botocore does not call a server silent that stops reading.

`turret.store.blobs` imports this module when the first S3 store is used.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress

from aiobotocore.session import AioSession
from botocore.loaders import create_loader
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from turret.json_types import JsonMapping, JsonValue

CONNECT_SECONDS = 5.0
TRY_SECONDS = 7.0
REQUEST_SECONDS = 40.0
BYTES_A_SECOND = 64 << 10
LOADER = create_loader()  # of botocore's service descriptions; it caches them, so all stores of the process share it


class Silent(Exception):
    """The server took too long. s3fs does not retry after this error."""


class S3(S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """The filesystem of one store: it caches no listing and shares no connection with other stores."""

    cachable = False
    retries = 2

    def __init__(self) -> None:
        limits = {"connect_timeout": CONNECT_SECONDS, "read_timeout": TRY_SECONDS}
        tries = {"total_max_attempts": 2, "mode": "standard"}
        session = AioSession()
        session.register_component("data_loader", LOADER)
        super().__init__(session=session, use_listings_cache=False, config_kwargs={**limits, "retries": tries})

    async def _call_s3(self, method: str, *defaults: JsonMapping, **parameters: JsonValue) -> JsonValue:
        """Call one method of botocore's S3 client, whose parameters and answers have the shape of JSON."""
        seconds = REQUEST_SECONDS + len(parameters.get("Body") or b"") / BYTES_A_SECOND
        try:
            return await asyncio.wait_for(super()._call_s3(method, *defaults, **parameters), seconds)
        except TimeoutError as error:
            raise Silent(f"no answer to {method} in {seconds:.0f} s") from error

    call_s3 = sync_wrapper(_call_s3)

    @staticmethod
    def close_session(loop: asyncio.AbstractEventLoop | None, s3: AsyncExitStack) -> None:
        """Close the connections of a filesystem that is garbage, on the event loop that they belong to.

        s3fs closes them on the loop of whichever thread collects the garbage. In a server that is its own loop, where
        closing fails, and asyncio reports that as a bug.
        """
        if loop is None or not loop.is_running():
            S3FileSystem.close_session(loop, s3)
        else:
            asyncio.run_coroutine_threadsafe(_close_connections(s3), loop)


async def _close_connections(s3: AsyncExitStack) -> None:
    with suppress(Exception):  # nobody waits for connections that nobody uses
        await s3.__aexit__(None, None, None)
