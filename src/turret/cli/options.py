"""The options that several verbs share: one dataclass for each group of them, which Typer gets field by field."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, ParamSpec, Protocol, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer import Argument, Option
from typer.models import OptionInfo, ParameterInfo

from turret.cli.output import columns, console, emit, offer_commands, status
from turret.errors import RecipeError
from turret.json_types import JsonMapping, JsonObject
from turret.location import Location
from turret.tasks.task import task_kinds

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from turret.recipe import Recipe
    from turret.workspace import Workspace

STORE = Location.parse(".turret")
Store = Annotated[
    Location,
    Option(
        envvar="TURRET_STORE",
        parser=Location.parse,
        metavar="STORE",
        help="Folder of the store, or postgresql://user@host/database?files=s3://bucket/prefix.",
    ),
]
Json = Annotated[bool, Option("--json", help="Print one JSON value on stdout, and everything else on stderr.")]
Set = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe, such as train.lr=1e-3; repeatable."),
]
On = Annotated[
    str | None, Option(metavar="WHERE", help="workers (turret worker) or ray://HOST:PORT; default: train here.")
]
BaseQuantization = Annotated[
    Literal["none", "nf4"], Option(help="nf4 keeps the base's linear layers in 4 bits (turret[quantized]).")
]
Device = Annotated[str, Option(metavar="DEVICE", help="auto (a GPU if the base fits), cpu, cuda, cuda:1 or mps.")]
Kind = Annotated[str | None, Option(help=f"{task_kinds()}.")]
Ref = Annotated[str, Argument(metavar="REF", help="A version: name, name@3 or name@production.")]
Source = Annotated[
    str,
    Argument(metavar="RECIPE | DATA", help="A recipe (.toml or a preset), or a table, folder, Hub id, pypi: or -."),
]

# The keys of [data] that say how a table is read: its columns, its form, and its values.
_COLUMNS = ("text", "label", "document", "summary", "prompt", "completion", "messages", "input", "system", "tools")
_FORM = ("ignore", "encoding", "delimiter", "header", "header_row", "sheet", "bad_lines", "separator")
KEYS = (*_COLUMNS, *_FORM, "normalize_labels", "rename", "test")


class Result(Protocol):
    """What a verb of the workspace returns."""

    def as_json(self) -> JsonMapping: ...


T = TypeVar("T")
R = TypeVar("R", bound=Result)
P = ParamSpec("P")


@dataclass(frozen=True)
class Command:
    """What nearly every verb has: the store that it works on, and whether it prints JSON."""

    store: Store = STORE
    as_json: Json = False

    @cached_property
    def workspace(self) -> Workspace:
        from turret.workspace import Workspace

        return Workspace(self.store)

    def report(self, result: R, show: Callable[[R], None]) -> None:
        """Print a result as JSON, or with `show`."""
        emit(result.as_json()) if self.as_json else show(result)

    def run(self, verb: Callable[P, T], *places: P.args, **names: P.kwargs) -> T:
        """Call a verb of the workspace, which says its stages meanwhile."""
        run: Callable[..., T] = partial(verb, *places, **names)
        with status() as say:
            return run(on_stage=say)

    def perform(self, show: Callable[[R], None], verb: Callable[P, R], *places: P.args, **names: P.kwargs) -> R:
        """As `run`, and print the result as `report` does."""
        found = self.run(verb, *places, **names)
        self.report(found, show)
        return found

    def say(self, value: JsonMapping, line: str) -> None:
        """Print a result as JSON, or as a line, which may have rich's markup."""
        emit(value) if self.as_json else console().print(line)

    def table(
        self,
        value: JsonMapping,
        heads: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        right: Sequence[str] = (),
        none: str,
    ) -> None:
        """Print a list: its JSON value, or a table.

        Args:
            right: the heads of the columns that hold numbers.
            none: printed instead of a table without rows.
        """
        if self.as_json:
            emit(value)
            return
        lines = list(rows)
        console().print(columns(heads, lines, right=right) if lines else none)

    def offer(self, *commands: str) -> None:
        """Print the next useful commands, but not with `--json`. They are given without `turret`."""
        if not self.as_json:
            offer_commands(commands, self.store)


