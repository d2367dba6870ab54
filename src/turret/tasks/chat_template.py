"""Renders conversations by a chat template, and tells which part of the text is whose.

A template that marks the assistant's words with `{% generation %}` says itself where each answer is. Without the marks,
the conversation is rendered up to each answer, and each rendering has to be the beginning of the whole; otherwise the
base would be trained on another text than it answers with later. That is refused.

A template is a program of the base's author. One that is not `PLAIN` runs in a helper process with limits of time and
memory, in the sandbox of transformers, so that it ends or blocks nothing here.

A text of a turn cannot open or close a turn: special tokens that it spells out are read as plain characters.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from turret.data import Prompt, Turn
from turret.data.examples import Message
from turret.errors import DataError, one_line
from turret.json_types import JsonObject, Plain
from turret.process import Died, HelperProcess
from turret.tasks.tokens import Tokens
from turret.tasks.tool_calls import CallFormat
from turret.transformer import Tokenizer

MOST_TEMPLATE = 1 << 18  # characters
MOST_RENDERED = 1 << 24  # characters that a template may write for one conversation
SECONDS = 5.0  # for one conversation
MEMORY = 512 << 20  # bytes that the process of templates may allocate

# For bases without a template of their own. A base that is not trained for chats learns any that is always the same.
PLAIN = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}:\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{{ '\\n\\n' }}"
    "{% else %}{{ message['content'] }}{{ '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:{{ '\\n' }}{% endif %}"
)
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "probe7c1e"  # a word that no template has

_HOLD, _FIRST = "\U000f0000", 0xF0001  # private characters, which stand for special tokens that a turn spells out

Span = tuple[int, int]  # first character, one past the last


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text."""

    text: str
    literal: tuple[Span, ...]  # special tokens that turns spell out; in `text` a placeholder stands for each
    words: tuple[str, ...]  # what stands there
    marked: tuple[Span, ...]  # what the template marks as the assistant's words


@dataclass(frozen=True)
class Tokenized:
    """A text as tokens."""

    ids: list[int]
    spans: list[Span]  # the characters of each token


