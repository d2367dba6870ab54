"""The pages of adapters and panels: all names, one name, one version, and the moves of an alias."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Annotated

from fastapi import Path, Query, Response

from turret.compare.evaluation_page import Live, decided_plot, reliability_plot, shown_details, steps
from turret.errors import BadRequest, NotFound, TurretError
from turret.manifest import Manifest, base_in
from turret.server import moves
from turret.server.console import render, snippets
from turret.server.console.render import Form, Page, Sent, pages
from turret.server.routes import View, check_alias_name
from turret.store import Panel, Question, Version, fold_comparisons, promises
from turret.store.catalog import PRODUCTION
from turret.tasks.shapes import SplitMetrics, number_in, parts_in
from turret.workspace import promising

router = pages()
Name = Annotated[str, Path(min_length=1, max_length=200)]
Number = Annotated[int, Path(ge=1, lt=1 << 53)]
Chosen = Annotated[int, Query(ge=1, lt=1 << 53)]
Parent = Version | str | None  # the version that training started from; its digest if it is gone; None for the base
MOST_MISTAKES = 20
SUGGESTED_ALIASES = (PRODUCTION, "candidate")


@router.get("/adapters")
async def listing(page: Page, view: View) -> Response:
    """All names."""
    versions = await view.control(view.workspace.list)
    values: render.Context = {
        "every": versions,
        "names": [(name, list(group)) for name, group in groupby(versions, key=lambda each: each.name)],
        "plain": _plain,
        "fold": fold_comparisons,
        "loaded": {each.digest for each in view.engines.loaded_adapters()},
        "broken": await view.control(_broken_promises, view),
        "store": str(view.workspace.store),
    }
    return page.show("adapters.html.j2", **values)


@router.get("/adapters/{name}")
async def show(page: Page, view: View, name: Name, moved: str | None = None) -> Response:
    """One name: its versions, its aliases with their gates, and the history of the aliases."""
    values = await _values(view, name)
    alias = next((each for each in values["aliases"] if each.alias == moved), None)
    return page.show("adapter.html.j2", **values, moved=alias)


@router.get("/adapters/{name}/diff")
async def diff(page: Page, view: View, name: Name, first: Chosen, second: Chosen) -> Response:
    """How one version of a name differs from another."""
    found = await view.control(view.workspace.diff, f"{name}@{first}", f"{name}@{second}", weights=False)
    both = [await view.control(view.workspace.resolve, each) for each in found.versions]
    return page.show("diff.html.j2", name=name, found=found, both=both)


@router.get("/adapters/{name}/{number}")
async def version(page: Page, view: View, name: Name, number: Number) -> Response:
    """One version."""
    shown = await view.control(view.workspace.show, f"{name}@{number}")
    known = _by_digest(await view.control(view.workspace.list))
    run, reference = shown["run"], str(shown["version"])
    promised = shown["promise"] is not None
    return page.show(
        "version.html.j2",
        name=name,
        number=number,
        shown=shown,
        loaded=view.engines.in_memory(shown["digest"]),
        promised=await view.control(view.workspace.promise, reference) if promised else None,
        text=promising,
        served=base_in(shown["manifest"]).get("fingerprint") in view.engines.fingerprints,
        report=None if run is None else await view.control(_report, view, str(run["id"]), shown["metrics"]),
        snippets=snippets.of_version(page.request, view, reference, shown["manifest"]),
        parent=_parent(shown["manifest"], known),
    )


@router.get("/adapters/{name}/move/{verb}")
async def ask(
    page: Page, view: View, name: Name, verb: str, alias: str = PRODUCTION, version: int | None = None
) -> Response:
    """The dialog that confirms a move."""
    if verb not in ("promote", "rollback"):
        raise NotFound(f"no move {ascii(verb)[:40]}: expected promote or rollback")
    values = await _values(view, name)
    suggested = list(dict.fromkeys([*SUGGESTED_ALIASES, alias, *(each.alias for each in values["aliases"])]))
    every = values["every"]
    chosen = next((each for each in every if each.number == version), every[0])
    more = {"verb": verb, "alias": alias, "suggested": suggested, "chosen": chosen}
    return page.show("move.html.j2", **values, **more)


@router.post("/adapters/{name}/move/promote")
async def post_promote(page: Page, view: View, name: Name, form: Sent) -> Response:
    """Move an alias to a version."""
    reference, alias = _version_in(form, name), check_alias_name(form.text("alias"))
    await moves.move_alias(view, reference, alias)
    return page.redirect(f"/adapters/{name}?moved={alias}")


@router.post("/adapters/{name}/move/rollback")
async def post_rollback(page: Page, view: View, name: Name, form: Sent) -> Response:
    """Move an alias back to the version that it named before."""
    alias = check_alias_name(form.text("alias"))
    await moves.roll_back(view, name, alias)
    return page.redirect(f"/adapters/{name}?moved={alias}")


@router.post("/adapters/{name}/{number}/verify")
async def verify(page: Page, view: View, name: Name, number: Number) -> Response:
    """Hash and open all files of a version again."""
    found = await view.control(view.workspace.verify, f"{name}@{number}")
    return page.show("verified.html.j2", found=found, what=f"{name}@{number}")


def _report(view: View, run_id: str, metrics: SplitMetrics) -> render.Context | None:
    """What a version's training found on its held-out examples."""
    try:
        report = view.workspace.run_report(run_id)
    except NotFound:
        return None
    shown = shown_details(report.details, metrics.get(report.split) or {}, MOST_MISTAKES)
    return {"report": report, "shown": shown}


