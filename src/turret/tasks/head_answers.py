"""What tasks with a head share: they read one text, or two texts in one row, between the tokenizer's special tokens.

Axes: T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self

from turret.data import Example, Input, TextPair
from turret.errors import DataError
from turret.json_types import JsonMapping
from turret.tasks.calibration import Calibration
from turret.tasks.task import Encoded
from turret.tasks.tokens import Tokens
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


class TextInputs:
    """Encodes texts, or pairs of texts. A row that is too long is cut; special tokens and `prefix_text` never are.

    Args:
        kind: of the task, for errors.
        max_tokens: of a row, special tokens included.
        prefix_text: in front of every (first) text.
        pairs: whether a row has two texts.

    Raises:
        DataError: `max_tokens` leaves no room for a text.
    """

    def __init__(self, kind: str, tokenizer: Tokenizer, max_tokens: int, prefix_text: str, *, pairs: bool) -> None:
        self.kind, self.max_tokens, self.prefix_text, self.pairs = kind, max_tokens, prefix_text, pairs
        self._tokens = Tokens(tokenizer)
        around = self._tokens.around_pair if pairs else None
        self._before, self._between, self._after = around or (self._tokens.before, [], self._tokens.after)
        self._instruction = len(self._tokens.plain([prefix_text])[0]) if prefix_text else 0
        special = len(self._before) + len(self._between) + len(self._after) + self._instruction
        needed = special + 1 + pairs
        if max_tokens < needed:
            raise DataError(
                f"task.max_tokens = {max_tokens} leaves no room for the text: the special tokens and prefix_text "
                f"take {special}, so set it to {needed} or more"
            )

    def encode(self, inputs: Sequence[Input]) -> list[Encoded]:
        """The tokens of each input: at most `max_tokens`, at least one. Raises DataError for one of another kind."""
        return self._two(self._checked_pairs(inputs)) if self.pairs else self._one(self._checked_texts(inputs))

    def _one(self, texts: Sequence[str]) -> list[Encoded]:
        """The first tokens of each text."""
        import torch

        room = self.max_tokens - len(self._before) - len(self._after)
        encoded = []
        for ids in self._tokens.plain([self.prefix_text + text for text in texts], most=room):
            row = [*self._before, *ids[:room], *self._after] or [self._tokens.filler]
            encoded.append(Encoded(torch.tensor(row, dtype=torch.long), cut=len(ids) > room))
        return encoded

    def _two(self, pairs: Sequence[TextPair]) -> list[Encoded]:
        """Both texts of each pair; the longer one loses its end first, as transformers' `longest_first`."""
        import torch

        room = self.max_tokens - len(self._before) - len(self._between) - len(self._after)
        firsts = self._tokens.plain([self.prefix_text + pair.text for pair in pairs], most=room)
        seconds = self._tokens.plain([pair.text_pair for pair in pairs], most=room)
        encoded = []
        for first, second in zip(firsts, seconds, strict=True):
            own = self._instruction
            kept = _kept(len(first) - own, len(second), room - own)
            kept = kept[0] + own, kept[1]
            start = [*self._before, *first[: kept[0]], *self._between]
            row = [*start, *second[: kept[1]], *self._after] or [self._tokens.filler]
            cut = kept != (len(first), len(second))
            ids = torch.tensor(row, dtype=torch.long)
            if self._tokens.segments:
                ids = torch.stack([ids, (torch.arange(len(row)) >= len(start)).long()], dim=1)
            encoded.append(Encoded(ids, cut=cut))
        return encoded

    def _checked_texts(self, inputs: Sequence[Input]) -> list[str]:
        texts = [each for each in inputs if isinstance(each, str)]
        if len(texts) < len(inputs):
            two = any(isinstance(each, TextPair) for each in inputs)
            given = "two texts were given" if two else "a conversation is asked of a task that generates"
            raise DataError(f"{given}, and this one is {self.kind}: give one text")
        return texts

    def _checked_pairs(self, inputs: Sequence[Input]) -> list[TextPair]:
        pairs = [each for each in inputs if isinstance(each, TextPair)]
        if len(pairs) < len(inputs):
            raise DataError(f'this {self.kind} reads two texts, and one was given: give {{"text": …, "text_pair": …}}')
        return pairs


class HeadAnswers(Protocol):
    """The part of `HeadTask` that every task has which reads texts and is answered by a head."""

    request: ClassVar[Literal["classify"]] = "classify"
    generates: ClassVar[Literal[False]] = False
    pipeline_tag: ClassVar[str] = "text-classification"
    spans: ClassVar[Literal["row", "batch"]] = "row"
    two_answers: ClassVar[bool] = False
    rate_ratio: ClassVar[float] = 1.0
    calibration: Calibration | None = None
    inputs: TextInputs

    @classmethod
    def printed(cls, spec: JsonMapping) -> str:
        return "print(logits.tolist())"

    @classmethod
    def peft_type(cls, *, encoder_decoder: bool) -> str:
        return "SEQ_CLS"

    @property
    def pairs(self) -> bool:
        return self.inputs.pairs

    @property
    def max_tokens(self) -> int:
        return self.inputs.max_tokens

    def encode_sources(self, inputs: Sequence[Input]) -> list[Encoded]:
        return self.inputs.encode(inputs)

    def encode_examples(self, examples: Sequence[Example]) -> list[tuple[Encoded, Encoded | None]]:
        return [(source, None) for source in self.encode_sources([example.asked for example in examples])]

    def calibrated(self, logits: Tensor, targets: Tensor, *, chose_weights: bool) -> Self:
        return self

    def class_scores(self, logits: Tensor) -> Tensor:
        return logits

    def label_sets(self, logits: Tensor, coverage: float) -> list[list[str]]:
        raise DataError("coverage needs probabilities of labels, and this task gives none: leave it out")


def _kept(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts fit: the longer one is cut, or both to equal lengths."""
    if first + second <= room:
        return first, second
    short, half = min(first, second), room // 2
    if short <= half:
        return (short, room - short) if first <= second else (room - short, short)
    return (half, room - half) if first <= second else (room - half, half)
