"""Claim: with 16 constrained rows, a decode step takes less than 5% longer than with 16 free rows.

One process decodes SmolLM2-135M in turns: 16 rows that are free, and 16 rows with a JSON schema whose answer is longer
than the limit, so that both sides take the same number of steps. Prompts, seeds and temperature are the same. The ratio
is of the same round; the mask of one row is timed alone as well.

    python benchmarks/structured.py --rounds 10
    python benchmarks/structured.py --report
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import record
from serve_sides import BASES, Shelf, use_threads

NAME = "structured"
CLAIM = "16 constrained rows take less than 5% longer for a decode step than 16 free rows"
ROWS, TOKENS = 16, 64
LONG: dict[str, Any] = {"type": "array", "items": {"type": "object", "properties": {
    "name": {"type": "string", "minLength": 20}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {
        "enum": ["red", "green", "blue"]}}}, "required": ["name", "age", "tags"], "additionalProperties": False},
    "minItems": 50}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    options = parser.parse_args()
    if not options.report:
        use_threads(options.threads)
        settings = {"rounds": options.rounds, "threads": options.threads, "dtype": options.dtype}
        record.keep(NAME, CLAIM, {"settings": settings, **measure(options), "machine": record.machine(options.threads)})
    print(report(record.load(NAME)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from turret import bases
    from turret.engine import Engine, Limits, SamplingParams
    from turret.engine.constraint import Constraint

    base = bases.load(BASES["decoder"], task="generate", dtype=options.dtype)
    generator = random.Random(0)
    rows = [[generator.randrange(1000, 20_000) for _ in range(32)] for _ in range(ROWS)]
    constraint = Constraint.json_schema(LONG)
    seconds: dict[str, list[float]] = {"free": [], "constrained": []}
    with Engine(base, Shelf(), Limits(running=64)) as engine:
        for turn in range(options.rounds + 1):
            for side in seconds if turn % 2 else reversed(seconds):
                wanted = constraint if side == "constrained" else None
                began = time.perf_counter()
                tickets = [
                    engine.submit(
                        "generate",
                        row,
                        None,
                        SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=seed, constraint=wanted),
                    )
                    for seed, row in enumerate(rows)
                ]
                tokens = sum(ticket.result()["tokens"] for ticket in tickets)
                if turn:
                    seconds[side].append((time.perf_counter() - began) / tokens * ROWS)
        masks = mask_seconds(engine, constraint)
    return {"dtype": str(base.model.dtype), "seconds_per_step": seconds, "mask_seconds": masks}


def mask_seconds(engine: Any, constraint: Any) -> list[float]:
    """Seconds of one mask, again and again at the places of one answer."""
    import torch

    from turret.engine.structured_output import Guide

    constraints = engine._prompts.constraints
    guide = Guide(constraints.compile_matcher(constraint), constraints.eos, constraints.eos)
    scores = torch.zeros(engine.base.model.get_input_embeddings().weight.shape[0])
    found = []
    for token in engine.base.tokenizer('[{"name":"a long name of somebody", "age":3')["input_ids"]:
        masked = scores.clone()
        began = time.perf_counter()
        guide.mask(masked)
        found.append(time.perf_counter() - began)
        guide.take(token)
    return found


def report(runs: list[dict[str, Any]]) -> str:
    """A row a run."""
    rows = []
    for run in runs:
        free, kept = (run["seconds_per_step"][side] for side in ("free", "constrained"))
        ratios = [b / a for a, b in zip(free, kept, strict=True)]
        interval = record.student(ratios)
        rows.append([
            run["machine"]["device"], run["dtype"], f"{1000 * statistics.median(free):.1f}",
            f"{1000 * statistics.median(kept):.1f}",
            f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]",
            f"{1e6 * statistics.median(run['mask_seconds']):.0f}",
        ])  # fmt: skip
    header = ["machine", "precision", "ms a step, free", "ms a step, constrained", "ratio", "µs a mask"]
    return record.table(header, rows)


if __name__ == "__main__":
    main()
