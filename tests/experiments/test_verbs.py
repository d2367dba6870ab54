"""An experiment is started, ramped, guarded and ended; a decision and its move of the alias are one transaction."""

from __future__ import annotations

import random
import re
import sqlite3
from dataclasses import replace

import pytest
from experiments.conftest import filled

from turret import Workspace
from turret.errors import BadExperiment, ExperimentError, GateFailed, InUse, NotFound, StoreError
from turret.experiments import Guards
from turret.experiments.analyze import Against, Missing, Since, decide
from turret.experiments.experiment import MISSING_BOUND
from turret.workspace import promoting

FEW = Guards(max_errors=0.02)


def run(workspace: Workspace, rates: dict[str, float], units: int, seed: int = 0, drop: float = 0.0) -> None:
    """Traffic with these probabilities of a 1 per arm; a share of the candidate's outcomes never comes."""
    draw, router = random.Random(seed), workspace.router()
    told = []
    for number in range(units):
        found = router.assign("news", f"{seed} {number}", f"{seed} {number}")
        value = int(draw.random() < rates[found.arm])
        if found.arm == "control" or draw.random() >= drop:
            told.append((f"{seed} {number}", None, value))
    router.flush()
    workspace.experiment("news").outcomes(told)


def verbs(workspace: Workspace) -> list[str]:
    return [each["verb"] for each in workspace.experiment("news").status().analysis.history]


def test_a_candidate_that_is_worse_is_rolled_back_by_itself_while_its_ramp_goes_on(workspace) -> None:
    experiment = workspace.experiment("news")
    experiment.start("news@2", steps=(0.2, 0.5))
    run(workspace, {"control": 0.6, "candidate": 0.3}, 300)
    experiment.ramp()
    run(workspace, {"control": 0.6, "candidate": 0.3}, 300, seed=1)
    (settled,) = workspace.settle()
    assert settled.done == ("candidate (news@2) rolled back: its outcomes are worse",)
    assert settled.experiment.state == "ended"
    assert settled.experiment.verdict["how"] == "rollback"
    assert workspace.settle() == []
    assert str(workspace.resolve("news")) == "news@1"
    assert verbs(workspace) == ["start", "ramp", "drop", "rollback"]
    assert "it has ended (its outcomes are worse)" in experiment.status().next


def test_a_candidate_that_is_better_is_promoted_only_where_asked_and_past_its_gates(workspace) -> None:
    rates = {"control": 0.3, "candidate": 0.6}
    experiment = workspace.experiment("news")
    experiment.start("news@2", share=0.5)
    run(workspace, rates, 400)
    (settled,) = workspace.settle()
    assert settled.done == ()
    assert settled.verdicts[0].startswith("candidate (news@2) is better than control: false winners stay below 5%")
    assert settled.next == "`turret experiment stop news --promote candidate` gives news@2 the alias production"
    experiment.stop()
    experiment.start("news@2", share=0.5, guards=Guards(promote=True))
    run(workspace, rates, 400, seed=1)
    workspace.gate("news", "production", add=["accuracy>=0.85"])
    (refused,) = workspace.settle()
    assert "is better and was not promoted: news@2 may not become news@production" in refused.done[0]
    assert workspace.settle()[0].done == ()  # there is one attempt
    assert "fix that, then `turret experiment stop news --promote candidate`" in experiment.status().next
    with pytest.raises(GateFailed):
        experiment.stop(promote="candidate")
    assert experiment.status().experiment.state == "running"
    workspace.gate("news", "production", remove=["accuracy"])
    ended = experiment.stop(promote="candidate")
    assert (ended.experiment.verdict["how"], ended.points) == ("promote", "news@2")
    assert verbs(workspace) == ["start", "refused", "promote"]
    assert str(workspace.rollback("news").version) == "news@1"


def test_a_promotion_by_itself_moves_the_alias_and_ends_the_experiment(workspace) -> None:
    workspace.experiment("news").start("news@2", share=0.5, guards=Guards(promote=True))
    run(workspace, {"control": 0.3, "candidate": 0.6}, 400)
    (settled,) = workspace.settle()
    assert settled.done == ("candidate (news@2) promoted to production: its outcomes are better",)
    assert settled.points == "news@2"


