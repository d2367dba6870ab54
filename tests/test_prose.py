"""`make prose` finds banned phrases with their line, and skips code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from scripts import load

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "release" / "check_prose.py"
check_prose = load(SCRIPT)


def check(*files: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, files)], capture_output=True, text=True, timeout=60)


def test_the_documentation_has_no_banned_form() -> None:
    done = check()
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("form", check_prose.FORMS, ids=lambda form: form.example)
def test_a_planted_sentence_is_found_with_line_reason_and_plain_form(form, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\nA plain sentence.\n\n{form.example}\n", encoding="utf-8")
    done = check(page)
    assert done.returncode == 1
    assert f"{page}:5: " in done.stdout
    assert form.reason in done.stdout
    assert form.plain in done.stdout


@pytest.mark.parametrize("form", check_prose.FORMS, ids=lambda form: form.example)
def test_the_plain_form_is_not_banned(form) -> None:
    assert list(check_prose.matches(form.plain)) == []


def test_a_form_is_found_over_the_end_of_a_line_and_in_capitals() -> None:
    assert [line for line, _, _ in check_prose.matches("A list stands in place\nof a text. Seldom.")] == [1, 2]


def test_code_links_comments_and_measured_blocks_are_not_read() -> None:
    unread = (
        "`in place of`, [a link](in-place-of.md#in place of)\n\n    in place of\n\n```\nin place of\n```\n"
        "<!-- in place of -->\n<!-- figures: x -->\nin place of\n<!-- end of figures -->\n"
    )
    assert list(check_prose.matches(unread)) == []
    assert [line for line, _, _ in check_prose.matches(f"{unread}\nA list in place of a text.")] == [13]
