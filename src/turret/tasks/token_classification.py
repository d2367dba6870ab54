"""Token classification: spans of a text and their labels, such as names of people and places.

A head reads the first token of each word. A text that is longer than `max_tokens` is read in windows that overlap, and
each word is answered by the window in which it has more words around it.

Axes: N words of all texts, C tags, T tokens of a row.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from turret.data import Dataset, Example, Input, Schema, Tagged
from turret.data.columns import SPANNED, TAGGED
from turret.data.examples import Span, written_span
from turret.errors import DataError, quote, quote_all
from turret.tasks.calibration import FEWEST, Calibration, Confidences, fit, temperature_of
from turret.tasks.classify import CLASSES, ECE, TEXTS, HeadAnswers, TextInputs, output_names
from turret.tasks.shapes import Answer, HeadConfig, Metrics, SpanAnswer, TaskSpec
from turret.tasks.task import Encoded, Gives, Measure, Mistake, Prediction, TaskSettings, register
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from turret.families.family import HeadKind
    from turret.families.family import Kind as FamilyKind

OUTSIDE = "O"
KEPT = 1024  # texts whose tokens and words are kept
OVERLAP = 0.25  # share of a window that the next one repeats
MARGIN = 2  # tokens more that a piece of a text may have, since it begins and ends elsewhere
_ONE_BY_ONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # scripts without blanks between words
_LETTERS = rf"[^\W{_ONE_BY_ONE}]+"
WORD = re.compile(rf"[{_ONE_BY_ONE}]|{_LETTERS}(?:[^\w\s]+{_LETTERS})*|[^\w\s]")  # U.S and b/c are one


@dataclass(frozen=True)
class _Text:
    """A text in tokens.

    Args:
        ids: of the whole text, without special tokens.
        words: first and last character of each.
        first: the number of the first token of each word.
        windows: each a range of tokens and the range of words that it answers.
    """

    ids: list[int]
    words: list[tuple[int, int]]
    first: list[int]
    windows: list[tuple[range, range]]


@register
class TokenClassification(HeadAnswers):
    """A tagger's labels, and how it reads a text.

    The outputs of the head are tags: O, and for each label B (a span begins) and I (it continues).
    """

    kind: ClassVar[str] = "token_classification"
    head: ClassVar[HeadKind] = "tag"
    reads_tokens: ClassVar[bool] = True
    pipeline_tag: ClassVar[str] = "token-classification"
    gives: ClassVar[Gives] = "spans"
    peft_task: ClassVar[str | None] = "TOKEN_CLS"
    calibrates: ClassVar[bool] = True
    solved: ClassVar[bool] = False
    metric: ClassVar[str] = "text_f1"
    metric_label: ClassVar[str] = "F1 of the spans of a text"
    measures: ClassVar[Mapping[str, Measure]] = {
        "text_f1": Measure("F1 by text", "the F1 of the spans of a text, as a mean over texts", share=True),
        "precision": Measure(
            "precision", "the share of answered spans that are right: start, end and label", share=True
        ),
        "recall": Measure("recall", "the share of right spans that are answered", share=True),
        "f1": Measure("F1", "the F1 of all spans", share=True),
        "loss": Measure("loss", "the mean of minus the logarithm of a word's right tag; 0 is perfect", "nats"),
        "ece": ECE,
    }
    errors: ClassVar[str] = "the texts with the most wrong spans"
    sides: ClassVar[tuple[str, str]] = ("missed", "wrong")
    settings: ClassVar[tuple[str, ...]] = CLASSES
    multi_label: bool = True

    def __init__(
        self, labels: Sequence[str], tokenizer: Tokenizer, max_tokens: int = 256, prefix_text: str = ""
    ) -> None:
        if not labels or len(set(labels)) != len(labels):
            raise DataError(f"labels of spans must be different and at least 1, given {list(labels)}")
        if not tokenizer.is_fast:
            raise DataError(
                "token_classification needs a fast tokenizer, which tells the place of each token: use another base"
            )
        self.labels = tuple(labels)
        self.tags = _tags_of(self.labels)
        self._number = {tag: number for number, tag in enumerate(self.tags)}
        self.inputs = TextInputs(self.kind, tokenizer, max_tokens, prefix_text, pairs=False)
        self._read = functools.lru_cache(KEPT)(self._reading)

    @classmethod
    def schema(cls, *, multi_label: bool = False) -> Schema:
        tokens = [
            (words, tags)
            for words in ("tokens", "words")
            for tags in ("tags", "ner_tags", "labels", "pos_tags", "chunk_tags")
        ]
        spans = [(text, spans) for text in TEXTS for spans in ("spans", "entities")]
        return Schema(
            cls.kind,
            {TAGGED: tokens, SPANNED: spans},
            TEXTS,
            lambda row: Tagged(*row.tagged_text()),
            classes=True,
            many=True,
            show=2,
            spans=True,
        )

    @classmethod
    def make(cls, settings: TaskSettings, dataset: Dataset, tokenizer: Tokenizer, family_kind: FamilyKind) -> Self:
        return cls(dataset.labels, tokenizer, settings.max_tokens, settings.prefix_text)

    @classmethod
    def num_labels(cls, labels: Sequence[str]) -> int | None:
        return 1 + 2 * len(labels) if labels else None

    @classmethod
    def labels_of_outputs(cls, names: Sequence[str]) -> tuple[str, ...]:
        """The labels whose tags, in order, are the names of a head's outputs. Raises DataError."""
        found = tuple(dict.fromkeys(name[2:] for name in names if name != OUTSIDE))
        if tuple(names) != _tags_of(found):
            raise DataError(
                f"the head's outputs are {quote_all(names, 80)}: expected O, then B- and I- of each label: train again"
            )
        return found

    @classmethod
    def head_config(cls, spec: TaskSpec) -> HeadConfig:
        return output_names(_tags_of(spec["labels"]))

    @classmethod
    def print_line(cls, spec: TaskSpec) -> str:
        return "print(logits.argmax(-1).tolist())"

    @property
    def instruction(self) -> str:
        return f"Mark every {', '.join(self.labels)} in the following text."

    # --- texts to rows ------------------------------------------------------------------------------------------------

    def encode_sources(self, inputs: Sequence[Input]) -> list[Encoded]:
        """The first window of each text. `cut`: there are more, which `windows` gives."""
        return [rows[0] for rows in self._rows(inputs, whole=False)]

    def windows(self, inputs: Sequence[Input]) -> list[list[Encoded]]:
        return self._rows(inputs, whole=True)

    def _rows(self, inputs: Sequence[Input], *, whole: bool) -> list[list[Encoded]]:
        return [self._windows_of(self._read(text), whole=whole) for text in self.inputs.texts(inputs)]

    def _windows_of(self, text: _Text, *, whole: bool) -> list[Encoded]:
        import torch

        rows = list[Encoded]()
        for tokens, words in text.windows if whole else text.windows[:1]:
            row, start = self.inputs.row(text.ids[tokens.start : tokens.stop])
            read = [text.first[word] - tokens.start + start for word in words]
            cut = not whole and len(text.windows) > 1
            rows.append(Encoded(torch.tensor(row), cut=cut, read=torch.tensor(read, dtype=torch.long)))
        return rows

    def _reading(self, text: str) -> _Text:
        """The tokens and the words of a text, and its windows."""
        ids, places = self.inputs.ids_with_offsets(text)
        words = [match.span() for match in WORD.finditer(text)]
        ends = list(itertools.accumulate((end for _, end in places), max))  # of the tokens so far
        first = [min(bisect.bisect_right(ends, start), len(ids) - 1) for start, _ in words] if ids else []
        words = words if ids else []
        return _Text(ids, words, first, self._split(first, len(ids)))

    def _split(self, first: Sequence[int], count: int) -> list[tuple[range, range]]:
        """The windows of a text of `count` tokens, whose words begin with the tokens `first`."""
        room = self.inputs.room
        if count <= room:
            return [(range(count), range(len(first)))]
        repeated, starts = int(room * OVERLAP), [0]
        while starts[-1] + room < count:
            following = starts[-1] + room - repeated
            begin = bisect.bisect_right(first, following) - 1  # a window begins with a word, if it can
            starts.append(first[begin] if begin >= 0 and first[begin] > starts[-1] else following)
        windows, done = list[tuple[range, range]](), 0
        for start, following in itertools.pairwise([*starts, count]):
            last = start + room >= count
            seam = count if last else (following + start + room) // 2  # the middle of what both windows read
            end = len(first) if last else max(done, bisect.bisect_left(first, seam))
            windows.append((range(start, min(count, start + room)), range(done, end)))
            done = end
        return windows

    def pieces(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Texts that are too long, in pieces that end before a word outside of spans; others as they are."""
        found = list[Example]()
        for example in examples:
            assert isinstance(example, Tagged)
            text = self._read(example.text)
            found += [example] if len(text.windows) == 1 else self._cut(example, text)
        return found

    def _cut(self, example: Tagged, text: _Text) -> list[Tagged]:
        begins = [at for at, _ in text.words]
        inside = {
            word
            for start, end, _ in example.spans
            for word in range(bisect.bisect_right(begins, start), bisect.bisect_left(begins, end))
        }
        room = max(1, self.inputs.room - MARGIN)
        cuts, begin = [0], 0
        for word, end in enumerate([*text.first[1:], len(text.ids)]):
            while end - text.first[begin] > room and word > begin:
                begin = next((each for each in range(word, begin, -1) if each not in inside), word)
                cuts.append(text.words[begin][0])
        found = []
        for first, last in itertools.pairwise([*cuts, len(example.text)]):
            piece = example.text[first:last].rstrip()
            own = [(max(a, first) - first, min(b, first + len(piece)) - first, label) for a, b, label in example.spans]
            found.append(Tagged(piece, tuple(span for span in own if span[0] < span[1])))
        return found

    # --- tags ---------------------------------------------------------------------------------------------------------

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """The tag of every word that a window answers: (N,) int64. A word has the label of a span that touches it."""
        import torch

        numbers = list[int]()
        for example in examples:
            assert isinstance(example, Tagged)
            text = self._read(example.text)
            numbers += self._tags(example, text.words[: text.windows[0][1].stop])
        return torch.tensor(numbers, dtype=torch.long)

    def _tags(self, example: Tagged, words: Sequence[tuple[int, int]]) -> list[int]:
        tags, spans, place = [0] * len(words), example.spans, 0
        for start, end, label in spans:
            if label not in self.labels:
                raise DataError(f"label {quote(label)} is unknown to this tagger: it knows {quote_all(self.labels)}")
            while place < len(words) and words[place][1] <= start:
                place += 1
            letter = "B"
            while place < len(words) and words[place][0] < end:
                tags[place], letter = self._number[f"{letter}-{label}"], "I"
                place += 1
        return tags

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """mean_n cross_entropy_n over words: a scalar. logits: (N, C), targets: (N,)."""
        import torch.nn.functional as F

        return F.cross_entropy(logits.float(), targets) if len(targets) else logits.float().sum()

    def guessing_loss(self, examples: Sequence[Example]) -> float | None:
        """The entropy of the tags' shares."""
        import torch

        shares = torch.bincount(self.targets(examples), minlength=len(self.tags)).double()
        shares = shares / shares.sum().clamp(min=1)
        return float(torch.special.entr(shares).sum())

    def answers(self, logits: Tensor, inputs: Sequence[Input] = ()) -> list[Answer]:
        """`{"spans": [{"label", "start", "end", "text", "probability"}]}` for each text.

        A span's probability is the mean of those of its words. logits: (N, C).
        """
        if not inputs:
            raise DataError("spans are places in a text: ask with the text, not with token ids")
        return self._answers(logits, inputs, temperature_of(self.calibration))

    def _answers(self, logits: Tensor, inputs: Sequence[Input], temperature: float) -> list[Answer]:
        best = (logits.float() / temperature).softmax(-1).max(-1)
        chosen, sure = best.indices.tolist(), best.values.tolist()
        answers, at = list[Answer](), 0
        for text in self.inputs.texts(inputs):
            words = self._read(text).words
            own = slice(at, at + len(words))
            answers.append({"spans": self._spans(text, words, chosen[own], sure[own])})
            at += len(words)
        return answers

    def _spans(
        self, text: str, words: Sequence[tuple[int, int]], tags: Sequence[int], sure: Sequence[float]
    ) -> list[SpanAnswer]:
        found, chances = list[list[int]](), list[list[float]]()  # number of the label, start, end
        before = 0
        for (start, end), tag, chance in zip(words, tags, sure, strict=True):
            number = (tag - 1) // 2
            if tag and (tag % 2 or not before or (before - 1) // 2 != number):  # I without a span before it begins one
                found.append([number, start, end])
                chances.append([chance])
            elif tag:
                found[-1][2] = end
                chances[-1].append(chance)
            before = tag
        return [
            {
                "label": self.labels[number],
                "start": start,
                "end": end,
                "text": text[start:end],
                "probability": sum(own) / len(own),
            }
            for (number, start, end), own in zip(found, chances, strict=True)
        ]

    def judge(self, logits: Tensor, examples: Sequence[Example]) -> tuple[Metrics, list[Answer]]:
        """text_f1, precision, recall and F1 of all spans and by label, as seqeval counts them, loss and ece.

        A span is right if start, end and label are. loss is of the words, ece of the spans that are answered, both with
        the temperature. logits: (N, C) of all words.
        """
        from turret.tasks.metrics import precision_and_recall

        answers = self.answers(logits, [example.asked for example in examples])
        targets = logits.new_tensor([tag for tags in self._every_tag(examples) for tag in tags]).long()
        hits, given, true = Counter[str](), Counter[str](), Counter[str]()
        scores = list[float]()
        for answer, example in zip(answers, examples, strict=True):
            assert isinstance(example, Tagged)
            own, right = {_span(each) for each in answer["spans"]}, set(example.spans)
            given.update(label for _, _, label in own)
            true.update(label for _, _, label in right)
            hits.update(label for _, _, label in own & right)
            scores.append(_f1(len(own & right), len(own), len(right)))
        every = precision_and_recall(hits.total(), given.total(), true.total())
        metrics: Metrics = {
            "text_f1": sum(scores) / max(1, len(scores)),
            **every,
            "loss": float(self.loss(logits / temperature_of(self.calibration), targets)),
            "ece": self.confidences(logits, examples)[""].error,
            "per_class": {
                label: precision_and_recall(hits[label], given[label], true[label]) | {"support": true[label]}
                for label in self.labels
            },
        }
        return metrics, answers

    def _every_tag(self, examples: Sequence[Example]) -> list[list[int]]:
        """The right tags of all words of each text."""
        return [self._tags(each, self._read(each.text).words) for each in examples if isinstance(each, Tagged)]

    def confidences(self, logits: Tensor, examples: Sequence[Example]) -> dict[str, Confidences]:
        """Of each span that is answered."""
        asked = [example.asked for example in examples]
        answers, raw = self.answers(logits, asked), self._answers(logits, asked, 1.0)
        right = list[bool]()
        for answer, example in zip(answers, examples, strict=True):
            assert isinstance(example, Tagged)
            right += [_span(span) in example.spans for span in answer["spans"]]
        sure, less = ([span["probability"] for answer in some for span in answer["spans"]] for some in (answers, raw))
        return {"": Confidences(sure, less, right, self.calibration)}

    def calibrated(self, logits: Tensor, examples: Sequence[Example], *, chose_weights: bool) -> Self:
        """One temperature for the tags of all words."""
        tags = self._every_tag(examples)
        if sum(map(bool, tags)) < FEWEST:
            return self
        targets = logits.new_tensor([tag for own in tags for tag in own]).long()
        return self.with_calibration(fit(logits, targets, chose_weights=chose_weights, rows=list(map(len, tags))))

    @classmethod
    def prediction_of(cls, answer: Answer) -> Prediction:
        """Every span in words, as `Tagged.output` writes it."""
        return [written_span(_span(each), each["text"]) for each in answer["spans"]]

    @classmethod
    def score(cls, given: Prediction, example: Example) -> float:
        """F1 of a text's spans; 1 where there are none and none are given."""
        own, right = set(given), set(example.output)
        return _f1(len(own & right), len(own), len(right))

    def worst(self, examples: Sequence[Example], answers: Sequence[Answer]) -> list[Mistake]:
        """The texts whose spans are not all right, the most wrong spans first: missed ones and wrong ones."""
        found = []
        for each in super().worst(examples, answers):
            missed = [span for span in each.right if span not in each.given]
            wrong = [span for span in each.given if span not in each.right]
            error = f"F1 {each.score:.2f}"
            found.append(dataclasses.replace(each, right=missed, given=wrong, error=error))
        return sorted(found, key=lambda each: -len(each.right) - len(each.given))

    @classmethod
    def line(cls, answer: Answer) -> str:
        spans = [f"{each['label']}: {each['text']} ({each['start']}-{each['end']})" for each in answer["spans"]]
        return "; ".join(spans) or "no spans"

    def spec(self) -> TaskSpec:
        return super().spec() | {"labels": list(self.labels)}

    @classmethod
    def from_spec(cls, spec: TaskSpec, tokenizer: Tokenizer) -> Self:
        made = cls(spec["labels"], tokenizer, spec["max_tokens"], spec["prefix_text"])
        return made.with_calibration(Calibration.from_json(spec["calibration"])) if "calibration" in spec else made


def _tags_of(labels: Sequence[str]) -> tuple[str, ...]:
    return (OUTSIDE, *(f"{letter}-{label}" for label in labels for letter in "BI"))


def _span(answered: SpanAnswer) -> Span:
    return answered["start"], answered["end"], answered["label"]


def _f1(hits: int, given: int, true: int) -> float:
    return 2 * hits / (given + true) if given + true else 1.0
