"""What a person reads of an experiment: the state in a line, then what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from turret.experiments.analyze import Against, Analysis, ArmAnalysis
from turret.experiments.experiment import Experiment, lasting
from turret.experiments.paired import Paired
from turret.experiments.validity import NEEDED


def verdicts(found: Analysis) -> Iterator[str]:
    """A line a verdict, the most important first."""
    experiment = found.experiment
    if found.void:
        yield void(found)
        return
    for each in found.arms:
        if each.against is None:
            continue
        if not each.arm.live:
            yield f"{each.arm.name} ({each.version}) was rolled back: {_why_dropped(found, each.arm.name)}"
        else:
            yield _verdict(experiment, each, each.against)


def advice(found: Analysis) -> str:
    """What to do now."""
    experiment, decision = found.experiment, found.decision
    name = experiment.adapter
    if experiment.state == "ended":
        how = (experiment.verdict or {}).get("why")
        return f"nothing: it has ended{f' ({how})' if how else ''}; `turret experiment start {name}` begins another"
    if decision.action == "hold":
        return (
            "find out how the arms differ (answers that fail, outcomes not told or told late, caches, robots); "
            f"then `turret experiment stop {name}` and begin anew: this one stays void"
        )
    if decision.action == "drop":
        return f"roll {decision.arm} back, {decision.why}: `turret experiment settle {name}` does it, as a server would"
    judged = [each for each in found.arms if each.against and each.arm.live]
    if turned := [each for each in judged if each.against and each.against.turned]:
        return (
            f"do not promote {turned[0].arm.name}: find out what changed, then `turret experiment stop {name}` and "
            "begin anew"
        )
    better = [each for each in judged if each.against and each.against.verdict == "better"]
    if better:
        best = max(better, key=lambda each: each.against.better if each.against else 0.0)
        if refused := _refused(found, best.arm.name):
            return f"{refused}: mend that, then `turret experiment stop {name} --promote {best.arm.name}`"
        command = f"`turret experiment stop {name} --promote {best.arm.name}`"
        return f"{command} gives {best.version} the alias {experiment.alias}{_discovery(found)}"
    if any(each.against and each.against.verdict == "worse" for each in judged):
        return f"`turret experiment stop {name} --rollback` leaves {experiment.alias} to {found.arms[0].version}"
    if not any(each.outcomes for each in found.arms) and any(arm.live for arm in experiment.candidates):
        return "tell outcomes: `turret experiment outcome`, or POST them to the server; without them nothing is learnt"
    if not any(arm.live for arm in experiment.candidates):
        return f"compare what the shadows do beside the control, then `turret experiment stop {name}`"
    share = experiment.next_share()
    wider = f", or send more there: `turret experiment ramp {name}` goes on to {share:.0%}" if share is not None else ""
    return f"wait{wider}; looking does no harm, however often"


def traffic(experiment: Experiment) -> str:
    """`candidate 20% (planned 5% → 20% → 50%)`."""
    parts = [f"{arm.name} {_percent(experiment.weights.get(arm.name, 0.0))}" for arm in experiment.arms if _shown(arm)]
    planned = (
        f" (planned {' → '.join(_percent(share) for share in experiment.steps)})" if len(experiment.steps) > 1 else ""
    )
    return ", ".join(parts) + planned


def lives(experiment: Experiment) -> str:
    """How long an outcome counts."""
    if experiment.outcome_ttl is None:
        return "count however late they come"
    return f"count for {lasting(experiment.outcome_ttl)} after the first answer; a unit without one by then is missing"


def guards(experiment: Experiment) -> str:
    """What happens without being asked."""
    wanted, said = experiment.guards, []
    if wanted.worse_by is not None and experiment.candidates:
        said.append("worse" if wanted.worse_by == 0 else f"worse by more than {wanted.worse_by:g}")
    if wanted.max_errors is not None:
        said.append(f"over {_percent(wanted.max_errors)} errors and more than control")
    if wanted.max_seconds is not None:
        said.append(f"over {wanted.max_seconds:g} s for more than 5% of answers and more often than control")
    back = f"rolled back by itself when {', or '.join(said)}" if said else "never rolled back by itself"
    forth = (
        f"takes {experiment.alias} by itself when a better one is a discovery"
        if wanted.promote
        else "promoted only when asked"
    )
    return f"{back}; {forth}"


def event(verb: str, detail: dict[str, Any]) -> str:
    """One line of the history, after its time."""
    if verb == "start":
        return "started: " + ", ".join(f"{arm} {version}" for arm, version in detail.get("arms", {}).items())
    if verb in ("ramp", "drop"):
        now = ", ".join(f"{arm} {_percent(share)}" for arm, share in detail.get("weights", {}).items())
        return f"rolled {detail.get('arm')} back, {detail.get('why')}: {now}" if verb == "drop" else f"ramped: {now}"
    if verb == "void":
        return f"void from now on: {detail.get('why')}"
    words = {"stop": "stopped", "rollback": "rolled back", "promote": "promoted", "refused": "promotion refused"}
    arm = f" {detail['arm']}" if detail.get("arm") else ""
    moved = f" ({detail['moved']})" if detail.get("moved") else ""
    why = f": {detail['why']}" if detail.get("why") else ""
    return f"{words.get(verb, verb)}{arm}{why}{moved}"


def replayed(found: Paired, a: str, b: str, what: str) -> str:
    """What a replay says, for two lines."""
    low, high, p = f"{found.low:+.3f}", f"{found.high:+.3f}", f"{found.p:.2g}"
    counted = (
        f"{b} is better on {found.only_b}, {a} on {found.only_a}, as good on {found.equal} of {found.examples} "
        "examples "
        f"({what} {found.b:.3f} against {found.a:.3f}: {found.difference:+.3f} [{low}, {high}], {found.test} p={p})"
    )
    return f"{counted}\n{_worth(found, a, b)}"


def _worth(found: Paired, a: str, b: str) -> str:
    if found.verdict == "better":
        return f"{b} is better here: worth live traffic, `turret experiment start`"
    if found.verdict == "worse":
        return f"{b} is worse here: spend no traffic on it"
    half = (found.high - found.low) / 2
    return (
        f"no difference is shown: with {found.examples} examples one under about {half:.3f} would not be; "
        "live traffic, or more examples, would tell"
    )


# --- the inside ------------------------------------------------------------------------------------------------------


def void(found: Analysis) -> str:
    """Why the arms cannot be compared, as it was first written down, and that this is for good."""
    if found.recorded is not None:
        return str(found.recorded.get("why"))
    check = found.alarm or ""
    live = [each for each in found.arms if each.arm.role != "shadow"]
    if check == "units":
        said = ", ".join(f"{each.arm.name} {each.units}" for each in live)
        what = f"SAMPLE RATIO MISMATCH: units did not fall as planned ({said})"
    elif check == "outcomes":
        said = ", ".join(
            f"{each.arm.name} {each.outcomes} of {each.units} units, {each.missing} missing" for each in live
        )
        what = f"OUTCOMES MISSING: they come back from the arms in other shares than units go ({said})"
    else:
        said = ", ".join(f"{each.arm.name} half within {lasting(each.half_within or 0.0)}" for each in live)
        what = f"OUTCOMES DELAYED: they take longer in one arm than in another ({said})"
    evidence = f"evidence {found.checks[check]:.3g}, {NEEDED:.3g} is beyond chance"
    return f"{what}; {evidence}: no verdict, the arms hold no comparable units and all evidence is void"


def _verdict(experiment: Experiment, each: ArmAnalysis, found: Against) -> str:
    who = f"{each.arm.name} ({each.version})"
    level = f"{1 / found.needed:.3g}"
    if found.verdict not in ("better", "worse"):
        most = max(found.better, found.worse)
        return f"{who}: not decided yet; the evidence came to {most:.2g} at most, and {found.needed:.3g} decides"
    claim = f"{who} {'is' if not found.turned else 'was'} {found.verdict} than control"
    if found.turned and found.since is not None:
        return (
            f"{claim} when the verdict came, and the {found.since.outcomes} outcomes since then have taken it back "
            f"(difference {found.since.difference or 0.0:+.3f}): the verdict has turned"
        )
    peak = found.better if found.verdict == "better" else found.worse
    lost = found.now < max(found.needed, peak / found.needed)
    fell = f"; its evidence came to {peak:.3g} and is {found.now:.2g} now" if lost else ""
    return f"{claim}: wrong in at most {level} of experiments, however often one looks{fell}"


def _discovery(found: Analysis) -> str:
    """What is lacking until it is a discovery among all experiments, where something is."""
    evidence = found.evidence
    if found.discovery is None or evidence is None or evidence >= found.discovery:
        return ""
    itself = "; then it is promoted by itself" if found.experiment.guards.promote else ""
    return (
        f", or wait: evidence of {math.exp(found.discovery):.3g} makes it a discovery among all experiments here, "
        f"{math.exp(evidence):.3g} is there{itself}"
    )


def _why_dropped(found: Analysis, arm: str) -> str:
    for each in reversed(found.history):
        if each["verb"] == "drop" and each["detail"].get("arm") == arm:
            return str(each["detail"].get("why"))
    return "as its experiment says"


def _refused(found: Analysis, arm: str) -> str | None:
    for each in reversed(found.history):
        if each["verb"] == "refused" and each["detail"].get("arm") == arm:
            return f"{arm} is better, and was not promoted: {each['detail'].get('why')}"
    return None


def _shown(arm: Any) -> bool:
    return arm.role != "shadow" and bool(arm.live)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
