"""One forward pass after another: requests become rows, and outputs become tokens and answers.

An error in a pass ends all requests in it. An error in one request's own part ends that request only.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import replace

import torch

from turret.engine.decode import choose
from turret.engine.input_processor import Prompts
from turret.engine.request import Done, Failed, Request, log_failure
from turret.engine.runner import Prefill, Runner
from turret.engine.sequence import RunningSequence
from turret.engine.structured_output import Guide
from turret.engine.text import Embedding
from turret.errors import EngineError, NotFinite, TurretError, one_line

End = Callable[[Request, Done | Failed, int], None]  # the request, its end, and the number of generated tokens


class Passes:
    """The requests that generate, and the passes over them.

    Args:
        runner: Runs a pass.
        prompts: Decodes tokens.
        end: Called when a request ends.
        freed: Called when a request that generates gives its rows and KV slots back.
        passed: Called after a pass with the requests that began in it, the number of decode rows, and its seconds.
    """

    def __init__(
        self,
        runner: Runner,
        prompts: Prompts,
        end: End,
        freed: Callable[[Request], None],
        passed: Callable[[Sequence[Request], int, float], None],
    ) -> None:
        self._runner, self._prompts = runner, prompts
        self._end, self._freed, self._passed = end, freed, passed
        self.generating: list[RunningSequence] = []

    def drop(self, requests: Container[Request]) -> None:
        """Free the KV slots of these requests, if they generate. Their tickets stay open."""
        for sequence in [each for each in self.generating if each.request in requests]:
            self._drop(sequence)

    def abandon(self) -> None:
        """Forget all requests: no pass follows."""
        self.generating.clear()

    def run(self, begin: Sequence[Request]) -> None:
        """Run one pass: prefill `begin`, and take a step of every request that generates. An error ends all of them."""
        running, started = list(self.generating), list[RunningSequence]()
        try:
            self._run(begin, running, started)
        except Exception as error:
            what = f"a pass failed ({type(error).__name__}: {error}): ask again, or report it"
            reason = error if isinstance(error, TurretError) else EngineError(one_line(what))
            log_failure(f"a pass of {len(begin) + len(running)} requests failed", error)
            for sequence in [*started, *running]:
                self._drop(sequence)
            dropped = {sequence.request for sequence in started}
            for request in begin:
                if request.generates and request not in dropped:
                    self._freed(request)
            for request in [*begin, *(each.request for each in running)]:
                self._end(request, Failed(reason), 0)

    def _run(
        self, begin: Sequence[Request], running: Sequence[RunningSequence], started: list[RunningSequence]
    ) -> None:
        began = time.monotonic()
        self._runner.reserve([self._row(request) for request in begin if request.generates])
        prefill = [self._prefill(request, started) for request in begin]
        steps = [step for sequence in running for step in sequence.steps()]
        outcome = self._runner.run(prefill, steps)
        self.generating += started
        self._passed(begin, len(steps), time.monotonic() - began)
        for request, pooled in zip([each for each in begin if each.embeds], outcome.embeddings, strict=True):
            self._embedded(request, pooled)
        classify = [request for request in begin if not (request.generates or request.embeds)]
        for request, logits in zip(classify, outcome.classes, strict=True):
            self._classified(request, logits)
        for row, sequence in enumerate(started):
            sequence.read(outcome.prompts.get(row, ()))
        self._take_tokens([*started, *running], outcome.vocabulary)

    def _prefill(self, request: Request, started: list[RunningSequence]) -> Prefill:
        assert request.ids is not None
        if request.embeds:
            return Prefill(request.ids, _slot(request), pooling=self._embedding(request).pooling)
        if not request.generates:
            return Prefill(request.ids, _slot(request))
        kv_slot, slot = self._runner.kv_slot(*self._row(request)), _slot(request)
        before = self._prompts.before(request)
        assert request.settings is not None
        matcher, eos = request.matcher, request.settings.eos
        guide = None if matcher is None else Guide(matcher, self._prompts.constraints.eos, eos)
        started.append(RunningSequence(request, request.settings, slot, kv_slot, before, guide))
        return started[-1].first()

    def _row(self, request: Request) -> tuple[int, int, int]:
        """(tokens of the prompt, most tokens of the answer, slot), as `Runner.kv_slot` takes them."""
        assert request.ids is not None
        assert request.settings is not None
        return len(request.ids), max(1, request.settings.max_tokens), _slot(request)

    def _classified(self, request: Request, logits: torch.Tensor) -> None:
        try:
            if not bool(torch.isfinite(logits).all()):
                raise self._not_finite(request)
            loaded = self._runner.adapter_pool.at(_slot(request))
            assert loaded is not None
            assert loaded.task.generates is False
            answer = loaded.task.answers(logits[None])[0]
            if request.options.coverage is not None:
                answer["label_set"] = loaded.task.label_sets(logits[None], request.options.coverage)[0]
            self._end(request, Done({**answer, "prompt_tokens": len(request.ids or ())}), 0)
        except Exception as error:
            self._end(request, Failed(error if isinstance(error, TurretError) else _unexpected(error)), 0)

    def _embedding(self, request: Request) -> Embedding:
        asked = request.options.embedding or Embedding()
        return replace(asked, pooling=asked.pooling or self._runner.base.family.embedding)

    def _embedded(self, request: Request, pooled: torch.Tensor) -> None:
        try:
            if not bool(torch.isfinite(pooled).all()):
                raise self._not_finite(request, "a vector that is")
            vector = self._embedding(request).vector(pooled)
            self._end(request, Done({"embedding": vector, "prompt_tokens": len(request.ids or ())}), 0)
        except Exception as error:
            self._end(request, Failed(error if isinstance(error, TurretError) else _unexpected(error)), 0)

    def _take_tokens(self, sequences: Sequence[RunningSequence], scores: torch.Tensor) -> None:
        """Give every sequence its next token or its next beams. scores: (rows of all sequences, V)"""
        start, single = 0, []
        for sequence in sequences:
            rows = len(sequence.kv_slots)
            if sequence.beams is None:
                single.append((start, sequence))
            else:
                own = scores[start : start + rows]
                self._safely(sequence, functools.partial(self._search, sequence, own))
            start += rows
        if single:
            index = [place for place, _ in single]
            own = scores if len(index) == len(scores) else scores[index]
            logprobs = {
                sequence: own[row].log_softmax(-1)
                for row, (_, sequence) in enumerate(single)
                if sequence.settings.logprobs is not None
            }  # `choose` changes the scores
            guides = {row: each.guide for row, (_, each) in enumerate(single) if each.guide is not None}
            tokens = choose(own, [sequence for _, sequence in single], guides)
            for (_, sequence), token in zip(single, tokens, strict=True):
                self._safely(sequence, functools.partial(self._take, sequence, token, logprobs.get(sequence)))

    def _take(self, sequence: RunningSequence, token: int | None, logprobs: torch.Tensor | None) -> None:
        if token is None:
            raise self._not_finite(sequence.request)
        if sequence.reason is None:  # else only its prompt was to be read
            sequence.take(token, self._prompts.decode, self._prompts.token_texts, logprobs)

    def _search(self, sequence: RunningSequence, scores: torch.Tensor) -> None:
        if not bool(torch.isfinite(scores.sum(-1)).all()):
            raise self._not_finite(sequence.request)
        sequence.search(scores, lambda: self._runner.kv_slot(*self._row(sequence.request)))

    def _safely(self, sequence: RunningSequence, step: Callable[[], None]) -> None:
        """Run a step of one sequence. An error, or the end of the sequence, ends its request."""
        try:
            step()
            if sequence.reason is None:
                return
            end: Done | Failed = Done(sequence.answer(self._prompts.decode, self._prompts.token_texts))
        except Exception as error:
            end = Failed(error if isinstance(error, TurretError) else _unexpected(error))
        self._drop(sequence)
        self._end(sequence.request, end, sequence.new)

    def _drop(self, sequence: RunningSequence) -> None:
        """Free the KV slots of a sequence; a second call does nothing."""
        if not sequence.kv_slots:
            return
        sequence.close(self._runner.cache)
        if sequence in self.generating:
            self.generating.remove(sequence)
        self._freed(sequence.request)
        if not self.generating:
            self._runner.adapter_pool.free_decoding()

    def _not_finite(self, request: Request, what: str = "logits that are") -> NotFinite:
        version = str(request.named) if request.named else f"base {self._runner.base.id}"
        return NotFinite(f"{version} gave {what} not finite for this text: retrain or replace this version")


def _slot(request: Request) -> int:
    return request.entry.slot if request.entry is not None else 0


def _unexpected(error: Exception) -> EngineError:
    log_failure("a request failed", error)
    text = f"the answer failed ({type(error).__name__}: {error}): report it to the operator of this engine"
    return EngineError(one_line(text))
