"""The text of an experiment's status: one line per verdict, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterator

from turret.experiments.analyze import Against, Analysis, ArmAnalysis
from turret.experiments.experiment import Arm, Experiment, duration_text
from turret.experiments.rows import EventDetail
from turret.experiments.validity import NEEDED


def verdicts(analysis: Analysis) -> Iterator[str]:
    """One line per verdict, the most important first."""
    if analysis.void:
        yield why_void(analysis)
        for each in analysis.arms:
            if each.against is not None and each.against.if_alike in ("better", "worse"):
                who = f"{each.arm.name} ({each.version})"
                yield f"{who} was {each.against.if_alike} than control before that: this verdict is taken back"
        return
    for each in analysis.arms:
        if each.against is None:
            continue
        if not each.arm.live:
            why = _last_reason(analysis, "drop", each.arm.name) or "by a guard"
            yield f"{each.arm.name} ({each.version}) was rolled back: {why}"
        else:
            yield _verdict(each, each.against)


def advice(analysis: Analysis) -> str:
    """What to do next."""
    experiment, decision = analysis.experiment, analysis.decision
    name = experiment.adapter
    if experiment.state == "ended":
        how = (experiment.verdict or {}).get("why")
        return f"nothing: it has ended{f' ({how})' if how else ''}; `turret experiment start {name}` starts another"
    if decision.action == "hold":
        return (
            "find out how the arms differ (failing answers, missing or late outcomes, caches, robots); "
            f"then `turret experiment stop {name}` and start a new one: this one stays void"
        )
    if decision.action == "drop":
        return f"roll back {decision.arm}, {decision.why}: run `turret experiment settle {name}`, or let a server do it"
    judged = [each for each in analysis.arms if each.against and each.arm.live]
    if turned := [each for each in judged if each.against and each.against.turned]:
        return (
            f"do not promote {turned[0].arm.name}: find out what changed, then `turret experiment stop {name}` and "
            "start a new one"
        )
    better = [each for each in judged if each.against and each.against.verdict == "better"]
    if better:
        best = max(better, key=lambda each: each.against.better if each.against else 0.0)
        command = f"`turret experiment stop {name} --promote {best.arm.name}`"
        if (refused := _last_reason(analysis, "refused", best.arm.name)) is not None:
            return f"{best.arm.name} is better, and was not promoted: {refused}: fix that, then {command}"
        return f"{command} gives {best.version} the alias {experiment.alias}{_discovery(analysis)}"
    if alike := [each for each in judged if each.against and each.against.if_alike != each.against.verdict]:
        return (
            f"send an outcome for every unit, or wait: missing outcomes could explain the difference of "
            f"{alike[0].arm.name}; `turret experiment stop {name} --promote {alike[0].arm.name}` or `--rollback` "
            "decides without a verdict"
        )
    if any(each.against and each.against.verdict == "worse" for each in judged):
        return f"`turret experiment stop {name} --rollback` keeps {experiment.alias} at {analysis.arms[0].version}"
    if not any(each.outcomes for each in analysis.arms) and any(arm.live for arm in experiment.candidates):
        return (
            "send outcomes: `turret experiment outcome`, or POST them to the server; there is no evidence without them"
        )
    if not any(arm.live for arm in experiment.candidates):
        return f"compare the shadows with the control, then `turret experiment stop {name}`"
    share = experiment.next_share()
    wider = f", or send more traffic: `turret experiment ramp {name}` goes to {share:.0%}" if share is not None else ""
    return f"wait{wider}; you may look as often as you like"


def traffic_split(experiment: Experiment) -> str:
    """The current split, such as `candidate 20% (planned 5% → 20% → 50%)`."""
    parts = [f"{arm.name} {_percent(experiment.weights.get(arm.name, 0.0))}" for arm in experiment.arms if _shown(arm)]
    planned = (
        f" (planned {' → '.join(_percent(share) for share in experiment.steps)})" if len(experiment.steps) > 1 else ""
    )
    return ", ".join(parts) + planned


def outcome_lifetime(experiment: Experiment) -> str:
    """How long outcomes count."""
    if experiment.outcome_ttl is None:
        return "count at any time"
    ttl = duration_text(experiment.outcome_ttl)
    return f"count for {ttl} after the first answer; after that a unit without one is missing"


def missing_outcomes_text(experiment: Experiment) -> str:
    """How many missing outcomes a verdict must bear."""
    if not experiment.missing_bound:
        return "taken to be like the others (--missing-bound 0)"
    return f"a verdict holds although up to {_percent(experiment.missing_bound)} of an arm's units hide a bad outcome"


def guards(experiment: Experiment) -> str:
    """What happens automatically."""
    limits, conditions = experiment.guards, []
    if limits.worse_by is not None and experiment.candidates:
        conditions.append("worse" if limits.worse_by == 0 else f"worse by more than {limits.worse_by:g}")
    if limits.max_errors is not None:
        conditions.append(f"over {_percent(limits.max_errors)} errors and more than control")
    if limits.max_seconds is not None:
        conditions.append(f"over {limits.max_seconds:g} s for more than 5% of answers and more often than control")
    back = (
        f"rolled back automatically when {', or '.join(conditions)}"
        if conditions
        else "never rolled back automatically"
    )
    forth = (
        f"a better one gets {experiment.alias} automatically when it is a discovery"
        if limits.promote
        else "promoted only by a person"
    )
    return f"{back}; {forth}"


def event(verb: str, detail: EventDetail) -> str:
    """One entry of the history, without its time."""
    if verb == "start":
        return "started: " + ", ".join(f"{arm} {version}" for arm, version in detail.get("arms", {}).items())
    if verb in ("ramp", "drop"):
        now = ", ".join(f"{arm} {_percent(share)}" for arm, share in detail.get("weights", {}).items())
        return f"rolled back {detail.get('arm')}, {detail.get('why')}: {now}" if verb == "drop" else f"ramped: {now}"
    if verb == "void":
        return f"void from now on: {detail.get('why')}"
    words = {"stop": "stopped", "rollback": "rolled back", "promote": "promoted", "refused": "promotion refused"}
    arm = f" {detail['arm']}" if detail.get("arm") else ""
    moved = f" ({detail['moved']})" if detail.get("moved") else ""
    why = f": {detail['why']}" if detail.get("why") else ""
    return f"{words.get(verb, verb)}{arm}{why}{moved}"


# --- verdicts ---------------------------------------------------------------------------------------------------------


def why_void(analysis: Analysis) -> str:
    """Why the arms cannot be compared, as it was first recorded."""
    if analysis.recorded is not None:
        return str(analysis.recorded.get("why"))
    check = analysis.alarm or ""
    live = [each for each in analysis.arms if each.arm.role != "shadow"]
    if check == "units":
        counts = ", ".join(f"{each.arm.name} {analysis.first_answers.get(each.arm.name, 0)}" for each in live)
        what = f"SAMPLE RATIO MISMATCH: units are not split as planned ({counts})"
    elif check == "outcomes":
        counts = ", ".join(
            f"{each.arm.name} {each.outcomes} of {each.units} units, {each.missing} missing" for each in live
        )
        what = f"OUTCOMES MISSING: the arms' shares of outcomes differ from their shares of units ({counts})"
    else:
        delays = ", ".join(f"{each.arm.name} half within {duration_text(each.half_within or 0.0)}" for each in live)
        what = f"OUTCOMES DELAYED: they take longer in one arm than in another ({delays})"
    evidence = f"evidence {analysis.checks[check]:.3g}, an alarm needs {NEEDED:.3g}"
    return f"{what}; {evidence}: no verdict, because the units of the arms are not comparable"


def _verdict(each: ArmAnalysis, against: Against) -> str:
    who = f"{each.arm.name} ({each.version})"
    if against.if_alike not in ("better", "worse"):
        most = max(against.better, against.worse)
        return f"{who}: not decided yet; the highest evidence was {most:.2g}, a verdict needs {against.needed:.3g}"
    claim = f"{who} {'is' if not against.turned else 'was'} {against.if_alike} than control"
    if against.turned and against.since is not None:
        return (
            f"{claim} at its verdict, but the {against.since.outcomes} outcomes since then have reversed it "
            f"(difference {against.since.difference or 0.0:+.3f}): the verdict has turned"
        )
    peak = against.better if against.if_alike == "better" else against.worse
    lost = against.now < max(against.needed, peak / against.needed)
    fell = f"; its evidence fell from {peak:.3g} to {against.now:.2g}" if lost else ""
    level = f"false winners stay below {_percent(1 / against.needed)} of experiments, however often you look"
    missing = against.missing
    if not missing.share:
        return f"{claim}: {level}{fell}"
    bears = math.floor(missing.tipping * each.units)
    if missing.holds:
        return (
            f"{claim}, also if the outcomes of {bears} of its {each.units} units are missing because of what they are: "
            f"{level}{fell}"
        )
    return (
        f"{who}: no verdict. It is {against.if_alike} than control if missing outcomes are like the others; but "
        f"{each.units - each.outcomes} of its {each.units} units sent none, and this bears only {bears} that are "
        f"missing because of what they are; --missing-bound asks for {math.ceil(missing.assumed * each.units)}{fell}"
    )


def _discovery(analysis: Analysis) -> str:
    """The evidence that is missing for a discovery among all experiments; empty if none is."""
    evidence = analysis.evidence
    if analysis.discovery is None or evidence is None or evidence >= analysis.discovery:
        return ""
    promoted = "; then it is promoted automatically" if analysis.experiment.guards.promote else ""
    return (
        f", or wait: evidence of {math.exp(analysis.discovery):.3g} makes it a discovery among all experiments here, "
        f"now it is {math.exp(evidence):.3g}{promoted}"
    )


def _last_reason(analysis: Analysis, verb: str, arm: str) -> str | None:
    """Why the last event of that kind happened to an arm; None if there was none."""
    found = (each["detail"] for each in reversed(analysis.history) if each["verb"] == verb)
    return next((str(detail.get("why")) for detail in found if detail.get("arm") == arm), None)


def _shown(arm: Arm) -> bool:
    return arm.role != "shadow" and arm.live


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
