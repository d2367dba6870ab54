"""From the text of a request to token ids, complete settings, and the KV cache it needs; and from tokens to text."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from functools import cached_property

from turret.bases import Base
from turret.data import Input, Prompt
from turret.engine.adapter_tensors import AdapterTensors
from turret.engine.cache import capacity
from turret.engine.decode import base_settings, resolved
from turret.engine.request import Kind, Limits, Named, Options, Receipt, Request, Ticket
from turret.engine.runner import Runner
from turret.errors import AdapterError, DataError, NoRoom
from turret.tasks import has_head, writes
from turret.tasks.calibration import require
from turret.tasks.chat_template import base_prompt
from turret.tasks.tokens import Tokens

CONTEXT_TOKENS = 4  # earlier tokens that decide how a token is written
CHARACTERS_PER_TOKEN = 3  # an estimate, used until the adapter is loaded and its template encodes the text


class Prompts:
    """Encodes and decodes for one base. A lock guards the tokenizer, which is not thread-safe."""

    def __init__(self, base: Base, runner: Runner, limits: Limits) -> None:
        self._base, self._runner, self._limits = base, runner, limits
        self._settings = base_settings(base.model, base.tokenizer)
        self._vocabulary = int(base.model.get_input_embeddings().weight.shape[0])
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self.can_generate = base.model.get_output_embeddings() is not None and base.family.generates
        self.is_encoder_decoder = base.family.is_encoder_decoder

    def request(
        self,
        kind: Kind,
        text: Input | Sequence[int],
        named: Named | None,
        options: Options,
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
        written = text if isinstance(text, (str, Prompt)) else None
        ids = None if isinstance(text, (str, Prompt)) else self.check_ids(text)
        receipt = Receipt(
            id=f"{next(self._numbers):x}",
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
        if len(checked) > self._limits.max_tokens:
            raise self._too_long(len(checked))
        return checked

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
                request.ids = self._encoded(request.text, None if request.embeds else loaded)
        length, shift = len(request.ids), 0 if loaded is None else loaded.prefix_length
        most = self._most(shift)
        if length > most:
            raise self._too_long(length, most)
        request.tokens = length
        if not request.generates:
            return
        task = None if loaded is None else loaded.task
        assert task is None or writes(task)
        # the positions of an encoder-decoder's answer start at 0
        room = most if self.is_encoder_decoder else most - length
        request.settings = resolved(
            request.options,
            self._settings,
            task,
            room=min(room, self._limits.max_tokens - length),
            vocabulary=self._vocabulary,
        )
        needs = self._runner.needs(length, request.settings.max_tokens, shift)
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

    def _encoded(self, text: Input, loaded: AdapterTensors | None) -> list[int]:
        if isinstance(text, Prompt):
            return self._conversation(text, loaded)
        if loaded is not None:
            return [int(token) for token in loaded.task.encode_sources([text])[0].ids.tolist()]
        tokens = self._tokens
        ids = [*tokens.before, *tokens.plain([text], most=self._limits.max_tokens)[0], *tokens.after]
        if not ids:
            raise DataError("the text has no tokens: give at least one character")
        return ids

    def _conversation(self, prompt: Prompt, loaded: AdapterTensors | None) -> list[int]:
        if loaded is None:
            return base_prompt(self._base.tokenizer, prompt)
        if not writes(loaded.task):
            raise DataError("a conversation is asked of an adapter that generates: give this one a text")
        return [int(token) for token in loaded.task.encode_chats([prompt])[0].ids.tolist()]

    def _check_kind(self, request: Request, loaded: AdapterTensors | None) -> None:
        if request.generates and not self.can_generate:
            raise AdapterError(
                f"base {self._base.id} was loaded as a classifier and cannot generate: ask it to classify, or use an "
                "engine whose base generates"
            )
        if loaded is None or request.embeds:  # any adapter changes the hidden states
            return
        kind = loaded.task.request
        if kind != request.kind:
            verbs = {"classify": "classifies", "generate": "generates"}
            raise AdapterError(f"{request.named} {verbs[kind]} and was asked to {request.kind}: ask it to {kind}")

    def _check_dimensions(self, request: Request) -> None:
        asked = request.options.embedding.dimensions if request.options.embedding is not None else None
        size = int(self._base.model.config.hidden_size)
        if asked is not None and asked > size:
            raise DataError(f"dimensions = {asked}: a vector of this base has {size} numbers, ask for no more")

    def _most(self, shift: int) -> int:
        """The most tokens of a row: prompt and answer. shift: tokens of its prefix."""
        family, most = self._base.family, self._limits.max_tokens
        end = family.position_limit(self._base.model.config)
        if family.positions != "table" or end is None:
            return most
        return min(most, end - shift if family.generates else end)

    def _too_long(self, length: int, most: int | None = None) -> DataError:
        most = self._limits.max_tokens if most is None else most
        return DataError(f"the text has {length} tokens or more and this engine takes at most {most} here: shorten it")


def _check_coverage(request: Request, coverage: float, loaded: AdapterTensors | None) -> None:
    """Raise AdapterError for an adapter without a calibration, DataError if that is too small for this coverage."""
    task = None if loaded is None else loaded.task
    if task is None or not has_head(task) or not task.calibrates:
        raise AdapterError(f"{request.named or 'the base'} gives no probability of labels: ask it without coverage")
    require(task.calibration, str(request.named)).threshold(coverage)
