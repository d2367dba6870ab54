"""From a request's text to what a pass takes: token ids, settings with nothing left open, and the room they need.

Knows tokenizers, tasks and limits. Refuses to know queues, threads (but for one lock: a tokenizer is not safe to share)
and how a pass is run.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property

from turret.bases import Base
from turret.engine.adapter_tensors import AdapterTensors
from turret.engine.cache import capacity
from turret.engine.decode import habits, resolved
from turret.engine.request import Limits, Request
from turret.engine.runner import Runner
from turret.errors import AdapterError, DataError, NoRoom
from turret.tasks.tokens import Tokens

BEHIND = 4  # tokens that decide how the next one is written
CHARACTERS_A_TOKEN = 3  # a guess, until a text's adapter is there to encode it


class Prompts:
    """What one base makes of texts."""

    def __init__(self, base: Base, runner: Runner, limits: Limits) -> None:
        self._base, self._runner, self._limits = base, runner, limits
        self._habits = habits(base.model, base.tokenizer)
        self._vocabulary = int(base.model.get_input_embeddings().weight.shape[0])
        self._lock = threading.Lock()
        self.can_generate = base.model.get_output_embeddings() is not None and base.family.generates
        self.crossing = base.family.is_encoder_decoder

    @cached_property
    def _tokens(self) -> Tokens:
        return Tokens(self._base.tokenizer)

    def guess(self, text: str) -> int:
        """How many tokens a text may have, before it is encoded."""
        return max(1, min(self._limits.max_tokens, len(text) // CHARACTERS_A_TOKEN))

    def check_ids(self, ids: Sequence[int]) -> list[int]:
        """Token ids as they were given. Raises DataError."""
        checked = [int(token) for token in ids]
        if not checked or not all(0 <= token < self._vocabulary for token in checked):
            raise DataError(f"a prompt of token ids holds one or more of 0 to {self._vocabulary - 1}")
        if len(checked) > self._limits.max_tokens:
            raise self._too_long(len(checked))
        return checked

    def prepare(self, request: Request, loaded: AdapterTensors | None) -> None:
        """Encode the request for its adapter and count what it needs. Raises what its ticket ends with."""
        self._check_kind(request, loaded)
        if request.ids is None:
            assert request.text is not None
            with self._lock:
                request.ids = self._encoded(request.text, loaded)
        length, shift = len(request.ids), 0 if loaded is None else loaded.length
        most = self._most(shift)
        if length > most:
            raise self._too_long(length, most)
        request.tokens = length
        if request.kind == "classify":
            return
        # an encoder-decoder counts its answer from the beginning
        room = most if self.crossing else most - length
        request.settings = resolved(
            request.options,
            self._habits,
            None if loaded is None else loaded.task,
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
        """The tokens in front of an answer that penalties count with it."""
        assert request.ids is not None
        return [int(self._base.model.config.decoder_start_token_id)] if self.crossing else request.ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, blanks around it included."""
        with self._lock:
            return str(self._base.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def words(self, before: Sequence[int], tokens: Sequence[int]) -> list[str]:
        """Each token as it stands behind `before`, its blank included; one that has no text of its own by its name."""
        near, decode = list(before[-BEHIND:]), self._base.tokenizer.decode
        with self._lock:
            start = str(decode(near)) if near else ""
            wholes = [str(decode([*near, token])) for token in tokens]
            return [
                whole[len(start) :] if whole.startswith(start) else str(decode([token]))
                for whole, token in zip(wholes, tokens, strict=True)
            ]

    def _encoded(self, text: str, loaded: AdapterTensors | None) -> list[int]:
        if loaded is not None:
            return [int(token) for token in loaded.task.encode_sources([text])[0].ids.tolist()]
        tokens = self._tokens
        ids = [*tokens.before, *tokens.plain([text], most=self._limits.max_tokens)[0], *tokens.after]
        if not ids:
            raise DataError("the text has no tokens: give at least one character")
        return ids

    def _check_kind(self, request: Request, loaded: AdapterTensors | None) -> None:
        if request.kind == "generate" and not self.can_generate:
            raise AdapterError(
                f"base {self._base.id} was loaded as a classifier and cannot generate: ask it to classify, or ask an "
                "engine on a base that generates"
            )
        if loaded is None:
            return
        does = loaded.task.request
        if does != request.kind:
            verbs = {"classify": "classifies", "generate": "generates"}
            raise AdapterError(f"{request.named} {verbs[does]} and was asked to {request.kind}: ask it to {does}")

    def _most(self, shift: int) -> int:
        """Tokens that a row may come to."""
        family, most = self._base.family, self._limits.max_tokens
        end = family.position_limit(self._base.model.config)
        if family.positions != "table" or end is None:
            return most
        return min(most, end - shift if family.generates else end)

    def _too_long(self, length: int, most: int | None = None) -> DataError:
        most = self._limits.max_tokens if most is None else most
        return DataError(f"the text has {length} tokens or more and this engine takes at most {most} here: shorten it")
