"""Compiles a constraint in a process of its own before the engine compiles it.

llguidance recurses on its thread's stack: a constraint that is built for it ends the whole process, and no thread can
catch that. So a helper process with less time, memory and stack compiles every constraint first, and the engine
compiles only what the helper survived. A helper that died is replaced for the next constraint.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from turret.errors import EngineError, one_line
from turret.json_types import JsonObject
from turret.process import environment

T = TypeVar("T")

# Of llguidance: a lexer state takes 1 to 2 kB, and fuel is spent at 14 to 50 units a microsecond.
LEXER_STATES = 30_000
GRAMMAR_SIZE = 100_000
COMPILE_FUEL = 1_000_000
STEP_FUEL = 200_000
STEP_ITEMS = 20_000

STACK = 16 << 20  # bytes of the thread that compiles in the engine's process
HELPER_STACK = STACK // 2
HELPER_MEMORY = 1 << 30  # bytes that the helper may allocate for one constraint
SECONDS = 5.0  # for one constraint
START_SECONDS = 60.0  # until a helper has read the tokenizer
REHEARSED = 8  # tokens of an answer that the helper takes
_KILLED = tuple(-getattr(signal, name, 0) for name in ("SIGKILL", "SIGTERM", "SIGINT"))  # by somebody else
_PIECE = 1 << 16


def tokenizer_of(text: str, size: int, eos: Sequence[int]) -> LLTokenizer:
    """A fast tokenizer, as the text of its `tokenizer.json`, as llguidance reads it. size: of the vocabulary."""
    return LLTokenizer(text, n_vocab=size, eos_token=list(eos))


def matcher_of(tokens: LLTokenizer, grammar: str) -> LLMatcher:
    """A grammar of llguidance's format, compiled. Its `is_error` may be true."""
    limits = LLParserLimits(
        initial_lexer_fuel=COMPILE_FUEL,
        step_lexer_fuel=STEP_FUEL,
        step_max_items=STEP_ITEMS,
        max_lexer_states=LEXER_STATES,
        max_grammar_size=GRAMMAR_SIZE,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )
    return LLMatcher(tokens, grammar, log_level=0, limits=limits)


def with_stack(size: int, function: Callable[[], T]) -> T:
    """Call a function on a thread with a stack of so many bytes, and wait for it."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    with _starting:
        before = threading.stack_size(size)
        try:
            thread = threading.Thread(target=run, name="turret-compile", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    return result.result()


_starting = threading.Lock()  # the size is one setting of the whole process


@dataclass(frozen=True)
class Refusal:
    """Why the engine must not compile a constraint. late: the helper ran out of time, perhaps on a busy machine."""

    why: str
    late: bool = False


class ConstraintProcess:
    """The helper process of one tokenizer. It starts with the first constraint. Any thread may call its methods.

    Args:
        text, size, eos: As of `tokenizer_of`.
        seconds: For one constraint.
    """

    def __init__(self, text: str, size: int, eos: Sequence[int], seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._about = json.dumps({"tokenizer": text, "size": size, "eos": list(eos)}).encode() + b"\n"
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.started = 0  # processes

    def check(self, grammar: str) -> Refusal | None:
        """Compile a grammar in the helper. Returns why the engine must not compile it; None if it may.

        Raises:
            EngineError: The helper cannot be started, or was killed twice.
        """
        line = json.dumps({"grammar": grammar}).encode() + b"\n"
        with self._lock:
            for _ in range(2):
                process = self._running()
                answer = self._ask(process, line, self._seconds)
                if answer is not None:
                    return None if answer["error"] is None else Refusal(str(answer["error"]))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                late, status = process.returncode is None, process.returncode
                self._end()
                if late:
                    return Refusal(
                        f"compiling it takes more than {self._seconds:g} seconds: make it smaller", late=True
                    )
                if status not in _KILLED:
                    most = HELPER_MEMORY >> 20
                    return Refusal(f"compiling it takes more stack, or more than {most} MiB: nest it less deeply")
        raise EngineError("a constraint cannot be compiled: its process was killed twice; try again")

    def close(self) -> None:
        """End the helper."""
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "turret.engine.constraint_process"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(),
                start_new_session=True,  # Ctrl-C is the server's, which then ends the helper
            )  # fmt: skip
        except OSError as error:
            raise EngineError(
                f"a constraint cannot be compiled: no process can be started ({error.strerror})"
            ) from None
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self.started += 1
        if self._ask(self._process, self._about, START_SECONDS) is None:
            self._end()
            raise EngineError("a constraint cannot be compiled: its process ended while it read the tokenizer")
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], line: bytes, seconds: float) -> JsonObject | None:
        """The helper's answer to a line; None if it died, or did not answer in time."""
        assert process.stdin is not None
        assert process.stdout is not None
        until = time.monotonic() + seconds
        try:
            if not _sent(process.stdin.fileno(), line, until):
                return None
            answer = _line_from(process.stdout.fileno(), until)
            return None if answer is None else json.loads(answer)
        except (OSError, ValueError):
            return None

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _sent(descriptor: int, line: bytes, until: float) -> bool:
    """Write a line to a pipe that never blocks. Returns whether all of it was written in time."""
    left = memoryview(line)
    while left:
        _, ready, _ = select.select([], [descriptor], [], max(0.0, until - time.monotonic()))
        if not ready:
            return False
        left = left[os.write(descriptor, left[:_PIECE]) :]
    return True


def _line_from(descriptor: int, until: float) -> bytes | None:
    """A line from a pipe; None if the pipe was closed, or the line did not come in time."""
    read = b""
    while not read.endswith(b"\n"):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
        piece = os.read(descriptor, _PIECE) if ready else b""
        if not piece:
            return None
        read += piece
    return read


# --- in the helper ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer a line of JSON for each line of JSON on stdin, until it is closed."""
    about = json.loads(sys.stdin.buffer.readline())
    tokens = tokenizer_of(about["tokenizer"], about["size"], about["eos"])
    _limit_memory()
    _answer({})
    for line in sys.stdin.buffer:
        grammar = json.loads(line)["grammar"]
        _answer({"error": with_stack(HELPER_STACK, partial(_rehearse, tokens, grammar))})


def _rehearse(tokens: LLTokenizer, grammar: str) -> str | None:
    """Compile a grammar, and take the first tokens that it allows. Returns llguidance's error."""
    matcher = matcher_of(tokens, grammar)
    for _ in range(REHEARSED):
        if matcher.is_error() or matcher.is_stopped():
            break
        bits = matcher.compute_bitmask()
        place = next((place for place, byte in enumerate(bits) if byte), None)
        if place is None or not matcher.consume_token(8 * place + (bits[place] & -bits[place]).bit_length() - 1):
            return None  # only the end of the text may follow
    return one_line(matcher.get_error(), 600) if matcher.is_error() else None


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as read:  # without it, there is no limit
            size = int(read.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + HELPER_MEMORY, size + HELPER_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(said: JsonObject) -> None:
    sys.stdout.buffer.write(json.dumps(said).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
