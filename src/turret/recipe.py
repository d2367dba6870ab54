"""The typed recipe: base, data, task, method and training in one frozen value, read from and written to TOML.

Refuses to know models, tables and torch: it checks words and ranges, not whether a file or a column is there.
Relative paths inside a recipe mean the current directory, so a recipe kept with a run can be run again as it is.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from turret import toml
from turret.errors import BadReference, RecipeError, one_line, shown
from turret.methods import METHODS, LoRA, Method, method_class
from turret.reference import check_name
from turret.tasks.task import TASKS, kinds
from turret.validation import as_many_as_fit, complaint

_ELSEWHERE = {  # what other tools call our keys
    "alpha": "lora_alpha", "dropout": "lora_dropout", "rank": "r", "learning_rate": "lr", "num_train_epochs": "epochs",
    "num_epochs": "epochs", "per_device_train_batch_size": "batch_size", "warmup_steps": "warmup",
    "warmup_ratio": "warmup", "lr_scheduler_type": "schedule", "max_grad_norm": "gradient_clip",
    "early_stopping_patience": "early_stopping", "patience": "early_stopping", "precision": "dtype",
    "max_length": "max_tokens", "max_source_length": "max_tokens", "max_target_length": "max_target_tokens",
    "prefix": "prefix_text", "source_prefix": "prefix_text", "model": "base", "dataset": "data",
}  # fmt: skip


MOST = 10**12  # steps, epochs, examples: beyond it a number is a mistake


class _Section(BaseModel):
    """A part of a recipe; however it is made, a mistake in it is one `RecipeError` of one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    section: ClassVar[str] = ""  # the table of the TOML file that it is

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise RecipeError(as_many_as_fit(list(_sentences(cls, error)))) from None


def _size(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST
    if value is None or whole or (isinstance(value, float) and 0 < value < 1):
        return value
    if isinstance(value, str) and re.match(r"[A-Za-z_]", value):
        return value
    raise ValueError(
        f"expected a number of at least 1, a fraction between 0 and 1 or the name of a split, given {shown(value)}"
    )


Size = Annotated[int | float | str | None, BeforeValidator(_size)]


class Data(_Section):
    """Where the examples come from; columns that are left out are guessed and the guess is printed."""

    section: ClassVar[str] = "data"

    source: str = Field(min_length=1)  # file, folder, Hub id (`id:config`), `pypi:package?option=value`
    text: str | None = None  # columns of a classification table
    label: str | None = None
    document: str | None = None  # columns of a table of pairs
    summary: str | None = None
    prompt: str | None = None  # the other names for such columns
    completion: str | None = None
    train: Size = None  # a number, a fraction, or the name of a split; None: all that is not held out
    validation: Size = None  # None: the split of that name, if there is one
    test: Size = None  # None: the split of that name, else a fifth, at most 1000
    seed: int | None = Field(default=None, ge=0, lt=2**32)  # of the split; None: the recipe's

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"source": str(value)} if isinstance(value, (str, Path)) else value


def _task_kind(value: Any) -> Any:
    if value not in (None, *TASKS):
        raise ValueError(f"expected {kinds(repr)}")
    return value


class Task(_Section):
    """What an example is, what is cut, what the loss weighs, and how text is generated."""

    section: ClassVar[str] = "task"

    kind: Annotated[str | None, BeforeValidator(_task_kind)] = None  # None: told by the columns
    max_tokens: int = Field(default=256, ge=1, le=1_000_000)  # of the input; longer ones are cut and counted
    max_target_tokens: int | None = Field(default=None, ge=1, le=1_000_000)  # of the target; None: 128
    prefix_text: str = ""  # goes before every input, is never cut
    multi_label: bool = False  # classify: any number of labels for a text
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    chat_template: bool = False  # decoder: the tokenizer's own template instead of ours
    num_beams: int = Field(default=1, ge=1, le=64)  # 1: greedy
    max_new_tokens: int | None = Field(default=None, ge=1, le=1_000_000)  # None: max_target_tokens


