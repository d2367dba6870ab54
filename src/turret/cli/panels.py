"""`turret panel ...`: named lists of questions about a text, each answered by an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from turret.cli import options
from turret.cli.output import columns, console, safe
from turret.errors import BadArgument
from turret.timestamp import to_minute

if TYPE_CHECKING:
    from turret.store import Panel, PanelMove
    from turret.tasks import QuestionType

Name = Annotated[str, Argument(help="Name of the panel.", show_default=False)]
PanelRef = Annotated[str, Argument(metavar="PANEL", help="A version of a panel: name or name@2.")]


def create(
    *,
    name: Name,
    ask: Annotated[
        list[str],
        Option(
            metavar="QUESTION=REF",
            help="A question and its adapter; repeatable. REF#COLUMN is one of several questions of an adapter, "
            "REF alone all of them.",
        ),
    ],
    type_: Annotated[
        list[str] | None,
        Option(
            "--type", metavar="QUESTION=TYPE", help="predicate, choice or score; default: as the adapter was trained."
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        Option(
            metavar="QUESTION=A,B",
            help="The labels of a score from the lowest to the highest, of a predicate false,true.",
        ),
    ] = None,
    threshold: Annotated[
        list[str] | None, Option(metavar="QUESTION=0.9", help="Give no answer whose probability is lower.")
    ] = None,
    command: options.Command,
) -> None:
    """Store the next version of a panel.

    The plain name means the newest version until one is promoted.
    """
    from turret.store import Question

    pairs = [each.rpartition("=")[::2] for each in ask]
    more = {key: _pairs(key, given) for key, given in (("type", type_), ("labels", labels), ("threshold", threshold))}
    names = [question for question, _ in pairs]
    for key, found in more.items():
        for question in found:
            if question not in names:
                raise BadArgument(f"--{key} {question}=…: no --ask {question}=REF, which must name the question first")
    thresholds = {
        question: options.number(f"threshold {question}", text, "a number such as 0.9")
        for question, text in more["threshold"].items()
    }
    questions = [
        Question(
            question,
            reference,
            _type(question, more["type"].get(question)),
            tuple(each.strip() for each in more["labels"][question].split(",")) if question in more["labels"] else (),
            thresholds.get(question),
        )
        for question, reference in pairs
    ]
    made = command.workspace.panels.create(name, questions)
    command.report(made, _print)
    command.offer(f"panel promote {made}", "serve")


def list_(command: options.Command) -> None:
    """List panels and their versions."""
    found = command.workspace.panels.list()
    command.table(
        {"panels": [each.as_json() for each in found]},
        ("panel", "alias", "questions", "", "stored"),
        map(_row, found),
        right=("questions",),
        none="no panels yet: [bold]turret panel create NAME --ask QUESTION=REF[/] makes one",
    )


def show(panel: PanelRef, command: options.Command) -> None:
    """Show one version: its questions, with adapters, labels and thresholds."""
    command.report(command.workspace.panels.show(panel), _print)


def promote(panel: PanelRef, command: options.Command) -> None:
    """Make a version the one that the plain name means. Every adapter must still fit its question."""
    command.report(command.workspace.panels.promote(panel), _print_move)


def rollback(name: Name, command: options.Command) -> None:
    """Go back to the version that was promoted before. Another rollback goes further back."""
    command.report(command.workspace.panels.rollback(name), _print_move)


app = options.group(
    "Lists of questions about a text, each answered by an adapter, for /v1/decisions.",
    create,
    list_,
    show,
    promote,
    rollback,
)


def _row(panel: Panel) -> tuple[str, ...]:
    return (
        f"[bold]{safe(panel)}[/]",
        "[green]production[/]" if panel.production else "",
        str(len(panel.questions)),
        safe(", ".join(each.name for each in panel.questions[:6])),
        safe(to_minute(panel.created)),
    )


def _pairs(key: str, given: Sequence[str] | None) -> dict[str, str]:
    found = {}
    for each in given or ():
        question, equals, value = each.rpartition("=")
        if not equals:
            raise BadArgument(f"--{key} {each[:60]!r}: expected QUESTION=VALUE, such as --{key} urgent=…")
        found[question] = value
    return found


def _type(question: str, text: str | None) -> QuestionType | None:
    from turret.store.panels import TYPES

    if text is None:
        return None
    for each in TYPES:
        if each == text:
            return each
    raise BadArgument(f"type of question {question[:40]} is {text[:40]}: expected {', '.join(TYPES)}")


def _print(panel: Panel) -> None:
    used = "  [green]production[/]" if panel.production else ""
    by = f" by {safe(panel.who)}" if panel.who else ""
    console().print(f"[bold]{safe(panel)}[/]{used}  [dim]{safe(to_minute(panel.created))}{by}[/]")
    rows = [
        (
            f"  [bold]{safe(each.name)}[/]",
            safe(each.reference),
            safe(each.type),
            safe(", ".join(each.labels)),
            "" if each.threshold is None else f"{each.threshold:g}",
        )
        for each in panel.questions
    ]
    console().print(columns(("question", "adapter", "type", "labels", "threshold"), rows, right=("threshold",)))


def _print_move(move: PanelMove) -> None:
    name, _, _ = move.panel.partition("@")
    if not move.changed:
        console().print(f"[green]{safe(name)}[/] means [bold]{safe(move.panel)}[/] already: nothing moved")
        return
    before = move.before or "the newest version"
    console().print(f"[green]{safe(name)}[/] means [bold]{safe(move.panel)}[/] now; it meant {safe(before)} before")
