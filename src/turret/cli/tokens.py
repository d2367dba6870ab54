"""`turret token create`, `list` and `revoke`: the access tokens of servers of this store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from turret.cli import options
from turret.cli.output import columns, console, emit, report, safe

if TYPE_CHECKING:
    from turret.store.access_tokens import Scope

token = typer.Typer(help="Access tokens for servers of this store.", no_args_is_help=True, rich_markup_mode=None)
Name = Annotated[str, typer.Argument(help="Name of the token.", show_default=False)]


@token.command()
def create(
    name: Name,
    scope: Annotated[list[str], typer.Option("--scope", help="infer or admin; repeatable.")] = ["infer"],  # noqa: B006
    requests: Annotated[int | None, typer.Option("--requests-per-minute", help="Quota; default: none.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens-per-minute", help="Quota; default: none.")] = None,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Make a token and print it.

    The store keeps only its hash, so it cannot be shown again.
    """
    from turret.workspace import Workspace

    scopes = cast("list[Scope]", scope)  # `create` checks them
    access, secret = Workspace(store).tokens.create(
        name, scopes, requests_per_minute=requests, tokens_per_minute=tokens
    )
    if as_json:
        emit({**access.as_json(), "token": secret})
    else:
        console(stderr=True).print(f"{safe(name)} may {' and '.join(access.scopes)}; the token is shown once:")
        console().print(secret)


@token.command("list")
def list_(store: options.Store = options.STORE, as_json: options.Json = False) -> None:
    """List all tokens with their scopes and quotas."""
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
        console().print("no token: a server of this store answers on loopback only; turret token create NAME makes one")


@token.command()
def revoke(name: Name, store: options.Store = options.STORE, as_json: options.Json = False) -> None:
    """Revoke a token. Running servers refuse it within a second."""
    from turret.workspace import Workspace

    revoked = Workspace(store).tokens.revoke(name)
    report(revoked, as_json, lambda token: console().print(f"revoked [bold]{safe(token.name)}[/]"))
