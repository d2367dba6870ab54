"""Control rates on texts of known aspect, and the pages that report them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from simulated_control import ASPECTS, HOSTILE, KINDS, LABELS, found, written

from turret.compare.control_rates import (
    Written,
    as_html,
    as_markdown,
    headline,
    rate_methods,
    shares_of_nearest,
    write_report,
)


def test_the_rate_is_the_share_of_outputs_of_the_asked_aspect_by_either_judge() -> None:
    one = rate_methods([written("prefix", aspect, 0.75, 100) for aspect in ASPECTS], ASPECTS, LABELS, KINDS, 0)[0]
    assert one.by_classifier.mean == pytest.approx(75)
    assert one.by_rouge.mean == pytest.approx(75)
    assert one.by_classifier.low < 75 < one.by_classifier.high
    assert one.said == ((0.75, 0.25), (0.25, 0.75))
    assert one.rouge_asked.mean == pytest.approx(100 * (0.75 * 0.6 + 0.25 * 0.2))


def test_a_base_that_writes_the_same_whatever_is_asked_is_at_chance() -> None:
    same = [written("base", "short", 1.0, 50), written("base", "long", 0.0, 50)]
    assert rate_methods(same, ASPECTS, LABELS, KINDS, 0)[0].by_classifier.mean == pytest.approx(50)


def test_equals_share_and_a_text_like_none_counts_for_none() -> None:
    shares = shares_of_nearest(np.array([[0.5, 0.5, 0.1], [0.0, 0.0, 0.0], [0.1, 0.2, 0.3]]))
    assert shares.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_an_empty_output_is_of_no_aspect_whatever_the_classifier_says() -> None:
    some = [written("prefix", aspect, 1.0, 10) for aspect in ASPECTS]
    blank = Written("prefix", "short", 1, "x@1", ["  "] * 10, ["short"] * 10, np.zeros((10, 2)))
    assert rate_methods([blank, some[1]], ASPECTS, LABELS, KINDS, 0)[0].by_classifier.mean == pytest.approx(50)


def test_a_method_that_lacks_an_aspect_is_not_rated_and_whole_seeds_are() -> None:
    some = [written("prefix", aspect, 0.5) for aspect in ASPECTS] + [written("prefix", "short", 0.5, seed=2)]
    assert rate_methods(some, ASPECTS, LABELS, KINDS, 0)[0].seeds == (1,)
    assert rate_methods([written("prefix", "short", 0.5)], ASPECTS, LABELS, KINDS, 0) == ()


def test_the_headline_says_when_control_is_not_shown() -> None:
    assert "80% of the outputs are of the requested aspect" in headline(found())
    assert "control is not shown" not in headline(found())
    assert "control is not shown" in headline(found(0.5))


def test_a_report_without_texts_has_the_rates_and_no_document() -> None:
    bare = found().without_texts()
    assert "a document" not in as_html(bare) + as_markdown(bare) + json.dumps(bare.as_json())
    assert "a document" in as_html(found())  # the control
    assert bare.rated == found().rated


def test_the_pages_are_whole_and_words_from_outside_are_no_markup(tmp_path) -> None:
    page, text = as_html(found()), as_markdown(found())
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert "src=" not in page
    ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    assert "| prefix | 80.0%" in text
    for words in ("2026-01-02", "device: cpu", "turret control t-{aspect}.csv"):
        assert words in page
        assert words in text
    write_report(found(), tmp_path, lambda path, words: path.write_text(words, encoding="utf-8") and None)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["headline"] == headline(found())
