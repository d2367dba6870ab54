"""`turret predict`, `evaluate`, `decide`, `suggest` and `promise`: use a stored version, and bound its errors."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from turret.amounts import percentage, span
from turret.cli import options
from turret.cli.output import class_table, columns, console, cut, emit, grid, metrics, safe
from turret.data import TextPair
from turret.data.columns import RoleColumns
from turret.errors import BadArgument, DataError, count_of, printable, quote
from turret.json_types import JsonObject
from turret.tasks import Task, stored_task, task_of
from turret.tasks.shapes import Answer, parts_in
from turret.timestamp import to_minute

if TYPE_CHECKING:
    from turret.compare.results import Details, QuestionResult
    from turret.data import Input
    from turret.workspace import Evaluation, Workspace
    from turret.workspace.promising import PromiseStatus
    from turret.workspace.results import PanelEvaluation, Predicted, Suggested


# --- evaluation -------------------------------------------------------------------------------------------------------
# What `turret evaluate` prints and writes.


CLASSES = 12  # at most in the confusion matrix on a screen
SHOWN_LABELS = 4  # of an untrained answer on a screen
MISTAKES = 5  # on a screen
MISTAKES_OF_EACH = 2  # of each question of a panel


def check_targets(out: Path | None, page: Path | None) -> None:
    """Raise DataError, before anything is measured, for a file that cannot be written."""
    from turret.data.table_writer import check_target

    if out is not None:
        check_target(out)
    if page is not None and (page.suffix.lower() not in (".html", ".htm") or not page.absolute().parent.is_dir()):
        raise DataError(f"--report {quote(str(page), 100)}: expected a .html file in a folder that exists")


def write_evaluation(
    found: Evaluation | PanelEvaluation, out: Path | None, page: Path | None, texts: bool
) -> list[str]:
    """Write the files that were asked for, and say which."""
    from turret.workspace import evaluation

    notes = []
    if out is not None:
        table = evaluation.write_mistakes(found, out)
        guarded = f"; {table.guarded} cells begin like a formula and have a ' in front" if table.guarded else ""
        notes.append(f"{found.wrong} wrong answers are in {out}{guarded}")
    if page is not None:
        evaluation.write_page(found, page, texts=texts)
        notes.append(f"the report is {page}")
    return notes


def print_evaluation(found: Evaluation, notes: list[str]) -> None:
    """Metrics, the table by class, confusions, calibration and the surest mistakes. notes: on files."""
    out, details = console(), found.details
    out.print(f"[bold]{safe(found.version)}[/] on {safe(found.data['source'])}")
    rows = [("metrics", metrics(found.metrics)), ("examples", f"{found.data['examples']} in {span(found.seconds)}")]
    of_each = parts_in(found.metrics, "per_question").items()
    rows += [("question", f"{safe(question)}: {metrics(each)}") for question, each in of_each]
    rows += [(name, safe(text)) for name, text in _calibration(details)]
    out.print(grid(rows + [("note", safe(note)) for note in found.notes]))
    if classes := parts_in(found.metrics, "per_class"):
        out.print()
        out.print(class_table(classes))
    _print_confusion(details)
    _print_mistakes(details)
    for note in notes:
        out.print(f"[dim]{safe(note)}[/]")


def print_panel(found: PanelEvaluation, notes: list[str]) -> None:
    """A line for each question, and its surest mistakes. notes: on files."""
    out = console()
    out.print(f"[bold]{safe(found.panel)}[/] on {safe(found.data['source'])}")
    heads = ("question", "answered by", "examples", "accuracy", "ECE", "threshold", "decided", "wrong among these")
    rows = [_question_row(each) for each in found.questions]
    out.print(columns(heads, rows, right=heads[2:]))
    out.print(grid([("examples", f"{found.data['examples']} in {span(found.seconds)}")]))
    out.print(grid([("note", safe(note)) for note in found.notes]))
    for each in found.questions:
        _print_mistakes(each.details, each.question, most=MISTAKES_OF_EACH)
    for note in notes:
        out.print(f"[dim]{safe(note)}[/]")


def _question_row(each: QuestionResult) -> tuple[str, ...]:
    from turret.compare.results import error_interval

    error, (low, high) = each.decided.error, error_interval(each.decided)
    wrong = "none" if error is None else f"{percentage(error)} ({low:.1%} to {high:.1%})"
    threshold = "none" if each.threshold is None else f"{each.threshold:.3g}, {each.threshold_of}"
    return (
        f"[bold]{safe(each.question)}[/]",
        safe(each.version),
        str(each.examples),
        percentage(each.metrics["accuracy"]),
        f"{each.sureness.ece:.3f}",
        threshold,
        percentage(each.share),
        wrong,
    )


def _calibration(details: Details) -> Iterator[tuple[str, str]]:
    for question, found in details.reliability.items():
        of = f"{question}: " if question else ""
        if found.temperature is not None and found.raw_ece is not None:
            text = f"ECE {found.ece:.3f} with temperature {found.temperature:.3g}, {found.raw_ece:.3f} without it"
        else:
            text = f"ECE {found.ece:.3f}; none is stored, because no validation split was there in training"
        yield "calibration", of + text
    if details.coverage is not None:
        c = details.coverage
        span = f"{percentage(c.measured)} ({c.low:.1%} to {c.high:.1%})"
        yield "coverage", f"{c.coverage:.0%} sets hold the right label in {span}, with {c.mean_size:.2f} labels each"


def _print_confusion(details: Details) -> None:
    confusion = details.confusion
    if confusion is None or not details.mistakes:
        return
    out = console()
    out.print()
    if len(confusion.labels) <= CLASSES:
        heads = tuple(map(safe, confusion.labels))
        rows = [
            (f"  {safe(label)}", *(str(count) if count else "[dim]·[/]" for count in counts))
            for label, counts in zip(confusion.labels, confusion.counts, strict=True)
        ]
        out.print(columns(("right \\ answered", *heads), rows, right=heads))
        return
    pairs = [(f"  {safe(right)}", safe(given), str(count)) for right, given, count in confusion.pairs(8)]
    out.print(columns(("right", "answered", "times"), pairs, right=("times",)))


def _print_mistakes(details: Details, question: str = "", most: int = MISTAKES) -> None:
    """The worst answers. question: of a panel."""
    if not details.mistakes:
        return
    out, count = console(), len(details.mistakes)
    shown = details.mistakes[:most]
    task = task_of(details.task)
    more = f" of {count}" if count > len(shown) else ""
    of = f"{safe(question)}: " if question else ""
    out.print(f"\n[dim]{of}{task.errors}, {len(shown)}{more}[/]")
    for each in shown:
        sides = ((task.sides[1], each.given, "red"), (task.sides[0], each.right, "green"))
        given, right = (f"[dim]{name}[/] [{hue}]{safe(_short(text, 60))}[/]" for name, text, hue in sides)
        out.print(f"  [dim]row {each.row}[/]  {given} {safe(each.error)}  {right}")
        texts = (each.asked.text, each.asked.text_pair) if isinstance(each.asked, TextPair) else (each.text,)
        for text in texts:
            out.print(f"    [dim]{safe(_short(text, 100))}[/]")


def _short(value: str | list[str], most: int) -> str:
    return cut(printable(value if isinstance(value, str) else ", ".join(value) or "none"), most)


# --- answers ----------------------------------------------------------------------------------------------------------


def predict(
    *,
    context: typer.Context,
    reference: options.Ref,
    inputs: Annotated[
        list[str],
        Argument(
            metavar="TEXT... | FILE", help="Texts, a table, a .txt file, or - for stdin; what follows -- is a text."
        ),
    ],
    reading: Annotated[options.Reading, options.Without(("label", "completion"))],
    out: Annotated[
        Path | None, Option(metavar="FILE", help="Write rows and answers to a .csv, .tsv, .jsonl or .xlsx.")
    ] = None,
    top: Annotated[int, Option(help="Labels to show for each text: the answer, then the most probable others.")] = 1,
    coverage: Annotated[float | None, Option(help="Also give sets that hold the right label this often: 0.9.")] = None,
    bare: Annotated[bool, Option(help="Ask the base alone, with the same prompt.")] = False,
    device: options.Device = "auto",
    command: options.Command,
) -> None:
    """Answer texts with a stored version.

    Prints labels with probabilities, or generated texts.
    FILE is a .txt file with one input per line, or a table (.csv, .tsv, .jsonl, .json, .xlsx, .parquet; .gz, .zst).
    """
    from turret.workspace.answering import PredictOptions, check_options

    workspace = command.workspace
    named = reading.keys()
    if out is not None:
        source, wanted = _one_file(inputs), PredictOptions(named, bare, top, coverage, device)
        command.perform(_print_written, workspace.predict_file, reference, source, out, wanted)
        return
    literal = min(context.obj or 0, len(inputs))  # inputs after `--`
    texts = inputs if literal == len(inputs) and not named else _texts(workspace, reference, inputs, named, literal)
    version = workspace.resolve(reference)
    if texts is inputs:
        texts = stored_task(version.task).from_words(version.task, inputs)
    check_options(version, top, coverage)
    answers = command.run(workspace.predict, reference, texts, bare=bare, coverage=coverage, device=device)
    if command.as_json:
        emit([_with_top(answer, top) for answer in answers])
    else:
        _print_answers(stored_task(version.task), texts, answers, top, coverage)


def evaluate(
    *,
    reference: Annotated[
        str, Argument(metavar="REF | PANEL", help="A version: name, name@3 or name@production; or a panel.")
    ],
    data: Annotated[str, Argument(metavar="DATA", help="File, folder, Hub id, pypi: package, or - for stdin.")],
    reading: options.Reading,
    out: Annotated[
        Path | None, Option(metavar="FILE", help="Write wrong answers to a .csv, .tsv, .jsonl or .xlsx.")
    ] = None,
    page: Annotated[
        Path | None, Option("--report", metavar="FILE", help="Write a page with plots and mistakes: page.html.")
    ] = None,
    texts: Annotated[bool, Option("--texts/--no-texts", help="Whether the page shows texts of the data.")] = True,
    device: options.Device = "auto",
    command: options.Command,
) -> None:
    """Measure a stored version on other data, and show what it gets wrong.

    Uses the test split if the data has one. The default columns are those of the version's training.
    A panel needs a column for each question, by its name or by --label QUESTION=COLUMN, and goes before a version of
    the same name.
    """
    workspace = command.workspace
    panel = workspace.panels.find(reference)
    columns = reading.keys()
    check_targets(out, page)
    files = f"evaluate {reference} {shlex.quote(data)} --out wrong.csv --report page.html"
    more = [] if out or page or data == "-" else [files]
    if panel is not None:
        columns |= _columns_of_questions(reading.columns.label)
        measured = command.run(workspace.evaluate_panel, str(panel), data, columns=columns, device=device)
        notes = write_evaluation(measured, out, page, texts)
        command.report(measured, lambda each: print_panel(each, notes))
        moves = [] if panel.production else [f"panel promote {panel}"]
    else:
        found = command.run(workspace.evaluate, reference, data, columns=columns, device=device)
        notes = write_evaluation(found, out, page, texts)
        command.report(found, lambda each: print_evaluation(each, notes))
        moves = [f"promote {found.version} production"]
    command.offer(*more, *moves)


def _columns_of_questions(label: list[str] | None) -> JsonObject:
    """`["topic=team"]` -> `{"label": {"topic": "team"}}`; one COLUMN alone is of the only question."""
    if not label or (len(label) == 1 and "=" not in label[0]):
        return {}
    if wrong := next((each for each in label if "=" not in each), None):
        raise BadArgument(f"--label {quote(wrong, 40)}: a panel has several questions, expected QUESTION=COLUMN")
    return {"label": dict(each.rpartition("=")[::2] for each in label)}


def decide(
    *,
    model: Annotated[str, Argument(metavar="MODEL", help="A base, or a version that generates or embeds.")],
    texts: Annotated[list[str], Argument(metavar="TEXT...", help="Texts.")],
    labels: Annotated[
        list[str], Option("--label", metavar="LABEL[=DESCRIPTION]", help="A possible answer; two or more.")
    ],
    instructions: Annotated[str, Option(metavar="TEXT", help="What a decoder decides.")] = "",
    prior: Annotated[
        bool, Option("--prior/--no-prior", help="Divide out what is answered about an empty text.")
    ] = False,
    device: options.Device = "auto",
    command: options.Command,
) -> None:
    """Answer a question about texts without training.

    A decoder answers by the words of the labels in its chat template, an encoder by their similarity to the text. The
    probabilities are not calibrated.
    """
    pairs = [each.partition("=") for each in labels]
    descriptions = {label: description for label, equals, description in pairs if equals}
    found = command.run(
        command.workspace.decide,
        model,
        texts,
        [label for label, _, _ in pairs],
        instructions=instructions,
        descriptions=descriptions,
        prior=prior,
        device=device,
    )
    if command.as_json:
        emit([each.as_json() for each in found])
        return
    for text, each in zip(texts, found, strict=True):
        ranked = sorted(each.probabilities.items(), key=lambda pair: -pair[1])
        line = "  ".join(f"{label} {chance:.2f}" for label, chance in ranked[:SHOWN_LABELS])
        mass = "" if each.label_mass is None else f"  label mass {each.label_mass:.2g}"
        console().print(f"[bold]{safe(line)}[/]  [dim]{safe(cut(printable(text), 72))}{mass}[/]")
    console().print("[dim]untrained: nothing was learnt for this question, and the probabilities are not calibrated[/]")


def suggest(
    *,
    reference: options.Ref,
    source: Annotated[str, Argument(metavar="FILE", help="A table or a .txt file without labels.")],
    most: Annotated[int, Option(metavar="N", help="Rows to suggest.")] = 50,
    reading: Annotated[options.Reading, options.Without(("label", "prompt", "completion", "messages"))],
    out: Annotated[
        Path | None, Option(metavar="FILE", help="Write the rows to label to a .csv, .tsv, .jsonl or .xlsx.")
    ] = None,
    device: options.Device = "auto",
    command: options.Command,
) -> None:
    """Choose the rows of a table to label next.

    Those are the rows that a version is least sure of, and they are not near-duplicates of each other.
    """
    named = reading.keys()
    check_targets(out, None)
    found = command.run(command.workspace.suggest, reference, source, most=most, columns=named, device=device)
    notes = []
    if out is not None:
        from turret.workspace.predicted_file import write_suggestions

        table = write_suggestions(found, out)
        notes.append(f"{count_of(len(found.suggestions), 'row')} to label in {out}: fill in the column {found.label}")
        if table.guarded:
            notes.append(f"{table.guarded} cells begin like a formula and have a ' in front")
    command.report(found, lambda each: _print_suggested(each, notes))
    if out is None:
        command.offer(f"suggest {reference} {shlex.quote(source)} --most {most} --out to-label.csv")


def _print_suggested(found: Suggested, notes: Sequence[str]) -> None:
    out = console()
    left_out = [f"{count} {word}" for count, word in ((found.blank, "blank"), (found.repeated, "repeated")) if count]
    read = f"{count_of(found.rows, 'row')} read" + (f" ({', '.join(left_out)})" if left_out else "")
    out.print(f"[bold]{safe(found.version)}[/] is least sure of these; {read} in {span(found.seconds)}")
    rows = [
        (
            str(each.row),
            f"{each.confidence:.2f}",
            safe(_short(each.predicted, 30)),
            *(safe(cut(printable(text), 100 // len(each.texts))) for text in each.texts),
        )
        for each in found.suggestions
    ]
    heads = ("row", "confidence", "predicted", *map(safe, found.columns))
    out.print(columns(heads, rows, right=("row", "confidence")))
    for note in [*found.notes, *notes]:
        out.print(f"[dim]{safe(note)}[/]")


def _texts(
    workspace: Workspace, reference: str, inputs: Sequence[str], named: RoleColumns, literal: int = 0
) -> Sequence[Input]:
    """The texts given on the command line, in a file or on stdin. literal: how many at the end are no file."""
    if len(inputs) == 1 and inputs[0] == "-":
        try:
            return [line.rstrip("\r\n") for line in sys.stdin]
        except UnicodeDecodeError:
            raise DataError("stdin is not UTF-8: give UTF-8 text with one input per line") from None
    if len(inputs) == 1 and not literal and _names_a_file(inputs[0]):
        return workspace.inputs(reference, inputs[0], columns=named)
    words = inputs[: len(inputs) - literal]
    if files := [word for word in words if os.path.isfile(word) or _names_a_file(word)]:
        raise DataError(
            f"{quote(files[0])} is a file between other inputs: give one file, or texts alone, each after -- if it "
            "looks like a file"
        )
    if named:
        raise DataError(
            f"a column is named, which needs one table, given {len(inputs)} texts: give a table, or name none"
        )
    return inputs


def _names_a_file(word: str) -> bool:
    """Whether an input is a file and not a text.

    Raises:
        DataError: the file does not exist, or it is no table.
    """
    from turret.data.source import is_table

    if os.path.exists(word):  # Path.exists raises for some names
        if is_table(Path(word)) or word.lower().endswith(".txt"):
            return True
        kind = "a folder" if os.path.isdir(word) else "a file that is no table"
        raise DataError(
            f"{quote(word)} is {kind}, and it is not read as a text: give a table or a .txt file, or for the text "
            "itself -- in front of it"
        )
    near = _near_file(word)
    if near is not None or _looks_like_a_file(word):
        meant = f": did you mean {quote(near, 80)}?" if near else ": give a file, or"
        raise DataError(f"there is no file {quote(word, 80)}{meant} For the text itself put -- in front of it")
    return False


def _looks_like_a_file(word: str) -> bool:
    """Whether a word can only be meant as a file: with the ending of one, even misspelt, or a separator of folders."""
    from turret.data.source import SUFFIXES

    if any(character.isspace() for character in word) or "://" in word:
        return False
    known = [*SUFFIXES, ".txt", ".xls", ".ods", ".gz", ".zst"]
    suffix = os.path.splitext(word)[1].lower()
    misspelt = len(suffix) > 3 and bool(difflib.get_close_matches(suffix, known, n=1, cutoff=0.75))
    return suffix in known or misspelt or "/" in word or os.sep in word or "\\" in word


def _near_file(word: str) -> str | None:
    """A table or .txt file whose path is almost this word, such as `Oktober.xlsx` for `Oktober.xslx`."""
    from turret.data.source import is_table

    folder, name = os.path.split(word)
    if len(name) > 100 or not os.path.splitext(name)[1]:
        return None
    try:
        names = [each for each in os.listdir(folder or ".") if is_table(Path(each)) or each.lower().endswith(".txt")]
    except (OSError, ValueError):  # no such folder, or no path at all
        return None
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    return os.path.join(folder, close[0]) if close else None


def _one_file(inputs: Sequence[str]) -> str:
    """The file whose rows are answered. Raises DataError for texts."""
    if len(inputs) != 1 or inputs[0] == "-" or not _names_a_file(inputs[0]):
        raise DataError("--out writes the answers to the rows of one table or .txt file: give such a file")
    return inputs[0]


def _with_top(answer: Answer, top: int) -> JsonObject:
    """An answer, with its most probable labels if more than one is asked for."""
    from turret.workspace.answering import ranked_labels

    ranked = ranked_labels(answer)[:top]
    more = {"top": [{"label": label, "probability": p} for label, p in ranked]} if top > 1 else {}
    return dict(answer) | more


def _print_answers(
    task: type[Task], texts: Sequence[Input], answers: Sequence[Answer], top: int, coverage: float | None
) -> None:
    from turret.workspace.answering import other_labels

    for text, answer in zip(texts, answers, strict=True):
        short = cut(printable(str(text)), 72)
        if task.generates:
            console().print(f"[dim]{safe(short)}[/]\n  {safe(task.line(answer))}")
            continue
        line = task.line(answer)
        if top > 1:
            line = "  ".join([line, *(f"{label} {p:.2f}" for label, p in other_labels(task, answer)[: top - 1])])
        person = "  [yellow]to a person[/]" if answer.get("abstain") else ""
        console().print(f"[bold]{safe(line)}[/]{person}  [dim]{safe(short)}[/]")
        if coverage is not None:
            console().print(f"  [dim]{coverage:.0%} set[/] {safe(', '.join(answer['label_set']))}")


def _print_written(done: Predicted) -> None:
    flags = [f"{count} {flag}" for flag, count in (("blank", done.blank), ("cut", done.cut)) if count]
    flags += [f"{done.to_a_person} to a person"] if done.to_a_person else []
    console().print(f"[bold]{safe(done.version)}[/] answered {count_of(done.rows, 'row')} in {span(done.seconds)}")
    rows = [("file", safe(done.out)), ("columns", safe(", ".join(done.columns)))]
    rows += [("flags", f"[yellow]{safe(', '.join(flags))}[/]")] if flags else []
    console().print(grid(rows + [("note", safe(note)) for note in done.notes]))


# --- promise ----------------------------------------------------------------------------------------------------------
# `turret promise` bounds the errors of a version's decisions, and says whether the bound holds.


HUES = {"holds so far": "green", "broken": "red", "cannot be known": "yellow"}


def promise(
    *,
    reference: options.Ref,
    error: Annotated[str | None, Option(metavar="SHARE", help="At most this share is wrong, such as 2%.")] = None,
    confidence: Annotated[str, Option(metavar="SHARE", help="How sure the bound is.")] = "95%",
    metric: Annotated[
        str, Option(help="What the share is of: error (the decided), misses:LABEL or precision:LABEL.")
    ] = "error",
    data: Annotated[
        str | None, Option(metavar="FILE", help="Labelled examples; default: those that training held out.")
    ] = None,
    reading: Annotated[options.Reading, options.Without(("prompt", "completion", "messages"))],
    when_broken: Annotated[
        Literal["alarm", "stricter", "rollback"], Option(help="What happens when outcomes break it.")
    ] = "alarm",
    outcome_ttl: Annotated[str, Option(help="Time after an answer in which its outcome counts: 12h, 7d.")] = "7d",
    missing_bound: Annotated[
        str, Option(help="Share of the answers whose missing outcome may depend on whether they are wrong.")
    ] = "5%",
    outcomes: Annotated[
        Path | None, Option(metavar="FILE", help="Record outcomes: a table with receipt and value.")
    ] = None,
    device: options.Device = "auto",
    command: options.Command,
) -> None:
    """Promise a bound on the errors of a version's decisions, or show whether the promise holds.

    With --error, chooses the least probability with which the version decides, on examples that chose nothing. Answers
    below it abstain. Without --error, shows the promise and what the outcomes say.
    """
    from turret.experiments.experiment import read_duration, read_share

    workspace = command.workspace
    if outcomes is not None:
        _record(workspace, reference, outcomes, command.as_json)
        return
    if error is None:
        command.report(workspace.promise(reference), _print_promise)
        return
    command.perform(
        _print_promise,
        workspace.promise,
        reference,
        read_share(error),
        confidence=read_share(confidence),
        metric=metric,
        data=data,
        columns=reading.keys(),
        when_broken=when_broken,
        outcome_ttl=read_duration(outcome_ttl),
        missing_bound=read_share(missing_bound),
        device=device,
    )
    command.offer(f"predict {reference} new.csv --out answered.csv", f"promise {reference}")


def _record(workspace: Workspace, reference: str, file: Path, as_json: bool) -> None:
    """Record the outcomes of a table, act if they break a promise, and show how the version's promise stands."""
    from turret.workspace.experimenting import lines_of, read_outcomes

    workspace.promise(reference)  # raises NotFound before anything is recorded
    told = [(receipt or "", value) for receipt, _, value in read_outcomes(file)]
    found = workspace.promise_outcomes(told)
    digest = workspace.resolve(reference).digest
    settled = next(each for each in workspace.settle_promises() if each.promise.digest == digest)
    if as_json:
        emit({"outcomes": [each.as_json() for each in found], **settled.as_json()})
        return
    for line in lines_of(found):
        console().print(safe(line))
    _print_promise(settled)


