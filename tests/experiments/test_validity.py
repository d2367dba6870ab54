"""Arms that cannot be compared raise an alarm, and their outcomes stay void."""

from __future__ import annotations

import math
import random
from datetime import datetime

import numpy as np
import pytest
from experiments.conftest import Clock
from scipy import stats

from turret import Workspace
from turret.errors import ExperimentError
from turret.experiments import Guards, Told, outcomes
from turret.experiments.outcomes import Seen
from turret.experiments.validity import SampleRatio
from turret.store.catalog import now

DAY = 86400.0
HALF = {"control": 0.5, "candidate": 0.5}


@pytest.fixture
def clock() -> Clock:
    """A month ago, so an outcome now may be late."""
    clock = Clock()
    clock.now = datetime.fromisoformat(now()).timestamp() - 30 * DAY
    return clock


def units(workspace: Workspace, arms: list[str], when: str | None = None) -> None:
    """Units that were seen in these arms, whatever their hash."""
    experiment = workspace.experiment("news").status().experiment
    first = sum(each["units"] for each in workspace.experiment("news").status().as_json()["arms"])
    seen = [
        Seen(experiment.id, f"{first + place:032x}", arm, experiment.revision, 0.5, when or now())
        for place, arm in enumerate(arms)
    ]
    with workspace.store.database().writing() as connection:
        outcomes.log(connection, seen)


def asked(router, clock: Clock, count: int, waits: dict[str, float], drop: float = 0.0, seed: int = 0) -> None:
    """Units that are answered one after the other; outcomes of each arm come after about these seconds.

    Args:
        drop: the share of the candidate's outcomes that never come.
    """
    draw, told = random.Random(seed), []
    for number in range(count):
        clock.now += 0.1
        found = router.assign("news", f"{seed} {number}", f"{seed} {number}")
        if found.arm == "control" or draw.random() >= drop:
            wait = waits[found.arm] * math.exp(draw.gauss(0, 1))
            told.append((clock.now + wait, f"{seed} {number}", int(draw.random() < 0.5)))
    router.flush()
    told.sort()
    for start in range(0, len(told), 25):
        clock.now = told[start][0]
        router.outcomes([Told(value, receipt=receipt) for _, receipt, value in told[start : start + 25]])


def test_an_alarm_stays_under_balanced_traffic_and_what_was_gathered_is_void(workspace) -> None:
    live = workspace.experiment("news")
    live.start("news@2", share=0.5, guards=Guards(promote=True))
    units(workspace, ["control"] * 40)
    (alarmed,) = workspace.settle()
    assert alarmed.done[0].startswith("SAMPLE RATIO MISMATCH: units are not split as planned (control 40, candidate 0)")
    units(workspace, ["candidate", "control"] * 1500)
    for found in (live.status(), *workspace.settle(), Workspace(workspace.store.root).experiment("news").status()):
        shown = found.as_json()
        assert shown["sample_ratio"]["ok"] is False
        assert shown["void"] == alarmed.done[0]
        assert shown["verdicts"] == [alarmed.done[0]]
        assert shown["decision"]["action"] == "hold"
        assert "start a new one: this one stays void" in found.next
        assert found.done == ()
    with pytest.raises(ExperimentError, match="news#1 is void") as refused:
        live.stop(promote="candidate")
    assert len(str(refused.value)) < 300
    assert live.status().experiment.state == "running"
    assert str(workspace.resolve("news")) == "news@1"
    assert [each["verb"] for each in live.status().analysis.history] == ["start", "void"]
    ended = live.stop()
    assert ended.experiment.verdict["void"] == "units"
    (listed,) = workspace.experiments()
    assert (listed["discovery"], listed["log_evidence"]) == (False, None)
    live.start("news@2", share=0.5)
    assert live.status().as_json()["void"] is None


def test_an_alarm_that_nobody_looked_at_in_time_is_seen_all_the_same(workspace) -> None:
    workspace.experiment("news").start("news@2", share=0.5)
    units(workspace, ["control"] * 40 + ["candidate", "control"] * 1500)
    assert workspace.experiment("news").status().as_json()["sample_ratio"]["ok"] is False


def test_as_many_outcomes_that_come_later_in_one_arm_are_noticed(workspace, router, clock) -> None:
    workspace.experiment("news").start("news@2", share=0.5, guards=Guards(promote=True))
    asked(router, clock, 200, {"control": 600, "candidate": 30_000})
    (found,) = workspace.settle()
    assert found.done[0].startswith(
        "OUTCOMES DELAYED: they take longer in one arm than in another (control half within"
    )
    assert {each.against.verdict for each in found.analysis.arms if each.against} == {"void"}
    half = {each["arm"]: each["half_within"] for each in found.as_json()["arms"]}
    assert half["candidate"] > half["control"] > 0


