"""The engine: one thread that runs passes over one base, each with any mixture of adapters (continuous batching).

`submit` returns a ticket. The thread gives the adapter a slot, asks the scheduler what begins, runs a pass, and ends
tickets. State that two threads use is guarded by `_wake`. Passes, tokenizers and listeners run without that lock.
"""

from __future__ import annotations

import functools
import math
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

import torch

from turret import process
from turret.adapters.adapter import Adapter
from turret.bases.base import Base, share_weights
from turret.data import Input
from turret.engine.adapter_loader import AdapterLoader, AdapterSource, Need, Warm, WithAdaptersInMemory
from turret.engine.adapter_pool import AdapterTensors
from turret.engine.constraint import Constraint
from turret.engine.input_processor import Prompts
from turret.engine.request import (
    Ask,
    Done,
    Failed,
    Group,
    Kind,
    Limits,
    LoadedAdapter,
    Named,
    PassListener,
    Request,
    Row,
    Stats,
    Ticket,
    failed,
    log_failure,
)
from turret.engine.runner import Outcome, Runner, pass_tokens
from turret.engine.sampler import choose, token_logprobs
from turret.engine.sampling_params import SamplingParams
from turret.engine.scheduler import Counters, Scheduler, TrainingTurns, between_passes
from turret.engine.sequence import Prefill, RunningSequence
from turret.engine.slots import Slots
from turret.engine.structured_output import Guide
from turret.errors import (
    Busy,
    DataError,
    Draining,
    EngineError,
    InUse,
    NoRoom,
    NotFinite,
    NotFound,
    TurretError,
    memory_ran_out,
    one_line,
)
from turret.ops.core import use_device
from turret.ops.table import end_idle_threads
from turret.tasks.shapes import Answer
from turret.tasks.task import Embedding

if TYPE_CHECKING:
    from turret.engine.vllm import Vllm, VllmPasses

# --- step -------------------------------------------------------------------------------------------------------------
# One forward pass after another: requests become rows, and outputs become tokens and answers.


