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
GROUPS = {
    group.name: [each.name or each.callback.__name__ for each in group.typer_instance.registered_commands]
    for group in app.registered_groups
}


@pytest.mark.slow
def test_every_verb_and_option_is_on_the_page(capsys) -> None:
    for verb in VERBS:
        assert f"## `turret {verb}" in PAGE
        assert run([verb, "--help"]) == 0
        for option in re.findall(r"^ +(?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE):
            assert option in PAGE, f"turret {verb} {option}"


def test_every_verb_on_the_page_is_there() -> None:
    assert sorted(re.findall(r"^## `turret ([a-z]+)", PAGE, re.MULTILINE)) == sorted([*VERBS, *GROUPS])


def test_every_verb_and_option_of_a_group_is_on_the_page(capsys) -> None:
    for group, verb in [(group, verb) for group, verbs in GROUPS.items() for verb in verbs]:
        assert f"`turret {group} {verb}" in PAGE
        assert run([group, verb, "--help"]) == 0
        for option in re.findall(r"^ +(?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.MULTILINE):
            assert option in PAGE, f"turret {group} {verb} {option}"


@pytest.mark.parametrize("result", [RunResult, Evaluation])
def test_every_key_of_a_result_is_on_the_page(result) -> None:
    for field in fields(result):
        assert f"`{field.name}`" in PAGE, field.name
