"""Claim: for few tokens a product that reads a frozen weight as it lies is quicker than the library's, packed or not.

y = x W^T with the widths of all-MiniLM-L6 and SmolLM2-135M; so many copies of W that no cache holds them, as in a
model. Three ways in turn: torch's linear; oneDNN's with W packed ahead for this number of tokens; turret's kernel where
it is used. How much is left to win for many tokens is seen from how far they all are from the peak.

    python benchmarks/products.py            a few minutes
    python benchmarks/products.py --avx2     as on a processor with AVX2 alone: torch, oneDNN and turret use no more
    python benchmarks/products.py --report
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import record

NAME = "products"
CLAIM = "for few tokens a product that reads a frozen weight as it lies is quicker than the library's, packed or not"
SHAPES = ((384, 384), (384, 1536), (1536, 384), (576, 576), (576, 1536), (1536, 576))  # D_in, D_out
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 2048)
WORKING_SET = 64e6  # bytes of all copies of a weight: more than a cache of such a processor
WAYS = ("torch", "packed ahead", "turret")


def main() -> None:
    options = _options()
    if not options.report:
        if options.avx2:
            only_avx2()
        import torch

        torch.set_num_threads(options.threads)
        for dtype in ("float32",) if options.avx2 else ("float32", "bfloat16"):
            settings = {"dtype": dtype, "threads": options.threads, "avx2": options.avx2}
            run = {"settings": settings, "rows": measure(dtype, options), "machine": record.machine(options.threads)}
            record.keep(NAME, CLAIM, run)
    print(report(record.newest(record.load(NAME), lambda run: repr(run["settings"]))))


def only_avx2() -> None:
    """Before torch is imported: nobody uses wider vectors than a processor with AVX2 has."""
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    from turret.ops.cpu import build

    build.NATIVE = ("-march=haswell",)


def measure(dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of one product by way, number of tokens and shape: `rounds` of each."""
    import torch

    from turret.ops.cpu import compiled as kernels

    kind = getattr(torch, dtype)
    ops = kernels.library(kind)
    few = 0 if ops is None else ops.few
    rows = []
    for tokens in TOKENS:
        for d_in, d_out in SHAPES:
            x = torch.randn(tokens, d_in).to(kind)
            bytes_ = d_in * d_out * x.element_size()
            weights = [(torch.randn(d_out, d_in) * d_in**-0.5).to(kind) for _ in range(int(WORKING_SET // bytes_) + 1)]
            packed = [torch.ops.mkldnn._reorder_linear_weight(weight, tokens) for weight in weights]
            ways: dict[str, Callable[[Any, Any], Any]] = {
                "torch": lambda w, _, x=x: torch.nn.functional.linear(x, w),  # type: ignore[misc]
                "packed ahead": lambda _, p, x=x: torch.ops.mkldnn._linear_pointwise(x, p, None, "none", [], ""),  # type: ignore[misc]
            }
            if ops is not None and tokens <= few:
                ways["turret"] = lambda w, _, x=x: ops.linear_few(x, w, None)  # type: ignore[misc]
            with torch.inference_mode():
                seconds = in_turns(ways, list(zip(weights, packed, strict=True)), options.rounds)
            rows.append({"tokens": tokens, "d_in": d_in, "d_out": d_out, "seconds": seconds})
    return rows


def in_turns(
    ways: Mapping[str, Callable[[Any, Any], Any]], copies: Sequence[tuple[Any, Any]], rounds: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            for weight, packed in copies:
                way(weight, packed)
            if turn:  # the first one warms
                times[name].append((time.perf_counter() - began) / len(copies))
    return times


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for run in runs:
        own = run["settings"]
        alone = ", AVX2 alone" * own["avx2"]
        lines.append(f"\n{own['dtype']}, {own['threads']} threads{alone}, GFLOP/s [least, most of shapes]\n")
        table = []
        for tokens in TOKENS:
            rows = [row for row in run["rows"] if row["tokens"] == tokens]
            cells = []
            for way in WAYS:
                speeds = [
                    2e-9 * tokens * row["d_in"] * row["d_out"] / statistics.median(row["seconds"][way])
                    for row in rows
                    if way in row["seconds"]
                ]
                cells.append(
                    f"{statistics.median(speeds):.0f} [{min(speeds):.0f}, {max(speeds):.0f}]" if speeds else "not used"
                )
            table.append([str(tokens), *cells])
        lines.append(record.table(["tokens", *WAYS], table))
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--avx2", action="store_true")
    parser.add_argument("--report", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
