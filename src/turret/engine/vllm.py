"""A vLLM server that computes the answers of an engine, by HTTP.

Versions, queue, turns of tenants and texts stay in the engine. vLLM gets the token ids of a prompt, and its adapters
under the digests of their versions: a name never means another adapter, so neither its list of names nor its prefix
cache can be stale. An adapter is written into a folder that both programs see, and loaded before a request names it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TypedDict

import httpx2
import torch

from turret.adapters.adapter import Adapter, require_base
from turret.bases.base import Base
from turret.bundles.bundle import save_bundle
from turret.bundles.gguf_lora import max_lora_rank
from turret.engine.adapter_pool import AdapterTensors, tensor_layout
from turret.engine.constraint import WHITE_SPACE
from turret.engine.input_processor import Prompts
from turret.engine.request import (
    Done,
    Failed,
    GenerationSettings,
    Limits,
    PassListener,
    Request,
    VllmServer,
    failed,
)
from turret.engine.sampler import TokenLogprobs
from turret.engine.sequence import RunningSequence
from turret.errors import AdapterError, DataError, Draining, EngineError, ServeRefused, TurretError, one_line
from turret.json_types import JsonObject, Plain
from turret.tasks.task import Task

CONNECT_SECONDS = 5.0
LOAD_SECONDS = 300.0  # until vLLM has read an adapter
PROBE = "The quick brown fox jumps over 13 lazy dogs."  # both programs must make the same tokens of it
IDLE_SECONDS = 0.05  # at most, until the engine looks again at what it could begin


class VllmLogprobs(TypedDict):
    """What vLLM says of the tokens of a piece, each as `token_id:25`."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class VllmChoice(TypedDict, total=False):
    """A piece of an answer of vLLM."""

    token_ids: list[int] | None
    logprobs: VllmLogprobs | None
    finish_reason: str | None