class ChatTemplate:
    """A chat template with its tokenizer.

    Args:
        tokenizer: of the base.
        plain: use `PLAIN` even if the base has a template of its own.
    """

    def __init__(self, tokenizer: Tokenizer, *, plain: bool = False) -> None:
        own = tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) and not plain else None
        self.plain = own is None
        self.text: str = own or PLAIN
        self._tokenizer = tokenizer
        self._tokens = Tokens(tokenizer)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._words = sorted(special, key=lambda word: (-len(word), word))  # the longest first
        self._special = re.compile("|".join(map(re.escape, self._words)) or r"(?!)")
        self._special_ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.marks = bool(_MARKS.search(self.text))

    # --- what the template knows -----------------------------------------------------------------------------------

    @cached_property
    def writes_tools(self) -> bool:
        """Whether it writes the list of tools."""
        tool = {"name": _PROBE, "description": "a", "parameters": {"type": "object", "properties": {}}}
        return self._writes([Turn("user", "a")], json.dumps([{"type": "function", "function": tool}]))

    @cached_property
    def writes_calls(self) -> bool:
        """Whether it writes the assistant's calls of tools."""
        return self._writes([Turn("user", "a"), _call(_PROBE)])

    @cached_property
    def writes_results(self) -> bool:
        """Whether it writes turns of the role `tool`."""
        call = _call("a") if self.writes_calls else Turn("assistant", "a")
        return self._writes([Turn("user", "a"), call, Turn("tool", _PROBE, name="a", call_id="abcdefgh1")])

    def _writes(self, turns: Sequence[Turn], tools: str = "") -> bool:
        try:
            return _PROBE in self._render([turn.message() for turn in turns], tools, answering=False)[0]
        except DataError:
            return False

    @cached_property
    def call_format(self) -> CallFormat:
        """How it writes a call of a tool, found by rendering one."""
        if not self.writes_calls:
            return CallFormat()
        asked = Turn("user", "a")
        start = self.render(Prompt((asked,)), answering=True).text
        text = self.render(Prompt((asked, _call(_PROBE))), answering=False).text
        return CallFormat.of_text(text.removeprefix(start), _PROBE) if text.startswith(start) else CallFormat()

    def in_ids(self, text: str) -> list[str | int]:
        """A text with the ids of its added tokens, such as `<tool_call>`, in their places."""
        ids = {str(token): number for number, token in self._tokenizer.added_tokens_decoder.items()}
        words = "|".join(map(re.escape, sorted(ids, key=lambda word: (-len(word), word))))
        parts = re.split(f"({words})", text) if words else [text]
        return [ids.get(part, part) for part in parts if part]

    def note(self, prompts: Sequence[Prompt]) -> str | None:
        """What of the conversations' tools the template has no place for, and where it goes; None if it has all."""
        turns = [turn for prompt in prompts for turn in prompt.turns]
        calls = any(turn.tool_calls for turn in turns) and not self.writes_calls
        results = any(turn.role == "tool" for turn in turns) and not self.writes_results
        tools = any(prompt.tools for prompt in prompts) and not self.writes_tools
        parts = ["tools are listed in the system turn"] * tools + ["calls are written as JSON"] * calls
        parts += ["results of tools are user turns"] * results
        return f"the base's chat template has no place for tools: {', '.join(parts)}" if parts else None

    def _in_words(self, prompt: Prompt) -> Prompt:
        """The conversation with tools as texts, where the template would leave them out."""
        turns = list(prompt.turns)
        if not self.writes_calls and any(turn.tool_calls for turn in turns):
            turns = [replace(turn, content=_with_calls(turn), tool_calls="") for turn in turns]
        if any(turn.role == "tool" for turn in turns) and not self.writes_results:
            turns = [Turn("user", turn.content) if turn.role == "tool" else turn for turn in turns]
        if not prompt.tools or self.writes_tools:
            return Prompt(tuple(turns), prompt.tools)
        lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in json.loads(prompt.tools)]
        listed = "\n".join(["You can call these tools:", *lines])
        if turns and turns[0].role == "system":
            return Prompt((Turn("system", f"{turns[0].content}\n\n{listed}"), *turns[1:]))
        return Prompt((Turn("system", listed), *turns))

    # --- to text ---------------------------------------------------------------------------------------------------

    def render(self, prompt: Prompt, *, answering: bool) -> Rendered:
        """The conversation as a text.

        Args:
            answering: whether the assistant's next turn begins at its end.

        Raises:
            DataError: the template does not accept the conversation.
        """

        def hold(found: re.Match[str]) -> str:
            return f"{_HOLD}{chr(_FIRST + self._words.index(found[0]))}"

        known = self._in_words(prompt)
        messages = [
            replace(
                turn, content=self._special.sub(hold, turn.content), tool_calls=self._special.sub(hold, turn.tool_calls)
            ).message()
            for turn in known.turns
        ]
        text, marked = self._render(messages, self._special.sub(hold, known.tools), answering=answering)
        held = [
            (found.span(), self._words[ord(found[1]) - _FIRST])
            for found in re.finditer(f"{_HOLD}(.)", text, re.DOTALL)
            if 0 <= ord(found[1]) - _FIRST < len(self._words)
        ]
        return Rendered(text, tuple(span for span, _ in held), tuple(word for _, word in held), tuple(marked))

    def _render(self, messages: list[Message], tools: str, *, answering: bool) -> tuple[str, list[Span]]:
        return render_template(
            self.text,
            messages,
            json.loads(tools) if tools else None,
            answering=answering,
            marks=self.marks,
            special=self._tokenizer.special_tokens_map,
        )

    def answers(self, prompt: Prompt, whole: Rendered) -> list[Span]:
        """The characters of every answer of the assistant.

        Args:
            prompt: the conversation.
            whole: its rendering, or that of the conversation with one more turn.

        Raises:
            DataError: the template has no marks and writes a turn differently once others follow.
        """
        if self.marks:
            return list(whole.marked)
        spans = []
        for place, turn in enumerate(prompt.turns):
            if turn.role == "assistant":
                start = self.render(Prompt(prompt.turns[:place], prompt.tools), answering=True).text
                end = self.render(Prompt(prompt.turns[: place + 1], prompt.tools), answering=False).text
                if not (whole.text.startswith(start) and whole.text.startswith(end) and len(start) < len(end)):
                    raise DataError(
                        "this base's chat template changes an answer when other turns follow it, so only the last "
                        'answer can be learnt: set task.loss_on = "last"'
                    )
                spans.append((len(start), len(end)))
        return spans

    # --- to tokens -------------------------------------------------------------------------------------------------

    def tokenize(self, rendered: Rendered, start: int = 0, stop: int | None = None) -> Tokenized:
        """The text as tokens. Special tokens are those of the template; what turns spell out is read as characters.

        Args:
            start, stop: the characters to read.
        """
        stop = len(rendered.text) if stop is None else stop
        pieces: list[tuple[str, int, int, bool]] = []  # text, its characters, and whether it is literal
        for (first, last), word in zip(rendered.literal, rendered.words, strict=True):
            if start <= first and last <= stop:
                pieces += [(rendered.text[start:first], start, first, False), (word, first, last, True)]
                start = last
        pieces.append((rendered.text[start:stop], start, stop, False))
        ids: list[int] = []
        spans: list[Span] = []
        for text, first, last, literal in pieces:
            if text:
                found, places = self._tokens.ids_with_offsets(text, literal=literal)
                ids += found
                spans += [(first, last)] * len(found) if literal else [(first + a, first + b) for a, b in places]
        return Tokenized(ids, spans)

    def tail(self, prompt: Prompt) -> str:
        """What the template writes after the text of the last turn, up to where the answer begins."""
        turns = (*prompt.turns[:-1], replace(prompt.turns[-1], content=_PROBE, tool_calls=""))
        return self.render(Prompt(turns, prompt.tools), answering=True).text.rpartition(_PROBE)[2]

    @cached_property
    def end(self) -> int:
        """The token that ends an answer: the first special token after it, or else the tokenizer's eos."""
        asked = [Turn("user", "a"), Turn("assistant", _PROBE)]
        text = self.render(Prompt(tuple(asked)), answering=False).text
        after = self._tokens.plain([text.rpartition(_PROBE)[2]])[0]
        return next((token for token in after if token in self._special_ids), self._tokens.eos)

    @property
    def digest(self) -> str:
        """`sha256:…` of the template."""
        return f"sha256:{hashlib.sha256(self.text.encode()).hexdigest()}"

    @property
    def before(self) -> list[int]:
        """Special tokens in front of a conversation that the template does not write itself."""
        return list(self._tokens.before) if self.plain else []