class Train(_Section):
    """How the trainable parameters are moved."""

    section: ClassVar[str] = "train"

    epochs: int | None = Field(default=None, ge=1, le=MOST)  # None: 3, and more of few examples
    batch_size: int = Field(default=8, ge=1, le=65536)
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] | None = None  # None: the method's own; auto: found by trials
    head_lr_ratio: float | None = Field(default=None, gt=0, le=1000)  # the head's rate over lr; None: the method's own
    init_from: str | None = Field(default=None, min_length=1)  # a stored version to go on from; None: the base alone
    evaluate: Literal["epoch", "never"] | Annotated[int, Field(ge=1, le=MOST)] = "epoch"  # a number: of steps between
    max_steps: int | None = Field(default=None, ge=1, le=MOST)  # None: as many as the epochs make
    warmup: Annotated[int, Field(ge=0, le=MOST)] | Annotated[float, Field(ge=0, lt=1)] = 0.06  # steps, or a part of all
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    early_stopping: int | None = Field(default=None, ge=1, le=MOST)  # evaluations of the validation split without gain
    keep: Literal["last", "best"] = "last"  # best by the validation split, never by the test split
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the frozen base; adapters are float32
    int8: bool = False  # frozen layers multiply in 8 bits in a step of training, and in dtype everywhere else
    gradient_clip: float = Field(default=1.0, gt=0)  # largest norm
    checkpoint_every: int | None = Field(default=None, ge=1, le=MOST)  # steps; None: every epoch
    micro_batch_tokens: int | None = Field(default=None, ge=1, le=MOST)  # of one pass; None: by the size of the base


def _method(value: Any) -> Any:
    """A method by its table or its kind alone, with the mistakes of its own class as sentences."""
    if isinstance(value, Method):
        return value
    try:
        found = method_class(value)
        return found.model_validate({"kind": value} if isinstance(value, str) else value)
    except ValidationError as error:
        sentences = list(_sentences(found, error))
    except RecipeError as error:
        sentences = [str(error)]
    raise PydanticCustomError("sentences", "{sentences}", {"sentences": sentences})


