"""The types of an example and of a data set, and how both are kept in memory and in files. Loads no numpy and no torch.

`ExampleStore` keeps examples in memory up to `MEMORY` characters, and beyond that in a temporary file. So a data set
larger than memory can be trained on. The file has no name, on systems that allow it, and is deleted with the sequence.
`write_dataset` and `load_dataset` pass a data set to another process, as lines of JSON.
"""

from __future__ import annotations

import json
import tempfile
import threading
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, NotRequired, TypeAlias, TypedDict, TypeVar, overload

from turret.errors import DataError
from turret.json_types import JsonValue, Plain

MEMORY = 256_000_000  # characters
SPLITS = ("train", "validation", "test")


_STORED: dict[str, type] = {}  # the classes in files of examples, by name
Registered = TypeVar("Registered", bound=type)


def register_example(kind: Registered) -> Registered:
    """Let examples of this kind pass to files and other processes: a decorator of their class, a frozen dataclass."""
    _STORED[kind.__name__] = kind
    return kind


@register_example
@dataclass(frozen=True, slots=True)
class TextPair:
    """Two texts that are read together: a premise and a hypothesis, a query and a passage."""

    text: str
    text_pair: str

    def __str__(self) -> str:
        """Both as one text."""
        return f"{self.text} | {self.text_pair}"


@dataclass(frozen=True, slots=True)
class Example:
    """What a task learns from one row: a question, and the right answer to it. Each kind is a frozen dataclass.

    The first field is what is asked and the second one the right answer, unless a kind says otherwise. A kind with
    a field `others` has further answers that are as good.
    """

    @property
    def asked(self) -> Input:
        """What the model is asked."""
        return getattr(self, fields(self)[0].name)

    @property
    def output(self) -> str | tuple[str, ...]:
        """The right answer in words."""
        return getattr(self, fields(self)[1].name)

    @property
    def input(self) -> str:
        """What the model is asked, as one text."""
        return str(self.asked)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in the right answer."""
        return ()

    @property
    def references(self) -> tuple[str, ...]:
        """The texts that an answer is compared with."""
        return (str(self.output), *getattr(self, "others", ()))

    def respelt(self, spelling: Mapping[str, str]) -> Example:
        """The example with the classes that its labels mean."""
        return self

    def in_training(self) -> Sequence[Example]:
        """The examples that it is in training: one for each reference."""
        if len(self.references) == 1:
            return (self,)
        return [replace(self, **{fields(self)[1].name: each, "others": ()}) for each in self.references]

    def parts(self) -> tuple[str, ...]:
        """All that it says, for the digest of a data set."""
        output = self.output
        return (self.input, *(output if isinstance(output, tuple) else (output,)))


@register_example
@dataclass(frozen=True, slots=True)
class Labelled(Example):
    """A text, or two, and its class; with `multi_label` a sorted tuple of any number of different classes."""

    text: str | TextPair
    label: str | tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return self.label if isinstance(self.label, tuple) else (self.label,)

    def respelt(self, spelling: Mapping[str, str]) -> Labelled:
        if isinstance(self.label, tuple):
            return Labelled(self.text, tuple(sorted({spelling[label] for label in self.label})))
        return Labelled(self.text, spelling[self.label])

    def parts(self) -> tuple[str, ...]:
        both = (self.text,) if isinstance(self.text, str) else (self.text.text, self.text.text_pair)
        return (*both, *self.labels)


@register_example
@dataclass(frozen=True, slots=True)
class Scored(Example):
    """A text, or two, and a number."""

    text: str | TextPair
    value: float

    @property
    def output(self) -> str:
        return repr(self.value)


Span: TypeAlias = tuple[int, int, str]  # first character, one past the last, label


@register_example
@dataclass(frozen=True, slots=True)
class Tagged(Example):
    """A text and its spans, in order, none of which overlap."""

    text: str
    spans: tuple[Span, ...]

    @property
    def output(self) -> tuple[str, ...]:
        return tuple(written_span(span, self.text[span[0] : span[1]]) for span in self.spans)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(label for _, _, label in self.spans)

    def respelt(self, spelling: Mapping[str, str]) -> Tagged:
        return Tagged(self.text, tuple((start, end, spelling[label]) for start, end, label in self.spans))


def written_span(span: Span, text: str) -> str:
    """A span in words: `0-4 PER: Anna`. text: of the span."""
    start, end, label = span
    return f"{start}-{end} {label}: {' '.join(text.split())}"


@register_example
@dataclass(frozen=True, slots=True)
class Pair(Example):
    """A text and the text to generate from it, or several such texts."""

    source: str
    target: str
    others: tuple[str, ...] = ()  # further texts that are as good as the target

    def parts(self) -> tuple[str, ...]:
        return (self.source, *self.references)


class Message(TypedDict):
    """A turn of a conversation as a chat template takes it."""

    role: str
    content: str
    tool_calls: NotRequired[list[Mapping[str, Plain]]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


@register_example
@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: str  # system, user, assistant or tool
    content: str
    tool_calls: str = ""  # JSON: a list of {"type": "function", "function": {"name", "arguments"}}
    name: str = ""  # of the tool, in a turn with its result
    call_id: str = ""  # of the call that a tool's result belongs to

    def message(self) -> Message:
        """The turn as a chat template takes it."""
        message: Message = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = json.loads(self.tool_calls)
        if self.name:
            message["name"] = self.name
        if self.call_id:
            message["tool_call_id"] = self.call_id
        return message


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for the assistant's next turn."""

    turns: tuple[Turn, ...]
    tools: str = ""  # JSON: a list of {"type": "function", "function": {"name", "description", "parameters"}}

    @classmethod
    def of(cls, text: str) -> Prompt:
        """A conversation of one user turn."""
        return cls((Turn("user", text),))

    @property
    def text(self) -> str | None:
        """The text of a single user turn without tools; None for any other conversation."""
        only = self.turns[0] if len(self.turns) == 1 else None
        return only.content if only is not None and only.role == "user" and not self.tools else None

    @property
    def characters(self) -> int:
        """The length of all its texts."""
        return len(self.tools) + sum(len(turn.content) + len(turn.tool_calls) for turn in self.turns)

    def __str__(self) -> str:
        """The conversation as one line of JSON."""
        turns = [turn.message() for turn in self.turns]
        found = {"messages": turns, "tools": json.loads(self.tools)} if self.tools else turns
        return json.dumps(found, ensure_ascii=False)