async def _values(view: View, name: str) -> render.Context:
    """What the template of a name shows. Versions and moves are the newest first; `every` has those of comparisons."""
    versions = await view.control(view.workspace.list)
    own = [each for each in versions if each.name == name]
    if not own:
        await view.control(view.workspace.resolve, name)  # raises NotFound with the names that exist
    shown = await view.control(view.workspace.show, str(own[-1]))
    known = _by_digest(versions)
    singles, compared = fold_comparisons(own)
    return {
        "name": name,
        "every": [*singles[::-1], *(one for each in compared[::-1] for one in each.versions)],
        "versions": singles[::-1],
        "compared": compared[::-1],
        "plain": _plain(own),
        "aliases": await moves.list_here(view, name),
        "gates": await view.control(view.workspace.gate, name),
        "history": shown["alias_history"][::-1],
        "parents": {each.number: _parent(each.manifest, known) for each in own},
        "loaded": {each.number for each in own if view.engines.in_memory(each.digest)},
    }


def _by_digest(versions: Iterable[Version]) -> dict[str, Version]:
    return {each.digest: each for each in versions}


def _parent(manifest: Manifest, known: Mapping[str, Version]) -> Parent:
    lineage = manifest.get("lineage")
    parent = lineage.get("parent") if isinstance(lineage, Mapping) else None
    return None if not parent else known.get(str(parent), str(parent))


def _broken_promises(view: View) -> set[str]:
    """The digests of the versions whose promise is broken."""
    with view.workspace.store.database(make=True).reading() as connection:
        return {each.digest for each in promises.in_force(connection) if each.broken}


def _plain(versions: Sequence[Version]) -> Version | None:
    """What the plain name means in the store, among all versions of the name by number."""
    used = (each for each in versions if PRODUCTION in each.aliases)
    return next(used, next((each for each in versions[::-1] if each.comparison is None), None))


def _version_in(form: Form, name: str) -> str:
    """The reference of the version that a form names. Raises BadRequest."""
    number = form.text("version")
    if not re.fullmatch("[0-9]{1,9}", number):
        raise BadRequest(f"version {ascii(number)[:40]}: expected a number of at most 9 digits")
    return f"{name}@{int(number)}"


# --- panels -----------------------------------------------------------------------------------------------------------
# The pages of panels: all of them, and one with its questions, versions and moves.


@router.get("/panels")
async def list_panels(page: Page, view: View) -> Response:
    """All names, each with the version that it means."""
    every = await view.control(view.workspace.panels.list)
    names = [_default_panel(list(versions)) for _, versions in groupby(every, key=lambda each: each.name)]
    return page.show("panels.html.j2", names=names)


@router.get("/panels/{name}")
async def show_panel(page: Page, view: View, name: Name, version: int | None = None) -> Response:
    """One panel: the questions of a version, all versions, and the moves of the plain name."""
    reference = name if version is None else f"{name}@{version}"
    values = await view.control(_panel_values, view, reference)
    return page.show("panel.html.j2", **values)


@router.post("/panels/{name}/promote")
async def promote_panel(page: Page, view: View, name: Name, form: Sent) -> Response:
    """Make a version the one that the plain name means."""
    await view.control(view.workspace.panels.promote, _version_in(form, name))
    return page.redirect(f"/panels/{name}")


@router.post("/panels/{name}/rollback")
async def roll_back_panel(page: Page, view: View, name: Name, form: Sent) -> Response:
    """Go back to the version that was promoted before."""
    await view.control(view.workspace.panels.rollback, name)
    return page.redirect(f"/panels/{name}")


def _default_panel(versions: Sequence[Panel]) -> tuple[Panel, int]:
    """What the plain name means, and how many versions it has."""
    return next((each for each in versions if each.production), versions[-1]), len(versions)


def _panel_values(view: View, reference: str) -> render.Context:
    panels = view.workspace.panels
    panel = panels.show(reference)
    own = [each for each in panels.list() if each.name == panel.name]
    moves = panels.moves(panel.name)
    return {
        "panel": panel,
        "meant": _default_panel(own)[0],
        "versions": own[::-1],
        "moves": moves[::-1],
        "asked": [_resolve_question(view, each) for each in panel.questions],
        "text": promising,
    }


def _resolve_question(view: View, question: Question) -> render.Context:
    """A question, and the version that answers it now, with its promise and how it stands; or why there is none."""
    found: render.Context = {"question": question, "version": None, "problem": None, "promised": None, "ece": None}
    try:
        version = view.workspace.resolve(view.aliases.exact(question.adapter))
    except TurretError as error:
        return {**found, "problem": str(error)}
    try:
        promised = None if question.part else view.workspace.promise(str(version))
    except NotFound:
        promised = None
    found = {**found, "version": version, "promised": promised, "ece": _ece(version, question.part)}
    if promised is None or promised.sureness is None:
        return found
    drawn, promise = promised.sureness, promised.promise
    threshold, bound, live = question.least(promise.threshold), None, None
    if promise.metric == "error":
        bound, share = promise.error, promised.decided / max(promised.answers, 1)
        live = Live(share, promised.standing.outcomes, promised.standing.wrong)
    plots = decided_plot(drawn, threshold, bound, live), reliability_plot(drawn.bins)  # SVG
    return {**found, "plots": plots, "steps": steps(drawn, threshold)}


def _ece(version: Version, part: str) -> float | None:
    """The calibration error of its test or validation split, if it was measured. part: of several questions."""
    for split in ("test", "validation"):
        values = version.metrics.get(split, {})
        if part:
            values = parts_in(values, "per_question").get(part, {})
        if "ece" in values:
            return number_in(values, "ece")
    return None
