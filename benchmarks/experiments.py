"""Evidence that may be looked at any time keeps its level; what that costs, at equal power, against a fixed test.

    python benchmarks/experiments.py --report
    python benchmarks/experiments.py                  # a few minutes on one core
    python benchmarks/experiments.py --rates other --only late_outages missing advice

Six simulations:

- verdicts: experiments with binary outcomes, with no difference (also with a base rate that drifts while traffic ramps
  5%, 20%, 50%) and with known ones. `z, peeking` is the two-proportion z-test looked at every 50 units from the 100th
  on. `fixed` is the number of units that this test needs, looked at once, to find the difference in 80% of experiments;
  `equal power` the number that the evidence needs to have found it in 80% too.
- discoveries: stores of 20 experiments of which 4 have a real difference. Each ends by itself: at its own verdict, or
  once it is also a discovery among all.
- outages: one answer in a hundred is an error, until an outage begins, of both arms or of the candidate alone. The
  setting says when it begins and how many answers then fail.
- missing outcomes: a share of the units sends no outcome, and the candidate's dissatisfied users a little less often
  than all others. Is there a verdict if missing outcomes are taken to be like the others, and with the bound on those
  that are not?
- advice: comparisons that are undecided, repeated with as many more seeds and examples as the verdict asks for.
- other mix: both arms tell as many outcomes, as quickly, and of one arm they are mostly the good ones.
With `--rates other` outages, missing outcomes and comparisons have rates that no rule of the program was chosen on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import record
from scipy.stats import norm

from turret.compare.verdict import judge
from turret.experiments import analyze, evidence, validity
from turret.experiments.evidence import OutcomeTally
from turret.experiments.experiment import MISSING_BOUND, duration_text
from turret.experiments.guarding import Watch
from turret.experiments.validity import SampleRatio
from turret.statistics import EProcess
from turret.timestamp import timestamp

NAME = "experiments"
CLAIM = "evidence that may be looked at any time keeps its level, and costs units against a test at a fixed end"
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
    (0.03, 0.045, False, EVEN, 20000),
)
POWER = 0.8
REAL, ALL = 4, 20  # experiments of a store
BASE, BETTER, MOST = 0.3, 0.4, 6000  # chances without and with a real difference, and the most units
BOUND, NORMAL, LASTS = 0.02, 0.01, 120  # shares of errors: the guard's, and usually; seconds of an outage
OUTAGES = (  # who fails, the second at which it begins, share of errors, answers per second, how many times simulated
    ("candidate alone", 20, 0.5, 10, 1.0),
    ("candidate alone", 300, 0.5, 10, 1.0),
    ("candidate alone", 3600, 0.5, 10, 0.3),
    ("candidate alone", 86400, 0.5, 10, 0.05),
    ("candidate alone", 20, 0.2, 10, 0.5),
    ("candidate alone", 3600, 0.2, 10, 0.2),
    ("candidate alone", 3600, 0.2, 50, 0.2),
    ("both arms", 20, 0.5, 10, 1.0),
    ("both arms", 3600, 0.5, 10, 0.3),
)
OTHER_BOUND, OTHER_NORMAL = 0.03, 0.004
OTHER_OUTAGES = (
    ("candidate alone", 45, 0.35, 4, 1.0),
    ("candidate alone", 900, 0.35, 4, 0.5),
    ("candidate alone", 7200, 0.35, 4, 0.1),
    ("candidate alone", 1800, 0.12, 25, 0.3),
    ("both arms", 700, 0.35, 25, 0.5),
)
ADVICE = (  # seeds, examples, points by which seeds, examples and both differ, and true differences; the margin
    (3, 150, 1.1, 14, 18, 2, 1.5),
    (4, 120, 2.2, 12, 16, 3, 2),
)
OTHER_ADVICE = (
    (5, 250, 0.6, 10, 22, 1.5, 1),
    (3, 400, 1.8, 16, 12, 2.5, 1.5),
    (7, 100, 1.2, 13, 20, 3, 2.5),
    (2, 300, 0.8, 9, 25, 2, 2),
)
MOST_DIFFERENCES = 100_000  # seeds times examples of advice that is followed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=200, help="simulated for each setting (default 200)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--report", action="store_true", help="only print the table of what is kept")
    parser.add_argument("--rates", choices=("first", "other"), default="first")
    parser.add_argument("--only", nargs="+", choices=SIMULATED, default=SIMULATED, help="default: all")
    options = parser.parse_args()
    if not options.report:
        run: dict[str, Any] = {"experiments": options.experiments, "seed": options.seed, "alpha": ALPHA}
        run["rates"] = options.rates
        run |= {name: simulate(options) for name, simulate in SIMULATED.items() if name in options.only}
        run["machine"] = record.machine(threads=1)
        record.keep(NAME, CLAIM, run)
    _report()


def _verdicts(options: argparse.Namespace) -> list[dict[str, Any]]:
    return [_measure(setting, options) for setting in SETTINGS]


def _discoveries(options: argparse.Namespace) -> dict[str, Any]:
    numbers = range(options.experiments // 10)
    return {rule: [_store(options.seed, number, rule) for number in numbers] for rule in RULES}


def _outages(options: argparse.Namespace) -> list[dict[str, Any]]:
    found, other = [], options.rates == "other"
    bound, normal = (OTHER_BOUND, OTHER_NORMAL) if other else (BOUND, NORMAL)
    for who, begins, share, rate, part in OTHER_OUTAGES if other else OUTAGES:
        numbers = range(round(part * options.experiments))
        seconds = [_outage(options.seed, number, who, begins, share, rate, bound, normal) for number in numbers]
        found.append({"who": who, "begins": begins, "share": share, "rate": rate, "seconds": seconds})
    return found


def _missed(options: argparse.Namespace) -> list[dict[str, Any]]:
    names, numbers = ("good", "effect", "answer", "less", "units"), range(options.experiments // 4)
    return [
        {**dict(zip(names, each, strict=True)), "found": [_missing(options.seed, number, *each) for number in numbers]}
        for each in (OTHER_MISSING if options.rates == "other" else MISSING)
    ]


def _advised(options: argparse.Namespace) -> list[dict[str, Any]]:
    names = ("seeds", "examples", "by_seed", "by_example", "rest", "means", "margin")
    return [
        {**dict(zip(names, each, strict=True)), "followed": _followed(options.seed, options.experiments // 4, *each)}
        for each in (OTHER_ADVICE if options.rates == "other" else ADVICE)
    ]


def _other_mixes(options: argparse.Namespace) -> list[dict[str, Any]]:
    return [_other_mix(options.seed, number) for number in range(options.experiments)]


SIMULATED = {  # name in the result -> the simulation
    "rows": _verdicts,
    "discoveries": _discoveries,
    "late_outages": _outages,
    "missing": _missed,
    "advice": _advised,
    "other_mix": _other_mixes,
}


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
    tally = OutcomeTally.empty(binary=binary, margin=None)
    for start in range(0, len(y), LOOK):
        end = start + LOOK
        tally = tally.after(arm[start:end], y[start:end], share[start:end])
        if _reached(tally.better) or _reached(tally.worse):
            return end
    return None


def _reached(process: EProcess) -> bool:
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


# --- discoveries ----------------------------------------------------------------------------------------------------

RULES = ("own verdict", "discovery")


def _store(seed: int, number: int, rule: str) -> dict[str, Any]:
    """Twenty experiments that run at the same time; each ends by itself, by one rule or the other."""
    paths = [_evidence(seed, number, place) for place in range(ALL)]
    ended: list[int | None] = [None] * ALL
    now = [0.0] * ALL
    for look in range(MOST // LOOK):
        for place, path in enumerate(paths):
            if ended[place] is None:
                now[place] = path[look][0]
        for place, path in enumerate(paths):
            verdict = path[look][1]
            if ended[place] is None and verdict is not None:
                enough = evidence.evidence_needed(now[:place] + now[place + 1 :], ALPHA)
                if rule == "own verdict" or verdict == "worse" or now[place] >= enough:
                    ended[place] = (look + 1) * LOOK
    named = evidence.discovered({str(place): log for place, log in enumerate(now)}, ALPHA)
    real = sum(int(place) < REAL for place in named)
    return {"real": real, "false": len(named) - real, "units": [end or MOST for end in ended[:REAL]]}


def _evidence(seed: int, number: int, place: int) -> list[tuple[float, str | None]]:
    """After each look: the logarithm of the evidence, and the verdict. The first experiments have a real difference."""
    generator = np.random.default_rng([seed, number, place])
    arm = (generator.random(MOST) < 0.5).astype(np.int64)
    chance = np.where(arm == 1, BETTER if place < REAL else BASE, BASE)
    y, share = (generator.random(MOST) < chance).astype(np.float64), np.full(MOST, 0.5)
    tally, found = OutcomeTally.empty(binary=True, margin=None, decides=analyze.deciding_evidence(ALPHA)), []
    for start in range(0, MOST, LOOK):
        some = slice(start, start + LOOK)
        tally = tally.after(arm[some], y[some], share[some])
        found.append((tally.equality(), tally.verdict))
    return found


# --- outages --------------------------------------------------------------------------------------------------------


def _outage(
    seed: int, number: int, who: str, begins: int, share: float, rate: int, bound: float, normal: float
) -> int | None:
    """The second of the outage in which the guard rolled the candidate back; below 1 is a false alarm."""
    generator, watch = np.random.default_rng([seed, number, begins]), Watch("control", {"errors": bound})
    splits = [(timestamp(0), {"control": 0.5, "candidate": 0.5})]
    for second in range(begins + LASTS):
        rows, candidate = [], int(generator.binomial(rate, 0.5))
        for arm, answers in (("candidate", candidate), ("control", rate - candidate)):
            hit = second >= begins and (arm == "candidate" or who == "both arms")
            errors = int(generator.binomial(answers, share if hit else normal))
            sums = {"errors": errors, "slow": 0, "seconds": 0.0, "compared": 0, "agreed": 0}
            rows.append(SimpleNamespace(id=second, at=timestamp(second), arm=arm, answers=answers, **sums))
        watch.read(rows, splits)
        if watch.arms["candidate"].detectors[0].alarm:
            return second - begins + 1
    return None


# --- missing outcomes -----------------------------------------------------------------------------------------------

MISSING = (  # chance of a good outcome, the candidate's gain, share that answers, dissatisfied users' loss of it, units
    (0.8, 0.0, 0.3, 0.15, 60_000),
    (0.7, 0.0, 0.2, 0.12, 80_000),
    (0.9, 0.0, 0.5, 0.15, 60_000),
    (0.7, 0.0, 0.8, 0.1, 40_000),
    (0.3, 0.05, 0.6, 0.0, 40_000),
    (0.3, 0.1, 0.6, 0.0, 10_000),
    (0.3, 0.2, 0.6, 0.0, 10_000),
)
OTHER_MISSING = (
    (0.6, 0.0, 0.4, 0.1, 60_000),
    (0.85, 0.0, 0.25, 0.2, 80_000),
    (0.5, 0.0, 0.7, 0.05, 50_000),
    (0.4, 0.07, 0.5, 0.0, 30_000),
    (0.15, 0.12, 0.7, 0.0, 20_000),
)


def _missing(
    seed: int, number: int, good: float, effect: float, answer: float, less: float, units: int
) -> dict[str, Any]:
    """Whether there is a verdict, how many missing outcomes it bears, and whether an alarm is raised."""
    generator = np.random.default_rng([seed, number])
    arm = (generator.random(units) < 0.5).astype(np.int64)
    y = generator.random(units) < good + effect * arm
    told = generator.random(units) < np.where((arm == 1) & ~y, answer * (1 - less), answer)
    tally = OutcomeTally.empty(binary=True, margin=None, decides=analyze.deciding_evidence(ALPHA))
    tally = tally.after(arm[told], y[told].astype(np.float64), np.full(int(told.sum()), 0.5))
    planned = {0: {"control": 0.5, "candidate": 0.5}}
    seen = [((0, int(not each)), "candidate" if a else "control") for a, each in zip(arm, told, strict=True)]
    alarm = SampleRatio().after(seen, planned).process.peak >= math.log(validity.NEEDED)
    return {"verdict": tally.verdict, "tipping": tally.tipping("better"), "alarm": bool(alarm)}


# --- advice that is followed -----------------------------------------------------------------------------------------


def _followed(
    seed: int,
    most: int,
    seeds: int,
    examples: int,
    by_seed: float,
    by_example: float,
    rest: float,
    means: float,
    margin: float,
) -> list[tuple[float, bool]]:
    """(share of cases that the advice says, whether it settled it) of at most so many undecided comparisons."""
    rng, found = np.random.default_rng([seed, seeds, examples]), list[tuple[float, bool]]()
    for _ in range(20 * most):
        key, mean = int(rng.integers(2**31)), means * rng.standard_normal()

        def differences(some: int, count: int, key: int = key, mean: float = mean) -> Any:
            """(S, N); those of before stay when seeds and examples are added."""
            rows = by_seed * np.random.default_rng([key, 1]).standard_normal((some, 1))
            columns = by_example * np.random.default_rng([key, 2]).standard_normal((1, count))
            own = [np.random.default_rng([key, 3, each]).standard_normal(count) for each in range(some)]
            return (mean + rows + columns + rest * np.stack(own)) / 100

        asked = judge(differences(seeds, examples), margin, rng, resamples=300)
        more, wider = seeds + (asked.more_seeds or 0), examples + (asked.more_examples or 0)
        if asked.word != "undecided" or (more, wider) == (seeds, examples) or more * wider > MOST_DIFFERENCES:
            continue
        settled = judge(differences(more, wider), margin, rng, resamples=300).word != "undecided"
        found.append((float(asked.settles or 0.0), bool(settled)))
        if len(found) == most:
            break
    return found


# --- outcomes of another mix ----------------------------------------------------------------------------------------


def _other_mix(seed: int, number: int) -> dict[str, Any]:
    """No difference, half of the outcomes are told at once; of the candidate those that are good, as far as they go."""
    generator = np.random.default_rng([seed, number])
    arm = (generator.random(MOST) < 0.5).astype(np.int64)
    good = generator.random(MOST) < BASE
    told = np.where(arm == 1, good | (generator.random(MOST) < (0.5 - BASE) / (1 - BASE)), generator.random(MOST) < 0.5)
    tally = OutcomeTally.empty(binary=True, margin=None, decides=analyze.deciding_evidence(ALPHA))
    tally = tally.after(arm[told], good[told].astype(np.float64), np.full(int(told.sum()), 0.5))
    planned = {0: {"control": 0.5, "candidate": 0.5}}
    seen = [((0, int(not each)), "candidate" if a else "control") for a, each in zip(arm, told, strict=True)]
    peak = SampleRatio().after(seen, planned).process.peak
    return {"verdict": tally.verdict, "alarm": bool(peak >= math.log(validity.NEEDED))}


# --- what is said of it ---------------------------------------------------------------------------------------------


def _report() -> None:
    for section in (verdicts, named, guarded, missed, advised, mixed):
        print(section(), end="\n\n")


def newest(simulation: str, rates: str = "first") -> Any:
    """The newest result of a simulation; empty if there is none."""
    found = [run for run in record.load(NAME) if simulation in run and run.get("rates", "first") == rates]
    return found[-1][simulation] if found else []


def both(simulation: str) -> Iterator[tuple[str, Any]]:
    """Every row with its rates: those that were looked at first, and others."""
    return ((rates, row) for rates in ("first", "other") for row in newest(simulation, rates))


def verdicts() -> str:
    """A row a setting: wrong verdicts, or those that were found and the units that took."""
    header = ["chances", "traffic", "most units", "binary", "bounded", "z, peeking", "fixed", "equal power", "times"]
    rows = []
    for row in newest("rows"):
        chances = f"{row['control']:g} and {row['candidate']:g}{', drifting' if row['drift'] else ''}"
        traffic = " → ".join(f"{100 * share:g}%" for share in row["ramp"])
        differs = row["control"] != row["candidate"]
        said = [_said(row["stopped"][kind], differs) for kind in ("binary", "bounded")]
        z = "" if differs else _said(row["stopped"]["z"], differs)
        equal = equal_power(row["stopped"]["binary"]) if row["fixed"] else None
        times = "" if equal is None else f"{equal / row['fixed']:.1f}x"
        rows.append([chances, traffic, row["most"], *said, z, row["fixed"] or "", equal or "", times])
    return record.table(header, rows)


def equal_power(stopped: list[int | None]) -> int | None:
    """Units after which 80% of the experiments had found the difference."""
    units = sorted(math.inf if each is None else each for each in stopped)
    found = units[math.ceil(POWER * len(units)) - 1]
    return None if math.isinf(found) else int(found)


def named() -> str:
    """A row a rule: how many of the real differences are discoveries, and how many are false."""
    rows = []
    for rule, stores in newest("discoveries").items():
        real = sum(each["real"] for each in stores) / (REAL * len(stores))
        false = sum(each["false"] / max(each["real"] + each["false"], 1) for each in stores) / len(stores)
        units = sorted(units for each in stores for units in each["units"])
        rows.append([f"its {rule}", len(stores), f"{real:.0%}", f"{false:.1%}", units[len(units) // 2]])
    return record.table(["ends at", "stores", "real differences found, of 4", "false discoveries", "units"], rows)


def guarded() -> str:
    """A row an outage: how often the candidate is rolled back, and after how many seconds."""
    rows = []
    for rates, run in both("late_outages"):
        after = sorted(second for second in run["seconds"] if second is not None and second >= 1)
        early = sum(second is not None and second < 1 for second in run["seconds"])
        gone = len(after) / len(run["seconds"])
        median, most = (f"{after[int(part * len(after))]} s" if after else "" for part in (0.5, 0.95))
        begins = duration_text(float(run["begins"]))
        rows.append([rates, run["who"], begins, f"{run['share']:.0%}", run["rate"], len(run["seconds"])])
        rows[-1] += [early, f"{gone:.0%}", median, most]
    header = [
        "rates",
        "outage of",
        "begins after",
        "answers that fail",
        "answers per second",
        "simulated",
        "false alarms before",
    ]
    return record.table([*header, "rolled back", "median delay", "95% within"], rows)


def missed() -> str:
    """A row a setting: verdicts without and with the bound on missing outcomes."""
    rows = []
    for rates, run in both("missing"):
        found = run["found"]
        fewer = run["less"] * (1 - run["good"])
        alike = [each["verdict"] == "better" and not each["alarm"] for each in found]
        holds = [bare and each["tipping"] >= MISSING_BOUND for bare, each in zip(alike, found, strict=True)]
        shares = [f"{sum(some) / len(found):.0%}" for some in ([each["alarm"] for each in found], alike, holds)]
        differs = f"{run['effect']:+g}" if run["effect"] else "none"
        rows.append([rates, differs, f"{run['answer']:.0%}", f"{fewer:.1%}", run["units"], len(found), *shares])
    header = ["rates", "real difference", "users who answer", "fewer of the candidate's", "units", "simulated", "alarm"]
    return record.table([*header, "better, if alike", "better, with the bound of 5%"], rows)


def advised() -> str:
    """A row a design: how often the advice said that it would settle it, and how often it did."""
    rows = []
    for rates, run in both("advice"):
        said, settled = zip(*run["followed"], strict=True)
        count, share = len(said), sum(settled) / len(said)
        error = 1.96 * math.sqrt(max(share * (1 - share), 1 / count) / count)
        interval = f"{share:.0%} [{max(0.0, share - error):.0%}, {min(1.0, share + error):.0%}]"
        rows.append([rates, run["seeds"], run["examples"], f"{run['margin']:g}", count])
        rows[-1] += [f"{sum(said) / count:.0%}", interval]
    header = ["rates", "seeds", "test examples", "margin, points", "undecided comparisons"]
    return record.table([*header, "settled, as the advice says", "settled, once followed"], rows)


def mixed() -> str:
    """False verdicts, and alarms, where one arm's outcomes are of another mix."""
    found = newest("other_mix")
    false = sum(each["verdict"] is not None for each in found) / len(found)
    seen = sum(each["alarm"] for each in found) / len(found)
    header = ["outcomes of the candidate", "false verdicts", "noticed"]
    return record.table(header, [["as many, as quick, other mix", f"{false:.0%}", f"{seen:.0%}"]])


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
