"""Rows that train nothing, and verdicts at equal steps, in the verdicts and reports."""

from __future__ import annotations

import pytest
from simulated_comparison import made

from turret.compare.report import as_html, as_markdown, headline


def rows(found):
    return {row.spec: row for row in found.rows}


@pytest.mark.slow
def test_a_regression_is_judged_like_a_method_and_never_promoted() -> None:
    found = made(linear=0.97, full=0.9, lora=0.9, prefix=0.9)
    linear = rows(found)["linear"]
    assert linear.verdict.word == "better"
    assert linear.verdict.seeds == 4
    assert len(linear.mcnemar) == 4
    assert linear.costs.train_seconds.mean == 1.0
    assert (linear.steps, linear.versions) == (None, ())
    assert "linear beats full by " in headline(found).lower()
    assert found.promotion.spec != "linear"
    worse = made(linear=0.7)
    assert rows(worse)["linear"].verdict.word == "worse", "the control"


@pytest.mark.slow
def test_a_method_may_be_judged_against_the_regression() -> None:
    found = made(against="linear", linear=0.8, full=0.95, lora=0.95, prefix=0.6)
    assert {spec: row.verdict.word for spec, row in rows(found).items() if spec in ("full", "lora", "prefix")} == {
        "full": "better", "lora": "better", "prefix": "worse",
    }  # fmt: skip
    lost = made(against="linear", linear=0.99, full=0.7, lora=0.7, prefix=0.6)
    assert lost.promotion.version is None
    assert "every method is worse than linear, which is no version" in lost.promotion.why


@pytest.mark.slow
def test_a_report_says_how_a_row_that_trains_nothing_answers() -> None:
    found = made()
    for page in (as_html(found), as_markdown(found)):
        assert page.count("Linear is a logistic regression.") == 1
    assert found.said == ("linear is a logistic regression",)
    assert "linear" not in found.recipes


STEPS = {"full": 100, "lora": 100, "prefix": 900, "full:epochs=9": 900}


@pytest.mark.slow
def test_a_verdict_at_equal_steps_stands_beside_the_one_at_own_defaults() -> None:
    found = made(
        "full,lora,prefix,full:epochs=9", steps=STEPS, twins=["full:epochs=9"],
        by_spec={"full": 0.7, "lora": 0.7, "prefix": 0.8, "full:epochs=9": 0.9},
    )  # fmt: skip
    prefix, lora, twin = (rows(found)[spec] for spec in ("prefix", "lora", "full:epochs=9"))
    assert prefix.verdict.word == "better"
    assert prefix.at_equal_steps.word == "worse"
    assert lora.at_equal_steps is None, "full has as many steps"
    assert twin.at_equal_steps is None
    sentence = "worse than full with as many steps (900) by more than 1 point"
    assert found.as_json()["rows"][2]["at_equal_steps"]["sentence"].startswith(sentence)
    for page in (as_html(found), as_markdown(found)):
        assert sentence in page.replace("\\", "")


@pytest.mark.slow
def test_a_report_says_the_steps_of_each_method_unless_they_are_the_same() -> None:
    several, same = made("full,lora,prefix", steps=STEPS), made("full,lora,prefix")
    assert "number of steps. Points are" in as_html(several)
    assert "900 steps" in as_html(several)
    assert "and the same number of steps" in as_html(same)
    assert "and the same number of steps" not in as_html(several)
    assert "| prefix | 900 |" in as_markdown(several)
