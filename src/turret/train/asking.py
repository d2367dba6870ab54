"""Ask an adapter in memory, or its bare base: the engine that serves answers, on the base's weights in memory.

So a version is judged by what will serve it. What the engine cannot take is asked of an attached model, whose texts are
those of transformers' `generate`, and `Asking.why_plain` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from turret import adapters
from turret.adapters import Adapter
from turret.adapters.adapter import PROMPT, shared_names
from turret.adapters.hooks import hook_model
from turret.adapters.packed import HeadRow, texts_in
from turret.adapters.tuners.tuner import tuner_of
from turret.bases import Base
from turret.bases.base import share_weights
from turret.bases.fingerprints import is_within
from turret.bases.sharded import parts_of
from turret.data import Example, Input
from turret.engine.cache import capacity
from turret.engine.core import Engine
from turret.engine.request import Ask, Limits, Named
from turret.engine.sampler import base_settings
from turret.engine.sampling_params import SamplingParams
from turret.errors import AdapterError, BaseModelError
from turret.families.family import Pooling
from turret.methods import Head
from turret.process import Closing
from turret.tasks import Embedding, Task
from turret.tasks.shapes import Answer, Generation, Metrics, number_of
from turret.tasks.task import RequestKind
from turret.tasks.tokens import Tokens
from turret.train.batches import CACHE_TOKENS, GENERATED_ROWS, EncodedRows, by_length
from turret.train.evaluation import class_logits, evaluate, evaluation_mode
from turret.train.losses import mount_reference
from turret.transformer import Model

MOST_TOKENS = 4096  # of one pass of an attached model that generates, prompt and new tokens
PASS_TOKENS = 2048  # of any other pass: nobody waits for a short one here
UNLIMITED = 1 << 40  # a limit of the engine that is not wanted here
LIMITS = Limits(  # of an engine that one thread asks, which waits for every answer
    queue_tokens=UNLIMITED,
    queue_seconds=UNLIMITED,
    running=GENERATED_ROWS,
    batch_tokens=PASS_TOKENS,
    cache_tokens=CACHE_TOKENS,
    max_tokens=UNLIMITED,
)


class Asking(Closing):
    """An adapter on its base, or the base alone, that answers. A context manager.

    The engine starts with the first question and ends with `close`. Only one thread asks.

    Args:
        base: nothing is attached to its model, which stays so. Of a base in parts: the trained model.
        adapter: None for the bare base.
        task: how texts are read and answered.
        model: with the adapter attached, for passes that the engine does not make. None: made when it is needed.
        most_tokens: of one pass.
    """

    def __init__(
        self,
        base: Base,
        adapter: Adapter | None,
        task: Task,
        model: Model | None = None,
        most_tokens: int = PASS_TOKENS,
    ) -> None:
        self.base, self.adapter, self.task, self.most_tokens = base, adapter, task, most_tokens
        self.why_plain = _why_plain(base, adapter, task.generates)  # why the engine does not answer; None: it does
        self._model = model
        self._engine: Engine | None = None
        self._held: list[Named] = []  # by the engine: what answers without the adapter, and with it
        self._cache_tokens = 0
        self._bare: Asking | None = None  # the base without an adapter that does not share it

    @property
    def model(self) -> Model:
        """A model with the adapter in the slot that every row takes; of the bare base, with hooks only."""
        if self._model is None:
            self._model = share_weights(self.base).model
            if self.adapter is None:
                hook_model(self._model)
            else:
                adapters.mount(self._model, self.adapter, fingerprint=self.base.fingerprint)
            mount_reference(self.base, self._model)
        return self._model

    @property
    def notes(self) -> list[str]:
        """A note for the user if the engine does not answer."""
        why = self.why_plain
        return [] if why is None else [f"answered by the trained model itself, not by the engine that serves: {why}"]

    def evaluate(
        self, examples: Sequence[Example], *, bare: bool = False, logits: Tensor | None = None
    ) -> tuple[Metrics, list[Answer]]:
        """The metrics on some examples, and an answer for each.

        Args:
            bare: of the base without the adapter; a head is as it was before the training.
            logits: (B, C) of the examples, if they are known.
        """
        task, slot = self.task, adapters.BARE if bare else None
        items = EncodedRows(task, examples)
        rows = items.windows()
        if not task.generates and (task.bare or not bare):
            return task.judge(self.logits(rows, bare=bare) if logits is None else logits, examples)
        losses, answers = evaluate(self.model, task, items, most_tokens=self.most_tokens, slot=slot)
        if answers:  # a head's, or of a preference, which is judged by these passes
            return losses, answers
        answers = self.texts([source for source, _ in rows], bare=bare)
        references = [example.references for example in examples]
        return task.judge_texts([answer["text"] for answer in answers], references, number_of(losses, "loss")), answers

    def logits(self, rows: Sequence[HeadRow], *, bare: bool = False) -> Tensor:
        """The outputs of the head for each row: (B, C) float32 on the CPU, or of all tokens that are read (N, C).

        Of a task without a head they are the vectors of all texts (N, D), before they are cut and normalized.
        """
        if self.task.pooling is not None:
            return self._vectors([text for row in rows for text in texts_in(row)], self.task.pooling, bare=bare)
        if self.why_plain is not None:
            with evaluation_mode(self.model, adapters.BARE if bare else None):
                return torch.cat(class_logits(self.model, rows, self.most_tokens))
        order = sorted(range(len(rows)), key=lambda place: len(rows[place][0]))
        options = [SamplingParams(logits=True, read=_places(rows[place][1])) for place in order]
        answers = self._ask("classify", [rows[place][0] for place in order], options, 1, bare=False)
        found = dict(zip(order, answers, strict=True))
        return _outputs(self.task, [found[place] for place in range(len(rows))])

    def embeddings(self, sources: Sequence[Tensor]) -> Tensor:
        """A vector of length 1 of the bare base for each source: (B, D) float32 on the CPU.

        Args:
            sources: token ids (T,) of each text; segments are not read.
        """
        rows = [source if source.ndim == 1 else source[:, 0] for source in sources]
        return nn.functional.normalize(self._vectors(rows, self.base.family.embedding, bare=True))

    def text_embeddings(self, texts: Sequence[str], most: int) -> Tensor:
        """A vector of length 1 for each text, as an engine gives it for the bare base: (B, D) float32 on the CPU.

        Args:
            most: tokens that are read of a text.
        """
        adapter = self.adapter
        if adapter is not None and not adapter.method.mixes(adapter.method.model_dump()):
            self._bare = self._bare or Asking(self.base, None, self.task)
            return self._bare.text_embeddings(texts, most)
        tokens, limit = Tokens(self.base.tokenizer), self.base.family.position_limit(self.base.model.config)
        return self.embeddings([torch.tensor(tokens.row(text, min(most, limit or most))) for text in texts])

    def _vectors(self, texts: Sequence[Tensor], pooling: Pooling, *, bare: bool) -> Tensor:
        """The pooled hidden states of each text: (N, D) float32 on the CPU. The engine reads equal texts once."""
        if self.why_plain is not None:
            with evaluation_mode(self.model, adapters.BARE if bare else None):
                return torch.cat(class_logits(self.model, [(ids, None) for ids in texts], self.most_tokens, pooling))
        places = dict[tuple[int, ...], list[int]]()
        for place, ids in enumerate(texts):
            places.setdefault(tuple(ids.tolist()), []).append(place)
        order = sorted(places, key=len)
        whole = Embedding(pooling, int(self.base.model.config.hidden_size), normalize=False)
        options = [SamplingParams(embedding=whole)] * len(order)
        answers = self._ask("embed", [torch.tensor(ids) for ids in order], options, 1, bare=bare)
        found = torch.empty(len(texts), int(self.base.model.config.hidden_size))
        for each, answer in zip(order, answers, strict=True):
            found[places[each]] = torch.tensor(answer["embedding"])
        return found

    def texts(self, sources: Sequence[Tensor], *, bare: bool = False, new_tokens: int | None = None) -> list[Answer]:
        """Generate a text for each source, with the task's settings.

        Args:
            sources: token ids (T,) of each prompt.
            bare: ask the base without the adapter.
            new_tokens: exactly so many for every text; None: the task's limits.

        Returns:
            For each source `{"text", "finish_reason", "tokens"}`.
        """
        adapter = self.adapter
        if bare and adapter is not None and not adapter.method.mixes(adapter.method.model_dump()):
            self._bare = self._bare or Asking(self.base, None, self.task)
            return self._bare.texts(sources, new_tokens=new_tokens)
        bare = bare or adapter is None
        if self.why_plain is not None:
            with evaluation_mode(self.model, adapters.BARE if bare else None):
                return _generate_texts(self.model, self.task, sources, new_tokens)
        settings = self.task.generation
        answer = int(settings["max_new_tokens"]) if new_tokens is None else new_tokens
        needed = int(settings["num_beams"]) * self._row_cache_tokens(max(map(len, sources), default=0), answer)
        options = SamplingParams(max_tokens=new_tokens, min_tokens=new_tokens)
        found = self._ask("generate", sources, [options] * len(sources), needed, bare)
        return [
            {"text": each["text"], "finish_reason": each["finish_reason"], "tokens": each["tokens"]} for each in found
        ]

    def answers(self, inputs: Sequence[Input], *, bare: bool = False, coverage: float | None = None) -> list[Answer]:
        """The answer to each input; see `answers_and_cuts`."""
        return [answer for answer, _ in self.answers_and_cuts(inputs, bare=bare, coverage=coverage)]

    def answers_and_cuts(
        self, inputs: Sequence[Input], *, bare: bool = False, coverage: float | None = None
    ) -> list[tuple[Answer, bool]]:
        """The answer to each input, and whether the input was cut because it is longer than the task's limit.

        Args:
            coverage: also give sets of labels, of a task that ranks them.

        Raises:
            AdapterError: the bare base cannot answer.
        """
        task = self.task
        if task.generates:
            encoded = task.encode_sources(inputs)
            texts = self.texts([each.ids for each in encoded], bare=bare)
            return [(text, each.cut) for text, each in zip(texts, encoded, strict=True)]
        if bare and not task.bare:
            raise AdapterError("this version classifies, and the bare base has no head for it: ask without bare")
        windows = task.windows(inputs)
        logits = self.logits([(row.ids, row.read) for rows in windows for row in rows], bare=bare)
        found = task.answers(logits, inputs)
        if coverage is not None:
            for answer, labels in zip(found, task.label_sets(logits, coverage), strict=True):
                answer["label_set"] = labels
        return [(answer, rows[0].cut) for answer, rows in zip(found, windows, strict=True)]

    def close(self) -> None:
        """End the engine. The base stays."""
        if self._bare is not None:
            self._bare.close()
        if self._engine is not None:
            self._engine.close()
            self._engine, self._held = None, []

    # --- the engine ---------------------------------------------------------------------------------------------------

    def _ask(
        self,
        kind: RequestKind,
        sources: Sequence[Tensor],
        options: Sequence[SamplingParams],
        cache_tokens: int,
        bare: bool,
    ) -> list[Answer]:
        """The answers, in order. The first error is raised, and cancels the other questions."""
        engine = self._start_engine(cache_tokens)
        named = None if kind == "embed" and bare else self._held[0 if bare else -1]
        return engine.answers(
            [Ask(kind, source.tolist(), named, own) for source, own in zip(sources, options, strict=True)]
        )

    def _start_engine(self, cache_tokens: int) -> Engine:
        """The engine, with a KV cache for at least so many tokens."""
        if self._engine is None or cache_tokens > self._cache_tokens:
            self.close()
            self._cache_tokens = max(CACHE_TOKENS, cache_tokens)
            rows = max(GENERATED_ROWS, int(self.task.generation.get("num_beams", 1)))
            limits = replace(LIMITS, batch_tokens=self.most_tokens, cache_tokens=self._cache_tokens, running=rows)
            base, adapter = self.base, self.adapter
            if adapter is not None and adapter.method.every_weight:
                weights = {**adapter.tensors, **adapter.head}
                head = {name: each for name, each in weights.items() if is_within(name, base.family.head_modules)}
                base, adapter = _with_weights(base, adapter), _nothing(base, self.task, head)
            self._engine = Engine(base, None, limits)
            answering = [_nothing(self.base, self.task), *([] if adapter is None else [adapter])]
            self._held = [self._engine.hold(each.method.kind, 1, each) for each in answering]
        return self._engine

    def _row_cache_tokens(self, prompt: int, answer: int) -> int:
        """The tokens of the KV cache that a row takes, as `Runner.needs` counts them."""
        every = () if self.adapter is None else (self.adapter, *self.adapter.others)
        tensors = [item for adapter in every for item in adapter.tensors.items()]
        prefixes = [each.shape[3] for _, each in tensors if each.dim() == 5]  # (L, 2, H, P, D)
        prefixes += [len(each) for name, each in tensors if name in PROMPT.values() and each.dim() == 2]  # (P, D)
        prefix = max(prefixes, default=0)
        if self.base.family.is_encoder_decoder:
            return capacity(prefix + answer) + capacity(prefix + prompt)
        return capacity(prefix + prompt + answer)


def logits_of_each(base: Base, asked: Sequence[tuple[Adapter, Task, Sequence[HeadRow]]]) -> list[Tensor]:
    """The outputs of several heads on one base, each for its own rows: (B, C) float32 on the CPU for each.

    The rows of all adapters share the passes of one engine. What it does not take has an engine or a model of its own.

    Args:
        asked: an adapter, how it reads and answers texts, and its rows.
    """
    found = dict[int, Tensor]()
    for number, (adapter, task, rows) in enumerate(asked):
        if adapter.method.every_weight or _why_plain(base, adapter, False) is not None:
            with Asking(base, adapter, task) as asking:
                found[number] = asking.logits(rows)
    mixed = [number for number in range(len(asked)) if number not in found]
    if not mixed:
        return [found[number] for number in range(len(asked))]
    order = [(number, place) for number in mixed for place in range(len(asked[number][2]))]
    order.sort(key=lambda each: (len(asked[each[0]][2][each[1]][0]), each[1]))  # the rows of a text follow one another
    with Engine(base, None, LIMITS) as engine:
        held = {number: engine.hold(f"adapter-{number}", 1, asked[number][0]) for number in mixed}
        asks = []
        for number, place in order:
            ids, read = asked[number][2][place]
            options = SamplingParams(logits=True, read=_places(read))
            asks.append(Ask("classify", ids.tolist(), held[number], options))
        answers = dict(zip(order, engine.answers(asks), strict=True))
    for number in mixed:
        _, task, rows = asked[number]
        found[number] = _outputs(task, [answers[number, place] for place in range(len(rows))])
    return [found[number] for number in range(len(asked))]


def _outputs(task: Task, answers: Sequence[Answer]) -> Tensor:
    """The outputs of a head in the answers of an engine, in order: (B, C), or of all tokens that are read (N, C)."""
    outputs = task.num_labels(task.labels) or 1
    return torch.cat([torch.tensor(answer["logits"]).reshape(-1, outputs) for answer in answers])


def _places(read: Tensor | None) -> tuple[int, ...] | None:
    return None if read is None else tuple(read.tolist())


def twin_base(base: Base) -> Base:
    """Another model on a base's weights, to be asked while the base's own one trains. A base in parts has none."""
    return base if parts_of(base.model) > 1 else share_weights(base)


def _nothing(base: Base, task: Task, head: dict[str, Tensor] | None = None) -> Adapter:
    """An adapter that changes nothing in the base: with it the base reads and answers as the task does."""
    return Adapter(method=Head(), tensors={}, head=head or {}, base=base.info, task=task.spec())


def _with_weights(base: Base, adapter: Adapter) -> Base:
    """The base with the weights of a full fine-tuning, which no other model on it sees."""
    own = share_weights(base)
    shared = shared_names(own.model)
    for name, value in adapter.tensors.items():
        old = own.model.get_parameter(name)
        new = nn.Parameter(value.to(old.device, old.dtype), requires_grad=False)
        for each in shared[name]:
            path, _, key = each.rpartition(".")
            setattr(own.model.get_submodule(path), key, new)
    return own


# --- without the engine -----------------------------------------------------------------------------------------------


def _why_plain(base: Base, adapter: Adapter | None, generates: bool) -> str | None:
    """Why an attached model is asked instead of the engine; None if the engine is."""
    if parts_of(base.model) > 1:
        return "the base lies in parts, and all processes take part in each pass"
    if base.model.device.type == "mps":
        return "the engine does not run on mps"
    try:
        base_settings(base.model, base.tokenizer)
    except BaseModelError as error:
        return str(error)
    for each in () if adapter is None else (adapter, *adapter.others):
        reason = each.method.why_unanswered(base.family, generates)
        if (reason := reason or tuner_of(each.method).why_unserved(base.model, each)) is not None:
            return reason
    return None


def _generate_texts(model: Model, task: Task, sources: Sequence[Tensor], new_tokens: int | None) -> list[Answer]:
    """A text for each source by transformers' `generate`. new_tokens: exactly so many for every text."""
    settings = task.generation
    if new_tokens is not None:
        settings = {**settings, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    answers: list[Answer] = [{} for _ in sources]
    lengths = [len(source) + int(settings["max_new_tokens"]) for source in sources]
    for piece in by_length(lengths, max(1, MOST_TOKENS // int(settings["num_beams"]))):
        for start in range(0, len(piece), GENERATED_ROWS):
            places = piece[start : start + GENERATED_ROWS]
            rows = [sources[i] for i in places]
            for place, answer in zip(places, _generated_rows(model, task, rows, settings), strict=True):
                answers[place] = answer
    return answers


def _generated_rows(model: Model, task: Task, rows: Sequence[Tensor], settings: Generation) -> list[Answer]:
    encoder_decoder = model.config.is_encoder_decoder
    side = "right" if encoder_decoder else "left"  # a decoder continues at the right end
    ids = pad_sequence(list(rows), batch_first=True, padding_value=int(settings["pad_token_id"]), padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        use_cache=True,
        synced_gpus=parts_of(model) > 1,  # layers in parts need all processes until the last text ends
        **settings,
    )
    eos = settings["eos_token_id"]
    answers = list[Answer]()
    for row in output[:, 1 if encoder_decoder else ids.shape[1] :].tolist():
        ended = eos in row
        ids = row[: row.index(eos)] if ended else row
        answers.append({"text": task.decode(ids), "finish_reason": "stop" if ended else "length", "tokens": len(ids)})
    return answers