class Recipe(_Section):
    """Everything a run depends on but the bytes of its base and data."""

    name: str  # of the adapter in the store; left out: made from the data's source
    base: str = Field(min_length=1)  # Hub id, folder, GGUF file, `pypi:package`
    seed: int = Field(default=42, ge=0, lt=2**32)
    data: Data
    task: Task = Task()
    method: Annotated[SerializeAsAny[Method], BeforeValidator(_method)] = LoRA()
    train: Train = Train()

    if TYPE_CHECKING:  # the short forms that the validators read, for type checkers

        def __init__(
            self,
            *,
            base: str | Path,
            data: Data | Mapping[str, object] | str | Path,
            name: str | None = None,
            seed: int = 42,
            task: Task | Mapping[str, object] = ...,
            method: Method | Mapping[str, object] | str = ...,
            train: Train | Mapping[str, object] = ...,
        ) -> None: ...

    @property
    def split_seed(self) -> int:
        """What the examples are chosen with: trainings that differ in their seed alone may share a split."""
        return self.seed if self.data.seed is None else self.data.seed

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("name") is None and value.get("data") is not None:
            data = value["data"]
            source = data.get("source") if isinstance(data, Mapping) else getattr(data, "source", data)
            return {**value, "name": name_from(str(source))}
        return value

    @field_validator("base", mode="before")
    @classmethod
    def _base_word(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("name")
    @classmethod
    def _name_fits(cls, value: str) -> str:
        try:
            check_name(value)
        except BadReference as error:
            raise ValueError(f"{error}; {name_from(value)!r} would do") from None
        return value

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """Read a TOML file, or the preset of that name where no such file exists."""
        known = presets()
        if str(source) in known and not os.path.isfile(source):  # unlike Path's, it bears any name
            return cls.from_toml(preset_text(str(source)), where=f"preset {source}")
        try:
            text = Path(source).read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else _os_reason(error)
            raise RecipeError(
                f"recipe {shown(str(source))} cannot be read ({reason}): "
                f"give a TOML file or one of the presets {', '.join(known)}"
            ) from None
        return cls.from_toml(text, where=str(source))

    @classmethod
    def from_toml(cls, text: str, *, where: str = "recipe") -> Recipe:
        where = one_line(where, 60)
        try:
            value = toml.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise RecipeError(f"{where} is not TOML: {one_line(str(error), 160) or 'nested too deeply'}") from None
        except ValueError as error:
            raise RecipeError(f"{where} cannot be read: {error}") from None
        try:
            return cls.model_validate(value)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None

    def to_toml(self) -> str:
        """Every setting written out, defaults too: `from_toml(to_toml())` is equal, whatever defaults become later.

        An unfinished run is found by the digest of this text. So a setting that is added later has None as its default,
        which is not written: the text of an older run's recipe stays the same.
        """
        lines, tables = [], []
        checked = Recipe.model_validate(self.model_dump())  # so that a default of 32 is written as the float it is
        for key, value in checked.model_dump().items():
            if isinstance(value, Mapping):
                tables += ["", f"[{key}]", *(f"{k} = {toml.written(v)}" for k, v in value.items() if v is not None)]
            elif value is not None:
                lines.append(f"{key} = {toml.written(value)}")
        return "\n".join([*lines, *tables]) + "\n"

    def with_overrides(self, overrides: Mapping[str, str]) -> Recipe:
        """The recipe with `--set key=value` pairs applied; text becomes the type of its key.

        `none` clears a setting, lists are TOML (`["q", "v"]`) or words with commas. `base`, `data` (its source) and
        `method` (its kind) can be named alone; another kind of method starts from that kind's defaults.
        """
        value = self.model_dump(mode="python")
        keys = {_ALONE.get(key, key): text for key, text in overrides.items()}
        kind = keys.pop("method.kind", None)
        if kind is not None and kind != value["method"]["kind"]:
            method_class(kind)
            value["method"] = {"kind": kind}
        for key, text in keys.items():
            _set(value, key, text)
        return Recipe.model_validate(value)


_ALONE = {"data": "data.source", "method": "method.kind"}
_SECTIONS: dict[str, type[BaseModel]] = {"data": Data, "task": Task, "train": Train}
_TOP = tuple(Recipe.model_fields)


def name_from(source: str) -> str:
    """A name for the adapter from a source of data: `Reviews 2.csv` -> `reviews-2`, `pypi:aclsum?a=b` -> `aclsum`."""
    stem = re.split(r"[?]", source.removeprefix("pypi:"))[0].replace("\\", "/").rstrip("/").split("/")[-1]
    stem = re.sub(r"\.(csv|tsv|jsonl|ndjson|json|parquet)$", "", stem.lower())
    words = re.sub(r"[.]{2,}|[^a-z0-9._-]+", "-", stem).strip("._-")
    return words[:100].rstrip("._-") or "adapter"


def presets() -> tuple[str, ...]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("turret") / "presets"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def preset_text(name: str) -> str:
    """The TOML of a preset, with its comments."""
    return (resources.files("turret") / "presets" / f"{name}.toml").read_text("utf-8")


def keys(method: str | None = None) -> dict[str, Any]:
    """Every key that a recipe (with that kind of method) and `--set` know, with its default, `...` where none."""
    known: dict[str, Any] = {}
    for key, field in Recipe.model_fields.items():
        methods = METHODS.values() if method is None else [METHODS[method]]
        parts = methods if key == "method" else [_SECTIONS[key]] if key in _SECTIONS else []
        for part in parts:
            known |= {f"{key}.{k}": _default(f) for k, f in part.model_fields.items()}
        if not parts:
            known[key] = _default(field)
    return known


def _default(field: FieldInfo) -> Any:
    return ... if field.is_required() else field.default


# --- overrides -------------------------------------------------------------------------------------------------------


def _set(value: dict[str, Any], key: str, text: str) -> None:
    """Put `text`, read as the type of `key`, into the nested `value`."""
    head, _, rest = key.partition(".")
    model: type[BaseModel]
    if head == "method" and rest:
        model = METHODS[value["method"]["kind"]]
    elif head in _SECTIONS and rest:
        model = _SECTIONS[head]
    else:
        head, rest, model = "", key, Recipe
    weight = rest.removeprefix("class_weights.") if head == "task" else rest
    if weight != rest and weight:  # a class may have any name, dots too
        old = value["task"]["class_weights"]
        number = _typed(key, text, TypeAdapter(float))
        value["task"]["class_weights"] = {**(old if isinstance(old, dict) else {}), weight: number}
        return
    field = model.model_fields.get(rest)
    if field is None and issubclass(model, Method) and model.open_settings:
        value[head][rest] = None if text.strip().lower() == "none" else _plain(text)
        return
    if field is None or (not head and rest in _SECTIONS):
        raise RecipeError(_unknown(key, value["method"]["kind"]))
    annotated: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    (value[head] if head else value)[rest] = _typed(key, text, TypeAdapter(annotated, config=ConfigDict(strict=True)))


def _plain(text: str) -> Any:
    """`text` as a TOML value, else as words where there is a comma, else as it is."""
    read = toml.value_or_text(text)
    return _comma_words(text) if read == text and "," in text else read


def _typed(key: str, text: str, type_: TypeAdapter[Any]) -> Any:
    """`text` as the first of: nothing, a TOML value, itself, words with commas, that the type admits."""
    for read in (_none, toml.value, str, _comma_words):
        try:
            candidate = read(text)
            return type_.validate_python(tuple(candidate) if isinstance(candidate, list) else candidate)
        except (ValueError, RecursionError):  # ValidationError and TOMLDecodeError are ValueErrors
            continue
    try:
        type_.validate_python(toml.value_or_text(text))
    except ValidationError as error:
        raise RecipeError(f"{key}: {complaint(list(error.errors()))}") from None
    raise AssertionError(key)


def _none(text: str) -> None:
    if text.strip().lower() != "none":
        raise ValueError(text)


def _comma_words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


# --- one line for every mistake --------------------------------------------------------------------------------------


def _sentences(model: type[BaseModel], error: ValidationError) -> Iterator[str]:
    """One sentence for each key that is wrong; every member of a union has complained, the deepest knew best."""
    groups: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        path = ".".join(filter(None, [getattr(model, "section", ""), *map(str, item["loc"][:1])]))
        groups.setdefault(path, []).append(item)
    if "data" in groups:
        groups.pop("name", None)  # it comes from the data
    for path, items in groups.items():
        depth = max(len(item["loc"]) for item in items)
        items = [item for item in items if len(item["loc"]) == depth]
        kind = items[0]["type"]
        if kind == "extra_forbidden":
            yield _unknown(path, model.model_fields["kind"].default if issubclass(model, Method) else "lora")
        elif kind == "missing":
            yield f"{path} is missing: {_missing_remedy(path)}"
        elif kind == "sentences":
            yield from items[0]["ctx"]["sentences"]
        else:
            yield f"{path}: {complaint(items)}"


def _unknown(key: str, method: str) -> str:
    """The sentence for a key that is not known; `method` is the kind of method that the recipe has."""
    every, (section, _, leaf) = list(keys(method)), key.rpartition(".")
    beside = [k for k in every if k.rpartition(".")[0] == section]
    owners = [kind for kind, model in METHODS.items() if section == "method" and leaf in model.model_fields]
    meant = [k for k in beside or every if k.rpartition(".")[2] == _ELSEWHERE.get(leaf, leaf)]
    meant += [k for k in every if k.rpartition(".")[2] == _ELSEWHERE.get(leaf, leaf)]  # `lr` alone means `train.lr`
    leaves = {k.rpartition(".")[2]: k for k in beside or every}
    others = {word: leaves[ours] for word, ours in _ELSEWHERE.items() if ours in leaves}
    meant += [(leaves | others)[near] for near in difflib.get_close_matches(leaf, [*leaves, *others], n=1)]
    meant += difflib.get_close_matches(key, every, n=1)
    if owners:
        remedy = f'it belongs to method.kind = "{owners[0]}", this method is "{method}"'
    elif meant:
        remedy = f"did you mean {meant[0]!r}?"
    else:
        remedy = f"known {f'in [{section}] ' if beside and section else ''}are {', '.join(leaves if beside else _TOP)}"
    return f"unknown key {shown(key)}: {remedy}"


def _missing_remedy(name: str) -> str:
    return {
        "base": 'say which pretrained model, for example base = "bert-base-uncased"',
        "data": "add a [data] table with a source",
        "data.source": "say where the examples are: a file, a folder, a Hub id or a pypi: package",
    }.get(name, "add it")


def _os_reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
