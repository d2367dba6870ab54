"""A method with one collapsed training in five: it is found, reported, and left out of the intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from simulated_comparison import made

from turret.compare.collapse import judge_learning, skill_of
from turret.compare.comparison import SeededResults, generator, judge_pair, paired_differences
from turret.compare.design import Cell, candidates
from turret.compare.report import as_html, as_markdown, headline
from turret.compare.results import CellResult
from turret.compare.verdict import Verdict, interval, rate
from turret.data import Example, Labelled, Preferred, Scored, TextPair, Turn
from turret.recipe import Recipe

RECIPE = Recipe(name="tiny", base="small", data="tiny.csv")
ROWS = {each.spec: each for each in candidates("full,lora", RECIPE, "classify")}


def trained(spec: str, seed: int, examples: list[Labelled], right: np.ndarray) -> CellResult:
    """A training with two classes whose answers are right where `right` is true."""
    answers = [e.label if r else "no" if e.label == "yes" else "yes" for e, r in zip(examples, right, strict=True)]
    said: dict[str, Any] = {
        "kind": "classify", "version": f"{spec}@{seed}", "base": {"fingerprint": "b"}, "metrics": {"accuracy": 0.0},
        "answers": answers, "scores": right.astype(float), "parameters": {}, "bundle_bytes": 1, "latency": {},
        "forgetting": None, "wall_seconds": 1.0, "notes": [],
    }  # fmt: skip
    return CellResult.of(Cell(ROWS[spec], seed, 1.0, RECIPE), said)


def trials(
    rng: np.random.Generator, seeds: int, count: int, collapses: float, majority: float = 0.5
) -> tuple[list[Labelled], list[CellResult]]:
    """Trainings of two equally good methods, of which each of lora collapses with probability `collapses`."""
    examples = [Labelled(str(place), "yes" if place < majority * count else "no") for place in range(count)]
    hard, results = rng.random(count), []
    for seed in range(seeds):
        for spec in ROWS:
            own = np.where(rng.random(count) < 0.7, hard, rng.random(count))
            right = own < 0.9 + 0.005 * rng.standard_normal()
            if spec == "lora" and rng.random() < collapses:
                right = np.array([each.label == "yes" for each in examples])
            results.append(trained(spec, seed, examples, right))
    return examples, results


def sides(examples: list[Labelled], results: list[CellResult]) -> tuple[SeededResults, SeededResults]:
    return SeededResults.of("lora", results, examples), SeededResults.of("full", results, examples)


def verdict(examples: list[Labelled], results: list[CellResult], margin: float = 1.0) -> Verdict:
    found = judge_pair(*sides(examples, results), margin, generator(1, "x"))
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "repeats"), [(5, 60), (3, 300)])
def test_with_one_collapse_in_five_the_interval_covers_what_it_is_about_and_the_rate_is_covered_too(
    seeds: int, repeats: int
) -> None:
    rng, held, claimed, rates, silent = np.random.default_rng(2), 0, 0, 0, 0
    for _ in range(repeats):
        found = verdict(*trials(rng, seeds, 300, 0.2))
        assert found.trainings == seeds
        assert found.collapse_rate is not None
        rates += found.collapse_rate.low <= 20 <= found.collapse_rate.high
        if found.claimed and found.seeds > 1:
            claimed += 1
            held += found.difference.low <= 0 <= found.difference.high
        silent += bool(found.collapsed) and found.word in ("within", "better")
    assert claimed > 0.8 * repeats
    assert held / claimed >= 0.88
    assert rates / repeats >= 0.9
    assert silent == 0


@pytest.mark.slow
def test_an_interval_over_all_trainings_would_not_cover_their_mean() -> None:
    """The control: an interval over all trainings misses their mean in a third of cases or more."""
    rng, held = np.random.default_rng(2), 0
    truth = 0.2 * (0.5 - 0.9)
    for _ in range(100):
        examples, results = trials(rng, 5, 300, 0.2)
        mine, theirs = sides(examples, results)
        d = paired_differences(mine.all, theirs.all)
        assert d is not None
        found = interval(d, rng, resamples=400)
        held += found.low <= truth <= found.high
    assert held / 100 < 0.75


def test_every_collapse_is_found_and_nothing_else() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        examples, results = trials(rng, 5, 300, 0.3)
        mine, theirs = sides(examples, results)
        lost = {each.seed for each in results if each.spec == "lora" and set(each.answers) == {"yes"}}
        if len(lost) < 5:
            assert mine.learnt.seeds == lost
        assert mine.learnt.nothing == (len(lost) == 5)
        assert theirs.learnt.seeds == frozenset()


def test_one_answer_to_all_is_a_collapse_however_common_its_class_is() -> None:
    """If 85% are of one class, always answering it scores nearly as much as a good training."""
    examples, results = trials(np.random.default_rng(1), 4, 400, 0.0, majority=0.85)
    always = np.array([each.label == "yes" for each in examples])
    results[1] = trained("lora", 0, examples, always)
    assert sides(examples, results)[0].learnt.seeds == {0}


def test_a_method_of_little_skill_has_not_collapsed() -> None:
    rng = np.random.default_rng(6)
    examples = [Labelled(str(place), "yes" if place % 2 else "no") for place in range(500)]
    results = [trained("lora", seed, examples, rng.random(500) < 0.58) for seed in range(10)]
    assert SeededResults.of("lora", results, examples).learnt.seeds == frozenset()


def test_where_no_pair_learnt_no_interval_is_claimed() -> None:
    examples, results = trials(np.random.default_rng(1), 2, 300, 0.0)
    always = np.array([each.label == "yes" for each in examples])
    results[1] = trained("lora", 0, examples, always)
    results[2] = trained("full", 1, examples, always)
    found = verdict(examples, results)
    assert not found.claimed
    assert found.word == "undecided"
    assert "no interval is claimed" in found.sentence()


@pytest.mark.slow
def test_the_report_names_the_seed_and_the_mean_leaves_it_out() -> None:
    found = made("full,lora", seeds=5, count=1500, margin=2, collapsed={"lora": [44]})
    row = found.rows[1]
    assert row.verdict.word == "undecided"
    assert row.verdict.collapsed == (44,)
    assert row.verdict.trainings == 5
    assert row.score.mean > 90
    assert row.collapses[0].score == pytest.approx(50, abs=5)
    assert "1 of 5 trainings collapsed: seed 44; in the others" in row.verdict.sentence()
    assert "1 of 5 collapsed" in headline(found)
    for page in (as_html(found), as_markdown(found)):
        assert "seed 44 (score 50.0, loss flat at 0.69, one answer to 100% of the texts)" in page.replace("\\", "")
    assert made("full,lora", seeds=5, count=1500, margin=2).rows[1].verdict.word == "within"  # the control
    assert found.promotion.version is None
    assert "lora, seed 44: its loss is that of guessing" in found.notes


def test_a_writer_whose_outputs_fit_any_text_as_well_has_collapsed() -> None:
    found = made("full,lora", kind="summarize", seeds=3, count=80, collapsed={"lora": [43]})
    assert [each.seed for each in found.rows[1].collapses] == [43]


@pytest.mark.slow
def test_a_method_that_never_learns_is_said_to_have_learnt_nothing_and_is_no_baseline() -> None:
    found = made("full,lora,prefix", seeds=3, count=400, prefix=0.5)
    row = found.rows[2]
    assert row.learnt_nothing
    assert row.verdict.word == "worse"
    assert row.collapses == ()
    assert "learnt nothing" in headline(found)
    poor = made("full,lora", seeds=3, count=400, full=0.5, lora=0.5)
    assert poor.promotion.version is None
    assert "learnt nothing" in poor.promotion.why


def test_what_is_better_than_a_baseline_that_learnt_nothing_is_promoted() -> None:
    """The headline says that it is better, so the advice is not to promote nothing."""
    found = made("full,lora", seeds=3, count=400, full=0.5)
    assert "LoRA beats full by " in headline(found)
    assert found.promotion.version == found.rows[1].versions[0]
    assert found.promotion.why.startswith("better than full, which learnt nothing; ")


def test_a_rate_of_none_in_five_leaves_half_possible() -> None:
    assert rate(0, 5).high == pytest.approx(52.2, abs=0.1)
    assert rate(0, 5).low == 0
    assert rate(5, 5).low == pytest.approx(47.8, abs=0.1)
    assert rate(1, 5).mean == 20


def judged(kind: str, seed: int, answers: Sequence[str], scores: np.ndarray) -> CellResult:
    result = trained("lora", seed, [], np.ones(0, dtype=bool))
    return dataclasses.replace(result, kind=kind, answers=answers, scores=scores)


@pytest.mark.parametrize("highest", [1.0, 3.0])
def test_a_reranker_that_takes_no_passage_for_relevant_has_no_skill(highest: float) -> None:
    """Its numbers differ; only whether they say relevant is judged. One passage in five is relevant."""
    rng, relevant = np.random.default_rng(3), np.arange(400) % 5 == 0
    examples: list[Example] = [Scored(TextPair(str(row), "b"), highest * yes) for row, yes in enumerate(relevant)]
    never = [f"{value:.6g}" for value in 0.2 + 0.1 * rng.random(400)]
    good = [f"{0.1 + 0.8 * yes + 0.1 * rng.random():.6g}" for yes in relevant]
    lost = judged("rerank", 0, never, 1.0 - relevant)
    skill = skill_of(lost, examples)
    assert skill is not None
    assert skill[0] == pytest.approx(0)
    assert skill[1] > 0.01
    assert judge_learning([lost], examples).nothing
    found = judge_learning([lost, judged("rerank", 1, good, np.ones(400))], examples)
    assert [each.seed for each in found.collapses] == [0]
    assert "one answer to 100% of the texts" in found.collapses[0].why


def test_a_preference_for_either_answer_by_a_coin_has_no_skill() -> None:
    rng = np.random.default_rng(3)
    examples: list[Example] = [Preferred((Turn("user", "?"),), f"good {row}", "bad") for row in range(400)]
    coin, good = (judged("preference", seed, *preferred(rng, share)) for seed, share in enumerate((0.5, 0.9)))
    skills = [skill_of(each, examples) for each in (coin, good)]
    assert skills[0] == pytest.approx((2 * coin.scores.mean() - 1, 0.05))
    assert judge_learning([coin], examples).nothing
    assert [each.seed for each in judge_learning([coin, good], examples).collapses] == [0]


def preferred(rng: np.random.Generator, share: float) -> tuple[list[str], np.ndarray]:
    """Answers that are the chosen one in that share of 400 pairs, and their scores."""
    right = rng.random(400) < share
    return ["chosen" if each else "rejected" for each in right], right.astype(float)
