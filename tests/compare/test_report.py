"""What a comparison concludes from results of known quality, and the pages that say it."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from simulated_comparison import made

from turret.compare.plots import Axis, Mark, axis, forest, scatter
from turret.compare.report import as_html, as_markdown, headline, write_report

HOSTILE = "<script>alert(1)</script> | `x` **b** {{{{ 7*7 }}}} number {}"
VOID = {"meta", "br", "link", "input", "hr", "img"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that is not open; knows every attribute that could fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.fetched: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open, tag
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def found():
    return made("base,head,full,lora,lora:r=4,prefix", fractions=(0.25, 1.0), text=HOSTILE, count=300, seeds=3)


def rows(comparison):
    return {row.spec: row for row in comparison.rows}


def test_a_method_as_good_is_within_and_one_ten_points_worse_is_worse() -> None:
    said = rows(made("full,lora,prefix", seeds=4, count=1500, margin=1.5))
    assert said["full"].verdict is None
    assert said["lora"].verdict.word == "within"
    assert said["prefix"].verdict.word == "worse"
    assert said["lora"].verdict.difference.low > -1.5


def test_the_smallest_of_the_good_is_promoted_and_no_test_example_chooses_its_seed() -> None:
    comparison = made("full,lora,prefix", prefix=0.95, seeds=4, count=1500, margin=2)
    assert comparison.promotion.spec == "lora"
    assert comparison.promotion.version == rows(comparison)["lora"].versions[0]
    assert "first seed" in comparison.promotion.why


def test_nothing_is_promoted_while_nothing_is_shown() -> None:
    comparison = made("full,lora", seeds=2, count=60)
    assert comparison.promotion.version is None
    assert re.search(r"about \d+ more (seeds? would settle it|test examples would)$", comparison.promotion.why)


def test_the_yardstick_is_promoted_where_all_else_is_worse() -> None:
    comparison = made("full,lora", lora=0.7, seeds=3)
    assert comparison.promotion.spec == "full"


def test_nothing_is_promoted_while_the_yardstick_is_alone() -> None:
    comparison = made("full,lora", without=("lora",))
    assert comparison.promotion.version is None
    assert comparison.promotion.why == "nothing beside full has run yet"


def test_the_claims_have_a_value_and_a_yes_or_no_each() -> None:
    comparison = made("full,lora,prefix", seeds=4, count=1500)
    said = {(claim.claim, claim.spec): claim for claim in comparison.claims}
    assert len(said) == 10
    assert said["more than 99% fewer trainable parameters", "lora"].answer == "yes"
    assert said["more than 99% fewer trainable parameters", "prefix"].answer == "no"
    assert said["within 1-2% of full fine-tuning", "lora"].answer == "yes"
    assert said["within 1-2% of full fine-tuning", "prefix"].answer == "no"
    assert said["adapters of one or two megabytes", "lora"].answer == "yes"
    assert said["adapters of one or two megabytes", "prefix"].answer == "no"
    assert said["faster training", "lora"].answer == "yes"
    assert said["up to 95% less memory", "prefix"].answer == "no"
    assert made("lora,prefix", against="lora").claims == (), "they are about full fine-tuning"


def test_a_method_that_could_not_run_stands_there_with_the_reason() -> None:
    comparison = made("full,lora,prefix", without=("prefix",), failures={"prefix": "seed 42: no room"}, missing=4)
    assert rows(comparison)["prefix"].failed == "seed 42: no room"
    assert "no room" in as_html(comparison)
    assert "Not made yet: 4 of the trainings" in as_html(comparison)


def test_without_its_yardstick_a_comparison_says_so() -> None:
    comparison = made("full,lora", without=("full",), failures={"full": "seed 42: out of memory"})
    assert comparison.promotion.version is None
    assert rows(comparison)["lora"].verdict is None
    assert "full" in headline(comparison)
    as_html(comparison)
    as_markdown(comparison)


def test_only_seeds_that_both_have_are_compared() -> None:
    """A budget that ends in the middle of a round leaves rows with more seeds than others."""
    comparison = made("full,lora", seeds=3)
    assert rows(comparison)["lora"].verdict.seeds == 3
    assert [len(row.mcnemar) for row in comparison.rows] == [0, 3]


def test_the_page_is_whole_and_fetches_nothing(found) -> None:
    page = as_html(found)
    parsed = Balanced()
    parsed.feed(page)
    assert parsed.open == []
    assert parsed.fetched == []
    assert "script" not in parsed.tags
    assert not re.search(r"@import|url\(", page)
    assert {"svg", "table", "details"} <= parsed.tags
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_words_from_the_data_cannot_become_markup(found) -> None:
    page, text = as_html(found), as_markdown(found)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "{{ 7*7 }}" in page
    assert "<script>" not in text.replace("\\<script\\>", "")


def test_every_plot_is_well_formed_and_knows_no_colour_of_its_own(found) -> None:
    plots = re.findall(r"<svg.*?</svg>", as_html(found), re.DOTALL)
    assert len(plots) == 6
    for plot in plots:
        ElementTree.fromstring(plot)
        assert not re.search(r'fill="|stroke="|style=|#[0-9a-f]{3}', plot)


def test_all_three_files_are_written_and_the_json_has_the_verdicts(found, tmp_path) -> None:
    write_report(found, tmp_path, lambda path, text: path.write_text(text, encoding="utf-8") and None)
    said = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {"rows", "claims", "curves", "classes", "confusions", "disagreements", "promotion"} <= set(said)
    lora = next(row for row in said["rows"] if row["spec"] == "lora")
    assert lora["verdict"]["word"] in ("within", "worse", "better", "undecided")
    assert "full" in lora["verdict"]["sentence"]
    assert (tmp_path / "report.md").read_text(encoding="utf-8").startswith("# tiny: methods compared")


def test_the_markdown_tables_have_as_many_cells_in_every_line(found) -> None:
    tables = re.findall(r"(?:^\|.*\|\n)+", as_markdown(found), re.MULTILINE)
    assert len(tables) > 4
    for table in tables:
        lines = table.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, table
        assert re.fullmatch(r"(\| --- )+\|", lines[1]), table  # a blank line would have cut it


def test_a_writer_says_what_it_forgot_and_has_no_classes() -> None:
    comparison = made("base,full,lora", kind="summarize", count=80)
    page = as_html(comparison)
    assert comparison.metric == "rougeL"
    assert "+0.200" in page
    assert comparison.classes == ()


def test_the_same_results_give_the_same_intervals() -> None:
    assert made("full,lora", seeds=3).as_json() == made("full,lora", seeds=3).as_json()


def test_disagreements_are_those_on_which_methods_differ(found) -> None:
    assert found.disagreements
    for each in found.disagreements:
        shares = [share for _, _, share in each.answers]
        assert max(shares) > min(shares)


def test_a_report_without_texts_has_everything_else(found) -> None:
    bare = found.without_texts()
    said = json.dumps(bare.as_json()) + as_html(bare) + as_markdown(bare)
    assert "alert(" not in said
    assert "alert(" in json.dumps(found.as_json())  # the control
    assert "texts of examples were left out" in said
    assert [row.verdict for row in bare.rows] == [row.verdict for row in found.rows]


# --- plots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high", "log"), [(0, 1, False), (5, 5, False), (1, 1e7, True), (20, 30, True)])
def test_an_axis_has_round_ticks_within_it(low, high, log) -> None:
    made_axis = axis([low, high], 0, 400, log=log)
    ticks = made_axis.ticks()
    assert 2 <= len(ticks) <= 9
    assert all(made_axis.low - 1e-9 <= tick <= made_axis.high * (1 + 1e-9) for tick in ticks)
    assert ticks == sorted(ticks)


def test_an_axis_keeps_what_lies_outside_at_its_end() -> None:
    assert Axis(0, 10, 0, 100).at(1e9) == 100
    assert Axis(1, 10, 0, 100, log=True).at(0) == 0


def test_names_of_points_that_lie_together_do_not_cover_each_other() -> None:
    marks = [Mark(f"lora r={r}", "lora", 1e5, 90 + r / 100, 89, 91) for r in range(5)]
    plot = ElementTree.fromstring(scatter(marks, x_label="x", y_label="y"))
    names = [each for each in plot.iter() if each.get("class") == "name"]
    places = sorted(float(each.get("y")) for each in names)
    assert len(places) == 5
    assert min(b - a for a, b in itertools.pairwise(places)) >= 13.9


def test_a_difference_without_width_is_still_drawn() -> None:
    ElementTree.fromstring(forest([Mark("a <b>", "lora", 0.0, 0.0, 0.0, 0.0)], 1.0, unit="points", zero="full"))
