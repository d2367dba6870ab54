"""`turret usage` and `turret audit`: what adapters answered, and who changed what."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from turret.access import Access
from turret.cli import options
from turret.cli.output import columns, console, emit, safe
from turret.errors import BadReference

if TYPE_CHECKING:
    from turret.audit import Action
    from turret.store.usage import Usage
    from turret.workspace import Workspace

Since = Annotated[str | None, typer.Option("--since", metavar="DAY", help="From this day on, such as 2026-11-27.")]
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def usage(
    since: Since = None,
    until: Annotated[str | None, typer.Option("--until", metavar="DAY", help="Up to and with this day.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, with a header.")] = False,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Requests and tokens by tenant, adapter and UTC day, as servers of this store counted them.

    Shows the tenant of --tenant; as `default` every tenant. The adapter of the bare base is empty. A server writes
    every two seconds, and when it ends.
    """
    from turret.store.usage import COLUMNS
    from turret.workspace import Workspace

    found = _usage(Workspace(store), _day(since), _day(until))
    if as_json:
        emit({"store": str(store), "usage": [each.as_json() for each in found]})
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(each, column) for column in COLUMNS] for each in found)
    elif found:
        heads = ("tenant", "adapter", "day", "requests", "answers", "prompt tokens", "completion tokens")
        rows = [[safe(str(getattr(each, column)) or "(base)") for column in COLUMNS] for each in found]
        console().print(columns(heads, rows, right=heads[3:]))
    else:
        console().print("no usage: turret serve counts what it answers")


def audit(
    since: Since = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="At most so many, the newest.")] = 100,
    store: options.Store = options.STORE,
    as_json: options.Json = False,
) -> None:
    """Who changed what: promote, rollback, put, delete, gates, loads, tokens, experiments. The newest first.

    Shows the tenant of --tenant. The store keeps every row: the database refuses to change or remove one.
    """
    from turret.audit import read
    from turret.workspace import Workspace

    database, day = Workspace(store).store.database(), _day(since)
    with database.reading() as connection:
        found: Sequence[Action] = read(connection, since=day, limit=limit)
    if as_json:
        emit({"store": str(store), "actions": [each.as_json() for each in found]})
    elif found:
        rows = [
            [safe(each.at), safe(each.who or "-"), safe(each.verb), safe(each.what), _change(each)] for each in found
        ]
        console().print(columns(("when", "who", "did", "to", "change"), rows))
    else:
        console().print("no action yet")


def _usage(workspace: Workspace, since: str | None, until: str | None) -> list[Usage]:
    from turret.store import usage

    store = workspace.store
    tenants = store.tenants() if store.access.operates else [store.access.tenant]
    stores = [store.with_access(Access(tenant)) for tenant in tenants]
    return [each for one in stores if one.exists() for each in usage.read(one.database(), since, until)]


def _change(action: Action) -> str:
    parts = [json.dumps(each) for each in (action.before, action.after) if each]
    text = " -> ".join(parts)
    return safe(text if len(text) <= 100 else f"{text[:97]}...")


def _day(text: str | None) -> str | None:
    if text is not None and not _DAY.fullmatch(text):
        raise BadReference(f"day {ascii(text)[:40]}: expected year, month and day, such as 2026-11-27")
    return text
