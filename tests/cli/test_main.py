"""Every command: fast help, one line for an error, exit statuses, one JSON object."""

from __future__ import annotations

import resource
import shlex
import subprocess
import sys

import pytest
import typer
from typer.exceptions import TyperException

from turret import errors
from turret.amounts import many, percentage, size, span
from turret.cli.main import GROUPS, app, run
from turret.cli.output import number, safe
from turret.compare.report_text import milliseconds
from turret.experiments.experiment import duration_text

VERBS = (
    "train",
    "plan",
    "evaluate",
    "predict",
    "list",
    "show",
    "diff",
    "promote",
    "rollback",
    "gate",
    "verify",
    "import",
    "export",
    "gc",
    "delete",
    "doctor",
)


def failing(error: BaseException) -> typer.Typer:
    """A command line whose one command raises."""
    commands = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

    @commands.command()
    def verb() -> None:
        raise error

    return commands


def test_help_loads_nothing_heavy_and_answers_quickly() -> None:
    code = (
        "import sys; from turret.cli.main import run; assert run(['--help']) == 0; "
        "heavy = {'torch', 'transformers', 'pandas', 'sqlalchemy', 'pydantic', 'rich'} & set(sys.modules); "
        "print(heavy, file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.strip() == "set()"
    # Processor time, so that a busy machine does not fail this.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # alone it is below 0.3
    for verb in VERBS:
        assert f"\n  turret {verb}" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_takes_store_and_json(verb, capsys) -> None:
    assert run([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--store" in out
    assert "--json" in out


def test_help_has_every_command_once_with_an_example_that_parses() -> None:
    """The words of an example are checked, and nothing is run."""
    command = typer.main.get_command(app)
    examples = [example for group in GROUPS.values() for example in group]
    assert sorted(example.partition(" ")[0] for example in examples) == sorted(command.commands)
    for example in examples:
        name, *words = shlex.split(example)
        with command.commands[name].make_context(name, words) as context:
            if words and hasattr(context.command, "commands"):
                context.command.commands[words[0]].make_context(words[0], words[1:])
    with pytest.raises(TyperException):
        command.commands["promote"].make_context("promote", ["news@2"])  # the control


def test_turret_alone_says_the_first_three_commands(capsys) -> None:
    assert run([]) == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  turret ")] == [
        "demo",
        "train",
        "predict",
    ]
    assert out.splitlines()[-1] == "All commands: turret --help"


def test_the_version_is_said(capsys) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("turret 0.")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["lst"], "No such command 'lst'"),
        (["list", "--jsn"], "No such option: --jsn"),
        (["predict", "a"], "Missing argument"),
        (["train"], "Missing argument"),
        (["train", "x.csv", "--seed", "one"], "see `turret train --help`"),
    ],
)
def test_a_mistyped_command_costs_one_line_and_status_2(arguments, complaint, capsys) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("turret: ")
    assert err.count("\n") == 1
    assert complaint in err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.StoreError("the disk is full"), 1),
        (errors.NotFound("no a@1"), 1),
        (errors.BadReference("bad"), 2),
        (errors.RecipeError("bad"), 2),
        (errors.Interrupted("stopped after step 3: start the same command again"), 130),
    ],
)
def test_an_error_of_ours_is_one_line_with_its_status(error, status, capsys) -> None:
    assert run([], failing(error)) == status
    assert capsys.readouterr() == ("", f"turret: {error}\n")


def test_a_message_of_many_lines_is_still_one_line(capsys) -> None:
    run([], failing(errors.DataError("first\n  second\x00\r\nthird")))
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "first second" in err


def test_a_long_message_keeps_what_failed_and_the_remedy(capsys) -> None:
    path, many = "/folder" * 2000, "word " * 3000
    run([], failing(errors.StoreError(f"the store cannot be read: {path}: {many}: make it readable")))
    err = capsys.readouterr().err
    assert len(err) <= errors.LINE + 1
    assert err.startswith("turret: the store cannot be read: /folder/folder")
    assert err.endswith("word : make it readable\n")


