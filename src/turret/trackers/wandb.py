"""Weights & Biases: a run in the project of the adapter's name, offline unless somebody has logged in.

WANDB_PROJECT, WANDB_MODE, WANDB_DIR and the library's other variables hold. Offline files lie in the folder `wandb` of
the run, and `wandb sync` sends them. Code, git state and the terminal's output are not recorded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import wandb

from turret.trackers import Point, State, TrackedRun


class WandB:
    """The configuration, metrics by step, a summary, and recipe and plan as files."""

    def start(self, run: TrackedRun) -> None:
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or run.name,
            id=run.id,
            name=run.id,
            resume="allow",
            mode=mode,
            dir=os.environ.get("WANDB_DIR") or run.folder,
            config=dict(run.settings),
            settings=wandb.Settings(console="off", disable_git=True, save_code=False, silent=True),
        )
        for name, text in run.texts.items():
            (Path(self._run.dir) / name).write_text(text, encoding="utf-8")

    def log(self, points: Sequence[Point]) -> None:
        for step, values in points:
            self._run.log(dict(values), step=step)

    def finish(self, state: State, summary: Mapping[str, float | str]) -> None:
        self._run.summary.update({**summary, "state": state})
        self._run.finish(exit_code=0 if state == "finished" else 1)
