"""What happens to requests in a pass: rows made of them, the pass, and the next token, text or answer of each.

A mistake in a pass ends the requests in it, one in a request's own part that request alone. Knows requests, the runner
and sequences. Refuses to know threads, queues and where adapters come from.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Container, Sequence

import torch

from turret.engine.decode import choose
from turret.engine.prompts import Prompts
from turret.engine.request import Done, Failed, Request, log
from turret.engine.runner import Prefill, Runner
from turret.engine.sequence import RunningSequence
from turret.errors import EngineError, NotFinite, TurretError

End = Callable[[Request, Done | Failed, int], None]  # with the tokens it generated


class Passes:
    """Everything that generates, and one pass after another. end, freed, passed: what the engine wants to be told."""

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
        """Give back what these hold, if they generate; their tickets are somebody else's."""
        for sequence in [each for each in self.generating if each.request in requests]:
            self._drop(sequence)

    def abandon(self) -> None:
        """Forget them: no pass follows."""
        self.generating.clear()

    def run(self, begin: Sequence[Request]) -> None:
        """One pass: these begin, and everything that generates goes on. What goes wrong ends these and nobody else."""
        going, started = list(self.generating), list[RunningSequence]()
        try:
            self._run(begin, going, started)
        except Exception as error:
            reason = EngineError(f"a pass failed ({type(error).__name__}: {error}): ask again, and tell if it stays")
            log.exception("a pass of %d requests failed", len(begin) + len(going))
            for sequence in [*started, *going]:
                self._drop(sequence)
            made = {sequence.request for sequence in started}
            for request in begin:
                if request.kind == "generate" and request not in made:
                    self._freed(request)
            for request in [*begin, *(each.request for each in going)]:
                self._end(request, Failed(reason), 0)

    def _run(self, begin: Sequence[Request], going: Sequence[RunningSequence], started: list[RunningSequence]) -> None:
        began = time.monotonic()
        self._runner.reserve([self._row(request) for request in begin if request.kind == "generate"])
        fresh = [self._begun(request, started) for request in begin]
        steps = [step for sequence in going for step in sequence.steps()]
        outcome = self._runner.run(fresh, steps)
        self.generating += started
        self._passed(begin, len(steps), time.monotonic() - began)
        asked = [request for request in begin if request.kind == "classify"]
        for request, logits in zip(asked, outcome.classes, strict=True):
            self._classified(request, logits)
        self._go_on([*started, *going], outcome.vocabulary)

    def _begun(self, request: Request, started: list[RunningSequence]) -> Prefill:
        assert request.ids is not None
        if request.kind == "classify":
            return Prefill(request.ids, _slot(request))
        kv_slot, slot = self._runner.kv_slot(*self._row(request)), _slot(request)
        before = self._prompts.before(request)
        started.append(RunningSequence(request, request.settings, slot, kv_slot, before))
        return started[-1].first()

    def _row(self, request: Request) -> tuple[int, int, int]:
        """What its lane has to hold: tokens of the prompt, at most so many of the answer, and the slot's prefix."""
        assert request.ids is not None
        return len(request.ids), request.settings.max_tokens, _slot(request)

    def _classified(self, request: Request, logits: torch.Tensor) -> None:
        try:
            if not bool(torch.isfinite(logits).all()):
                raise self._not_finite(request)
            loaded = self._runner.adapter_pool.at(request.entry.slot)
            assert loaded is not None
            answer = loaded.task.answers(logits[None])[0]
            self._end(request, Done({**answer, "prompt_tokens": len(request.ids or ())}), 0)
        except Exception as error:
            self._end(request, Failed(error if isinstance(error, TurretError) else _unexpected(error)), 0)

    def _go_on(self, sequences: Sequence[RunningSequence], scores: torch.Tensor) -> None:
        """A step of every sequence by its rows of scores: the next token, or the next beams, or the end."""
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
            }  # before the scores are used up
            tokens = choose(own, [sequence for _, sequence in single])
            for (_, sequence), token in zip(single, tokens, strict=True):
                self._safely(sequence, functools.partial(self._take, sequence, token, logprobs.get(sequence)))

    def _take(self, sequence: RunningSequence, token: int | None, logprobs: torch.Tensor | None) -> None:
        if token is None:
            raise self._not_finite(sequence.request)
        sequence.take(token, self._prompts.decode, logprobs)

    def _search(self, sequence: RunningSequence, scores: torch.Tensor) -> None:
        if not bool(torch.isfinite(scores.sum(-1)).all()):
            raise self._not_finite(sequence.request)
        sequence.search(scores, self._runner.cache, lambda: self._runner.kv_slot(*self._row(sequence.request)))

    def _safely(self, sequence: RunningSequence, step: Callable[[], None]) -> None:
        """What goes wrong with one sequence is its own error; what is over ends."""
        try:
            step()
            if sequence.reason is None:
                return
            end: Done | Failed = Done(sequence.answer(self._prompts.decode, self._prompts.words))
        except Exception as error:
            end = Failed(error if isinstance(error, TurretError) else _unexpected(error))
        self._drop(sequence)
        self._end(sequence.request, end, sequence.new)

    def _drop(self, sequence: RunningSequence) -> None:
        """Give back what a sequence holds, once."""
        if not sequence.kv_slots:
            return
        sequence.close(self._runner.cache)
        if sequence in self.generating:
            self.generating.remove(sequence)
        self._freed(sequence.request)
        if not self.generating:
            self._runner.adapter_pool.stack.clear()

    def _not_finite(self, request: Request) -> NotFinite:
        who = str(request.named) if request.named else f"base {self._runner.base.id}"
        return NotFinite(
            f"{who} gave numbers that are not finite for this text: retrain it, or promote another version"
        )


def _slot(request: Request) -> int:
    return request.entry.slot if request.entry is not None else 0


def _unexpected(error: Exception) -> EngineError:
    log.exception("a request failed", exc_info=error)
    return EngineError(f"no answer could be made ({type(error).__name__}: {error}): tell those who run this engine")