class Vllm:
    """A vLLM server: what an engine has in place of a `Runner`.

    Args:
        base: Without weights.

    Raises:
        ServeRefused: It does not answer, serves no base, or has another tokenizer.
    """

    def __init__(self, base: Base, server: VllmServer) -> None:
        self.base, self.url = base, server.url.rstrip("/").removesuffix("/v1")
        headers = {} if server.key is None else {"authorization": f"Bearer {server.key}"}
        timeout = httpx2.Timeout(LOAD_SECONDS, connect=CONNECT_SECONDS)
        self._client = httpx2.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)
        self.headers = headers
        found = self._request_json("GET", "/v1/models")["data"]
        model = next((each for each in found if not each.get("parent")), None)
        if model is None:
            raise ServeRefused(f"vLLM at {self.url} serves no base: start it with the base {base.id}")
        self.name, self.longest = str(model["id"]), int(model.get("max_model_len") or Limits().max_tokens)
        self._check_tokenizer()
        self.adapter_pool = VllmAdapters(self, server.folder)
        self._passes: VllmPasses | None = None

    @property
    def device(self) -> torch.device:
        """That of this process, which computes nothing."""
        return torch.device("cpu")

    def within(self, limits: Limits) -> Limits:
        """The limits as they are: memory is vLLM's."""
        return limits

    def needs(self, prompt: int, answer: int, prefix: int = 0) -> dict[str, int]:
        """No tokens of a cache of this process: vLLM has its own."""
        return {}

    def passes(self, prompts: Prompts, listener: PassListener) -> VllmPasses:
        """What starts requests here. See `Passes`."""
        self._passes = VllmPasses(self, prompts, listener)
        return self._passes

    def close(self) -> None:
        """Unload the adapters of this process, and end all connections."""
        if self._passes is not None:
            self._passes.close()
        self.adapter_pool.close()
        self._client.close()

    def load(self, name: str, folder: Path, *, again: bool = False) -> None:
        """Load an adapter from a folder, under a name. again: also if it has that name already.

        Raises:
            AdapterError: vLLM cannot serve it.
            Draining: vLLM does not answer.
        """
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": again}
        try:
            got = self._client.post("/v1/load_lora_adapter", json=body)
        except httpx2.TransportError as error:
            raise self.away(error) from None
        if got.status_code == 404 and "Not Found" in got.text and '"detail"' in got.text:
            raise AdapterError(
                f"vLLM at {self.url} takes no adapters: start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            )
        if got.status_code == 400 and "already been loaded" in got.text and not again:
            self.load(name, folder, again=True)  # by another server, from a folder that may go with it
        elif got.status_code != 200:
            raise AdapterError(one_line(f"vLLM does not load the adapter: {_message(got.text)}"))

    def unload(self, name: str) -> None:
        """Forget an adapter. One that vLLM does not have is no error."""
        with suppress(httpx2.HTTPError):
            self._client.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def away(self, error: Exception) -> Draining:
        """The error while vLLM cannot be reached: no version causes it."""
        return Draining(f"vLLM at {self.url} does not answer ({type(error).__name__}): ask again, or start it again")

    def _check_tokenizer(self) -> None:
        told = self._request_json(
            "POST", "/tokenize", {"model": self.name, "prompt": PROBE, "add_special_tokens": False}
        )
        own = self.base.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        if list(told["tokens"]) != [int(each) for each in own]:
            raise ServeRefused(
                f"vLLM at {self.url} serves {self.name}, whose tokens are not those of {self.base.id}: start it with "
                "this base, or name its base with --base"
            )

    def _request_json(self, method: str, path: str, body: Mapping[str, Plain] | None = None) -> JsonObject:
        try:
            got = self._client.request(method, path, json=body)
            got.raise_for_status()
            found = got.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise ServeRefused(
                one_line(f"--engine-url {self.url}: vLLM does not answer {path} ({error}): start it first")
            ) from None
        return dict(found)


class VllmAdapters:
    """The adapters that vLLM has for this process, by slot: what an engine has in place of an `AdapterPool`."""

    def __init__(self, vllm: Vllm, folder: Path | None) -> None:
        self._vllm, self.device = vllm, vllm.device
        self._folder = Path(tempfile.mkdtemp(prefix="turret-vllm-", dir=folder))
        self._folder.chmod(0o755)  # vLLM may be another user
        self._slots: dict[int, AdapterTensors] = {}
        self._lock = threading.Lock()
        self._uses: Counter[str] = Counter()  # by name: mounted, or about to be
        self._unloading = ThreadPoolExecutor(1, "turret-vllm-unload")

    def prepare(self, adapter: Adapter, key: str, task: Task) -> AdapterTensors:
        """Write an adapter and load it into vLLM. key: what it is called there.

        Raises:
            AdapterError: vLLM cannot serve it.
            Draining: vLLM does not answer.
        """
        if adapter.others:
            raise AdapterError("vLLM answers with one adapter at a time: store their sum with `turret merge --how cat`")
        require_base(adapter, self._vllm.base.fingerprint)
        max_lora_rank(adapter)
        size = sum(each.nbytes for each in adapter.tensors.values())
        loaded = AdapterTensors(
            key, task, torch.empty(size, dtype=torch.uint8, device="meta"), None, {}, tensor_layout({})
        )
        with self._lock:
            if not self._uses[key]:
                try:
                    save_bundle(adapter, self._folder_of(key))
                    self._vllm.load(key, self._folder_of(key))
                except BaseException:
                    shutil.rmtree(self._folder_of(key), ignore_errors=True)
                    raise
            self._uses[key] += 1
        return loaded

    def load_again(self, key: str) -> None:
        """Load an adapter that vLLM has lost, because it was started again."""
        with self._lock:
            self._vllm.load(key, self._folder_of(key), again=True)

    def _folder_of(self, key: str) -> Path:
        return self._folder / hashlib.sha256(key.encode()).hexdigest()

    def mount(self, slot: int, loaded: AdapterTensors) -> None:
        self._slots[slot] = loaded

    def unmount(self, slot: int) -> None:
        """Take the adapter out of a slot; vLLM forgets it a little later."""
        if (loaded := self._slots.pop(slot, None)) is not None:
            self._unloading.submit(self._unload, loaded.digest)

    def at(self, slot: int) -> AdapterTensors | None:
        """The adapter in a slot; None for the bare base."""
        return self._slots.get(slot)

    def close(self) -> None:
        """Let vLLM forget all adapters, and remove their folders."""
        for slot in list(self._slots):
            self.unmount(slot)
        self._unloading.shutdown(wait=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _unload(self, key: str) -> None:
        with self._lock:
            self._uses[key] -= 1
            if not self._uses[key]:
                del self._uses[key]
                self._vllm.unload(key)
                shutil.rmtree(self._folder_of(key), ignore_errors=True)


class VllmPasses:
    """The requests that vLLM answers now. As `Passes`, but `run` only starts them; their tokens come on a thread."""

    def __init__(self, vllm: Vllm, prompts: Prompts, listener: PassListener) -> None:
        self._vllm, self._prompts, self._listener = vllm, prompts, listener
        self._running: dict[RunningSequence, asyncio.Task[None]] = {}
        self._salts: dict[str, str] = {}  # by tenant: no tenant sees in the time of an answer what another one asked
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="turret-vllm", daemon=True)
        self._thread.start()
        # The event loop's own client; each request has a connection of its own, which ends with it.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
        self._client = httpx2.AsyncClient(
            base_url=vllm.url, headers=vllm.headers, timeout=timeout, limits=limits, trust_env=False
        )

    @property
    def generating(self) -> Sequence[RunningSequence]:
        """The requests that vLLM answers now."""
        return list(self._running)

    def run(self, begin: Sequence[Request]) -> None:
        """Start requests. Without any, wait until something is new."""
        for request in begin:
            self._start(request)
        if not begin:
            with self._listener.wake:
                self._listener.wake.wait(IDLE_SECONDS)

    def drop(self, requests: Container[Request]) -> None:
        """End these requests in vLLM, if they run there. Their tickets stay open."""
        for sequence in [each for each in self.generating if each.request in requests]:
            task = self._running.get(sequence)
            if self._forget(sequence) and task is not None:
                self._loop.call_soon_threadsafe(task.cancel)

    def abandon(self) -> None:
        """Forget all requests."""
        self.drop([each.request for each in self.generating])

    def close(self) -> None:
        """End all requests and the thread."""
        self.abandon()
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _start(self, request: Request) -> None:
        try:
            body = self._body(request)
        except TurretError as error:
            if request.rows:
                self._listener.freed(request)
            self._listener.ended(request, Failed(error), 0)
            return
        assert request.settings is not None
        sequence = RunningSequence(request, request.settings, 0, None, self._prompts.before(request))
        started = threading.Event()

        def start() -> None:
            self._running[sequence] = self._loop.create_task(self._answer(sequence, body))
            started.set()

        self._loop.call_soon_threadsafe(start)
        started.wait()

    def _body(self, request: Request) -> JsonObject:
        """The request to vLLM. Raises DataError for what it cannot do."""
        if not request.rows:
            raise AdapterError("vLLM answers with texts here: ask an engine of turret for labels, vectors and scores")
        settings, options = request.settings, request.options
        assert settings is not None
        _check_settings(settings)
        name = self._vllm.name if request.named is None else request.named.key
        body: JsonObject = {
            "model": name,
            "prompt": list(request.ids or ()),
            "max_tokens": settings.max_tokens,
            "stream": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "ignore_eos": True,
            "stop_token_ids": list(settings.eos),
            "temperature": settings.temperature,
            "top_p": 1.0 if settings.top_p is None else settings.top_p,
            "top_k": 0 if settings.top_k is None else settings.top_k,
            "min_p": 0.0,
            "seed": settings.seed & (2**63 - 1),
            "min_tokens": settings.min_new_tokens,
            "repetition_penalty": settings.repetition_penalty,
            "presence_penalty": settings.presence_penalty,
            "frequency_penalty": settings.frequency_penalty,
            "cache_salt": self._salts.setdefault(request.tenant, secrets.token_hex(32)),
        }
        if settings.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in settings.logit_bias}
        if settings.logprobs is not None:
            body["logprobs"] = settings.logprobs
        if options.constraint is not None:
            body["structured_outputs"] = {"grammar": lark_of(options.constraint.grammar)}
            body["stop_token_ids"] = sorted({*settings.eos, *self._prompts.constraints.eos})
        return body

    async def _answer(self, sequence: RunningSequence, body: Mapping[str, Plain]) -> None:
        """Answer one request, on the thread of the event loop."""
        end: Done | Failed
        try:
            await self._generate(sequence, body)
            end = Done(sequence.answer(self._prompts.decode, self._prompts.token_texts))
        except asyncio.CancelledError:
            return  # it was dropped
        except httpx2.HTTPError as error:
            end = Failed(self._vllm.away(error))
        except Exception as error:
            end = failed(error, "the answer of vLLM", "ask again")
        if self._forget(sequence):
            self._listener.ended(sequence.request, end, sequence.new)

    async def _generate(self, sequence: RunningSequence, body: Mapping[str, Plain]) -> None:
        """Take the tokens of vLLM until the answer ends. An adapter that vLLM has lost is loaded again, once."""
        since = time.monotonic()
        for last in (False, True):
            try:
                async with aclosing(self._choices(body)) as choices:
                    async for choice in choices:
                        since = self._take(sequence, choice, since)
                        if sequence.reason is not None:
                            return  # the end of the connection ends the request in vLLM
                raise EngineError("vLLM ended an answer before its end: ask again")
            except _UnknownModel as error:
                named = sequence.request.named
                if last or named is None or sequence.new:
                    raise EngineError(one_line(f"vLLM does not have {body['model']}: {error}: ask again")) from None
                await self._loop.run_in_executor(None, self._vllm.adapter_pool.load_again, named.key)

    async def _choices(self, body: Mapping[str, Plain]) -> AsyncGenerator[VllmChoice, None]:
        """What vLLM says, piece by piece."""
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                raise _error_of(response.status_code, response.text)
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                said = json.loads(line.removeprefix("data: "))
                if "error" in said:
                    raise _error_of(int(said["error"].get("code") or 500), line)
                for choice in said["choices"]:
                    yield choice

    def _take(self, sequence: RunningSequence, choice: VllmChoice, since: float) -> float:
        """Add the tokens of a piece. Returns its time. since: the time of the piece before it, or of the start."""
        request, tokens, now = sequence.request, choice.get("token_ids") or [], time.monotonic()
        reported = _logprobs(choice.get("logprobs"), sequence.settings.logprobs)
        first = sequence.new == 0
        for place, token in enumerate(tokens):
            if sequence.reason is None:
                own = reported[place] if place < len(reported) else None
                sequence.take(int(token), self._prompts.decode, self._prompts.token_texts, own)
        if sequence.reason is None and choice.get("finish_reason"):
            sequence.reason = "length" if choice["finish_reason"] == "length" else "stop"
        if first and (tokens or sequence.reason is not None):
            self._listener.passed([request], 0, now - since)
        elif tokens:
            self._listener.stepped(len(tokens), (now - since) / len(tokens))
        return now

    def _forget(self, sequence: RunningSequence) -> bool:
        """Give back what a request holds; False if that is done."""
        with self._listener.wake:
            if self._running.pop(sequence, None) is None:
                return False
        self._listener.freed(sequence.request)
        return True