@register_example
@dataclass(frozen=True, slots=True)
class Conversation(Example):
    """Turns that end with an answer of the assistant, which follows from the turns before it."""

    turns: tuple[Turn, ...]
    tools: str = ""  # as in `Prompt`

    @property
    def asked(self) -> Prompt:
        """Everything before the last answer."""
        return Prompt(self.turns[:-1], self.tools)

    @property
    def output(self) -> str:
        """The text of the last answer; its tool calls as JSON if it has no text."""
        return self.turns[-1].content or self.turns[-1].tool_calls


@register_example
@dataclass(frozen=True, slots=True)
class Preferred(Example):
    """A conversation with two next answers, of which one is preferred."""

    turns: tuple[Turn, ...]  # before the answer
    chosen: str
    rejected: str

    @property
    def asked(self) -> Prompt:
        return Prompt(self.turns)

    @property
    def output(self) -> str:
        return self.chosen

    def parts(self) -> tuple[str, ...]:
        return (self.input, self.chosen, self.rejected)


@register_example
@dataclass(frozen=True, slots=True)
class Related(Example):
    """A text, one that belongs to it, and texts that do not."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()
    others: tuple[str, ...] = ()  # further texts that belong to the anchor

    def parts(self) -> tuple[str, ...]:
        return (self.anchor, *self.references, *self.negatives)


Input: TypeAlias = str | TextPair | Prompt  # what a model is asked


@dataclass(frozen=True)
class Dataset:
    """Examples of one task in three splits, with the decisions that were made while reading them."""

    train: Sequence[Example]  # shuffled with the seed
    validation: Sequence[Example]  # may be empty
    test: Sequence[Example]
    kind: str  # of the task
    labels: tuple[str, ...]  # every class of the training table, in order; empty if outputs are texts
    columns: dict[str, str]  # role -> column
    notes: tuple[str, ...]  # guesses, left out rows, duplicates: a sentence each, for the user
    duplicates: int  # test examples whose input is also a training input
    digest: str  # "sha256:..." of the examples in their splits and order


# --- kept in memory, and in files -------------------------------------------------------------------------------------


class ExampleStore(Sequence[Example]):
    """A sequence that is filled once, in any order, and then read.

    Args:
        size: number of examples.
        memory: characters to keep in memory.
    """

    def __init__(self, size: int, memory: int = MEMORY) -> None:
        self._room = memory
        self._lock = threading.Lock()  # all readers share the position in the file
        self._examples: list[Example | None] = [None] * size
        self._file: IO[bytes] | None = None
        self._offsets, self._lengths = array("Q"), array("Q")  # of each example, in the file

    def put(self, place: int, example: Example) -> None:
        """Set the example at an index. Raises DataError if the disk is full."""
        if self._file is None:
            self._examples[place] = example
            self._room -= len(example.input) + len(example.output)
            if self._room < 0:
                self._spill()
        else:
            self._write(self._file, place, example)

    def _spill(self) -> None:
        """Move all examples to a file."""
        examples, self._examples = self._examples, []
        self._offsets, self._lengths = (array("Q", bytes(8 * len(examples))) for _ in range(2))
        with _disk_errors():
            self._file = tempfile.TemporaryFile(prefix="turret-")  # noqa: SIM115 - it lives as long as the sequence
        weakref.finalize(self, self._file.close)
        for place, example in enumerate(examples):
            if example is not None:
                self._write(self._file, place, example)

    def _write(self, file: IO[bytes], place: int, example: Example) -> None:
        record = _record(example).encode()
        with _disk_errors():
            self._offsets[place], self._lengths[place] = file.tell(), len(record)
            file.write(record)

    def done(self) -> ExampleStore:
        """The sequence, ready to be read. Raises DataError if the disk is full."""
        if self._file is not None:
            with _disk_errors():
                self._file.flush()
        return self

    @property
    def on_disk(self) -> bool:
        return self._file is not None

    def __len__(self) -> int:
        return len(self._offsets) if self.on_disk else len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        if self._file is None:
            example = self._examples[place]
            assert example is not None, "read before it was filled"
            return example
        with self._lock:
            self._file.seek(self._offsets[place])
            record = self._file.read(self._lengths[place])
        return _example(record)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the data is larger than memory and {tempfile.gettempdir()} cannot hold it ({error.strerror}): "
            "free some space there, set TMPDIR to another folder, or lower data.train"
        ) from None


def _record(example: Example) -> str:
    """A line of JSON: each object is the name of a class with its fields in a list."""
    return json.dumps(
        example, default=lambda each: {type(each).__name__: [getattr(each, f.name) for f in fields(each)]}
    )


def _example(record: str | bytes) -> Example:
    """The example of such a line."""
    found = json.loads(record, object_hook=_decode_object)
    assert isinstance(found, Example)
    return found


def _decode_object(named: Mapping[str, list[Plain]]) -> object:
    ((name, values),) = named.items()
    return _STORED[name](*map(_frozen, values))


def _frozen(value: Plain) -> JsonValue:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def write_dataset(dataset: Dataset, path: Path) -> None:
    """Write a data set to a file: a line about it, and a line an example."""
    about = {field.name: getattr(dataset, field.name) for field in fields(dataset)}
    about |= {split: len(about[split]) for split in SPLITS}
    with path.open("w", encoding="ascii") as file:
        file.write(json.dumps(about) + "\n")
        for split in SPLITS:
            for example in getattr(dataset, split):
                file.write(_record(example) + "\n")


def load_dataset(path: Path, memory: int = MEMORY) -> Dataset:
    """The data set in a file of `write_dataset`. memory: characters of examples that are kept in memory."""
    with path.open(encoding="ascii") as file:
        about = json.loads(file.readline())
        for split in SPLITS:
            examples = ExampleStore(about[split], memory)
            for place in range(about[split]):
                examples.put(place, _example(file.readline()))
            about[split] = examples.done()
    return Dataset(**about | {"labels": tuple(about["labels"]), "notes": tuple(about["notes"])})
