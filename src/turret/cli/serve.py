"""`turret serve`: HTTP over the store on one base. Decode, call, encode."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from turret.cli import options
from turret.cli.output import console, emit, safe, status
from turret.errors import ServeRefused

if TYPE_CHECKING:
    from turret.server.state import ServerSettings
    from turret.workspace import Workspace

Dtype = Literal["auto", "float32", "bfloat16"]
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
Base = Annotated[
    str | None, typer.Option("--base", help="Where left out: the one that the store's adapters were trained on.")
]
Memory = Annotated[
    str | None, typer.Option("--memory", metavar="BYTES", help="Most for adapters in memory, such as 500MB or 2GB.")
]


def serve(
    base: Base = None,
    host: Annotated[str, typer.Option("--host", help="Address; beyond loopback only with tokens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    alias: Annotated[str, typer.Option("--alias", help="What plain names mean; loaded beforehand.")] = "production",
    memory: Memory = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Precision of the base.")] = "auto",
    requests: Annotated[
        int | None, typer.Option("--adapter-requests-per-minute", min=1, help="Quota of each adapter.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--adapter-tokens-per-minute", min=1, help="Quota of each adapter.")
    ] = None,
    connections: Annotated[
        int, typer.Option("--connections-per-client", min=0, help="Most open at a time from one address; 0: any.")
    ] = 128,
    proxy: Annotated[
        list[str] | None,
        typer.Option("--proxy", metavar="ADDRESS", help="Of a reverse proxy: its connections are not limited."),
    ] = None,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Write the texts of requests to the log.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Answer over HTTP, as OpenAI's API does.

    One base with all its adapters. SIGTERM and Ctrl-C let running answers finish; a second one ends at once.
    """
    from turret.server.connections import networks
    from turret.server.limits import RequestLimits
    from turret.server.quotas import Quota
    from turret.server.state import ServerSettings
    from turret.workspace import Workspace

    workspace = Workspace(store)
    quota = Quota(requests, tokens)
    settings = ServerSettings(
        host=host,
        port=port,
        alias=alias,
        limits=RequestLimits(connections_per_client=connections or None),
        per_adapter=quota,
        log_texts=log_texts,
        proxies=networks(proxy or ()),
    )
    _serve(workspace, base or only_base(workspace), settings, size_of(memory), dtype, as_json)


def _serve(
    workspace: Workspace, base: str, settings: ServerSettings, memory: int | None, dtype: Dtype, as_json: bool
) -> None:
    from turret.engine import Limits, Options
    from turret.server.auth import Guard
    from turret.server.run import bind, run
    from turret.server.state import ServerState

    Guard(settings.host, workspace.tokens.list())  # refuse before anything is loaded
    with bind(settings.host, settings.port) as listening:
        with status() as stage:
            limits = Limits(memory=memory)
            engine = workspace.engine(base, limits=limits, dtype=dtype, on_stage=stage)
        with engine:
            served = ServerState(workspace, engine, Options, settings)
            run(served, listening, lambda url: _announce(url, served.base_id, as_json))
            engine.drain(served.limits.drain_seconds)


def _announce(url: str, base: str, as_json: bool) -> None:
    if as_json:
        emit({"url": url, "base": base})
    else:
        console().print(f"[green]{safe(base)}[/] answers at [bold]{safe(url)}[/]  [dim](Ctrl-C ends it)[/]")


def only_base(workspace: Workspace) -> str:
    """The base that all adapters of the store were trained on."""
    found = sorted({str((each.manifest.get("base") or {}).get("id")) for each in workspace.list()})
    if len(found) == 1:
        return found[0]
    what = f"adapters of {', '.join(found[:5])}" if found else "no adapter"
    raise ServeRefused(f"which base to serve: the store has {what}; say it with --base")


def size_of(text: str | None) -> int | None:
    """`500MB` -> 500000000."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.strip().lower())
    if found is None or not float(found[1]):
        raise ServeRefused(f"--memory {ascii(text)[:40]}: expected a number of bytes such as 500MB or 2GB")
    return int(float(found[1]) * UNITS[found[2]])
