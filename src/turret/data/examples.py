"""The types of an example and of a data set. Loads no numpy and no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from turret.json_types import JsonObject


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and its class; with `multi_label` a sorted tuple of any number of different classes."""

    text: str
    label: str | tuple[str, ...]

    @property
    def input(self) -> str:
        return self.text

    @property
    def output(self) -> str | tuple[str, ...]:
        return self.label

    @property
    def labels(self) -> tuple[str, ...]:
        """Its classes, one or many."""
        return self.label if isinstance(self.label, tuple) else (self.label,)


@dataclass(frozen=True, slots=True)
class Pair:
    """A text and the text to generate from it, or several such texts."""

    source: str
    target: str
    others: tuple[str, ...] = ()  # further texts that are as good as the target

    @property
    def references(self) -> tuple[str, ...]:
        """All texts that the answer may be compared with."""
        return (self.target, *self.others)

    @property
    def input(self) -> str:
        return self.source

    @property
    def output(self) -> str:
        return self.target


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


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that end with an answer of the assistant, which follows from the turns before it."""

    turns: tuple[Turn, ...]
    tools: str = ""  # as in `Prompt`

    @property
    def prompt(self) -> Prompt:
        """Everything before the last answer."""
        return Prompt(self.turns[:-1], self.tools)

    @property
    def input(self) -> str:
        return str(self.prompt)

    @property
    def output(self) -> str:
        """The text of the last answer; its tool calls as JSON if it has no text."""
        return self.turns[-1].content or self.turns[-1].tool_calls


Input: TypeAlias = str | Prompt  # what a model is asked
Example = Labelled | Pair | Conversation


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


def inputs_of(examples: Sequence[Example]) -> list[Input]:
    """What a model is asked in some examples: a text, or the turns of a conversation before its last answer."""
    return [example.prompt if isinstance(example, Conversation) else example.input for example in examples]


def texts_of(examples: Sequence[Example]) -> list[str]:
    """The inputs of some examples as texts; those of conversations as JSON."""
    return [example.input for example in examples]


def labels_of(example: Example) -> tuple[str, ...]:
    """The labels of a classified example: one, or any number if its task takes several."""
    return example.output if isinstance(example.output, tuple) else (example.output,)


def references_of(example: Example) -> tuple[str, ...]:
    """The texts that an answer to an example is compared with: several if its row has several."""
    return example.references if isinstance(example, Pair) else (str(example.output),)