@dataclass(frozen=True)
class Columns:
    """The columns of a table, by their roles."""

    text: Annotated[str | None, Option(metavar="COLUMN", help="Column of the texts to classify.")] = None
    text_pair: Annotated[str | None, Option(metavar="COLUMN", help="Column of a second text, read with the first.")] = (
        None
    )
    label: Annotated[
        list[str] | None,
        Option(metavar="COLUMN", help="Column of their classes or numbers; repeatable for classes."),
    ] = None
    prompt: Annotated[str | None, Option(metavar="COLUMN", help="Column of the texts to answer.")] = None
    completion: Annotated[str | None, Option(metavar="COLUMN", help="Column of the answers.")] = None
    messages: Annotated[str | None, Option(metavar="COLUMN", help="Column of conversations.")] = None

    def named_columns(self) -> dict[str, str | list[str]]:
        """Role -> column for each option that is given: keys of a recipe's `[data]`. Several labels are a list."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.label and len(self.label) == 1:
            given["label"] = self.label[0]
        return {role: column for role, column in given.items() if column}


@dataclass(frozen=True)
class Reading:
    """How a verb reads a table that no recipe names."""

    columns: Columns
    sets: Set = None

    def keys(self) -> JsonObject:
        """The columns, and the keys of a recipe's `[data]` among the `--set` options. Raises RecipeError."""
        from turret.recipe import Recipe

        texts = overrides(self.sets)
        for key in texts:
            if key.removeprefix("data.") not in KEYS:
                raise RecipeError(
                    f"--set {key}: expected a key of [data], such as data.text; known here are {', '.join(KEYS)}"
                )
        changes = {f"data.{key.removeprefix('data.')}": text for key, text in texts.items()}
        read = Recipe(data="x").with_overrides(changes)
        found = {key: value for key in KEYS if (value := getattr(read.data, key, None)) is not None}
        return found | self.columns.named_columns()


@dataclass(frozen=True)
class Training:
    """What changes in a recipe, or in that of a table, before it is trained."""

    columns: Columns
    base: Annotated[str | None, Option(help="A Hub id, folder, .gguf file or pypi: package; default: by task.")] = None
    name: Annotated[str | None, Option(help="Name of the adapter in the store.")] = None
    data: Annotated[str | None, Option(help="Data that replaces the recipe's.")] = None
    task: Kind = None
    method: Annotated[str | None, Option(help="lora, prefix, head, full or peft.")] = None
    lr: Annotated[str | None, Option(help="Peak learning rate, or auto to find it by short trials.")] = None
    seed: Annotated[int | None, Option(help="Seed of all random numbers.")] = None
    device: Annotated[
        str | None, Option(metavar="DEVICE", help="auto (a GPU if the plan fits), cpu, cuda, cuda:1 or mps.")
    ] = None
    sets: Set = None

    def changes(self) -> dict[str, str]:
        """The keys of a recipe that the options give, then those of `--set`; not the columns."""
        named = {"base": self.base, "name": self.name, "data.source": self.data, "task.kind": self.task}
        named |= {"method.kind": self.method, "train.lr": self.lr, "train.device": self.device}
        named["seed"] = None if self.seed is None else str(self.seed)
        return {key: value for key, value in named.items() if value is not None} | overrides(self.sets)

    def recipe(self, source: str) -> Recipe:
        """The recipe of a file, a preset or data, with the changes. Raises RecipeError.

        The names of columns are taken as they are, so that one may be called `none` or `1`.
        """
        from turret.recipe import Recipe, presets

        changes = self.changes()
        if source.endswith(".toml") or (source in presets() and not Path(source).exists()):
            recipe = Recipe.load(source).with_overrides(changes)
        elif self.data is not None:
            raise RecipeError(
                f"two sources of data, {source!r} and --data {self.data!r}: give one of them, or a recipe with --data"
            )
        else:
            start = {"data": {"source": source}} | {key: changes.pop(key) for key in ("base", "name") if key in changes}
            recipe = Recipe.model_validate(start).with_overrides(changes)
        columns = self.columns.named_columns()
        if not columns:
            return recipe
        settings = recipe.model_dump(mode="python")
        return type(recipe).model_validate({**settings, "data": {**settings["data"], **columns}})


