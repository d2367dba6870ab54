"""`turret token create`, `list`, `rotate` and `revoke`: the access tokens of servers of this store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from turret.access import ANY
from turret.cli import options
from turret.cli.output import columns, console, emit, report, safe

if TYPE_CHECKING:
    from turret.store.access_tokens import AccessToken, Scope

token = typer.Typer(
    help="Access tokens for servers of this store; with --tenant T those of a tenant.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Name = Annotated[str, typer.Argument(help="Name of the token.", show_default=False)]


@token.command()
def create(
    name: Name,
    scope: Annotated[
        list[str],
        typer.Option(
            "--scope",
            help="infer (ask), admin (everything of the tenant), metrics (/metrics alone), or, together with admin, "
            "operate (tokens and usage of all tenants); repeatable.",
        ),
    ] = ["infer"],  # noqa: B006
    requests: Annotated[int | None, typer.Option("--requests-per-minute", help="Quota; default: none.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens-per-minute", help="Quota; default: none.")] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapters", metavar="PATTERN", help="Only adapters of this name, or 'legal-*'; repeatable."),
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option("--base", metavar="PATTERN", help="Only this base and its adapters; repeatable."),
    ] = None,
    expires: Annotated[str | None, typer.Option("--expires", help="Such as 90d or 12h; default: never.")] = None,
    no_sign_in: Annotated[
        bool, typer.Option("--no-sign-in", help="For a machine: no person signs in to the console by it.")
    ] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Make a token of the tenant (--tenant T) and print it.

    The store keeps only its hash, so it cannot be shown again.
    """
    from turret.experiments.experiment import read_duration
    from turret.workspace import Workspace

    scopes = cast("list[Scope]", scope)  # `create` checks them
    access, secret = Workspace(store).tokens.create(
        name,
        scopes,
        requests_per_minute=requests,
        tokens_per_minute=tokens,
        adapters=adapters or ANY,
        bases=base or ANY,
        lifetime=None if expires is None else read_duration(expires),
        sign_in=not no_sign_in,
    )
    _print_secret(access, secret, f"{access.name} of tenant {access.tenant} may {' and '.join(access.scopes)}", as_json)


def _print_secret(access: AccessToken, secret: str, text: str, as_json: bool) -> None:
    if as_json:
        emit({**access.as_json(), "token": secret})
    else:
        err = console(stderr=True)
        err.print(f"{safe(text)}; the token is shown once:")
        console().print(secret)
        if err.is_terminal and {"infer", "admin"} & set(access.scopes):
            err.print(f"[dim]with a running `turret serve`:[/]\n  {safe(models_line(secret))}")


def models_line(secret: str) -> str:
    """A command that asks a server for its models with this token."""
    return f"curl -H 'authorization: Bearer {secret}' http://127.0.0.1:8000/v1/models"


@token.command("list")
def list_(store: options.Store = options.STORE, as_json: options.Json = False) -> None:
    """List all tokens of the tenant with their scopes, adapters and quotas."""
    from turret.workspace import Workspace

    found = Workspace(store).tokens.list()
    if as_json:
        emit({"store": str(store), "tokens": [each.as_json() for each in found]})
    elif found:
        heads = (
            "token",
            "scopes",
            "adapters",
            "bases",
            "requests/min",
            "tokens/min",
            "created",
            "expires",
            "revoked",
            "sign-in",
        )
        rows = [
            (
                f"[bold]{safe(each.name)}[/]",
                safe(" ".join(each.scopes)),
                safe(" ".join(each.adapters)),
                safe(" ".join(each.bases)),
                safe(each.requests_per_minute or "-"),
                safe(each.tokens_per_minute or "-"),
                safe(each.created),
                safe(each.expires or "-"),
                safe(each.revoked or "-"),
                safe("yes" if each.sign_in else "no"),
            )
            for each in found
        ]
        console().print(columns(heads, rows, right=("requests/min", "tokens/min")))
    else:
        console().print("no token: a server of this store answers on loopback only; turret token create NAME makes one")


@token.command()
def rotate(
    name: Name,
    overlap: Annotated[str, typer.Option("--overlap", help="For how long the secret so far stays valid.")] = "1d",
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Give a token a new secret, and print it.

    Running servers know it within a second. The secret so far stays valid for the overlap; --overlap 0 ends it now.
    """
    from turret.experiments.experiment import read_duration
    from turret.workspace import Workspace

    access, secret = Workspace(store).tokens.rotate(name, read_duration(overlap))
    until = f"valid until {access.former_until}" if access.former_until else "not valid any more"
    _print_secret(access, secret, f"{access.name} has a new secret, and the one so far is {until}", as_json)


@token.command()
def revoke(name: Name, store: options.Store = options.STORE, as_json: options.Json = False) -> None:
    """Revoke a token. Running servers refuse it within a second."""
    from turret.workspace import Workspace

    revoked = Workspace(store).tokens.revoke(name)
    report(revoked, as_json, lambda token: console().print(f"revoked [bold]{safe(token.name)}[/]"))
