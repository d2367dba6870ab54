"""The pages of panels: all of them, and one with its questions, versions and moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

from fastapi import Path, Request, Response

from turret.compare.evaluation_page import reliability_plot
from turret.compare.panel_page import Live, Step, decided_plot, steps
from turret.errors import BadRequest, NotFound, TurretError
from turret.server.console import render
from turret.server.console.render import Sent, pages
from turret.server.routes import View
from turret.store import Panel, Question, Version
from turret.tasks.calibration import Sureness
from turret.tasks.shapes import number_in, parts_in
from turret.workspace import promising
from turret.workspace.promising import PromiseStatus

router = pages()
Name = Annotated[str, Path(min_length=1, max_length=200)]


@dataclass(frozen=True)
class AskedNow:
    """A question of a panel, and the version that answers it now."""

    question: Question
    version: Version | None
    problem: str | None  # why there is none
    promised: PromiseStatus | None = None  # how the promise of the version stands

    @property
    def ece(self) -> float | None:
        """The calibration error of its test or validation split, if it was measured."""
        measured = {} if self.version is None else self.version.metrics
        for split in ("test", "validation"):
            values = measured.get(split, {})
            if self.question.part:
                values = parts_in(values, "per_question").get(self.question.part, {})
            if "ece" in values:
                return number_in(values, "ece")
        return None

    @property
    def measured(self) -> str:
        return "" if self.ece is None else render.points(self.ece)

    @property
    def threshold(self) -> float | None:
        """The question's own, or else that of the promise."""
        return self.question.least(None if self.promised is None else self.promised.promise.threshold)

    @property
    def drawn(self) -> Sureness | None:
        """The answers to the examples that the promise's threshold was chosen on."""
        return None if self.promised is None else self.promised.sureness

    @property
    def plots(self) -> tuple[str, str]:
        """The error by the share that is decided, with the error of live outcomes, and the reliability: SVG."""
        found, promised = self.drawn, self.promised
        if found is None or promised is None:
            return "", ""
        bound, live = None, None
        if promised.promise.metric == "error":
            bound = promised.promise.error
            share = promised.decided / max(promised.answers, 1)
            live = Live(share, promised.standing.outcomes, promised.standing.wrong)
        return decided_plot(found, self.threshold, bound, live), reliability_plot(found.bins)

    @property
    def steps(self) -> Sequence[Step]:
        return [] if self.drawn is None else steps(self.drawn, self.threshold)

    @property
    def command(self) -> str | None:
        """What gives the page its plots; None if its version can make no promise."""
        if self.version is None or self.question.part:
            return None
        return f"turret promise {self.version} --error 2%"


@router.get("/panels")
async def listing(request: Request, view: View) -> Response:
    """All names, each with the version that it means."""
    every = await view.control(view.workspace.panels.list)
    names = [_meant(list(versions)) for _, versions in groupby(every, key=lambda each: each.name)]
    return render.page(request, view, "panels.html.j2", names=names)


@router.get("/panels/{name}")
async def show(request: Request, view: View, name: Name, version: int | None = None) -> Response:
    """One panel: the questions of a version, all versions, and the moves of the plain name."""
    reference = name if version is None else f"{name}@{version}"
    values = await view.control(_values, view, reference)
    return render.page(request, view, "panel.html.j2", **values)


@router.post("/panels/{name}/promote")
async def post_promote(request: Request, view: View, name: Name, form: Sent) -> Response:
    """Make a version the one that the plain name means."""
    number = form.text("version")
    if not number.isdecimal():
        raise BadRequest(f"version {ascii(number)[:40]}: expected a number")
    await view.control(view.workspace.panels.promote, f"{name}@{int(number)}")
    return render.redirect(request, f"/panels/{name}")


@router.post("/panels/{name}/rollback")
async def post_rollback(request: Request, view: View, name: Name, form: Sent) -> Response:
    """Go back to the version that was promoted before."""
    await view.control(view.workspace.panels.rollback, name)
    return render.redirect(request, f"/panels/{name}")


def _meant(versions: Sequence[Panel]) -> tuple[Panel, int]:
    """What the plain name means, and how many versions it has."""
    return next((each for each in versions if each.production), versions[-1]), len(versions)


def _values(view: View, reference: str) -> render.Context:
    panels = view.workspace.panels
    panel = panels.show(reference)
    own = [each for each in panels.list() if each.name == panel.name]
    moves = panels.moves(panel.name)
    return {
        "panel": panel,
        "meant": _meant(own)[0],
        "versions": own[::-1],
        "moves": moves[::-1],
        "asked": [_asked(view, each) for each in panel.questions],
        "text": promising,
    }


def _asked(view: View, question: Question) -> AskedNow:
    try:
        version = view.workspace.resolve(view.aliases.exact(question.adapter))
    except TurretError as error:
        return AskedNow(question, None, str(error))
    try:
        promised = None if question.part else view.workspace.promise(str(version))
    except NotFound:
        promised = None
    return AskedNow(question, version, None, promised)
