"""The control plane of panels: list, show, create, promote, roll back."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, Field

from turret.server.routes import AdapterName, Model, Reference, View, router
from turret.store.panels import MOST_LABELS, MOST_QUESTIONS, Question
from turret.tasks import QuestionType

control = router("admin")
Label = Annotated[str, Field(max_length=1000)]
Ref = Annotated[Reference, Path(description="A panel: name or name@2.")]
Name = Annotated[AdapterName, Path(description="The name of a panel.")]


class AskedQuestion(Model):
    """A question of a new panel. The store takes type and labels from the adapter where they are missing."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    reference: Reference = Field(description="An adapter: name@production, or name@3#column for one of its questions.")
    type: QuestionType | None = None
    labels: Annotated[list[Label], Field(max_length=MOST_LABELS, fail_fast=True)] = Field(default_factory=list)
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None


class PanelRequest(Model):
    name: AdapterName
    questions: Annotated[list[AskedQuestion], Field(min_length=1, max_length=MOST_QUESTIONS, fail_fast=True)]


class QuestionOfPanel(BaseModel):
    name: str
    reference: str
    type: QuestionType
    labels: list[str] = Field(description="Of a score from the lowest, of a predicate false and true.")
    threshold: float | None = Field(description="The least probability of an answer.")


class PanelVersion(BaseModel):
    panel: str
    created: str
    who: str | None
    production: bool = Field(description="Whether it was promoted, and the plain name means it.")
    questions: list[QuestionOfPanel]


class PanelList(BaseModel):
    panels: list[PanelVersion]


class PanelMoved(BaseModel):
    panel: str = Field(description="The version that the plain name means now.")
    before: str | None
    changed: bool


@control.get("/api/panels")
async def list_panels(view: View) -> PanelList:
    """All versions of all panels, by name and number."""
    found = await view.control(view.workspace.panels.list)
    return PanelList(panels=[PanelVersion(**each.as_json()) for each in found])


@control.post("/api/panels")
async def create_panel(body: PanelRequest, view: View) -> PanelVersion:
    """Store the next version of a panel. One with the same questions keeps its number."""
    asked = [
        Question(each.name, each.reference, each.type, tuple(each.labels), each.threshold) for each in body.questions
    ]
    made = await view.control(view.workspace.panels.create, body.name, asked)
    return PanelVersion(**made.as_json())


@control.get("/api/panels/{reference}")
async def show_panel(reference: Ref, view: View) -> PanelVersion:
    """One version of a panel."""
    return PanelVersion(**(await view.control(view.workspace.panels.show, reference)).as_json())


@control.post("/api/panels/{reference}/promote")
async def promote_panel(reference: Ref, view: View) -> PanelMoved:
    """Make a version the one that the plain name means. Requests that have begun keep theirs."""
    return PanelMoved(**(await view.control(view.workspace.panels.promote, reference)).as_json())


@control.post("/api/panels/{name}/rollback")
async def rollback_panel(name: Name, view: View) -> PanelMoved:
    """Go back to the version that was promoted before."""
    return PanelMoved(**(await view.control(view.workspace.panels.rollback, name)).as_json())
