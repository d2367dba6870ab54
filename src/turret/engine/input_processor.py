"""From the text of a request to token ids, complete settings, and the KV cache it needs; and from tokens to text."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from functools import cached_property

from turret.bases.base import Base
from turret.data import Input, Prompt, TextPair
from turret.engine.adapter_pool import AdapterTensors
from turret.engine.cache import capacity
from turret.engine.request import MAX_TOKENS, Kind, Limits, Named, Receipt, Request, Row, Ticket
from turret.engine.sampler import base_settings, resolve_settings
from turret.engine.sampling_params import SamplingParams
from turret.engine.sequence import CONTEXT_TOKENS
from turret.engine.structured_output import Constraints
from turret.errors import AdapterError, ContextLengthExceeded, DataError, NoRoom
from turret.tasks.calibration import require_calibration
from turret.tasks.chat_template import base_prompt
from turret.tasks.task import Task
from turret.tasks.tokens import Tokens

CHARACTERS_PER_TOKEN = 3  # an estimate, used until the adapter is loaded and its template encodes the text


class Prompts:
    """Encodes and decodes for one base. A lock guards the tokenizer, which is not thread-safe."""

    def __init__(self, base: Base, needs: Callable[[int, int, int], dict[str, int]], limits: Limits) -> None:
        """needs: as `Runner.needs`."""
        self._base, self._needs, self._limits = base, needs, limits
        self._settings = base_settings(base.model, base.tokenizer)
        self._vocabulary = int(base.model.get_input_embeddings().weight.shape[0])
        self.constraints = Constraints(base.tokenizer, self._vocabulary, self._settings.eos)
        self._lock = threading.Lock()
        self.can_generate = base.model.get_output_embeddings() is not None and base.family.causal
        self.is_encoder_decoder = base.family.is_encoder_decoder
        self._last_position = base.family.last_position(base.model.config)

    def request(
        self,
        kind: Kind,
        text: Input | Row,
        named: Named | None,
        options: SamplingParams,
        priority: int,
        now: float,
        deadline: float | None,
        cancel: Callable[[Request], None],
    ) -> Request:
        """A new request with its ticket; see `Engine.submit`.

        Args:
            named: The version that answers; None for the bare base.
            now, deadline: Seconds of the engine's clock.
            cancel: Called when the ticket is cancelled.

        Raises:
            DataError: The kind or the token ids are not valid.
            AdapterError: The bare base cannot classify.
        """
        if kind not in ("classify", "generate", "embed"):
            raise DataError(f"kind {kind!r}: expected classify, generate or embed")
        if kind == "classify" and named is None:
            raise AdapterError("the bare base has no head to classify with: name an adapter")
        written, ids, segments = None, None, None
        if isinstance(text, (str, TextPair, Prompt)):
            written = text
        else:
            ids, segments = self.check_row(text)
        if ids is not None and (kind != "generate" or options.truncate_prompt_tokens is None):
            self._check_length(len(ids), self._limits.max_tokens)
        matcher = None if options.constraint is None else self.constraints.compile_matcher(options.constraint)
        receipt = Receipt(
            id=secrets.token_hex(8),  # a number would tell how many requests others have
            name=named.name if named else None,
            number=named.number if named else 0,
            digest=named.digest if named else None,
            base=self._base.fingerprint,
        )
        request = Request(
            kind=kind,
            ticket=Ticket(receipt, lambda: cancel(request)),
            named=named,
            text=written,
            options=options,
            tokens=len(ids or ()) if written is None else self.estimate(str(written)),
            arrived=now,
            priority=priority,
            deadline=deadline,
            ids=ids,
            segments=segments,
            matcher=matcher,
        )
        return request

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its answer together, without a prefix."""
        return self._most(0)

    @cached_property
    def _tokens(self) -> Tokens:
        return Tokens(self._base.tokenizer)

    def estimate(self, text: str) -> int:
        """An estimate of a text's tokens, before it is encoded."""
        return max(1, min(self._limits.max_tokens, len(text) // CHARACTERS_PER_TOKEN))

    def check_ids(self, ids: Sequence[int]) -> list[int]:
        """The token ids of a prompt that was submitted as ids. Raises DataError."""
        checked = [int(token) for token in ids]
        if not checked or not all(0 <= token < self._vocabulary for token in checked):
            raise DataError(f"a prompt of token ids needs one or more integers from 0 to {self._vocabulary - 1}")
        return checked

    def check_row(self, row: Row) -> tuple[list[int], list[int] | None]:
        """The token ids of a row and its segments, if it has any. Raises DataError."""
        pairs = [each for each in row if not isinstance(each, int)]
        if not pairs:
            return self.check_ids([each for each in row if isinstance(each, int)]), None
        if len(pairs) < len(row) or not all(len(pair) == 2 and all(isinstance(n, int) for n in pair) for pair in pairs):
            raise DataError("a row is token ids, or pairs of an id and its segment: give two texts as TextPair(a, b)")
        ids, segments = map(list, zip(*pairs, strict=True))
        return self.check_ids(ids), segments

    def prepare(self, request: Request, loaded: AdapterTensors | None) -> None:
        """Encode the request for its adapter, complete its settings, and count the rows and KV cache it needs.

        Raises:
            TurretError: The error that the request ends with.
        """
        self._check_kind(request, loaded)
        self._check_dimensions(request)
        if request.options.coverage is not None:
            _check_coverage(request, request.options.coverage, loaded)
        if request.ids is None:
            assert request.text is not None
            with self._lock:
                if request.embeds and isinstance(request.text, TextPair):
                    raise DataError("a vector is that of one text, and two were given: ask for each text")
                own = loaded if loaded is not None and loaded.task.request == request.kind else None
                rows = None if own is None else self._windows(request.text, own.task)
                if rows is not None:
                    request.windows, request.ids = rows, rows[0][0]
                else:
                    request.ids, request.segments, request.ticket.cut = self._encode_shared(request, request.text, own)
        elif request.options.read is not None:
            request.windows = [(request.ids, request.options.read)]
        shift = 0 if loaded is None else loaded.prefix_length
        most = self._most(shift)
        self._truncate(request, most)
        length = len(request.ids)
        self._check_length(length, most)
        request.tokens = sum(len(ids) for ids, _ in request.windows) or length
        self._check_length(request.tokens, self._limits.max_tokens)
        if request.options.scored is not None:
            self._check_scored(request, request.options.scored, most)
            return
        if not request.rows:
            return
        task = None if loaded is None else loaded.task
        # the positions of an encoder-decoder's answer start at 0
        room = most if self.is_encoder_decoder else most - length
        request.settings = resolve_settings(
            request.options,
            self._settings,
            task,
            room=min(room, self._limits.max_tokens - length),
            vocabulary=self._vocabulary,
        )
        if self.is_encoder_decoder and request.options.echo:
            raise DataError("echo needs a decoder, which continues its prompt: leave it out")
        needs = self._needs(length, max(1, request.settings.max_tokens), shift)
        request.rows = request.settings.num_beams
        request.cache_tokens = request.rows * sum(map(capacity, needs.values()))
        if request.rows > self._limits.running:
            raise NoRoom(f"num_beams = {request.rows}: the limit of running rows is {self._limits.running}")
        if request.cache_tokens > self._limits.cache_tokens:
            raise NoRoom(
                f"the request needs {request.cache_tokens} tokens of the key-value cache and the limit of cache_tokens "
                f"is {self._limits.cache_tokens}: shorten it, ask for less, or raise the limit"
            )

    def before(self, request: Request) -> Sequence[int]:
        """The tokens before the answer that penalties count too."""
        assert request.ids is not None
        return [int(self._base.model.config.decoder_start_token_id)] if self.is_encoder_decoder else request.ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, not stripped."""
        with self._lock:
            return str(self._base.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def token_texts(self, before: Sequence[int], tokens: Sequence[int]) -> list[str]:
        """The text of each token after the tokens `before`, with its leading space."""
        near, decode = list(before[-CONTEXT_TOKENS:]), self._base.tokenizer.decode
        with self._lock:
            start = str(decode(near)) if near else ""
            wholes = [str(decode([*near, token])) for token in tokens]
            return [
                whole[len(start) :] if whole.startswith(start) else str(decode([token]))
                for whole, token in zip(wholes, tokens, strict=True)
            ]

    def _encode_shared(
        self, request: Request, text: Input, loaded: AdapterTensors | None
    ) -> tuple[list[int], list[int] | None, bool]:
        """Ids, segments, and whether the text was cut; as encoded for another of its group that reads it alike."""
        known = None if request.group is None else request.group.encoded
        alike = None if loaded is None else loaded.task.reads_like
        key = (text, alike, request.options.cut)
        if known is not None and alike is not None and key in known:
            return known[key]
        row, cut = self._encode_prompt(text, loaded, request.options)
        found = (*self.check_row(row), cut)
        if known is not None and alike is not None:
            known[key] = found
        return found

    def _encode_prompt(self, text: Input, loaded: AdapterTensors | None, options: SamplingParams) -> tuple[Row, bool]:
        """(row, whether the adapter's task cut the text). Raises ContextLengthExceeded if that is not wanted."""
        if loaded is not None:
            encoded = loaded.task.encode_sources([text])[0]
            if encoded.cut and not options.cut:
                raise ContextLengthExceeded(
                    f"the prompt has more tokens than the {len(encoded.ids)} that this adapter reads: shorten it, or "
                    "send truncate_prompt_tokens to have it cut"
                )
            return encoded.ids.tolist(), encoded.cut
        if isinstance(text, Prompt):
            return base_prompt(self._base.tokenizer, text), False
        if isinstance(text, TextPair):
            raise DataError("two texts are asked of an adapter that reads pairs, and none was named: give one text")
        tokens = self._tokens
        limit = None if options.truncate_prompt_tokens is not None else self._limits.max_tokens
        ids = [*tokens.before, *tokens.plain([text], most=limit)[0], *tokens.after]
        if not ids:
            raise DataError("the text has no tokens: give at least one character")
        return ids, False

    @staticmethod
    def _windows(text: Input, task: Task) -> list[tuple[list[int], list[int]]] | None:
        """The `Window`s of a text, of a task whose head reads tokens; None of any other."""
        if not task.reads_tokens:
            return None
        return [(each.ids.tolist(), each.read.tolist()) for each in task.windows([text])[0] if each.read is not None]

    def _truncate(self, request: Request, most: int) -> None:
        """Keep the last tokens of a prompt, as many as the request allows. An adapter has cut a text itself."""
        wanted, ids = request.options.truncate_prompt_tokens, request.ids
        assert ids is not None
        if wanted is None or not request.rows:
            return
        answer = MAX_TOKENS if request.options.max_tokens is None else request.options.max_tokens
        keep = most if self.is_encoder_decoder else max(1, most - max(1, answer))
        keep = keep if wanted == -1 else wanted
        if len(ids) <= keep:
            return
        if request.named is not None and request.text is not None:
            raise ContextLengthExceeded(
                f"truncate_prompt_tokens = {wanted}: the prompt in the adapter's template has {len(ids)} tokens; allow "
                "as many, or shorten the prompt"
            )
        request.ids, request.ticket.cut = ids[len(ids) - keep :], True

    def _check_scored(self, request: Request, answers: Sequence[Sequence[int]], most: int) -> None:
        """Count the tokens of answers to score. Raises DataError for what cannot be scored."""
        if self.is_encoder_decoder:
            raise DataError("scored needs a decoder, which continues its prompt: leave it out")
        if request.text is not None:
            raise DataError("scored needs a prompt of token ids: give the ids, not the text")
        lengths = [len(self.check_ids(answer)) for answer in answers]
        self._check_length(request.tokens + max(lengths), most)
        self._check_length(sum(lengths), self._limits.max_tokens)
        request.tokens += sum(lengths)

    def _check_kind(self, request: Request, loaded: AdapterTensors | None) -> None:
        if request.kind == "generate" and not self.can_generate:
            who = f"base {self._base.id} was loaded as" if request.named is None else f"{request.named} is"
            raise AdapterError(
                f"{who} a classifier and cannot generate: ask it to classify (POST /v1/classify), or ask a base that "
                "generates"
            )
        if loaded is None or request.embeds:  # any adapter changes the hidden states
            return
        kind = loaded.task.request
        if kind != request.kind:
            verbs = {"classify": "classifies", "generate": "generates", "embed": "embeds"}
            raise AdapterError(f"{request.named} {verbs[kind]} and was asked to {request.kind}: ask it to {kind}")

    def _check_dimensions(self, request: Request) -> None:
        asked = request.options.embedding.dimensions if request.options.embedding is not None else None
        size = int(self._base.model.config.hidden_size)
        if asked is not None and asked > size:
            raise DataError(f"dimensions = {asked}: a vector of this base has {size} numbers, ask for no more")

    def _most(self, shift: int) -> int:
        """The most tokens of a row: prompt and answer. shift: tokens of its prefix."""
        family, most = self._base.family, self._limits.max_tokens
        end = self._last_position
        if end is None:
            return most
        return min(most, end - shift if family.causal else end)

    def _check_length(self, length: int, most: int) -> None:
        if length > most:
            raise ContextLengthExceeded(
                f"the text has {length} tokens or more and this engine takes at most {most} here: shorten it"
            )


def _check_coverage(request: Request, coverage: float, loaded: AdapterTensors | None) -> None:
    """Raise AdapterError for an adapter without a calibration, DataError if that is too small for this coverage."""
    task = None if loaded is None else loaded.task
    if task is None or not task.ranks_labels:
        raise AdapterError(f"{request.named or 'the base'} gives no probability of labels: ask it without coverage")
    require_calibration(task.calibration, str(request.named)).threshold(coverage)
