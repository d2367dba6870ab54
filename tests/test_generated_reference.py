"""`make reference`: the generated parts of the reference are those of the code as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import load

from turret.recipe import Train

ROOT = Path(__file__).parents[1]
make_reference = load(ROOT / "release" / "make_reference.py")


def test_every_generated_part_is_up_to_date() -> None:
    stale = [page.name for page, text in make_reference.pages().items() if page.read_text(encoding="utf-8") != text]
    assert stale == [], "run `make reference`"


def test_a_changed_default_is_written_and_the_meaning_stays() -> None:
    page = "<!-- generated: keys train -->\n" + make_reference.keys(
        "train", (ROOT / "docs/reference/recipe.md").read_text()
    )
    wrong = page.replace("| `8` | examples per step |", "| `9` | examples per update |")
    assert wrong != page
    assert "| `batch_size` | whole number, 1 to 65536 | `8` | examples per update |" in make_reference.keys(
        "train", wrong
    )


def test_a_key_without_a_meaning_is_an_error() -> None:
    with pytest.raises(SystemExit, match="write the meaning of epochs"):
        make_reference.keys("train", "")


def test_a_type_is_said_in_words_with_its_bounds() -> None:
    fields = Train.model_fields
    assert make_reference.kind_of(fields["batch_size"]) == "whole number, 1 to 65536"
    assert make_reference.kind_of(fields["lr"]) == 'number, above 0; or `"auto"`'
    assert make_reference.kind_of(fields["keep"]) == '`"last"` or `"best"`'


def test_every_command_and_every_route_is_there() -> None:
    commands = (ROOT / "docs/reference/commands.md").read_text(encoding="utf-8")
    app = make_reference.typer.main.get_command(make_reference.app)
    for name, command in app.commands.items():
        for each in [f"{name} {verb}" for verb in getattr(command, "commands", ())] or [name]:
            assert f"<!-- generated: command {each} -->" in commands, each
    assert "## `POST /v1/classify`" in make_reference.schema_page()