def _print_promise(found: PromiseStatus) -> None:
    from turret.workspace import promising

    promise, standing, out = found.promise, found.standing, console()
    out.print(f"[bold]{safe(found.version)}[/] promises {safe(promising.sentence(promise))}")
    rows = [("threshold", safe(promising.threshold(promise))), ("decides", safe(promising.cost(promise)))]
    if found.all_wrong is not None:
        rows.append(("without it", f"all are decided, and {percentage(found.all_wrong)} were wrong"))
    rows.append(("chosen on", safe(promising.chosen_on(promise))))
    rows.append(("when broken", safe(promise.when_broken)))
    rows.append(("live", f"[{HUES[standing.state]}]{standing.state}[/]: {safe(standing.why)}"))
    if found.answers:
        missing = f"{standing.missing:.0%} of the outcomes are missing"
        rows.append(("answers", f"{found.decided} of {count_of(found.answers, 'answer')} decided; {missing}"))
        rows.append(("evidence", f"{standing.evidence:.3g} against it; {standing.needed:.3g} breaks it"))
    inputs = found.inputs
    hue = {"alike so far": "green", "drifted": "yellow"}.get(inputs.state, "dim")
    what = f"{inputs.state}: {inputs.why}" if inputs.state == "not watched" else inputs.why
    rows.append(("inputs", f"[{hue}]{safe(what)}[/]"))
    rows.append(
        (
            "since",
            f"{safe(to_minute(promise.created))}{f' by {safe(promise.who)}' if promise.who else ''}",
        )
    )
    out.print(grid(rows + [("note", safe(note)) for note in found.notes]))
    for line in found.done:
        out.print(f"[yellow]{safe(line)}[/]")
