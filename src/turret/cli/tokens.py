"""`turret token create | list | revoke`: who may ask a server of this store. Decode, call, encode."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from turret.cli import options
from turret.cli.output import columns, console, emit, safe

token = typer.Typer(help="Who may ask a server of this store.", no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str, typer.Argument(help="Name of the token, to know it by.", show_default=False)]


@token.command()
def create(
    name: Name,
    scope: Annotated[list[str], typer.Option("--scope", help="infer or admin; repeatable.")] = ["infer"],  # noqa: B006
    requests: Annotated[int | None, typer.Option("--requests-per-minute", help="Quota; none where left out.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens-per-minute", help="Quota; none where left out.")] = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Make a token and show it, once.

    The store keeps its hash; nothing can show it again.
    """
    from turret.workspace import Workspace

    scopes: Any = scope
    kept, secret = Workspace(store).tokens.create(name, scopes, requests_per_minute=requests, tokens_per_minute=tokens)
    if as_json:
        emit({**kept.as_json(), "token": secret})
    else:
        console(stderr=True).print(f"{safe(name)} may {' and '.join(kept.scopes)}; this is shown once:")
        console().print(secret)


@token.command("list")
def list_(store: options.Store = options.STORE, as_json: options.Json = False) -> None:
    """Every token by name: scopes, quotas, when it was made and revoked."""
    from turret.workspace import Workspace

    found = Workspace(store).tokens.list()
    if as_json:
        emit({"store": str(store), "tokens": [each.as_json() for each in found]})
    elif found:
        heads = ("token", "scopes", "requests/min", "tokens/min", "created", "revoked")
        rows = [
            (
                f"[bold]{safe(each.name)}[/]",
                safe(" ".join(each.scopes)),
                safe(each.requests_per_minute or "-"),
                safe(each.tokens_per_minute or "-"),
                safe(each.created),
                safe(each.revoked or "-"),
            )
            for each in found
        ]
        console().print(columns(heads, rows, right=("requests/min", "tokens/min")))
    else:
        console().print("no token: a server of this store answers on loopback only; turret token create NAME")


@token.command()
def revoke(name: Name, store: options.Store = options.STORE, as_json: options.Json = False) -> None:
    """Make a token unknown; servers that run follow within a second."""
    from turret.workspace import Workspace

    gone = Workspace(store).tokens.revoke(name)
    if as_json:
        emit(gone.as_json())
    else:
        console().print(f"revoked [bold]{safe(gone.name)}[/]")