class Passes:
    """The requests that generate, and the passes over them.

    Args:
        runner: Runs a pass.
        prompts: Decodes tokens.
        listener: Is told what happens.
    """

    def __init__(self, runner: Runner, prompts: Prompts, listener: PassListener) -> None:
        self._runner, self._prompts, self._listener = runner, prompts, listener
        self.generating: list[RunningSequence] = []

    def drop(self, requests: Container[Request]) -> None:
        """Free the KV slots of these requests, if they generate. Their tickets stay open."""
        for sequence in [each for each in self.generating if each.request in requests]:
            self._drop(sequence)

    def abandon(self) -> None:
        """Forget all requests: no pass follows."""
        self.generating.clear()

    def run(self, begin: Sequence[Request]) -> None:
        """Run one pass: prefill `begin`, and take a step of every request that generates.

        An error ends all of them. If memory runs out, what does not fit ends, and the others go on.
        """
        running, started, began = list(self.generating), list[RunningSequence](), time.monotonic()
        outcome: Outcome | None = None
        try:
            outcome = self._compute_pass(begin, running, started)
        except Exception as error:
            for sequence in started:
                sequence.close(self._runner.cache)
            if not memory_ran_out(error):
                self._fail_requests(begin, running, error)
                return
        if outcome is None:  # here the error is gone, which held the tensors of the pass
            self._run_in_parts(begin, running)
            return
        try:
            self.generating += started
            steps = sum(len(sequence.kv_slots) for sequence in running)
            self._listener.passed(begin, steps, time.monotonic() - began)
            self._read(begin, running, started, outcome)
        except Exception as error:
            self._fail_requests(begin, [*started, *running], error)

    def _fail_requests(self, begin: Sequence[Request], sequences: Sequence[RunningSequence], error: Exception) -> None:
        """End all requests of a pass."""
        what = f"a pass failed ({type(error).__name__}: {error}): ask again, or report it"
        reason = error if isinstance(error, TurretError) else EngineError(one_line(what))
        dropped = {sequence.request for sequence in sequences}
        log_failure(f"a pass of {len({*begin, *dropped})} requests failed", error)
        for sequence in sequences:
            self._drop(sequence)
        for request in begin:
            if request.rows and request not in dropped:
                self._listener.freed(request)
        for request in {**dict.fromkeys(begin), **dict.fromkeys(sequence.request for sequence in sequences)}:
            self._listener.ended(request, Failed(reason), 0)

    def _run_in_parts(self, begin: Sequence[Request], running: Sequence[RunningSequence]) -> None:
        """Run a pass again after memory ran out: what begins by halves. A single one that does not fit ends."""
        self._runner.make_room()
        if len(begin) > 1:
            middle = len(begin) // 2
            self.run(begin[:middle])
            self.run(begin[middle:])
            return
        last = begin[0] if begin else running[-1].request
        reason = Busy(
            f"memory ran out for a text of {last.tokens} tokens beside {len(running)} others: ask again later, or for "
            "less; if it happens often, lower the limits cache_tokens and memory",
            retry_after=1,
        )
        if not begin:
            self._drop(running[-1])
        elif last.rows:
            self._listener.freed(last)
        self._listener.ended(last, Failed(reason), 0)
        if self.generating:
            self.run(())

    def _compute_pass(
        self, begin: Sequence[Request], running: Sequence[RunningSequence], started: list[RunningSequence]
    ) -> Outcome:
        self._runner.reserve([self._row(request) for request in begin if request.rows])
        prefill = [row for request in begin for row in self._prefill(request, started)]
        return self._runner.run(prefill, [step for sequence in running for step in sequence.steps()])

    def _read(
        self,
        begin: Sequence[Request],
        running: Sequence[RunningSequence],
        started: Sequence[RunningSequence],
        outcome: Outcome,
    ) -> None:
        for request, pooled in zip([each for each in begin if each.embeds], outcome.embeddings, strict=True):
            self._end_embedding(request, pooled)
        for request, scores in zip([each for each in begin if each.scores], outcome.scores, strict=True):
            self._end_scoring(request, scores)
        classify = [request for request in begin if not (request.rows or request.embeds or request.scores)]
        classes = iter(outcome.classes)
        for request in classify:
            rows = [next(classes) for _ in request.windows] or [next(classes)[None]]
            self._end_classification(request, torch.cat(rows))
        for row, sequence in enumerate(started):
            sequence.read(outcome.prompts.get(row, ()))
        self._take_tokens([*started, *running], outcome.vocabulary)

    def _prefill(self, request: Request, started: list[RunningSequence]) -> list[Prefill]:
        assert request.ids is not None
        if request.embeds:
            return [Prefill(request.ids, _slot(request), pooling=self._embedding(request).pooling)]
        if request.windows:
            return [Prefill(ids, _slot(request), read=read) for ids, read in request.windows]
        if request.scores:
            return [Prefill(request.ids, _slot(request), branches=request.options.scored or ())]
        if not request.rows:
            return [Prefill(request.ids, _slot(request), segments=request.segments)]
        kv_slot, slot = self._runner.kv_slot(*self._row(request)), _slot(request)
        before = self._prompts.before(request)
        assert request.settings is not None
        matcher, eos = request.matcher, request.settings.eos
        guide = None if matcher is None else Guide(matcher, self._prompts.constraints.eos, eos)
        started.append(RunningSequence(request, request.settings, slot, kv_slot, before, guide))
        return [started[-1].first()]

    def _row(self, request: Request) -> tuple[int, int, int]:
        """(tokens of the prompt, most tokens of the answer, slot), as `Runner.kv_slot` takes them."""
        assert request.ids is not None
        assert request.settings is not None
        return len(request.ids), max(1, request.settings.max_tokens), _slot(request)

    def _end_classification(self, request: Request, logits: torch.Tensor) -> None:
        try:
            if not bool(torch.isfinite(logits).all()):
                raise self._not_finite(request)
            loaded = self._runner.adapter_pool.at(_slot(request))
            assert loaded is not None
            if request.options.logits:
                answer: Answer = {"logits": logits.tolist()}
            else:
                answer = loaded.task.answers(logits, () if request.text is None else [request.text])[0]
            if request.options.coverage is not None:
                answer["label_set"] = loaded.task.label_sets(logits, request.options.coverage)[0]
            self._listener.ended(request, Done({**answer, "prompt_tokens": request.tokens}), 0)
        except Exception as error:
            self._listener.ended(request, failed(error), 0)

    def _embedding(self, request: Request) -> Embedding:
        """How the text becomes a vector: as the request says, else as the adapter was trained."""
        asked, loaded = request.options.embedding or Embedding(), self._runner.adapter_pool.at(_slot(request))
        trained = None if loaded is None else loaded.task.embedding
        return asked.over(trained or Embedding(self._runner.base.family.embedding))

    def _end_embedding(self, request: Request, pooled: torch.Tensor) -> None:
        try:
            if not bool(torch.isfinite(pooled).all()):
                raise self._not_finite(request, "a vector that is")
            vector = self._embedding(request).vectors(pooled).tolist()
            self._listener.ended(request, Done({"embedding": vector, "prompt_tokens": len(request.ids or ())}), 0)
        except Exception as error:
            self._listener.ended(request, failed(error), 0)

    def _end_scoring(self, request: Request, scores: Sequence[float]) -> None:
        if all(map(math.isfinite, scores)):
            self._listener.ended(request, Done({"logprobs": list(scores), "prompt_tokens": request.tokens}), 0)
        else:
            self._listener.ended(request, Failed(self._not_finite(request)), 0)

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
            count = sequence.settings.logprobs or 0
            found = (
                None if logprobs is None or token in sequence.settings.eos else token_logprobs(logprobs, token, count)
            )
            sequence.take(token, self._prompts.decode, self._prompts.token_texts, found)

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
            end = failed(error)
        self._drop(sequence)
        self._listener.ended(sequence.request, end, sequence.new)

    def _drop(self, sequence: RunningSequence) -> None:
        """Free the KV slots of a sequence; a second call does nothing."""
        if not sequence.kv_slots:
            return
        sequence.close(self._runner.cache)
        if sequence in self.generating:
            self.generating.remove(sequence)
        self._listener.freed(sequence.request)
        if not self.generating:
            self._runner.adapter_pool.free_decoding()

    def _not_finite(self, request: Request, what: str = "logits that are") -> NotFinite:
        version = str(request.named) if request.named else f"base {self._runner.base.id}"
        return NotFinite(f"{version} gave {what} not finite for this text: retrain or replace this version")