def test_a_verdict_that_the_later_outcomes_turn_is_shown_and_promotes_nothing_by_itself(workspace) -> None:
    experiment = workspace.experiment("news")
    experiment.start("news@2", share=0.5, guards=Guards(worse_by=None), salt="salt")
    run(workspace, {"control": 0.3, "candidate": 0.7}, 150)
    assert "is better than control" in experiment.status().verdicts[0]
    for seed in (1, 2):
        run(workspace, {"control": 0.7, "candidate": 0.3}, 180, seed=seed)
    found = experiment.status()
    said = r"candidate \(news@2\) was better than control at its verdict, but the \d+ outcomes since then have"
    assert re.match(rf"{said} reversed it \(difference -0\.\d+\): the verdict has turned$", found.verdicts[0])
    assert found.next.startswith("do not promote candidate: find out what changed")
    against = found.as_json()["arms"][1]["against_control"]
    assert against["verdict"] == "better"
    assert against["since_verdict"]["turned"] is True
    assert against["since_verdict"]["difference"] < 0


def test_a_verdict_whose_evidence_has_gone_since_says_so(workspace) -> None:
    experiment = workspace.experiment("news")
    experiment.start("news@2", share=0.5, guards=Guards(worse_by=None), salt="salt")
    run(workspace, {"control": 0.3, "candidate": 0.7}, 150)
    run(workspace, {"control": 0.7, "candidate": 0.3}, 120, seed=1)
    assert re.search(r"is better than control: .* its evidence fell from \S+ to \S+$", experiment.status().verdicts[0])


def test_among_many_experiments_a_promotion_by_itself_waits_until_it_is_a_discovery(workspace) -> None:
    """With twenty others that found nothing: evidence of 20 decides for it alone, a discovery needs 420."""
    experiment = workspace.experiment("news")
    for _ in range(20):
        experiment.start("news@2", share=0.5)
        experiment.stop()
    experiment.start("news@2", share=0.5, guards=Guards(promote=True), salt="salt")
    for seed, units in ((6, 75), (7, 10), (8, 10)):
        run(workspace, {"control": 0.2, "candidate": 0.6}, units, seed=seed)
    (waiting,) = workspace.settle()
    assert waiting.done == ()
    assert "is better than control" in waiting.verdicts[0]
    assert (
        "`turret experiment stop news --promote candidate` gives news@2 the alias production, or wait" in waiting.next
    )
    assert "evidence of 420 makes it a discovery among all experiments here" in waiting.next
    run(workspace, {"control": 0.2, "candidate": 0.6}, 150, seed=9)
    (settled,) = workspace.settle()
    assert settled.done == ("candidate (news@2) promoted to production: its outcomes are better",)
    assert workspace.experiments()[-1]["discovery"] is True


def test_less_can_be_better(workspace) -> None:
    workspace.experiment("news").start("news@2", share=0.5, goal="lower", metric="0..1")
    run(workspace, {"control": 0.6, "candidate": 0.3}, 400)
    (settled,) = workspace.settle()
    (against,) = [each.against for each in settled.analysis.arms if each.against]
    assert against.verdict == "better"
    assert against.interval[0] < against.difference < against.interval[1] < 0


def test_errors_or_latency_beyond_their_bound_roll_a_candidate_back_without_outcomes(workspace, clock) -> None:
    for guards, seconds, why in (
        (Guards(max_errors=0.02), 0.1, r"of its last \d+ answers were errors, the limit is 2%"),
        (Guards(max_seconds=2.0), 3.0, r"took longer than 2 s, the limit is 5%"),
    ):
        workspace.experiment("news").start("news@2", share=0.5, guards=guards)
        router = workspace.router(clock)
        seen = 0
        for number in range(120):
            found = router.assign("news", str(number))
            seen += found.arm == "candidate"  # a third of its own answers, however units are split
            bad = found.arm == "candidate" and seen % 3 == 0
            router.answered(found, seconds=seconds if bad else 0.1, error=bad and seconds < 1)
        router.flush()
        (settled,) = workspace.settle()
        assert settled.experiment.state == "ended"
        assert re.search(why, settled.done[0])


