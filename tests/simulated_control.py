"""A finding on control with a known truth: what `turret control` would have measured, without a model."""

from __future__ import annotations

import numpy as np

from turret.compare.control_rates import Control, Written, rate_methods, shown_documents

ASPECTS = ("short", "long")
LABELS = KINDS = {"prefix": "prefix", "base": "base"}
HOSTILE = "<script>alert(1)</script>"


def written(
    spec: str, aspect: str, share: float, count: int = 60, seed: int = 1, aspects: tuple[str, ...] = ASPECTS
) -> Written:
    """`share` of the texts are of the aspect, by both judges; the others are of the next one."""
    row = aspects.index(aspect)
    right = np.arange(count) % 100 < 100 * share
    said = [aspect if each else aspects[(row + 1) % len(aspects)] for each in right]
    detected = np.where(right, row, (row + 1) % len(aspects))
    rouge = np.where(detected[:, None] == np.arange(len(aspects))[None], 0.6, 0.2)
    texts = [f"text {number} {HOSTILE}" for number in range(count)]
    return Written(spec, aspect, seed, None if spec == "base" else f"x-{aspect}@1", texts, said, rouge)


def found(share: float = 0.8, aspects: tuple[str, ...] = ASPECTS) -> Control:
    some = [written("prefix", aspect, share, 100, aspects=aspects) for aspect in aspects]
    some += [written("base", aspect, float(not place), 100, aspects=aspects) for place, aspect in enumerate(aspects)]
    references = {aspect: [f"{aspect} reference {HOSTILE}"] * 100 for aspect in aspects}
    return Control(
        name="x", base={"id": "small", "fingerprint": "sha256:b"}, source="t-{aspect}.csv", aspects=aspects,
        documents=100, train=10, seeds=(1,), confidence=0.95, chance=50.0,
        judge={"version": "x-judge@1", "base": "b", "accuracy": 90.0, "learnt_from": 20, "references": 200},
        rated=rate_methods(some, aspects, LABELS, KINDS, 0),
        shown=shown_documents(some, ["a document"] * 100, references),
        failures={}, recipes={"prefix, short": "name = 1"}, notes=(HOSTILE,), missing=0, folder="f",
        made={"from": "2026-01-02T03:04:05Z", "to": "2026-01-02T04:04:05Z", "device": "cpu", "versions": {}},
        command="turret control t-{aspect}.csv",
    )  # fmt: skip