def _slot(request: Request) -> int:
    return request.entry.slot if request.entry is not None else 0


# --- core -------------------------------------------------------------------------------------------------------------


T = TypeVar("T")
VLLM_TOKENS = 65_536  # of prompts that begin at once, if vLLM computes: it divides them into passes itself


class Engine(process.Closing):
    """One base in memory that answers with any number of adapters. A context manager.

    The engine owns the base's model while it is open: it attaches hooks, and `close` removes them.

    Args:
        base: A loaded base.
        source: Loads adapters by reference. None: there are only those of `hold`.
        limits: Limits of memory, queue, batch and cache.
        clock: Seconds that only grow; for tests.
        vllm: A server that computes the answers; None: this process does. The base then has no weights.

    Raises:
        BaseModelError: The base's generation_config.json has an unsupported setting.
    """

    def __init__(
        self,
        base: Base,
        source: AdapterSource | None,
        limits: Limits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        vllm: Vllm | None = None,
    ) -> None:
        self.base, self.limits = base, limits or Limits()
        self._source, self._clock = WithAdaptersInMemory(source), clock
        # The base's own model stays bare, so that trainings can share it too.
        self._runner: Runner | Vllm = Runner(share_weights(base)) if vllm is None else vllm
        try:
            self._prompts = Prompts(self._runner.base, self._runner.needs, self.limits)
        except TurretError:
            self._runner.close()
            raise
        self.longest = self._prompts.longest  # tokens of a prompt and its answer together
        self.limits = self._runner.within(self.limits)
        self._slots = Slots(self.limits.slots, self.limits.memory)
        self._wake = threading.Condition(self._slots.budget.lock)
        self._loader = AdapterLoader(
            self._runner.adapter_pool, self._slots, self._source, base.tokenizer, self._wake, clock, self._encode
        )
        self._scheduler = Scheduler(
            batch_tokens=self.limits.batch_tokens or (pass_tokens(base) if vllm is None else VLLM_TOKENS),
            running=self.limits.running,
            cache_tokens=self.limits.cache_tokens,
        )
        self._open: set[Request] = set()  # not ended
        self._waiting: set[Request] = set()  # not begun
        self._waiting_tokens: Counter[str] = Counter()  # by tenant
        self._counters = Counters(clock)
        listener = PassListener(self._end, self._free_request, self._count_pass, self._count_tokens, self._wake)
        self._passes: Passes | VllmPasses
        if isinstance(self._runner, Runner):
            self._passes = Passes(self._runner, self._prompts, listener)
        else:
            self._passes = self._runner.passes(self._prompts, listener)
        self._submitting = threading.local()  # the group of a thread
        self._trainings = TrainingTurns(self.limits.train_percent / 100)
        self._retired: set[Named] = set()  # of `hold`, no longer wanted
        self._cancelled = False  # a request was cancelled since the last check
        self._draining = self._closing = False
        self._thread = threading.Thread(target=self._loop, name="turret-engine", daemon=True)
        self._thread.start()

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(
        self,
        kind: Kind,
        text: Input | Row,
        adapter: str | Named | None,
        options: SamplingParams | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
        tenant: str = "",
    ) -> Ticket:
        """Submit a request. The version that `adapter` names now answers it, even if an alias moves later.

        Errors that show only when the adapter is loaded are raised by the ticket.

        Args:
            kind: "classify", "generate" or "embed".
            text: A text, two texts, a conversation, or token ids that are used unchanged.
            adapter: A reference, or what `hold` returned; None for the bare base, which cannot classify.
            options: How to answer.
            priority: Higher goes first.
            deadline: Seconds from now.
            tenant: Who asks. Tenants take turns by the tokens of their requests.

        Raises:
            NotFound: The reference names no version.
            Busy: The queue is full, or the request would wait too long.
            Draining: The engine takes no new requests.
            AdapterError: The adapter cannot answer this kind of request.
            DataError: The text or the options do not fit.
            NoRoom: The request is larger than a limit.
        """
        named, now = None if adapter is None else self._source.resolve(adapter), self._clock()
        end = None if deadline is None else now + deadline
        request = self._prompts.request(
            kind, text, named, options or SamplingParams(), priority, now, end, self._cancel
        )
        request.tenant, request.group = tenant, getattr(self._submitting, "group", None)
        end_idle_threads()  # leave the processors to the engine's thread
        with self._wake:
            if self._draining:
                raise Draining("the engine takes no new requests: it is being stopped; ask another one")
            self._check_queue(request)
            loaded = None if request.named is None else self._loader.need(request)
            self._admit(request)
            if request.named is not None and loaded is None:
                return request.ticket  # `_take_up` continues when it is loaded
        self._encode(request, loaded)
        if request.error is not None:
            self._end(request, Failed(request.error))
            raise request.error
        with self._wake:
            self._schedule(request)
        return request.ticket

    @contextmanager
    def together(self) -> Iterator[None]:
        """The requests that this thread submits in the block enter the queue at once, at its end.

        So one pass takes as many of them as fit, and their passes are the same each time. Adapters that read a text
        alike share its tokens. The queue needs room for the first request only. Other threads are not kept waiting.
        """
        before, group = getattr(self._submitting, "group", None), Group()
        self._submitting.group = group
        try:
            yield
        finally:
            self._submitting.group = before
            with self._wake:
                group.closed = True
                for request in group.ready:
                    self._schedule(request)

    def classify(
        self,
        texts: Sequence[str],
        adapter: str,
        *,
        coverage: float | None = None,
        priority: int = 0,
        deadline: float | None = None,
    ) -> list[Answer]:
        """`{"label", "probabilities", "prompt_tokens"}` for each text, in order; with a coverage also `label_set`."""
        options = None if coverage is None else SamplingParams(coverage=coverage)
        return self.answers(self._asks("classify", texts, adapter, options), priority=priority, deadline=deadline)

    def generate(
        self,
        texts: Sequence[str],
        adapter: str | None = None,
        options: SamplingParams | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> list[Answer]:
        """`{"text", "finish_reason", "tokens", "prompt_tokens"}` for each text, in order. Raises as `submit` does."""
        return self.answers(self._asks("generate", texts, adapter, options), priority=priority, deadline=deadline)

    def _asks(self, kind: Kind, texts: Sequence[str], adapter: str | None, options: SamplingParams | None) -> list[Ask]:
        """One request for each text. Raises DataError for one string, or for too few or too many texts."""
        most = self.limits.max_inputs
        if isinstance(texts, str) or not texts or len(texts) > most:
            given = "one text" if isinstance(texts, str) else f"{len(texts)} texts"
            raise DataError(f"expected a list of 1 to {most} texts (limit max_inputs), given {given}")
        return [Ask(kind, text, adapter, options or SamplingParams()) for text in texts]

    def answers(
        self, asks: Sequence[Ask], *, priority: int = 0, deadline: float | None = None, tenant: str = ""
    ) -> list[Answer]:
        """The answers to several requests, in order. The first error is raised, and cancels the other requests.

        They are submitted `together`. Raises as `submit` does, and what a request failed with.
        """
        tickets, found = self.submit_all(asks, priority=priority, deadline=deadline, tenant=tenant), list[Answer]()
        try:
            for ticket in tickets:
                found.append(ticket.result())
                between_passes()
            return found
        finally:
            for ticket in tickets:
                ticket.cancel()

    def submit_all(
        self, asks: Sequence[Ask], *, priority: int = 0, deadline: float | None = None, tenant: str = ""
    ) -> list[Ticket]:
        """The tickets of several requests, submitted `together`. One that is refused cancels those before it."""
        tickets = list[Ticket]()
        try:
            with self.together():
                for ask in asks:
                    own = self.submit(
                        ask.kind,
                        ask.text,
                        ask.adapter,
                        ask.options,
                        priority=priority,
                        deadline=deadline,
                        tenant=tenant,
                    )
                    tickets.append(own)
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return tickets

    def compile(self, constraint: Constraint) -> None:
        """Compile a constraint, so that a request with it is submitted at once. May take seconds. Raises DataError."""
        self._prompts.constraints.compile_matcher(constraint)

    def is_compiled(self, constraint: Constraint) -> bool:
        """Whether a request with this constraint is submitted at once."""
        return self._prompts.constraints.is_compiled(constraint)

    # --- trainings ----------------------------------------------------------------------------------------------------

    def run(self, work: Callable[[], T], tenant: str = "") -> T:
        """Run a part of a training in the engine's thread, between passes of answers. Returns its result.

        While answers wait, trainings get `Limits.train_percent` of the time, and an answer waits for one pass of a
        training if the part calls `between_passes` after each.

        Args:
            work: About one optimiser step, on a model of its own (`bases.base.share`).
            tenant: Whose training it is. Tenants take turns by seconds.

        Raises:
            Draining: The engine is being stopped.
        """
        if threading.current_thread() is self._thread:
            return work()
        return self._trainings.run(work, tenant, self._wake, lambda: self._draining)

    def hold(self, name: str, number: int, adapter: Adapter) -> Named:
        """Let requests name an adapter that is in no store, until `let_go`."""
        size = sum(each.nbytes for each in (*adapter.tensors.values(), *adapter.head.values()))
        named = Named(name, number, f"memory:{uuid.uuid4().hex}", size)
        self._source.adapters[named.digest] = adapter
        return named

    def let_go(self, named: Named) -> None:
        """Forget an adapter of `hold` as soon as no request needs it."""
        with self._wake:
            self._retired.add(named)
            self._forget_retired()

    def _forget_retired(self) -> None:
        """Called with the lock."""
        for named in self._retired - {each.named for each in self._open if each.named is not None}:
            with suppress(NotFound):
                self._loader.unload(self._loader.entry(named))
            self._retired.discard(named)
            self._source.adapters.pop(named.digest, None)

    # --- adapters -----------------------------------------------------------------------------------------------------

    def warm(self, reference: str | Named, *, pin: bool = False) -> Named:
        """Load a version and wait until it is mounted. `pin` keeps it in memory until `unpin`.

        Raises:
            NotFound: The reference names no version.
            Draining: The engine loads no more adapters.
            AdapterError: The adapter does not fit this base.
            NoRoom: It is larger than the limit of memory, or tenants have pinned too much.
        """
        named = self._source.resolve(reference)
        warm = Warm(named, self._clock(), pin)
        with self._wake:
            if self._draining:
                raise Draining("the engine loads no adapters: it is being stopped; ask another one")
            loaded = self._loader.need(warm)
            if loaded is not None:
                self._end_warm(warm)
        warm.done.result()
        return named

    def warm_ahead(self, reference: str) -> bool:
        """As `warm`, for a version that nobody asks yet. False, and nothing is loaded, if it would evict another."""
        named = self._source.resolve(reference)
        with self._wake:
            if self._slots.find(named.key) is None and not self._slots.has_room(named.bytes):
                return False
        self.warm(named)
        return True

    def unpin(self, reference: str) -> Named:
        """Let a version be evicted again. Raises NotFound if it is not loaded."""
        named = self._source.resolve(reference)
        with self._wake:
            self._loader.entry(named).pinned = False
            self._wake.notify_all()
        return named

    def unload(self, reference: str) -> Named:
        """Remove a version from memory, pinned or not.

        Raises:
            NotFound: It is not loaded.
            InUse: Requests need it.
        """
        named = self._source.resolve(reference)
        with self._wake:
            entry = self._loader.entry(named)
            if entry.holds:
                raise InUse(f"{named} is needed by {entry.holds} requests: wait for them, or cancel them")
            self._loader.unload(entry)
        return named

    def loaded(self) -> list[LoadedAdapter]:
        """The adapters in memory, most recently used first."""
        with self._wake:
            return self._loader.loaded_adapters()

    def stats(self) -> Stats:
        """A snapshot of the queue, the running rows, the adapters in memory and the totals."""
        with self._wake:
            return Stats(
                waiting=len(self._waiting),
                waiting_tokens=self._waiting_tokens.total(),
                running=self._scheduler.rows,
                cache_tokens=self._scheduler.held_tokens,
                passes=self._counters.passes,
                prompt_tokens=self._counters.prompt_tokens,
                tokens=self._counters.tokens,
                answers=self._counters.answers,
                errors=self._counters.errors,
                loads=self._loader.loads,
                failed_loads=self._loader.failed_loads,
                evictions=self._slots.evictions,
                adapters=len(self._slots),
                adapter_bytes=self._slots.bytes,
                versions=self._counters.versions(),
                queue_seconds=self._counters.queue.now(),
                first_token_seconds=self._counters.first_token.now(),
                between_tokens_seconds=self._counters.between_tokens.now(),
                most_adapters=self.limits.slots,
                most_cache_tokens=self.limits.cache_tokens,
                waiting_adapters=sorted({each.named.of_tenant for each in self._waiting if each.named is not None}),
            )

    # --- the end ------------------------------------------------------------------------------------------------------

    def drain(self, timeout: float) -> bool:
        """Take no new requests and wait for the others. Returns whether all ended within `timeout` seconds."""
        end = time.monotonic() + timeout
        with self._wake:
            self._draining = True
            while self._open:
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self._wake.wait(min(left, 0.2))
        return True

    def close(self) -> None:
        """End all open tickets with Draining, stop the thread, and remove the hooks from the base."""
        with self._wake:
            already = self._closing
            self._draining = self._closing = True
            self._wake.notify_all()
        if threading.current_thread() is self._thread:
            raise EngineError("the engine cannot be closed from one of its own listeners: close it from another thread")
        self._thread.join()
        if not already:
            self._loader.close()
            self._runner.close()
            self._prompts.constraints.close()

    # --- requests coming in -------------------------------------------------------------------------------------------

    def _check_queue(self, request: Request) -> None:
        admitted = request.group is not None and request.group.admitted
        if self._waiting and not admitted:
            self._counters.admit(request, self._waiting_tokens, self.limits)
        if request.group is not None:
            request.group.admitted = True

    def _admit(self, request: Request) -> None:
        self._open.add(request)
        self._waiting.add(request)
        self._count(request, request.tokens)
        self._counters.count_request(request)
        if request.deadline is not None:
            self._wake.notify_all()  # the thread may sleep longer than that

    def _count(self, request: Request, tokens: int) -> None:
        """Count a waiting request with so many tokens. Called with the lock."""
        self._waiting_tokens[request.tenant] += tokens - request.counted
        request.counted = tokens
        if not self._waiting_tokens[request.tenant]:
            del self._waiting_tokens[request.tenant]

    def _encode(self, need: Need, loaded: AdapterTensors | None) -> None:
        """Encode a request, or set its error. Runs on the caller's, the loader's or the engine's thread."""
        if not isinstance(need, Request) or need.ready or need.error is not None:
            return
        try:
            self._prompts.prepare(need, loaded)
        except TurretError as error:
            need.error = error
        except Exception as error:  # an error of the tokenizer fails this request only
            need.error = DataError(f"the text cannot be encoded ({type(error).__name__}: {error}): give another one")
        with self._wake:
            if need in self._waiting:
                self._count(need, need.tokens)
            need.ready = need.error is None

    def _schedule(self, request: Request) -> None:
        """Give a request to the scheduler, unless it has ended or its group is not complete. Called with the lock."""
        if request.group is not None and not request.group.closed:
            request.group.ready.append(request)
        elif request in self._waiting:
            self._scheduler.add(request)
            self._cancelled = self._cancelled or request.cancelled
            self._wake.notify_all()

    def _cancel(self, request: Request) -> None:
        with self._wake:
            request.cancelled = True
            self._cancelled = True
            self._wake.notify_all()

    def _end_warm(self, warm: Warm) -> None:
        """End a call of `warm`: its adapter is mounted. Called with the lock."""
        entry = warm.entry
        assert entry is not None
        problem: NoRoom | None = None
        if warm.pin:
            try:
                self._slots.pin(entry)
            except NoRoom as error:
                problem = error
        self._loader.release(warm)
        if problem is None:
            warm.done.set_result(entry)
        else:
            warm.done.set_exception(problem)

    # --- the thread ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    @process.keep_freed()
    def _loop(self) -> None:
        reason: TurretError = Draining("the engine was closed before it answered: ask another one")
        use_device(self._runner.device)
        try:
            while self._wait():
                self._answer()
                self._train()
        except BaseException as error:  # a bug: no ticket may wait forever
            log_failure("the engine's thread failed", error)
            reason = EngineError(one_line(f"the engine failed ({type(error).__name__}: {error}): start it again"))
        with self._wake:
            self._draining = True
            requests, needs = list(self._open), self._loader.abandon()
            self._trainings.abandon()
        for request in requests:
            self._end(request, Failed(reason))
        for need in needs:
            if isinstance(need, Warm):
                need.done.set_exception(reason)
        self._passes.abandon()

    def _wait(self) -> bool:
        """Wait for work. Returns False at the end."""
        with self._wake:
            while not (self._closing or self._has_work() or self._trainings.waiting):
                self._wake.wait(self._until_deadline())
            return not self._closing

    def _answer(self) -> None:
        """Run one pass of answers, if there is something to answer."""
        with self._wake:
            if not self._has_work():
                return
            ready, failed = self._loader.between_passes()
            for need, _ in ready:
                if isinstance(need, Warm):
                    self._end_warm(need)
            overdue = self._overdue()
        self._schedule_loaded(ready, failed, overdue)
        with self._wake:
            begin = self._scheduler.next()
            for request in begin:
                self._waiting.discard(request)
                self._count(request, 0)
        if begin or self._passes.generating:
            started = time.monotonic()
            self._passes.run(begin)
            with self._wake:
                self._trainings.credit_answers(time.monotonic() - started)

    def _train(self) -> None:
        """Run a part of a training, if it is due."""
        with self._wake:
            taken = None if self._closing else self._trainings.take(answers_wait=self._answers_wait())
        if taken is None:
            return
        tenant, part = taken
        trained, began = 0.0, time.monotonic()

        def pause() -> None:
            nonlocal trained, began
            seconds = time.monotonic() - began
            trained += seconds
            with self._wake:
                self._trainings.charge_training(seconds)
            while self._answers_first():
                with torch.inference_mode():
                    self._answer()
            began = time.monotonic()

        with torch.inference_mode(False), torch.enable_grad():
            part.run(pause)
        trained += (seconds := time.monotonic() - began)
        with self._wake:
            self._trainings.charge_training(seconds)
            self._trainings.end_part(tenant, trained)

    def _answers_wait(self) -> bool:
        """Whether there is something to answer now. Called with the lock."""
        return bool(self._passes.generating or len(self._scheduler) or self._loader.pending)

    def _answers_first(self) -> bool:
        with self._wake:
            return not self._closing and self._trainings.owes and self._answers_wait()

    def _has_work(self) -> bool:
        return self._answers_wait() or self._cancelled or self._soonest() <= self._clock()

    def _soonest(self) -> float:
        return min((each.deadline for each in self._open if each.deadline is not None), default=math.inf)

    def _until_deadline(self) -> float | None:
        return None if (soonest := self._soonest()) == math.inf else max(0.0, soonest - self._clock())

    def _overdue(self) -> dict[Request, EngineError]:
        """Requests that were cancelled or are late. Called with the lock."""
        if not self._cancelled and self._soonest() > self._clock():
            return {}
        self._cancelled = False
        now = self._clock()
        overdue: dict[Request, EngineError] = {
            each: error for each in self._open if (error := each.end_of_time(now)) is not None
        }
        self._scheduler.remove(overdue)
        return overdue

    def _schedule_loaded(
        self,
        ready: Sequence[tuple[Need, AdapterTensors]],
        failed: Sequence[tuple[Need, TurretError]],
        overdue: Mapping[Request, EngineError],
    ) -> None:
        """Schedule requests whose adapter is ready; end those that failed or are overdue. Called without the lock."""
        self._passes.drop(overdue)
        for request, error in overdue.items():
            self._end(request, Failed(error))
        for need, reason in failed:
            if isinstance(need, Request):
                self._end(need, Failed(reason))
            else:
                need.done.set_exception(reason)
        for need, loaded in ready:
            if isinstance(need, Request) and need not in overdue:
                self._encode(need, loaded)
                if need.error is not None:
                    self._end(need, Failed(need.error))
                else:
                    with self._wake:
                        self._schedule(need)

    def _end(self, request: Request, end: Done | Failed, tokens: int = 0) -> None:
        with self._wake:
            if request not in self._open:
                return
            self._open.discard(request)
            if request in self._waiting:
                self._waiting.discard(request)
                self._count(request, 0)
                self._scheduler.remove([request])
            if request.named is not None:
                self._loader.release(request)
                if self._retired:
                    self._forget_retired()
            self._counters.count_end(request, isinstance(end, Done), tokens)
            self._wake.notify_all()
        request.ticket.end(end)

    def _free_request(self, request: Request) -> None:
        with self._wake:
            self._scheduler.free_request(request)

    def _count_pass(self, begin: Sequence[Request], steps: int, seconds: float) -> None:
        with self._wake:
            self._counters.count_pass(begin, steps, seconds, bool(self._waiting))

    def _count_tokens(self, tokens: int, seconds: float) -> None:
        """Count further tokens of one row, with so many seconds between two of them."""
        with self._wake:
            self._counters.count_tokens(tokens, seconds)