LONG = "x" * 10_000


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "--store", LONG],
        ["list", "--store", f"postgresql://{LONG}"],
        ["show", LONG],
        ["show", f"a@{LONG}"],
        ["predict", LONG, "text"],
        ["evaluate", "a", LONG],
        ["plan", LONG],
        ["train", f"~{LONG}/r.toml"],
        ["plan", "quick-classify", "--set", f"data.source={LONG}"],
        ["plan", "quick-classify", "--set", f"data.source=~{LONG}"],
        ["plan", "quick-classify", "--set", f"base={LONG}"],
        ["plan", "quick-classify", "--set", f"{LONG}=1"],
        ["plan", "quick-classify", "--set", f"method={LONG}"],
        ["plan", "quick-classify", "--set", f"seed={'9' * 5000}"],
        ["import", LONG, "--name", "a"],
        ["import", ".", "--name", LONG],
        ["promote", "a@1", LONG],
        ["gate", "a", "production", "--add", LONG],
        ["gate", "a", "production", "--golden", LONG],
        ["export", "a@1", LONG],
        ["token", "create", LONG, "--scope", LONG],
        ["experiment", "start", LONG, LONG],
        [LONG],
        ["list", f"--{LONG}"],
    ],
    ids=lambda words: " ".join(word[:30] for word in words),
)
def test_a_name_of_10000_characters_costs_one_line_of_300(arguments, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("turret: ")
    assert err.count("\n") == 1
    assert len(err) <= errors.LINE + 1
    assert "bug in turret" not in err


def test_ctrl_c_is_130_without_a_traceback(capsys) -> None:
    assert run([], failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "turret: stopped\n"


def test_a_bug_is_one_line_unless_the_traceback_is_asked_for(capsys, monkeypatch) -> None:
    monkeypatch.delenv("TURRET_DEBUG", raising=False)
    assert run([], failing(ZeroDivisionError("division by zero"))) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "a bug in turret (ZeroDivisionError: division by zero): set TURRET_DEBUG=1" in err
    monkeypatch.setenv("TURRET_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run([], failing(ZeroDivisionError()))


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error() -> None:
    line = f"{sys.executable} -m turret list --json | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_sizes_counts_and_spans_are_short() -> None:
    assert [size(n) for n in (0, 999, 87_000, 1_234_567, 2.5e9, 3e12, None)] == [
        "0 B",
        "999 B",
        "87.0 kB",
        "1.2 MB",
        "2.5 GB",
        "3000 GB",
        "?",
    ]
    assert [many(n) for n in (12, 74_112, 22_700_000, 1.5e9)] == ["12", "74.1k", "22.7M", "1.5B"]
    assert [span(s) for s in (0.84, 42, 185, 7800)] == ["0.8 s", "42 s", "3 min 05 s", "2 h 10 min"]


def test_a_number_that_rounds_up_takes_the_next_unit() -> None:
    assert [size(n) for n in (999.7, 999_960, -999_960, 999_400)] == ["1.0 kB", "1.0 MB", "-1.0 MB", "999 kB"]
    assert [many(n) for n in (999_999, 999_999_999)] == ["1.0M", "1.0B"]
    assert [span(s) for s in (9.97, 59.7, 59.4)] == ["10 s", "1 min 00 s", "59 s"]
    assert [milliseconds(s) for s in (0.0031, 0.42, 0.9997)] == ["3.1 ms", "420 ms", "1.0 s"]


def test_durations_of_years_are_in_days() -> None:
    days = [duration_text(86400 * each) for each in (1, 1.001, 1.5, 400, 999.7, 3650)]
    assert days == ["1 day", "1 day", "1.5 days", "400 days", "1,000 days", "3,650 days"]


def test_only_all_is_100_percent_and_only_none_is_0_percent() -> None:
    assert [number(each) for each in (0.9989, 0.9996, 1.0, 1.0004)] == ["0.999", "0.999", "1.000", "1.000"]
    shares = (0, 1e-9, 0.0004, 0.913, 0.9996, 1 - 1e-9, 1, -0.2)
    assert [percentage(each) for each in shares] == [
        "0.0%", "0.1%", "0.1%", "91.3%", "99.9%", "99.9%", "100.0%", "-20.0%",
    ]  # fmt: skip


def test_a_text_cannot_move_the_cursor_or_write_markup() -> None:
    assert errors.printable("a\x1b[31mb\nc\x00") == "a [31mb c "
    assert safe("[red]x[/]") == r"\[red]x\[/]"
