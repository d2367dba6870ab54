"""The verdicts of a comparison on results of known quality, and the pages that report them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
import simulated_control
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_comparison import dataset, made, result

from turret.compare import control_rates
from turret.compare.design import Cell, candidates
from turret.compare.evaluation_page import as_html as evaluation_page
from turret.compare.plots import (
    CHARACTER,
    WIDTH,
    Axis,
    LossCurve,
    Mark,
    axis,
    forest,
    loss_curves,
    scatter,
    short_number,
)
from turret.compare.report import _apart, as_html, as_markdown, headline, write_report
from turret.compare.report_text import rounded_estimate
from turret.compare.results import Confusions, Details, costs_of
from turret.compare.verdict import Interval, Verdict, interval
from turret.recipe import Recipe
from turret.tasks import Mistake
from turret.workspace.results import Evaluation

HOSTILE = "<script>alert(1)</script> | `x` **b** {{{{ 7*7 }}}} number {}"
VOID = {"meta", "br", "link", "input", "hr", "img"}


class Balanced(HTMLParser):
    """Fails if a closing tag does not match, and collects every attribute that could fetch something."""

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


@pytest.mark.slow
def test_the_smallest_of_the_good_is_promoted_and_no_test_example_chooses_its_seed() -> None:
    comparison = made("full,lora,prefix", prefix=0.95, seeds=4, count=1500, margin=2)
    assert comparison.promotion.spec == "lora"
    assert comparison.promotion.version == rows(comparison)["lora"].versions[0]
    assert "first seed" in comparison.promotion.why


def test_nothing_is_promoted_while_nothing_is_shown() -> None:
    comparison = made("full,lora", seeds=2, count=60)
    assert comparison.promotion.version is None
    asked = r"about \d+ more seeds?( and [\d,]+ more test examples together)? would settle it in about \d+% of cases$"
    assert re.search(asked, comparison.promotion.why)


@pytest.mark.slow
def test_the_baseline_is_promoted_where_all_else_is_worse() -> None:
    comparison = made("full,lora", lora=0.7, seeds=3)
    assert comparison.promotion.spec == "full"


def test_nothing_is_promoted_while_the_baseline_is_alone() -> None:
    comparison = made("full,lora", without=("lora",))
    assert comparison.promotion.version is None
    assert comparison.promotion.why == "no method but full has run yet"


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("fractions", [(1.0,), (1.0, 0.5)])
def test_the_order_in_which_workers_end_the_cells_changes_nothing(fractions: tuple[float, ...]) -> None:
    one, other = (made(fractions=fractions, seeds=2, count=200, backwards=backwards) for backwards in (False, True))
    assert one.as_json() == other.as_json()


def test_a_method_that_could_not_run_stands_there_with_the_reason() -> None:
    comparison = made("full,lora,prefix", without=("prefix",), failures={"prefix": "seed 42: no room"}, missing=4)
    assert rows(comparison)["prefix"].failed == "seed 42: no room"
    assert "no room" in as_html(comparison)
    assert "Not run yet: 4 of the trainings" in as_html(comparison)


def test_without_its_baseline_a_comparison_says_so() -> None:
    comparison = made("full,lora", without=("full",), failures={"full": "seed 42: out of memory"})
    assert comparison.promotion.version is None
    assert rows(comparison)["lora"].verdict is None
    assert "full" in headline(comparison)
    as_html(comparison)
    as_markdown(comparison)


@pytest.mark.slow
def test_only_seeds_that_both_have_are_compared() -> None:
    """A budget that ends in the middle of a round leaves rows with more seeds than others."""
    comparison = made("full,lora", seeds=3)
    assert rows(comparison)["lora"].verdict.seeds == 3
    assert [len(row.mcnemar) for row in comparison.rows] == [0, 3]


@pytest.mark.slow
def test_the_headline_names_every_method_that_was_judged_in_words_to_repeat() -> None:
    said = headline(made("base,head,full,lora,prefix", seeds=4, count=1500, margin=2))
    behind = r"prefix, head and the bare base are \d+ to \d+ points behind full"
    assert re.fullmatch(rf"LoRA is as good as full within 2 points; {behind}\.", said)
    assert "LoRA did not run" in headline(made("full,lora", without=("lora",), failures={"lora": "seed 42: no"}))
    won = headline(made("head,lora,prefix", against="head", head=0.5, seeds=3, count=300, falling=["lora", "prefix"]))
    assert re.match(r"LoRA and prefix beat head by \d+ to \d+ points; .*both would gain from more epochs\.$", won)
    some = headline(made("head,lora,prefix", against="head", head=0.5, seeds=3, count=300, falling=["lora"]))
    assert "; LoRA would gain from more epochs." in some  # the control


def test_a_headline_says_one_decimal_below_ten_points() -> None:
    assert [_apart(each) for each in ([1.0], [0.84], [-4.2, -44.1], [49.3, 40.4], [40.3, 40.1])] == [
        "1.0 point", "0.8 points", "4 to 44 points", "40 to 49 points", "40 points",
    ]  # fmt: skip


def test_advice_has_no_more_digits_than_an_estimate_has() -> None:
    assert [rounded_estimate(value) for value in (7, 42, 243, 8921, 11569, 1_234_567)] == [
        "7", "42", "240", "8,900", "12,000", "1,200,000",
    ]  # fmt: skip
    d = Interval(-1.3, -3.1, 0.5)
    said = Verdict("undecided", d, 1, 5, 500, 0.1, 50, 11569, 0.72).sentence()
    assert said.endswith(
        "about 50 more seeds and 12,000 more test examples together would settle it in about 72% of cases"
    )


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("within", "as good as full within 2 points (-0.5 points, 95% interval -1.5 to +0.5)"),
        ("better", "better than full (-0.5 points, 95% interval -1.5 to +0.5)"),
        ("worse", "worse than full by more than 2 points (-0.5 points, 95% interval -1.5 to +0.5)"),
        (
            "undecided",
            "undecided against full (-0.5 points, 95% interval -1.5 to +0.5): about 3 more seeds would settle it",
        ),
    ],
)
def test_each_verdict_has_its_sentence(word, said) -> None:
    assert Verdict(word, Interval(-0.5, -1.5, 0.5), 2, 2, 500, 0.1, more_seeds=3).sentence("full") == said


def test_no_interval_leaves_what_a_difference_can_be() -> None:
    """Two seeds, a class with three examples: a t of one degree of freedom would say -316 to +298."""
    d = np.array([[1.0, 1.0, 1.0], [-1.0, -1.0, 0.0]])
    found = interval(d, np.random.default_rng(0)).times(100)
    assert -100 <= found.low <= found.mean <= found.high <= 100
    assert found.open
    wide = Verdict("undecided", found, 1, 2, 3, 0.5)
    assert "not determined by so few" in wide.sentence()
    assert not interval(np.zeros((3, 500)), np.random.default_rng(0)).times(100).open  # the control
    for row in made("full,lora,prefix", seeds=2, count=8).classes:
        assert -100 <= row.difference.low <= row.difference.high <= 100


@pytest.mark.slow
def test_a_method_whose_loss_still_fell_is_marked_not_trained_out() -> None:
    comparison = made("full,lora,prefix", seeds=3, count=300, falling=["prefix"])
    assert [row.trained_out for row in comparison.rows] == [True, True, False]
    assert "prefix would gain from more epochs" in headline(comparison)
    assert "not trained out" in as_html(comparison).split("Training curves")[0]
    assert "prefix is not trained out" in as_markdown(comparison)
    assert "more epochs" not in headline(made("full,lora", seeds=3, count=300))  # the control


def test_a_report_says_when_where_and_with_what_and_how_to_make_it_again(found) -> None:
    for page in (as_html(found), as_markdown(found).replace("\\", "")):
        for words in ("2026-01-02", "family 1, model 2", "float32", "torch 2.9.0", "abc123", "turret compare tiny.csv"):
            assert words in page
    assert found.as_json()["made"]["threads"] == 1
    assert found.as_json()["power"]["sentences"]


def test_examples_are_evenly_chosen_with_every_methods_answer(found) -> None:
    assert len(found.examples) == 6
    assert {spec for spec, _, _ in found.examples[0].answers} == {"head", "full", "lora", "lora:r=4", "prefix"}
    assert "Some test examples" in as_html(found)


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
    assert len(plots) == 7
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.5, "0.5"), (999.4, "999"), (999.6, "1k"), (-999.6, "-1k"), (1500, "1.5k"), (999_999, "1M"), (2e6, "2M")],
)
def test_a_short_number_is_rounded_before_its_unit_is_chosen(value: float, shown: str) -> None:
    assert short_number(value) == shown


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


def boxes(plot: str) -> list[tuple[str, float, float, float, float]]:
    """(words, left, top, right, bottom) of the names in a plot, with letters as wide as `labels` takes them to be."""
    found = []
    for each in ElementTree.fromstring(plot).iter():
        if "name" in each.get("class", "").split():
            words, x, y = each.text or "", float(each.get("x", 0)), float(each.get("y", 0))
            width, anchor = CHARACTER * len(words), each.get("text-anchor")
            left = x - width if anchor == "end" else x
            found.append((words, left, y - 10, left + width, y + 2))
    return found


def covered(plot: str) -> list[tuple[str, str]]:
    """The pairs of names that cover each other."""
    return [
        (a[0], b[0])
        for a, b in itertools.combinations(boxes(plot), 2)
        if min(a[3], b[3]) > max(a[1], b[1]) and min(a[4], b[4]) > max(a[2], b[2])
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(3, 7), st.integers(80, 99)), min_size=1, max_size=7))
def test_names_in_a_plot_never_cover_each_other_and_stay_inside(places) -> None:
    marks = [Mark(f"lora r={n}", "lora", 10.0**x, y, y - 1, y + 1) for n, (x, y) in enumerate(places)]
    plot = scatter(marks, x_label="x", y_label="y")
    assert covered(plot) == []
    assert all(left >= 0 and right <= WIDTH for _, left, _, right, _ in boxes(plot))
    lines = [LossCurve(mark.label, "lora", (1.0, mark.y)) for mark in marks]
    assert covered(loss_curves(lines, x_label="x", y_label="y")) == []


def test_names_at_one_place_would_cover_each_other() -> None:
    """The control: the same names, each right of its point."""
    drawn = "".join(f'<text class="name" x="100" y="{100 + n}" text-anchor="start">lora r={n}</text>' for n in range(3))
    assert len(covered(f"<svg>{drawn}</svg>")) == 3


def test_a_long_name_leaves_room_for_its_numbers() -> None:
    long = "lora r=4 lora_alpha=16 target_modules=query+value+dense"
    (name, *_, right, _), *_ = boxes(forest([Mark(long, "lora", 0.5, 0.5, -1, 2)], 1.0, unit="points", zero="full"))
    assert name.endswith("…")
    assert right < WIDTH - 14 - 6 * len("+0.5  (-1.0 to +2.0)")


def test_the_contenders_choose_the_scale_and_what_lies_outside_is_an_arrow() -> None:
    near, far = Mark("lora", "lora", 0.2, 0.2, -1.0, 1.5), Mark("head", "head", -36.0, -36.0, -40.0, -31.0)
    plot = forest([near, far], 1.0, unit="points", zero="full", scale=[near])
    assert "off scale  -36.0 (-40.0 to -31.0)" in plot.replace("-36.0  (", "-36.0 (")
    assert "<polygon" in plot
    assert width_of(plot) > 5 * width_of(forest([near, far], 1.0, unit="points", zero="full"))


def width_of(plot: str) -> float:
    """Of the interval of lora."""
    line = next(each for each in ElementTree.fromstring(plot).iter() if each.get("class") == "whisker k-lora")
    return float(line.get("x2")) - float(line.get("x1"))


def test_the_untrained_head_is_in_the_plots_and_chooses_no_scale(found) -> None:
    plots = re.findall(r"<svg.*?</svg>", as_html(found), re.DOTALL)
    assert ">base<" in plots[0]
    assert "off scale" in plots[0]
    assert "head" in plots[1]
    assert "off scale" in plots[1]


PAGES = ("report", "evaluation", "composition", "control", "control of nine")
LONG = "Document {}. " + "A sentence that goes on for a while. " * 12
NINE = (
    "challenge", "approach", "outcome", "future work", "data", "ethics", "reproducibility", "related work", "limits",
)  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """Addresses of a comparison of four methods, an evaluation of nine classes, a composition, and two of control."""
    folder = tmp_path_factory.mktemp("pages")
    of = {
        "report": as_html(made("base,head,full,lora,lora:r=4,prefix", fractions=(0.25, 1.0), count=300, seeds=3)),
        "evaluation": evaluation(9),
        "composition": as_html(
            dataclasses.replace(
                made("base,lora,prefix", count=300, seeds=1, kind="summarize", against="lora", text=LONG),
                composition="legal@3+formal@2",
            )
        ),
        "control": control_rates.as_html(simulated_control.found()),
        "control of nine": control_rates.as_html(simulated_control.found(aspects=NINE)),
    }
    for name, page in of.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in of}


def evaluation(classes: int) -> str:
    labels = tuple(f"Technische Rückfrage {n}" for n in range(classes))
    rows = tuple(tuple(40 if a == b else (a + b) % 4 for b in range(classes)) for a in range(classes))
    wrong = tuple(Mistake(n, "Guten Tag, wo ist es? " * 8, labels[0], labels[1], 0.0, 0.9) for n in range(60))
    each = {"precision": 0.9, "recall": 0.8, "f1": 0.85, "support": 50}
    metrics = {"accuracy": 0.85, "macro_f1": 0.8, "loss": 0.4, "per_class": dict.fromkeys(labels, each)}
    details = Details(wrong, "classify", Confusions(labels, rows))
    data = {"source": "mails.csv", "examples": 400}
    return evaluation_page(Evaluation("mails@3", "sha256:ab", data, metrics, 1.0, details), texts=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_no_name_over_another_and_nothing_wider_than_the_page(pages, name, width) -> None:
    from browser import browser

    with browser() as chromium:
        page = chromium.new_page(viewport={"width": width, "height": 900})
        page.goto(pages[name])
        if width == 1280:
            assert page.evaluate("document.documentElement.scrollHeight") <= 4 * 900
        assert page.evaluate(BEFORE_DETAILS) <= 4 * 900
        for folded in (True, False):
            if not folded:
                page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            assert page.evaluate(OVERLAPS) == []
            assert page.evaluate(ON_WHISKERS) == []
            assert page.evaluate(CLIPPED) == []
            assert page.evaluate(BROKEN) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.add_style_tag(
            content="th { display: inline-block; width: 9px; overflow-wrap: anywhere; min-width: 0 !important }"
        )
        if page.evaluate("[...document.querySelectorAll('th')].some(each => each.checkVisibility())"):
            assert page.evaluate(BROKEN), "the control"
        page.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_printed_page_unfolds_its_details_and_cuts_nothing(pages, name) -> None:
    from browser import browser

    with browser() as chromium:
        page = chromium.new_page(viewport={"width": 700, "height": 1000})  # A4 without its margins
        page.goto(pages[name])
        assert set(page.evaluate(FOLDED)) == {False}, "the control"
        page.emulate_media(media="print")
        page.wait_for_function(f"() => ({FOLDED})().every(each => each)", timeout=10_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= 700
        cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        assert page.evaluate(cut) == 0
        page.close()


BEFORE_DETAILS = "document.querySelector('h2.details, details.part').getBoundingClientRect().top"
FOLDED = """() => [...document.querySelectorAll("details.part > :not(summary, .recipe)")].map(
  each => each.checkVisibility({contentVisibilityAuto: true}) && each.getBoundingClientRect().height > 0)"""
ON_WHISKERS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg"))
    for (const text of svg.querySelectorAll("text.name, text.value"))
      for (const line of svg.querySelectorAll(".whisker:not(.thin)")) {
        const [a, b] = [text.getBoundingClientRect(), line.getBoundingClientRect()];
        const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (a.width && b.height < 12 && x > 1 && y > -1) found.push(text.textContent);
      }
  return found;
}"""
CLIPPED = """() => [...document.querySelectorAll("svg text")].filter(text => {
  const [a, b] = [text.getBoundingClientRect(), text.closest("svg").getBoundingClientRect()];
  return a.width && (a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1);
}).map(text => text.textContent)"""
# a word of a table's head that stands on several lines: one rectangle for each line
BROKEN = """() => [...document.querySelectorAll("th")].filter(each => each.checkVisibility()).flatMap(each => {
  const node = each.firstChild, found = [];
  for (const word of (node && node.nodeType === 3 ? node.data : "").matchAll(/\\S+/g)) {
    const range = document.createRange();
    range.setStart(node, word.index);
    range.setEnd(node, word.index + word[0].length);
    const tops = new Set([...range.getClientRects()].map(line => Math.round(line.top)));
    if (tops.size > 1) found.push(word[0]);
  }
  return found;
})"""
OVERLAPS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg")) {
    const drawn = [...svg.querySelectorAll("text.name, text.value")];
    const texts = drawn.map(t => [t.textContent, t.getBoundingClientRect()]);
    for (let i = 0; i < texts.length; i++) for (let j = i + 1; j < texts.length; j++) {
      const [a, b] = [texts[i][1], texts[j][1]];
      const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (x > 1 && y > 3) found.push([texts[i][0], texts[j][0], x, y]);
    }
  }
  return found;
}"""


def test_a_difference_without_width_is_still_drawn() -> None:
    ElementTree.fromstring(forest([Mark("a <b>", "lora", 0.0, 0.0, 0.0, 0.0)], 1.0, unit="points", zero="full"))


@pytest.mark.slow
def test_memory_and_time_are_of_the_first_seed_that_had_a_process_of_its_own() -> None:
    """Control: the numbers of other seeds, which ran in processes of their own too, would change them."""
    recipe = Recipe(name="tiny", base="small", data="tiny.csv")
    (row,) = candidates("lora", recipe, "classify")
    data = dataset(30)
    results = [result(Cell(row, seed, 1.0, recipe), data, 0.9, seed) for seed in range(3)]
    slow = {"train_seconds": 9e9, "steps": 40}
    beside = [
        dataclasses.replace(
            each, timing=slow, memory=each.memory | {"peak_bytes": 9e12}, latency={"median_seconds": 9.0}
        )
        for each in results[1:]
    ]
    alone, first = costs_of(results[:1]), costs_of([results[0], *beside])
    measured = ("train_seconds", "best_seconds", "answer_seconds", "above_base", "peak", "predicted", "measured")
    assert [getattr(first, name) for name in measured] == [getattr(alone, name) for name in measured]
    resident_first = [dataclasses.replace(beside[0], resident=True), results[1]]
    assert costs_of(resident_first).train_seconds == costs_of(results[1:2]).train_seconds
    assert costs_of(beside).train_seconds != alone.train_seconds
    sentence = "Memory and times are those of each method's first seed"
    for page in (as_html(made("full,lora")), as_markdown(made("full,lora"))):
        assert sentence in page.replace("&#39;", "'").replace("\\", "")