def test_an_alias_that_names_the_bad_candidate_goes_back_and_one_that_names_another_version_stays(workspace) -> None:
    for named, then in (("news@2", "news@1"), ("news@3", "news@3")):
        workspace.promote("news@1", "production")
        workspace.experiment("news").start("news@2", share=0.5)
        workspace.promote(named, "production")
        run(workspace, {"control": 0.7, "candidate": 0.2}, 200)
        (settled,) = workspace.settle()
        assert settled.points == then
    history = workspace.show("news@1")["alias_history"]
    assert [(move["verb"], move["version"]) for move in history[:3]] == [
        ("promote", 1),
        ("promote", 2),
        ("rollback", 1),
    ]


def test_one_bad_candidate_of_two_goes_and_the_other_goes_on(workspace) -> None:
    experiment = workspace.experiment("news")
    experiment.start(["news@2", "news@3"], share=0.6)
    run(workspace, {"control": 0.6, "candidate": 0.2, "candidate2": 0.6}, 500)
    (settled,) = workspace.settle()
    assert settled.experiment.state == "running"
    assert dict(settled.experiment.weights) == {"control": pytest.approx(0.7), "candidate2": pytest.approx(0.3)}
    assert settled.verdicts[0] == "candidate (news@2) was rolled back: its outcomes are worse"
    with pytest.raises(BadExperiment, match="no live candidate 'candidate': there are candidate2"):
        experiment.ramp({"candidate": 0.5})


def test_a_shadow_is_run_beside_recorded_and_never_assigned(workspace, router) -> None:
    experiment = workspace.experiment("news")
    experiment.start(shadows="news@3", guards=Guards(max_errors=0.02))
    for number in range(80):
        found = router.assign("news", str(number))
        assert (found.version, found.shadows) == ("news@1", (("shadow", "news@3"),))
        router.answered(found, seconds=0.1)
        router.shadowed(found, "shadow", seconds=0.2, agrees=number % 4 > 0)
    router.flush()
    shadow = experiment.status().as_json()["arms"][1]
    assert (shadow["answers"], shadow["compared"], shadow["agreed"], shadow["share"]) == (80, 80, 60, 0.0)
    assert "compare the shadows with the control" in experiment.status().next
    for _ in range(20):
        router.answered(found, seconds=0.1)
        router.shadowed(found, "shadow", seconds=0.2, error=True)
    router.flush()
    assert "shadow (news@3) rolled back: 20 of its last 100 answers were errors" in workspace.settle()[0].done[0]


def test_a_sample_ratio_mismatch_is_shown_before_any_verdict_and_nothing_is_decided(workspace) -> None:
    workspace.experiment("news").start("news@2", share=0.5, guards=Guards(promote=True))
    run(workspace, {"control": 0.3, "candidate": 0.7}, 800, drop=0.5)
    (settled,) = workspace.settle()
    said, taken_back = settled.verdicts
    assert taken_back == "candidate (news@2) was better than control before that: this verdict is taken back"
    assert settled.done == (said,)
    assert said.startswith("OUTCOMES MISSING: the arms' shares of outcomes differ from their shares of units")
    assert "find out how the arms differ" in settled.next
    assert {each.against.verdict for each in settled.analysis.arms if each.against} == {"void"}
    assert settled.as_json()["sample_ratio"]["ok"] is False


def test_the_policy_in_its_order() -> None:
    far, near = 1e9, 0.5
    good = Against(
        verdict="better", if_alike="better", missing=Missing(0.0, 0.0, 0.2), difference=0.1, interval=None,
        better=far, worse=near, worse_by=near, peak=20.0, now=far, equality=20.0, needed=20.0, since=None,
    )  # fmt: skip
    bad = replace(good, verdict="worse", if_alike="worse", better=near, worse=far, worse_by=far, peak=0.0)
    turned = replace(good, since=Since(outcomes=900, difference=-0.1, turned=True))
    failing = [("candidate", "12 of its last 80 answers were errors")]
    ask = Guards(promote=True)

    def decided(found: Against | None, alarms=(), guards=ask, *, void=None, named=True) -> str:
        live = {} if found is None else {"candidate": found}
        return decide(live, alarms, guards, void=void, named=named).action

    assert decided(good, failing, void="units") == "drop"
    assert decided(good, void="units") == "hold"
    assert decided(bad) == "drop"
    assert decided(replace(bad, worse_by=None), guards=Guards(worse_by=None)) == "continue"
    assert decided(good) == "promote"
    assert decided(good, guards=Guards()) == "continue"
    assert decided(good, named=False) == "continue"
    assert decided(turned) == "continue"
    assert decided(None) == "continue"
    better = replace(good, peak=900.0)  # the e-value of both is at its cap
    assert decide({"candidate": good, "candidate2": better}, (), ask, void=None).arm == "candidate2"


