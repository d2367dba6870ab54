"""Measured figures in README and docs come from `benchmarks/results/`, inside marked blocks, and nowhere else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
EXEMPT = "docs/reports/"  # commands wrote them
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if not page.relative_to(ROOT).as_posix().startswith(EXEMPT)
]
BLOCK = re.compile(r"<!-- figures: [a-z0-9-]+ -->.*?<!-- end of figures -->", re.DOTALL)
CODE = re.compile(r"(?s:```.*?```)|^(?: {4}|\t).*$|`[^`\n]*`", re.MULTILINE)
# A time, a rate, a ratio, a score or a share of something that somebody measured.
MEASURED = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\b\d+(?:\.\d+)?x\b",
        r"\b\d+(?:\.\d+)?(?: to \d+(?:\.\d+)?)? times (?:as |faster|slower|less|more|quicker|smaller|the )",
        r"(?<![\d/])1/\d+(?:\.\d+)?\b",
        r"\b\d+(?:\.\d+)? ?(?:tokens/s|requests/s|GFLOP/s|TFLOP/s|tokens a second|requests a second)",
        r"(?:accuracy|F1|ROUGE[-\w]*|BLEU|loss|score)[^.|\n]{0,40}\b\d+\.\d+",
        r"[+-]?\d+(?:\.\d+)? points\b",
        r"\b0\.[1-9]\d\d\b",
        r"\b(?:takes?|took|in|needs?|costs?) (?:about |under )?\d+(?:\.\d+)? ?(?:ms|milliseconds|minutes)\b",
    )
]
# What looks like a measurement and is none: a limit, a setting, an example, or somebody else's published figure.
NO_MEASUREMENT = {
    "docs/measured.md": ("2.0x [1.8, 2.3]",),
    "docs/howto/read-an-experiment.md": ("a betting score: it starts at 0.5",),
    "docs/howto/untrained.md": ("a softmax of 20 times the cosines",),
    "docs/reference/exchange.md": ("100 times the size of the archive",),
    "docs/reference/http.md": ("at most 1/32 of the remaining ones",),
}


def unmarked(text: str, allowed: tuple[str, ...] = ()) -> list[str]:
    """Lines with a measured figure outside a block."""
    outside = CODE.sub("", BLOCK.sub("", text))
    lines = [line for line in outside.splitlines() if not any(word in line for word in allowed)]
    return [line for line in lines if any(pattern.search(line) for pattern in MEASURED)]


def test_a_measured_figure_stands_in_a_marked_block() -> None:
    for page in PAGES:
        allowed = NO_MEASUREMENT.get(page.relative_to(ROOT).as_posix(), ())
        assert unmarked(page.read_text(encoding="utf-8"), allowed) == [], page


@pytest.mark.parametrize(
    "claim",
    [
        "A step takes 1/4.0 of the time of HF Trainer + PEFT.",
        "It is 2.8x faster than PEFT.",
        "Prefix tuning reaches an accuracy of 0.935 there.",
        "Sixteen adapters decode at 605 tokens/s.",
        "Looking costs 1.6 to 2.1 times as many units.",
        "A load takes 4.7 ms.",
    ],
)
def test_a_claim_without_a_source_is_noticed(claim: str) -> None:
    assert unmarked(f"Some text.\n\n    a block of code\n\n```\nanother one\n```\n\n{claim}\n") == [claim]
    assert unmarked(f"<!-- figures: summary -->\n{claim}\n<!-- end of figures -->\n") == []


def test_every_block_is_one_that_is_written() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = BLOCK.findall(text)
        assert len(found) == text.count("<!-- figures:"), page
        assert all(block.count("\n") > 1 for block in found), f"{page}: a block without a figure"


# --- what may be claimed ---------------------------------------------------------------------------------------------

RATIO = re.compile(r"\d(?:\.\d+)?x \[(-?[\d.]+), (-?[\d.]+)\]")
COMMIT = re.compile(r"20\d\d-\d\d-\d\d, [0-9a-f]{7,40}\b|older tree")
NO_END = re.compile(r"\[-?inf|inf\]")
SCORE = re.compile(r"\b(?:gave|reached|got)\b[^.\n\"]{0,20}\b0\.\d\d")
# A score in the program's own words: the file, the score, the result that carries it.
CARRIED = {"methods/lora.py": {"accuracy 0.53": "book_jobs", "0.87 by default": "book_jobs"}}


def chance(text: str) -> list[str]:
    """Ratios whose interval reaches 1, or is none."""
    return [found.group() for found in RATIO.finditer(text) if float(found[1]) <= 1.0]


def test_the_front_page_claims_no_ratio_that_chance_explains() -> None:
    assert chance((ROOT / "README.md").read_text(encoding="utf-8")) == []
    assert chance("- a step is 3.1x [1.05, 4.8] faster") == []
    assert chance("3.1x [1.0, 4.8] faster, 2.7x [0.60, 6.7] faster") == ["3.1x [1.0, 4.8]", "2.7x [0.60, 6.7]"]


def test_every_interval_has_two_ends_and_no_commit_is_cited() -> None:
    for page in (*PAGES, ROOT / "ARCHITECTURE.md"):
        text = page.read_text(encoding="utf-8")
        assert NO_END.findall(text) == [], page
        assert COMMIT.findall(text) == [], page
    assert NO_END.search("1.49x [-inf, inf]")
    assert COMMIT.search("2026-11-27, 04759c0d0c5b")


def test_a_score_in_the_programs_own_words_is_one_that_a_result_carries() -> None:
    for path in sorted((ROOT / "src" / "turret").rglob("*.py")):
        known = CARRIED.get(path.relative_to(ROOT / "src" / "turret").as_posix(), {})
        text = path.read_text(encoding="utf-8")
        for found in SCORE.finditer(text):
            assert any(words in text[found.start() : found.end() + 40] for words in known), f"{path}: {found.group()}"
        for words, result in known.items():
            score = re.search(r"0\.\d\d", words)
            assert words in text
            assert score is not None
            kept = (BENCHMARKS / "results" / f"{result}.json").read_text(encoding="utf-8")
            assert re.search(rf'"accuracy": {score.group()}', kept), words
    assert SCORE.search("after one epoch 2e-5 gave 0.51 on IMDB")


def run(*arguments: str) -> str:
    """What Python prints for these arguments; it finds the modules of `benchmarks/`."""
    path = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, env=path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_ratio_has_an_interval_that_covers_it_as_often_as_it_says() -> None:
    program = (
        "import numpy as np, record\n"
        "draw = np.random.default_rng(1)\n"
        "for rounds in (3, 5, 7, 15):\n"
        "    found = [record.ratio(2 * np.exp(draw.normal(0, 0.3, rounds)), np.ones(rounds)) for _ in range(400)]\n"
        "    print(sum(each.low <= 2 <= each.high for each in found) / len(found))\n"
        "print(record.shown(record.ratio([2.0], [1.0]), 1), record.shown(record.ratio([2.0] * 9, [1.0] * 9), 1))\n"
    )
    *covered, last = run("-c", program).splitlines()
    assert all(float(share) >= 0.92 for share in covered), covered
    assert last == "2.0x 2.0x [2.0, 2.0]"


@pytest.mark.slow
def test_every_block_and_chart_is_what_the_results_say() -> None:
    run(str(BENCHMARKS / "figures.py"), "--check")


@pytest.mark.slow  # `make docs` checks every page
def test_the_readme_says_what_the_results_say_and_a_figure_changed_by_hand_is_noticed() -> None:
    program = (
        "import figures\n"
        "page = figures.PAGES[0].read_text(encoding='utf-8')\n"
        "assert figures.filled(page) == page\n"
        "changed = page.replace('x [', '9x [', 1)\n"
        "assert changed != page and figures.filled(changed) == page\n"
    )
    run("-c", program)
