"""Dataclasses of options: what Typer sees of them, and what the verb gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer import Option

from turret.cli.options import Without, flatten_options, group


@dataclass(frozen=True)
class Inner:
    depth: Annotated[int, Option(help="How deep.")] = 1
    loud: Annotated[bool, Option(help="Say more.")] = False


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name_of: Annotated[str | None, Option(help="Its name.")] = None


GIVEN: list[object] = []


def verb(*, first: Annotated[int, Option(help="First.")] = 0, outer: Outer) -> None:
    """Do it."""
    GIVEN.append((first, outer))


def other(*, outer: Annotated[Outer, Without(("depth",))], depth: Annotated[str, Option(help="Own.")] = "own") -> None:
    """Do it otherwise."""
    GIVEN.append((outer, depth))


@pytest.fixture
def typed():
    """Runs a command line, and returns what its verb got."""
    GIVEN.clear()
    commands = group("Verbs.", verb, other)

    def typed(*words: str) -> object:
        commands(list(words), standalone_mode=False)
        return GIVEN.pop()

    return typed


def test_every_field_is_an_option_in_its_place_called_as_it_is_without_a_no_form() -> None:
    commands = typer.main.get_command(group("Verbs.", verb, other)).commands
    assert [each.opts for each in commands["verb"].params] == [["--first"], ["--depth"], ["--loud"], ["--name-of"]]
    assert commands["verb"].params[2].secondary_opts == []
    assert commands["verb"].help == "Do it."


def test_the_verb_gets_the_dataclass(typed) -> None:
    assert typed("verb") == (0, Outer(Inner()))
    assert typed("verb", "--depth", "3", "--loud", "--name-of", "x") == (0, Outer(Inner(3, True), "x"))


def test_what_a_verb_leaves_out_keeps_its_default_even_if_its_own_option_has_the_name(typed) -> None:
    assert typed("other", "--depth", "7") == (Outer(Inner(depth=1)), "7")


def test_a_verb_without_groups_stays_as_it_is() -> None:
    def plain(word: Annotated[str, typer.Argument(help="A word.")]) -> None:
        GIVEN.append(word)

    flatten_options(plain)(word="x")
    assert GIVEN.pop() == "x"