def overrides(pairs: list[str] | None) -> dict[str, str]:
    """`["train.lr=1e-3"]` -> `{"train.lr": "1e-3"}`."""
    found: dict[str, str] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {ascii(pair)[:60]}: expected KEY=VALUE, such as --set train.lr=1e-3")
        found[key.strip()] = value
    return found


def number(option: str, text: str, example: str) -> float:
    """The number that an option has. Raises RecipeError, which tells what is expected."""
    try:
        return float(text)
    except ValueError:
        raise RecipeError(f"--{option} {ascii(text)[:40]}: expected {example}") from None


def numbers(option: str, text: str, example: str) -> list[float]:
    """The numbers of an option, with commas between them. Raises RecipeError, which tells what is expected."""
    return [number(option, part, example) for part in text.split(",") if part.strip()]


# --- verbs ------------------------------------------------------------------------------------------------------------


Verb = Callable[..., None]
Value = str | float | list[str] | Path | Location | typer.Context | None  # of one parameter of a command


@dataclass(frozen=True)
class Without:
    """Options of a group that a verb does not have, as in `Annotated[Training, Without(("lr",))]`: all at defaults."""

    names: tuple[str, ...]


def group(help: str, *verbs: Verb, alone: Verb | None = None) -> typer.Typer:
    """A command with verbs of its own, such as `turret token`. alone: what runs without a verb; default: its help."""
    app = typer.Typer(help=help, no_args_is_help=alone is None, rich_markup_mode=None)
    if alone is not None:
        app.callback(invoke_without_command=True)(flatten_options(alone))
    for verb in verbs:
        app.command(verb.__name__.rstrip("_"))(flatten_options(verb))
    return app


def flatten_options(verb: Verb) -> Verb:
    """A verb as Typer takes it: a dataclass among its parameters becomes an option for each of its fields.

    An option without a name is called as its parameter. A flag has no `--no-` form unless its name says so.
    """
    taken = {each.name: _options(each, ()) for each in inspect.signature(verb, eval_str=True).parameters.values()}
    flat = [option for found, _ in taken.values() for option in found]

    def run(**values: Value) -> None:
        verb(**{name: make(values) for name, (_, make) in taken.items()})

    run.__name__, run.__doc__ = verb.__name__, verb.__doc__
    run.__annotations__ = {each.name: each.annotation for each in flat}
    run.__dict__["__signature__"] = inspect.Signature(flat)
    return run


def _options(
    parameter: inspect.Parameter, without: tuple[str, ...]
) -> tuple[list[inspect.Parameter], Callable[[dict[str, Value]], Value | DataclassInstance]]:
    """The options of a parameter, and what makes its value from theirs: itself, or a dataclass of its fields."""
    kind, notes = parameter.annotation, []
    if get_origin(kind) is Annotated:
        kind, *notes = get_args(kind)
    info = next((each for each in notes if isinstance(each, ParameterInfo)), None)
    if info is not None or not (isinstance(kind, type) and is_dataclass(kind)):
        if isinstance(info, OptionInfo) and info.default is ... and not info.param_decls:
            info = copy(info)
            info.param_decls = (f"--{parameter.name.replace('_', '-')}",)
            parameter = parameter.replace(annotation=Annotated[kind, info])
        return [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)], lambda values: values[parameter.name]
    left_out = without + tuple(name for each in notes if isinstance(each, Without) for name in each.names)
    hints, parts = get_type_hints(kind, include_extras=True), {}
    for each in fields(kind):
        if each.name not in left_out:
            default = inspect.Parameter.empty if each.default is MISSING else each.default
            field = inspect.Parameter(each.name, parameter.kind, default=default, annotation=hints[each.name])
            parts[each.name] = _options(field, left_out)
    flat = [option for found, _ in parts.values() for option in found]
    return flat, lambda values: kind(**{name: make(values) for name, (_, make) in parts.items()})
