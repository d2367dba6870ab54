"""What every benchmark here shares: draw examples, note the machine, keep every run, say what a difference is worth.

It does not depend on turret, on its rivals or on a benchmark.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("turret", "torch", "transformers", "peft", "accelerate", "tokenizers", "numpy")


def draw(source: Path, count: int | None, seed: int, destination: Path) -> list[dict[str, Any]]:
    """Shuffle the rows of a JSONL file with the seed, keep the first `count`, write them to `destination` too.

    Both sides of a comparison read that file whole, so both see the same examples.
    """
    with source.open(encoding="utf-8") as lines:  # not str.splitlines: reviews hold U+0085 and U+2028
        rows = [json.loads(line) for line in lines if line.strip()]
    random.Random(seed).shuffle(rows)
    chosen = rows[:count]
    if count is not None and len(chosen) < count:
        raise SystemExit(f"{source} has {len(rows)} rows, {count} were asked for: lower the number")
    write_rows(chosen, destination)
    return chosen


def write_rows(rows: Sequence[Mapping[str, Any]], destination: Path) -> None:
    """Write rows as JSONL."""
    destination.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def machine(threads: int) -> dict[str, Any]:
    """Where and with what a run happened; the load says how busy the machine was with other work."""
    return {
        "device": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "environment": {
            key: os.environ[key] for key in sorted(os.environ) if key.startswith(("OMP_", "GOMP_", "MALLOC_"))
        },
        "commit": _commit(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    """Its name, family, model, and the widest instructions it has: "AMD EPYC" alone is Zen 3, Zen 4 and Zen 5."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    told = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines() if ":" in line)
    told = {key.strip(): value.strip() for key, value in told.items()}
    if "model name" not in told:
        return platform.processor() or platform.machine()
    has = set(told.get("flags", "").split())
    widest = next((name for flag, name in INSTRUCTIONS.items() if flag in has), "")
    generation = _generation(told.get("vendor_id", ""), int(told.get("cpu family", 0)), int(told.get("model", 0)))
    which = f"family {told.get('cpu family')} model {told.get('model')}"
    return ", ".join(part for part in (told["model name"], generation, which, widest) if part)


def _generation(vendor: str, family: int, model: int) -> str:
    """The generation of an AMD processor. Source: the families and models that Linux lists in asm/amd."""
    if vendor != "AuthenticAMD":
        return ""
    if family == 26:
        return "Zen 5"
    if family == 25:
        return "Zen 4" if 0x10 <= model <= 0x1F or 0x60 <= model <= 0xAF else "Zen 3"
    return {23: "Zen 1 or 2"}.get(family, "")


def _commit() -> str | None:
    """The commit that was measured, with "+" where files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "../src"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed else "")


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def load(name: str) -> list[dict[str, Any]]:
    """Every run kept under `results/<name>.json`, the oldest first."""
    path = RESULTS / f"{name}.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["runs"]) if path.exists() else []


def newest(runs: Sequence[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], Hashable]) -> list[dict[str, Any]]:
    """The newest run of each key on each processor, in the order in which the keys came first."""
    return list({(run["machine"]["device"], key(run)): dict(run) for run in runs}.values())


def keep(name: str, claim: str, run: Mapping[str, Any]) -> None:
    """Add a run to `results/<name>.json`; a line a run. No run is ever taken away."""
    RESULTS.mkdir(exist_ok=True)
    body = ",\n".join(json.dumps(entry) for entry in [*load(name), dict(run)])
    beside = RESULTS / f".{name}.json.{os.getpid()}"
    beside.write_text(f'{{"claim": {json.dumps(claim)}, "runs": [\n{body}\n]}}\n', encoding="utf-8")
    beside.rename(RESULTS / f"{name}.json")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


@dataclass(frozen=True)
class Interval:
    """A mean, or a median, with its interval of 95% confidence."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


FEWEST = 6  # rounds for an interval of the median


def student(differences: Sequence[float]) -> Interval:
    """Student's t interval of a mean of few paired differences (one a seed)."""
    from scipy import stats

    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Interval(mean, float("-inf"), float("inf"))
    half = stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return Interval(mean, mean - half, mean + half)


def median(values: Sequence[float]) -> Interval:
    """The median and an interval between two of the sorted values, which covers it in at least 95% of samples.

    A value lies below the true median with probability 1/2, so the count of those below is binomial. Too few values
    (under 6) have no such interval.
    """
    from scipy import stats

    ordered, count = sorted(values), len(values)
    outside = int(stats.binom.ppf(0.025, count, 0.5))  # P(fewer than so many lie below) <= 2.5%
    bounds = (ordered[outside - 1], ordered[-outside]) if outside else (float("-inf"), float("inf"))
    return Interval(statistics.median(ordered), *bounds)


def ratio(slow: Sequence[float], quick: Sequence[float]) -> Interval:
    """How many times faster: the ratio of two times of the same rounds, with its 95% interval.

    From six rounds on the median with the interval of `median`. With fewer rounds the geometric mean with Student's t
    interval of the logarithms. One round has no interval.
    """
    each = [a / b for a, b in zip(slow, quick, strict=True)]
    if len(each) >= FEWEST:
        return median(each)
    logs = student([math.log(one) for one in each])
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(min(logs.high, 700.0)))


def shown(found: Interval, digits: int = 2, unit: str = "x") -> str:
    """`2.4x [2.3, 2.6]`; without brackets if there is no interval."""
    middle = f"{found.mean:.{digits}f}{unit}"
    if found.low <= 0 or found.high > 1e6:
        return middle
    return f"{middle} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def bootstrap(
    differences: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0, draws: int = 10_000
) -> Interval:
    """Percentile bootstrap interval of a (weighted) mean of many paired differences (one an example)."""
    values = np.asarray(differences, dtype=np.float64)  # (N,)
    shares = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)  # (N,)
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(draws // 500):
        drawn = generator.integers(0, len(values), (500, len(values)))  # (500, N)
        means.append((values * shares)[drawn].sum(axis=1) / shares[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(np.average(values, weights=shares)), float(low), float(high))