# --- running a template -----------------------------------------------------------------------------------------------


def render_template(
    template: str,
    messages: Sequence[Message],
    tools: Plain = None,
    *,
    answering: bool,
    marks: bool = False,
    special: Mapping[str, str],
) -> tuple[str, list[Span]]:
    """What a template makes of messages, and the characters that it marks as the assistant's.

    Args:
        answering: whether the assistant's next turn begins at its end.
        marks: whether the template marks.
        special: the tokenizer's special tokens by their names.

    Raises:
        DataError: the template is too long, refuses, writes too much, or takes too much time or memory.
    """
    if len(template) > MOST_TEMPLATE:
        raise DataError(
            f"the base's chat template has {len(template)} characters: expected at most {MOST_TEMPLATE}; use another"
        )
    asked: JsonObject = {  # the arguments of `render_jinja_template`
        **{name: str(token) for name, token in special.items()},
        "conversations": [list(messages)],
        "tools": tools,
        "chat_template": template,
        "return_assistant_tokens_mask": marks,
        "add_generation_prompt": answering,
    }
    here = template == PLAIN or sys.platform == "win32"  # where a process cannot wait for a pipe and a clock
    answer = helper({})(asked) if here else _process().ask(asked)
    if isinstance(answer, Died):
        reason = f"it takes more than {SECONDS:g} seconds" if answer.late else "its process ended"
    elif answer["error"] is None:
        return str(answer["text"]), [(int(start), int(end)) for start, end in answer["spans"]]
    else:
        reason = str(answer["error"])
    raise DataError(f"the base's chat template does not accept a conversation: {reason}")


@lru_cache(maxsize=1)
def _process() -> HelperProcess[JsonObject, JsonObject]:
    made = HelperProcess[JsonObject, JsonObject](
        __name__, {}, SECONDS, MEMORY, "the base's chat template cannot be used"
    )
    atexit.register(made.close)
    return made


def helper(_: Mapping[str, Plain]) -> Callable[[JsonObject], JsonObject]:
    """What runs a template, for `turret.process`."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def answer(asked: JsonObject) -> JsonObject:
        try:
            texts, spans = render_jinja_template(**asked)
        except MemoryError:
            return {"error": f"it takes more than {MEMORY >> 20} MiB"}
        except Exception as error:  # a template may raise anything, for example for roles in the wrong order
            return {"error": one_line(str(error), 120) or type(error).__name__}
        text = str(texts[0])
        if len(text) > MOST_RENDERED:
            return {"error": f"it writes {len(text)} characters, expected at most {MOST_RENDERED}"}
        return {"error": None, "text": text, "spans": list(spans[0]) if spans else []}

    return answer


def base_prompt(tokenizer: Tokenizer, prompt: Prompt, *, answering: bool = True) -> list[int]:
    """The tokens of a conversation by the base's own chat template.

    Args:
        answering: whether the assistant's next turn begins at its end.

    Raises:
        DataError: the base has no template, or the template does not accept the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("this base has no chat template: expected one user message")
    template = ChatTemplate(tokenizer)
    return template.tokenize(template.render(prompt, answering=answering)).ids


def _call(name: str) -> Turn:
    function = {"name": name, "arguments": {"a": "b"}}
    return Turn("assistant", "", json.dumps([{"id": "abcdefgh1", "type": "function", "function": function}]))


def _with_calls(turn: Turn) -> str:
    """The text of a turn and its calls, each a line of JSON."""
    calls = [call["function"] for call in json.loads(turn.tool_calls)] if turn.tool_calls else []
    lines = [json.dumps(call, ensure_ascii=False) for call in calls]
    return "\n".join([*([turn.content] if turn.content else []), *lines])