class _UnknownModel(Exception):
    """vLLM does not know the name of an adapter, or has lost its files."""


def _check_settings(settings: GenerationSettings) -> None:
    """Raise DataError for a setting that vLLM does not have."""
    wrong = {
        "num_beams": settings.num_beams > 1,
        "echo": settings.echo,
        "no_repeat_ngram_size": settings.no_repeat_ngram_size > 0,
        "min_length": settings.min_length > 0,
        "forced_bos_token_id": settings.forced_bos is not None,
        "forced_eos_token_id": bool(settings.forced_eos),
    }
    for name, given in wrong.items():
        if given:
            raise DataError(f"{name} is set, and vLLM does not have it: leave it out, or ask an engine of turret")


def lark_of(grammar: str) -> str:
    """A grammar of llguidance in its variant of Lark, which vLLM's backend `guidance` reads.

    JSON gets no free white space: the llguidance of vLLM has no limit of it, and a model may write nothing else.
    """
    if grammar.startswith("{"):
        (only,) = json.loads(grammar)["grammars"]
        lark = only["lark_grammar"]
        grammar = f"start: %json {json.dumps(only['json_schema'])}" if lark is None else str(lark)
    return grammar.replace(f'"whitespace_pattern": {json.dumps(WHITE_SPACE)}', '"whitespace_flexible": false')


