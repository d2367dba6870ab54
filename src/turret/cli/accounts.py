"""`turret token ...`, `turret usage` and `turret audit`: who may ask a server, what it answered, who changed what."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, cast

from typer import Argument, Option

from turret.access import ANY, Access
from turret.cli import options
from turret.cli.output import console, cut, emit, safe
from turret.errors import BadReference

if TYPE_CHECKING:
    from turret.audit import Action
    from turret.store.access_tokens import AccessToken, Scope
    from turret.store.usage import Usage
    from turret.workspace import Workspace


# --- tokens -----------------------------------------------------------------------------------------------------------


Name = Annotated[str, Argument(help="Name of the token.", show_default=False)]


def create(
    *,
    name: Name,
    scope: Annotated[
        list[str],
        Option(
            help="infer (ask), admin (everything of the tenant), metrics (/metrics alone), or, together with admin, "
            "operate (tokens and usage of all tenants); repeatable."
        ),
    ] = ["infer"],  # noqa: B006
    requests: Annotated[int | None, Option("--requests-per-minute", help="Quota; default: none.")] = None,
    tokens: Annotated[int | None, Option("--tokens-per-minute", help="Quota; default: none.")] = None,
    adapters: Annotated[
        list[str] | None, Option(metavar="PATTERN", help="Only adapters of this name, or 'legal-*'; repeatable.")
    ] = None,
    base: Annotated[
        list[str] | None, Option(metavar="PATTERN", help="Only this base and its adapters; repeatable.")
    ] = None,
    expires: Annotated[str | None, Option(help="Such as 90d or 12h; default: never.")] = None,
    no_sign_in: Annotated[bool, Option(help="For a machine: no person signs in to the console by it.")] = False,
    command: options.Command,
) -> None:
    """Make a token of the tenant (--tenant T) and print it.

    The store keeps only its hash, so it cannot be shown again.
    """
    from turret.experiments.experiment import read_duration

    scopes = cast("list[Scope]", scope)  # `create` checks them
    access, secret = command.workspace.tokens.create(
        name,
        scopes,
        requests_per_minute=requests,
        tokens_per_minute=tokens,
        adapters=adapters or ANY,
        bases=base or ANY,
        lifetime=None if expires is None else read_duration(expires),
        sign_in=not no_sign_in,
    )
    text = f"{access.name} of tenant {access.tenant} may {' and '.join(access.scopes)}"
    _print_secret(access, secret, text, command.as_json)


def _print_secret(access: AccessToken, secret: str, text: str, as_json: bool) -> None:
    if as_json:
        emit({**access.as_json(), "token": secret})
    else:
        err = console(stderr=True)
        err.print(f"{safe(text)}; the token is shown once:")
        console().print(secret)
        if err.is_terminal and {"infer", "admin"} & set(access.scopes):
            line = f"curl -H 'authorization: Bearer {secret}' http://127.0.0.1:8000/v1/models"
            err.print(f"[dim]with a running `turret serve`:[/]\n  {safe(line)}")


def list_(command: options.Command) -> None:
    """List all tokens of the tenant with their scopes, adapters and quotas."""
    found = command.workspace.tokens.list()
    right = ("requests/min", "tokens/min")
    command.table(
        {"store": str(command.store), "tokens": [each.as_json() for each in found]},
        ("token", "scopes", "adapters", "bases", *right, "created", "expires", "revoked", "sign-in"),
        (_token_row(each) for each in found),
        right=right,
        none="no token: a server of this store answers on loopback only; turret token create NAME makes one",
    )


def _token_row(token: AccessToken) -> tuple[str, ...]:
    return (
        f"[bold]{safe(token.name)}[/]",
        safe(" ".join(token.scopes)),
        safe(" ".join(token.adapters)),
        safe(" ".join(token.bases)),
        safe(token.requests_per_minute or "-"),
        safe(token.tokens_per_minute or "-"),
        safe(token.created),
        safe(token.expires or "-"),
        safe(token.revoked or "-"),
        "yes" if token.sign_in else "no",
    )


def rotate(
    *,
    name: Name,
    overlap: Annotated[str, Option(help="For how long the secret so far stays valid.")] = "1d",
    command: options.Command,
) -> None:
    """Give a token a new secret, and print it.

    Running servers know it within a second. The secret so far stays valid for the overlap; --overlap 0 ends it now.
    """
    from turret.experiments.experiment import read_duration

    access, secret = command.workspace.tokens.rotate(name, read_duration(overlap))
    until = f"valid until {access.former_until}" if access.former_until else "not valid any more"
    _print_secret(access, secret, f"{access.name} has a new secret, and the one so far is {until}", command.as_json)


def revoke(name: Name, command: options.Command) -> None:
    """Revoke a token. Running servers refuse it within a second."""
    revoked = command.workspace.tokens.revoke(name)
    command.report(revoked, lambda token: console().print(f"revoked [bold]{safe(token.name)}[/]"))


app = options.group(
    "Access tokens for servers of this store; with --tenant T those of a tenant.", create, list_, rotate, revoke
)


# --- usage and audit --------------------------------------------------------------------------------------------------


Since = Annotated[str | None, Option(metavar="DAY", help="From this day on, such as 2026-11-27.")]
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def usage(
    *,
    since: Since = None,
    until: Annotated[str | None, Option(metavar="DAY", help="Up to and with this day.")] = None,
    as_csv: Annotated[bool, Option("--csv", help="Print CSV, with a header.")] = False,
    command: options.Command,
) -> None:
    """Requests and tokens by tenant, adapter and UTC day, as servers of this store counted them.

    Shows the tenant of --tenant; as `default` every tenant. The adapter of the bare base is empty. A server writes
    every two seconds, and when it ends.
    """
    from turret.store.usage import COLUMNS

    found = _usage(command.workspace, _day(since), _day(until))
    if as_csv and not command.as_json:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(each, column) for column in COLUMNS] for each in found)
        return
    right = ("requests", "answers", "prompt tokens", "completion tokens")
    command.table(
        {"store": str(command.store), "usage": [each.as_json() for each in found]},
        ("tenant", "adapter", "day", *right),
        ([safe(str(getattr(each, column)) or "(base)") for column in COLUMNS] for each in found),
        right=right,
        none="no usage: turret serve counts what it answers",
    )


def audit(
    *,
    since: Since = None,
    limit: Annotated[int, Option(min=1, max=100_000, help="At most so many, the newest.")] = 100,
    command: options.Command,
) -> None:
    """Who changed what: promote, rollback, put, delete, gates, loads, tokens, experiments. The newest first.

    Shows the tenant of --tenant. The store keeps every row: the database refuses to change or remove one.
    """
    from turret.audit import read_actions

    database, day = command.workspace.store.database(), _day(since)
    with database.reading() as connection:
        found: Sequence[Action] = read_actions(connection, since=day, limit=limit)
    command.table(
        {"store": str(command.store), "actions": [each.as_json() for each in found]},
        ("when", "who", "did", "to", "change"),
        (
            (
                safe(each.at),
                safe(each.who or "-"),
                safe(each.verb),
                safe(each.what),
                _change(each),
            )
            for each in found
        ),
        none="no action yet",
    )


def _usage(workspace: Workspace, since: str | None, until: str | None) -> list[Usage]:
    from turret.store import usage

    store = workspace.store
    tenants = store.tenants() if store.access.operates else [store.access.tenant]
    stores = [store.with_access(Access(tenant)) for tenant in tenants]
    return [each for one in stores if one.exists() for each in usage.read_usage(one.database(), since, until)]


def _change(action: Action) -> str:
    return safe(cut(" -> ".join(json.dumps(each) for each in (action.before, action.after) if each), 100))


def _day(text: str | None) -> str | None:
    if text is not None and not _DAY.fullmatch(text):
        raise BadReference(f"day {ascii(text)[:40]}: expected year, month and day, such as 2026-11-27")
    return text
