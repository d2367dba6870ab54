"""Requests to a server with an experiment on `a`, and the figures of its arms."""

from __future__ import annotations

from server.echo import probabilities

from turret.workspace import Workspace

UNITS = [f"user {number}" for number in range(40)]


def asked(client, unit: str | None = None, text: str = "x", model: str = "a", **headers: str):
    body = {"model": model, "input": text} | ({} if unit is None else {"user": unit})
    return client.post("/v1/classify", json=body, headers=headers)


def status(workspace: Workspace) -> dict:
    return workspace.experiment("a").status().as_json()


def arms(workspace: Workspace, key: str) -> dict[str, int]:
    return {each["arm"]: each[key] for each in status(workspace)["arms"]}


def label(workspace: Workspace, version: str, text: str) -> str:
    found = probabilities(workspace.resolve(version).digest, text)
    return max(found, key=lambda key: found[key])


def of(arm: str, workspace: Workspace) -> str:
    """A unit of this arm."""
    router = workspace.router()
    experiment = router.running("a")
    return next(unit for unit in UNITS if router.choose(experiment, unit).arm == arm)
