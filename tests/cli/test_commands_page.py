"""docs/reference/commands.md names every verb, every option and every key of every result."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from turret.cli.main import app, run
from turret.workspace import Evaluation, RunResult

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
VERBS = [(command.name or getattr(command.callback, "__name__", "")) for command in app.registered_commands]
VERBS += [str(group.typer_instance.info.name) for group in app.registered_groups if group.typer_instance]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_and_option_is_on_the_page(verb, capsys) -> None:
    assert f"## `turret {verb}" in PAGE
    assert run([verb, "--help"]) == 0
    for option in re.findall(r"^ +(?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE):
        assert option in PAGE, option


def test_every_verb_on_the_page_is_there() -> None:
    assert sorted(re.findall(r"^## `turret ([a-z]+)", PAGE, re.MULTILINE)) == sorted(VERBS)


@pytest.mark.parametrize("result", [RunResult, Evaluation])
def test_every_key_of_a_result_is_on_the_page(result) -> None:
    for field in fields(result):
        assert f"`{field.name}`" in PAGE, field.name
