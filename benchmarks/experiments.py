"""Evidence that may be looked at any time keeps its level, and costs few more outcomes than a test at a fixed end.

    python benchmarks/experiments.py --report
    python benchmarks/experiments.py                  # about a minute on one core

Simulated experiments with binary outcomes: no difference (also with a base rate that drifts while traffic ramps 5%,
20%, 50%), and known differences. `z, peeking` is the two-proportion z-test looked at every 50 units from the 100th
on; `fixed` is the number of units that this test needs, looked at once, to find the difference in 80% of experiments.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import record
from scipy.stats import norm

from turret.experiments.evidence import Process, Tally

NAME = "experiments"
CLAIM = (
    "evidence that may be looked at any time keeps its level, and costs few more outcomes than a test at a fixed end"
)
ALPHA = 0.05
LOOK = 100  # units between two looks; a look after every unit would find no more
EVEN, RAMP = (0.5,), (0.05, 0.2, 0.5)
SETTINGS = (  # control, candidate, drift, ramp, most units
    (0.3, 0.3, False, EVEN, 5000),
    (0.3, 0.3, True, RAMP, 5000),
    (0.03, 0.03, False, EVEN, 5000),
    (0.3, 0.4, False, EVEN, 5000),
    (0.3, 0.35, False, EVEN, 10000),
    (0.3, 0.35, False, RAMP, 10000),
    (0.03, 0.045, False, EVEN, 10000),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=200, help="simulated for each setting (default 200)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--report", action="store_true", help="only print the table of what is kept")
    options = parser.parse_args()
    if not options.report:
        rows = [_measure(setting, options) for setting in SETTINGS]
        run = {"experiments": options.experiments, "seed": options.seed, "alpha": ALPHA, "rows": rows}
        run["machine"] = record.machine(threads=1)
        record.keep(NAME, CLAIM, run)
    _report()


def _measure(setting: tuple[float, float, bool, tuple[float, ...], int], options: argparse.Namespace) -> dict[str, Any]:
    control, candidate, drifts, ramp, most = setting
    stopped: dict[str, list[int | None]] = {"binary": [], "bounded": [], "z": []}
    for number in range(options.experiments):
        generator = np.random.default_rng([options.seed, number])
        share = np.repeat(ramp, -(-most // len(ramp)))[:most]
        base = np.linspace(0.5, 1.5, most) if drifts else np.ones(most)
        arm = (generator.random(most) < share).astype(np.int64)
        y = (generator.random(most) < base * np.where(arm == 1, candidate, control)).astype(np.float64)
        for kind in ("binary", "bounded"):
            stopped[kind].append(_stopped(arm, y, share, kind == "binary"))
        stopped["z"].append(_z_stopped(arm, y))
    return {
        "control": control,
        "candidate": candidate,
        "drift": drifts,
        "ramp": list(ramp),
        "most": most,
        "stopped": stopped,
        "fixed": _fixed(control, candidate) if candidate != control and len(ramp) == 1 else None,
    }


def _stopped(arm: Any, y: Any, share: Any, binary: bool) -> int | None:
    """The look, in units, at which a verdict stood."""
    tally = Tally.empty(binary=binary, margin=None)
    for start in range(0, len(y), LOOK):
        end = start + LOOK
        tally = tally.after(arm[start:end], y[start:end], share[start:end])
        if _reached(tally.better) or _reached(tally.worse):
            return end
    return None


def _reached(process: Process) -> bool:
    return process.peak >= math.log(2 / ALPHA)


def _z_stopped(arm: Any, y: Any) -> int | None:
    n1, s1, n, s = np.cumsum(arm), np.cumsum(arm * y), np.arange(1, len(y) + 1), np.cumsum(y)
    n0, s0, pooled = n - n1, s - s1, s / n
    looks = np.arange(99, len(y), 50)
    looks = looks[(n0[looks] > 0) & (n1[looks] > 0) & (pooled[looks] > 0) & (pooled[looks] < 1)]
    error = np.sqrt(pooled * (1 - pooled))[looks] * np.sqrt(1 / n0[looks] + 1 / n1[looks])
    found = np.abs(s1[looks] / n1[looks] - s0[looks] / n0[looks]) / error > norm.ppf(1 - ALPHA / 2)
    return int(looks[np.argmax(found)] + 1) if found.any() else None


def _fixed(control: float, candidate: float) -> int:
    """Units of a two-sided z-test with equal arms, 80% power."""
    variance = control * (1 - control) + candidate * (1 - candidate)
    return math.ceil(2 * (norm.ppf(1 - ALPHA / 2) + norm.ppf(0.8)) ** 2 * variance / (candidate - control) ** 2)


def _report() -> None:
    header = ["chances", "traffic", "most units", "binary", "bounded", "z, peeking", "fixed"]
    for run in record.load(NAME):
        rows = []
        for row in run["rows"]:
            chances = f"{row['control']:g} and {row['candidate']:g}{', drifting' if row['drift'] else ''}"
            traffic = " → ".join(f"{100 * share:g}%" for share in row["ramp"])
            said = [
                _said(row["stopped"][kind], row["control"] != row["candidate"]) for kind in ("binary", "bounded", "z")
            ]
            rows.append([chances, traffic, row["most"], *said, row["fixed"] or ""])
        print(record.table(header, rows))


def _said(stopped: list[int | None], differs: bool) -> str:
    """The share with a verdict; where there is something to find, the median and the 90th percentile of units."""
    share = sum(units is not None for units in stopped) / len(stopped)
    if not differs:
        return f"{share:.1%} wrong"
    units = sorted(math.inf if each is None else each for each in stopped)
    median, most = units[len(units) // 2], units[int(0.9 * len(units))]
    return f"{share:.0%}; {median:g} ({most:g})".replace("(inf)", "(not within)")


if __name__ == "__main__":
    main()