def test_what_an_experiment_runs_with_is_not_deleted(workspace) -> None:
    workspace.experiment("news").start("news@2")
    for force in (True, False):
        with pytest.raises(InUse, match="an experiment runs with it; `turret experiment stop news`"):
            workspace.delete("news@2", force=force)
    workspace.experiment("news").stop()
    workspace.delete("news@2")
    assert workspace.experiment("news").status().experiment.state == "ended"


@pytest.mark.parametrize(
    ("settings", "kind", "complaint"),
    [
        ({"candidates": "news@1"}, BadExperiment, "control and candidate are the same version"),
        ({"candidates": ()}, BadExperiment, "needs two versions"),
        ({"candidates": "news@9"}, NotFound, "no news@9: news has versions 1 to 3"),
        (
            {"candidates": "news@2", "control": "news@3"},
            ExperimentError,
            "control is news@3, and news@production names",
        ),
        ({"candidates": "news@2", "alias": "other"}, ExperimentError, "names nothing, so there is no control"),
        ({"candidates": "news@2", "metric": "5..1"}, BadExperiment, "bad metric '5..1': expected binary, or"),
        ({"candidates": "news@2", "metric": "stars"}, BadExperiment, "bad metric 'stars'"),
        ({"candidates": "news@2", "goal": "up"}, BadExperiment, "expected higher or lower"),
        ({"candidates": "news@2", "unit": "planet"}, BadExperiment, "one of user, session, request"),
        ({"candidates": "news@2", "alpha": 0.0}, BadExperiment, "level 0.0"),
        ({"candidates": "news@2", "share": 1.5}, BadExperiment, "add up to at most 1"),
        ({"candidates": "news@2", "share": {"candidate7": 0.1}}, BadExperiment, "no live candidate 'candidate7'"),
        ({"candidates": "news@2", "steps": (0.5, 0.2)}, BadExperiment, "a ramp of 0.5, 0.2: expected rising"),
        ({"candidates": "news@2", "steps": ()}, BadExperiment, "a ramp of nothing"),
        ({"candidates": "news@2", "guards": Guards(worse_by=1.0)}, BadExperiment, "a margin of 1.0"),
        ({"candidates": "news@2", "guards": Guards(max_errors=2)}, BadExperiment, "a bound on errors"),
        ({"candidates": "news@2", "guards": Guards(max_seconds=0)}, BadExperiment, "a bound on latency"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_begins_nothing(workspace, settings, kind, complaint) -> None:
    with pytest.raises(kind, match=complaint) as refused:
        workspace.experiment("news").start(**settings)
    assert "\n" not in str(refused.value)
    with pytest.raises(NotFound, match="no experiment on news"):
        workspace.experiment("news").status()


def test_one_experiment_of_a_name_runs_at_a_time_and_earlier_ones_can_be_looked_at(workspace) -> None:
    experiment = workspace.experiment("news")
    experiment.start("news@2", share=0.1)
    with pytest.raises(
        ExperimentError, match=r"news#1 has been running since .* stop it with `turret experiment stop news`"
    ):
        experiment.start("news@3")
    with pytest.raises(ExperimentError, match="news#1 has no next step, none was planned: give a share"):
        experiment.ramp()
    experiment.stop()
    for verb in (lambda: experiment.ramp(0.5), experiment.stop, lambda: experiment.assign("ann")):
        with pytest.raises(ExperimentError, match=r"news#1 has ended \(stop, 20"):
            verb()
    experiment.start("news@3", share=0.1)
    assert str(workspace.experiment("news").status().experiment) == "news#2"
    assert workspace.experiment("news", 1).status().experiment.state == "ended"
    with pytest.raises(NotFound, match="no experiment news#7: there are news#1 to news#2"):
        workspace.experiment("news", 7).status()
    names = [(each["experiment"], each["discovery"]) for each in workspace.experiments()]
    assert names == [("news#1", False), ("news#2", False)]


def test_a_look_through_what_was_added_up_before_says_what_a_fresh_look_says(workspace) -> None:
    workspace.experiment("news").start("news@2", steps=(0.2, 0.5), guards=Guards(worse_by=None))
    for seed in range(3):
        run(workspace, {"control": 0.4, "candidate": 0.5}, 100, seed=seed)
        (kept,) = workspace.settle()
        fresh = Workspace(workspace.store.root).experiment("news").status().as_json()
        assert kept.as_json()["arms"][0] == fresh["arms"][0]
        found, wanted = (each["arms"][1]["against_control"] for each in (kept.as_json(), fresh))
        assert found["evidence"] == pytest.approx(wanted["evidence"])
        if seed == 0:
            workspace.experiment("news").ramp()


def test_a_stop_that_was_overtaken_by_another_process_changes_nothing(workspace, monkeypatch) -> None:
    """Another process stops it between the look and the move: the alias stays, and the error is one line."""
    experiment = workspace.experiment("news")
    experiment.start("news@2", share=0.5)
    promote = promoting.replay_then_promote

    def overtaken(*arguments, **settings):
        Workspace(workspace.store.root).experiment("news").stop()
        return promote(*arguments, **settings)

    monkeypatch.setattr(promoting, "replay_then_promote", overtaken)
    with pytest.raises(ExperimentError, match="news#1 has ended"):
        experiment.stop(promote="candidate")
    assert str(workspace.resolve("news")) == "news@1"


def test_a_store_without_experiments_says_how_to_begin(tmp_path) -> None:
    workspace = filled(tmp_path / "store", tmp_path)
    assert list(workspace.experiments()) == []
    assert workspace.settle() == []
    with pytest.raises(NotFound, match="there is no store"):
        Workspace(tmp_path / "none").experiment("news").status()


def test_a_row_that_makes_no_sense_is_one_line(workspace) -> None:
    workspace.experiment("news").start("news@2")
    for arms in ("{}", "[1]", '[{"name": 1}]', "null"):
        with sqlite3.connect(workspace.store.root / "turret.db") as connection:
            connection.execute("UPDATE experiments SET arms = ?", (arms,))
        connection.close()
        with pytest.raises(StoreError):
            workspace.experiment("news").status()


def test_a_shadow_that_fails_leaves_an_alias_that_names_nothing_alone(workspace) -> None:
    router = workspace.router()
    workspace.experiment("news").start("news@2", control="news@1", shadows="news@3", alias="other", guards=FEW)
    of_units = (router.assign("news", f"user {number}") for number in range(1000))
    found = next(each for each in of_units if each.arm == "control")  # the shadow is compared with the control
    for _ in range(50):
        router.answered(found, seconds=0.1)
        router.shadowed(found, "shadow", seconds=0.1, error=True)
    router.flush()
    (settled,) = workspace.settle()
    assert (settled.experiment.state, settled.points) == ("running", None)
    assert "shadow (news@3) rolled back" in settled.done[0]


@pytest.mark.parametrize(("settings", "bound"), [("'$.of_a_newer_turret', 1", 0.2), (None, MISSING_BOUND)])
def test_settings_of_an_older_and_of_a_newer_turret_are_read(workspace, settings, bound) -> None:
    workspace.experiment("news").start("news@2", share=0.5, missing_bound=0.2)
    change = "json_remove(settings, '$.missing_bound')" if settings is None else f"json_set(settings, {settings})"
    with sqlite3.connect(workspace.store.root / "turret.db") as connection:
        connection.execute(f"UPDATE experiments SET settings = {change}")
    status = workspace.experiment("news").status()
    assert (status.experiment.state, status.experiment.missing_bound) == ("running", bound)
