"""A verdict says how many missing outcomes it can bear, and is given only if that is enough."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import stats

from turret.errors import BadExperiment
from turret.experiments import Guards
from turret.experiments.analyze import deciding_evidence
from turret.experiments.evidence import HIDDEN, OutcomeTally

LEVEL, BOUND = 0.05, 0.05
SALT = "5" * 32  # so that the same units go to the same arms each time


def told(arm, y, answers) -> OutcomeTally:
    """The tally of the units that sent their outcome, at an even split."""
    tally = OutcomeTally.empty(binary=True, margin=None, decides=deciding_evidence(LEVEL))
    return tally.after(arm[answers], y[answers].astype(float), np.full(int(answers.sum()), 0.5))


def test_dissatisfied_users_who_answer_a_little_less_give_no_verdict_and_would_have_given_one() -> None:
    found = []
    for seed in range(10):
        generator = np.random.default_rng(seed)
        arm = (generator.random(40_000) < 0.5).astype(np.int64)
        y = generator.random(40_000) < 0.7  # both versions are equal
        chance = np.where((arm == 1) & ~y, 0.72, 0.8)  # 3% fewer outcomes of the candidate
        found.append(told(arm, y, generator.random(40_000) < chance))
    assert sum(tally.verdict == "better" for tally in found) >= 9  # control: without the bound it is fooled
    assert max(tally.tipping("better") for tally in found) < BOUND


@pytest.mark.parametrize("side", ["better", "worse"])
def test_in_the_worst_case_that_a_bound_allows_false_verdicts_stay_below_the_level(side) -> None:
    """Equal versions; the bad outcomes of 5% of the candidate's units are hidden, and good ones of the control."""
    runs, false = 60, 0
    for seed in range(runs):
        generator = np.random.default_rng([seed, 5])
        arm = (generator.random(4000) < 0.5).astype(np.int64)
        y = generator.random(4000) < 0.5
        raised = 1 if side == "worse" else 0
        hides = np.where(arm == raised, y, ~y)  # half of the units of each arm could be hidden, a tenth of these are
        tally = told(arm, y, ~(hides & (generator.random(4000) < 2 * BOUND)))
        false += tally.tipping(side) >= BOUND
    assert false <= stats.binom.ppf(0.999, runs, LEVEL)


def test_a_large_difference_bears_more_missing_outcomes_than_a_small_one() -> None:
    tips = []
    for good in (0.3, 0.4, 0.5, 0.7):
        generator = np.random.default_rng(1)
        arm = (generator.random(6000) < 0.5).astype(np.int64)
        y = generator.random(6000) < np.where(arm == 1, good, 0.3)
        tips.append(told(arm, y, np.ones(6000, dtype=bool)).tipping("better"))
    assert tips == sorted(tips)
    assert tips[0] == 0.0
    assert tips[-1] == HIDDEN[-1]


def traffic(workspace, rates: dict[str, float], units: int, answer: float, seed: int = 0) -> None:
    """Outcomes of a share `answer` of the units of both arms, drawn without regard to what they are."""
    draw, router = random.Random(seed), workspace.router()
    sent = []
    for number in range(units):
        unit = f"{seed} {number}"
        found = router.assign("news", unit, unit)
        value = int(draw.random() < rates[found.arm])
        if draw.random() < answer:
            sent.append((unit, None, value))
    router.flush()
    workspace.experiment("news").outcomes(sent)


RATES = {"control": 0.3, "candidate": 0.42}


def test_a_verdict_that_missing_outcomes_could_explain_is_kept_apart_and_promotes_nothing(workspace) -> None:
    experiment = workspace.experiment("news")
    experiment.start("news@2", salt=SALT, share=0.5, guards=Guards(promote=True))
    traffic(workspace, RATES, 1600, answer=0.6)
    (settled,) = workspace.settle()
    assert settled.done == ()
    assert settled.experiment.state == "running"
    (said,) = settled.verdicts
    assert said.startswith("candidate (news@2): no verdict. It is better than control if missing outcomes are like the")
    assert "units sent none, and this bears only" in said
    assert settled.next.startswith("send an outcome for every unit, or wait")
    found = settled.as_json()["arms"][1]["against_control"]
    assert (found["verdict"], found["if_missing_are_alike"]) == ("undecided", "better")
    assert found["missing"]["assumed"] == BOUND
    assert found["missing"]["tipping"] < BOUND
    assert found["missing"]["share"] == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("answer", [1.0, 0.6])
def test_units_that_a_ramp_moved_before_their_outcome_do_not_count_as_missing(workspace, answer) -> None:
    experiment, units = workspace.experiment("news"), 400
    experiment.start("news@2", salt=SALT, share=0.05)
    router = workspace.router()
    for number in range(units):
        router.assign("news", f"0 {number}")
    router.flush()
    experiment.ramp(0.5)
    traffic(workspace, RATES, units, answer)
    control, candidate = experiment.status().analysis.arms
    assert control.units + candidate.units == units
    assert candidate.outcomes > 0.05 * units  # control: most of its units were first answered by the other arm
    assert candidate.outcomes <= candidate.units
    silent = [1 - each.outcomes / each.units for each in (control, candidate)]
    assert candidate.against.missing.share == pytest.approx(max(silent))
    assert (candidate.against.missing.share == 0) == (answer == 1)


@pytest.mark.slow
@pytest.mark.parametrize(("bound", "answer"), [(0.0, 0.6), (BOUND, 1.0)])
def test_the_same_outcomes_give_a_verdict_if_none_is_missing_or_a_person_vouches_for_it(
    workspace, bound, answer
) -> None:
    experiment = workspace.experiment("news")
    experiment.start("news@2", salt=SALT, share=0.5, missing_bound=bound, guards=Guards(promote=True))
    traffic(workspace, RATES, 1600 if answer < 1 else 960, answer=answer)
    (settled,) = workspace.settle()
    assert settled.experiment.state == "ended", settled.verdicts
    assert str(workspace.resolve("news")) == "news@2"


def test_a_verdict_says_how_many_missing_outcomes_it_bears(workspace) -> None:
    experiment = workspace.experiment("news")
    experiment.start("news@2", salt=SALT, share=0.5)
    traffic(workspace, {"control": 0.2, "candidate": 0.7}, 800, answer=0.7)
    (said,) = experiment.status().verdicts
    assert "is better than control, also if the outcomes of" in said
    assert "units are missing because of what they are: false winners stay below 5%" in said


@pytest.mark.slow
def test_a_worse_candidate_is_rolled_back_although_outcomes_are_missing(workspace) -> None:
    """The guard protects users: it acts on what the outcomes say."""
    workspace.experiment("news").start("news@2", salt=SALT, share=0.5)
    traffic(workspace, {"control": 0.42, "candidate": 0.3}, 1600, answer=0.6)
    assert workspace.settle()[0].done == ("candidate (news@2) rolled back: its outcomes are worse",)


@pytest.mark.parametrize("bound", [-0.1, 0.5, float("nan")])
def test_a_bound_that_makes_no_sense_is_one_line(workspace, bound) -> None:
    with pytest.raises(BadExperiment, match=r"missing_bound of .*: expected a share of an arm's units from 0 to 0\.2"):
        workspace.experiment("news").start("news@2", missing_bound=bound)