def _logprobs(said: VllmLogprobs | None, count: int | None) -> list[TokenLogprobs]:
    """The log probabilities of the tokens of a piece. count: of the most probable ones that are wanted."""
    if said is None or count is None:
        return []
    found = []
    for own, value, top in zip(said["tokens"], said["token_logprobs"], said["top_logprobs"], strict=True):
        others = sorted(((_id_of(each), float(given)) for each, given in top.items()), key=lambda each: -each[1])
        found.append(TokenLogprobs(_id_of(own), float(value), tuple(others[:count])))
    return found


def _id_of(text: str) -> int:
    """`token_id:25` -> 25."""
    return int(text.removeprefix("token_id:"))


def _error_of(status: int, text: str) -> Exception:
    """The error of a response of vLLM."""
    message = _message(text)
    if status == 404 or "adapter" in message.lower():
        return _UnknownModel(message)
    if status == 400:
        return DataError(one_line(f"vLLM refuses the request: {message}"))
    if status in (429, 503):
        return Draining(one_line(f"vLLM takes no request now: {message}"))
    return EngineError(one_line(f"vLLM failed with status {status}: {message}"))


def _message(text: str) -> str:
    """The message in an answer of vLLM."""
    try:
        said = json.loads(text.removeprefix("data: "))
        said = said.get("error", said)
        return str(said.get("message", said) if isinstance(said, dict) else said)[:200]
    except (ValueError, AttributeError):
        return text[:200]
