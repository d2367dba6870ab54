"""The types of an example and of a data set. Loads no numpy and no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from turret.json_types import JsonObject, JsonValue


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
    """What a task learns from one row: a question, and the right answer to it. Each kind is a frozen dataclass."""

    @property
    def asked(self) -> Input:
        """What the model is asked."""
        raise NotImplementedError

    @property
    def output(self) -> str | tuple[str, ...]:
        """The right answer in words."""
        raise NotImplementedError

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
        return (str(self.output),)

    def respelt(self, spelling: Mapping[str, str]) -> Example:
        """The example with the classes that its labels mean."""
        return self

    def in_training(self) -> Sequence[Example]:
        """The examples that it is in training."""
        return (self,)

    def parts(self) -> tuple[str, ...]:
        """All that it says, for the digest of a data set."""
        output = self.output
        return (self.input, *(output if isinstance(output, tuple) else (output,)))

    @classmethod
    def from_json(cls, fields: Sequence[JsonValue]) -> Example:
        """The example whose fields were written as JSON, in their order: an object is a list there."""
        return cls(*fields)


EXAMPLES: dict[str, type[Example]] = {}  # by the name of the class, for files of examples
Registered = TypeVar("Registered", bound="type[Example]")


def register_example(kind: Registered) -> Registered:
    """Let examples of this kind pass to files and other processes: a decorator of their class."""
    EXAMPLES[kind.__name__] = kind
    return kind


def asked_from_json(value: JsonValue) -> str | TextPair:
    """One text, or two in a list."""
    return value if isinstance(value, str) else TextPair(*value)


@register_example
@dataclass(frozen=True, slots=True)
class Labelled(Example):
    """A text, or two, and its class; with `multi_label` a sorted tuple of any number of different classes."""

    text: str | TextPair
    label: str | tuple[str, ...]

    @property
    def asked(self) -> str | TextPair:
        return self.text

    @property
    def output(self) -> str | tuple[str, ...]:
        return self.label

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

    @classmethod
    def from_json(cls, fields: Sequence[JsonValue]) -> Labelled:
        text, label = fields
        return cls(asked_from_json(text), tuple(label) if isinstance(label, list) else label)


@register_example
@dataclass(frozen=True, slots=True)
class Scored(Example):
    """A text, or two, and a number."""

    text: str | TextPair
    value: float

    @property
    def asked(self) -> str | TextPair:
        return self.text

    @property
    def output(self) -> str:
        return repr(self.value)

    @classmethod
    def from_json(cls, fields: Sequence[JsonValue]) -> Scored:
        text, value = fields
        return cls(asked_from_json(text), value)


Span: TypeAlias = tuple[int, int, str]  # first character, one past the last, label


@register_example
@dataclass(frozen=True, slots=True)
class Tagged(Example):
    """A text and its spans, in order, none of which overlap."""

    text: str
    spans: tuple[Span, ...]

    @property
    def asked(self) -> str:
        return self.text

    @property
    def output(self) -> tuple[str, ...]:
        return tuple(written_span(span, self.text[span[0] : span[1]]) for span in self.spans)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(label for _, _, label in self.spans)

    def respelt(self, spelling: Mapping[str, str]) -> Tagged:
        return Tagged(self.text, tuple((start, end, spelling[label]) for start, end, label in self.spans))

    @classmethod
    def from_json(cls, fields: Sequence[JsonValue]) -> Tagged:
        text, spans = fields
        return cls(text, tuple((start, end, label) for start, end, label in spans))


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

    @property
    def asked(self) -> str:
        return self.source

    @property
    def output(self) -> str:
        return self.target

    @property
    def references(self) -> tuple[str, ...]:
        return (self.target, *self.others)

    def in_training(self) -> Sequence[Pair]:
        return [Pair(self.source, reference) for reference in self.references] if self.others else (self,)

    def parts(self) -> tuple[str, ...]:
        return (self.source, *self.references)

    @classmethod
    def from_json(cls, fields: Sequence[JsonValue]) -> Pair:
        source, target, others = fields
        return cls(source, target, tuple(others))


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: str  # system, user, assistant or tool
    content: str
    tool_calls: str = ""  # JSON: a list of {"type": "function", "function": {"name", "arguments"}}
    name: str = ""  # of the tool, in a turn with its result
    call_id: str = ""  # of the call that a tool's result belongs to

    def message(self) -> JsonObject:
        """The turn as a chat template takes it."""
        message: JsonObject = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = json.loads(self.tool_calls)
        more = {"name": self.name, "tool_call_id": self.call_id}
        return message | {key: value for key, value in more.items() if value}


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

    @classmethod
    def from_json(cls, fields: Sequence[JsonValue]) -> Conversation:
        turns, tools = fields
        return cls(tuple(Turn(*turn) for turn in turns), tools)


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

    @classmethod
    def from_json(cls, fields: Sequence[JsonValue]) -> Preferred:
        turns, chosen, rejected = fields
        return cls(tuple(Turn(*turn) for turn in turns), chosen, rejected)


@register_example
@dataclass(frozen=True, slots=True)
class Related(Example):
    """A text, one that belongs to it, and texts that do not."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()
    others: tuple[str, ...] = ()  # further texts that belong to the anchor

    @property
    def asked(self) -> str:
        return self.anchor

    @property
    def output(self) -> str:
        return self.positive

    @property
    def references(self) -> tuple[str, ...]:
        return (self.positive, *self.others)

    def in_training(self) -> Sequence[Related]:
        return [Related(self.anchor, each, self.negatives) for each in self.references] if self.others else (self,)

    def parts(self) -> tuple[str, ...]:
        return (self.anchor, *self.references, *self.negatives)

    @classmethod
    def from_json(cls, fields: Sequence[JsonValue]) -> Related:
        anchor, positive, negatives, others = fields
        return cls(anchor, positive, tuple(negatives), tuple(others))


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