def test_outcomes_that_are_as_quick_and_as_complete_raise_no_alarm(workspace, router, clock) -> None:
    """The control of the tests around it."""
    workspace.experiment("news").start("news@2", share=0.5)
    asked(router, clock, 200, {"control": 600, "candidate": 600})
    shown = workspace.experiment("news").status().as_json()
    assert shown["sample_ratio"]["ok"] is True
    assert max(shown["sample_ratio"][check] for check in ("units", "outcomes", "delays")) < 100
    assert sum(each["missing"] for each in shown["arms"]) == 0


def test_units_that_never_get_an_outcome_in_one_arm_are_noticed_as_missing(workspace, router, clock) -> None:
    workspace.experiment("news").start("news@2", share=0.5)
    asked(router, clock, 200, {"control": 600, "candidate": 600}, drop=0.6)
    found = workspace.experiment("news").status()
    missing = {each["arm"]: each["missing"] for each in found.as_json()["arms"]}
    assert missing["control"] == 0
    assert missing["candidate"] > 40
    assert found.verdicts[0].startswith(
        "OUTCOMES MISSING: the arms' shares of outcomes differ from their shares of units"
    )
    assert f"{missing['candidate']} missing" in found.verdicts[0]


def test_outcomes_later_than_their_time_to_live_count_for_nobody(workspace, router, clock) -> None:
    workspace.experiment("news").start("news@2", share=0.5, outcome_ttl=2 * DAY)
    for number in range(40):
        router.assign("news", str(number), str(number))
    clock.now += 1.9 * DAY
    early = router.outcomes([Told(1, receipt=str(number)) for number in range(20)])
    for number in range(20, 40):  # another answer does not restart the time to live
        router.assign("news", str(number), f"again {number}")
    clock.now += 0.2 * DAY
    late = router.outcomes([Told(1, receipt=f"again {number}") for number in range(20, 40)])
    assert {each.status for each in early} == {"counted"}
    assert {each.status for each in late} == {"late"}
    assert "first answered 2.1 days ago, and outcomes of news#1 count for 2 days: not counted" in late[0].text
    arms = workspace.experiment("news").status().as_json()["arms"]
    assert sum(arm["outcomes"] for arm in arms) == 20
    assert sum(arm["missing"] for arm in arms) == 20
    assert all(arm["outcomes"] + arm["missing"] == arm["units"] for arm in arms)  # in both arms


@pytest.mark.parametrize("salt", ["one", "a look", "another"])
def test_the_evidence_does_not_depend_on_the_looks_before(workspace, router, clock, salt) -> None:
    workspace.experiment("news").start("news@2", share=0.5, outcome_ttl=DAY, guards=Guards(worse_by=None), salt=salt)
    for day in range(3):
        asked(router, clock, 40, {"control": 60, "candidate": 60}, drop=0.3, seed=day)
        (kept,) = workspace.settle()
    fresh = Workspace(workspace.store.root).experiment("news").status()
    for key in ("units", "outcomes", "missing", "half_within"):
        assert [each[key] for each in kept.as_json()["arms"]] == [each[key] for each in fresh.as_json()["arms"]]
    assert kept.analysis.checks == pytest.approx(fresh.analysis.checks)
    assert sum(each["missing"] for each in fresh.as_json()["arms"]) > 0


RUNS, COUNT = 120, 800


def alarms(check: str, effect: float, level: float) -> int:
    """The number of simulated experiments with a ramp that ever raised an alarm.

    Args:
        effect: on the candidate's delay (a factor), or on its completeness (units lost in addition to the control's).
    """
    planned, found = {0: {"control": 0.8, "candidate": 0.2}, 1: HALF}, 0
    for seed in range(RUNS):
        generator = np.random.default_rng(seed)
        revision = (np.arange(COUNT) >= COUNT // 2).astype(int)
        candidate = generator.random(COUNT) < np.where(revision == 1, 0.5, 0.2)
        if check == "delays":
            waited = 600 * np.exp(generator.normal(size=COUNT)) * np.where(candidate, effect, 1)
            kind = (np.log(waited) / math.log(4)).astype(int)
        else:
            kind = (generator.random(COUNT) < 0.3 + np.where(candidate, effect, 0)).astype(int)
        seen = [
            ((int(r), int(k)), "candidate" if c else "control")
            for r, k, c in zip(revision, kind, candidate, strict=True)
        ]
        found += SampleRatio().after(seen, planned).process.peak >= math.log(1 / level)
    return found


@pytest.mark.parametrize(("check", "none", "some"), [("delays", 1.0, 3.0), ("outcomes", 0.0, 0.3)])
def test_arms_alike_raise_an_alarm_no_more_often_than_the_level_and_others_nearly_always(check, none, some) -> None:
    assert alarms(check, none, 0.05) <= stats.binom.ppf(0.999, RUNS, 0.05)
    assert alarms(check, some, 0.001 / 3) > 0.95 * RUNS
