"""Answers the batches of a store, one batch at a time, a few lines of it at a time.

Each line goes through the same routes as a request over HTTP, as its owner's token, with a lower priority. So it is
validated, counted and charged like one. A quota that is spent, or a full queue, makes the batch wait.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from starlette.types import ASGIApp, Message, Scope

from turret.errors import BadRequest, NotFound, TurretError, shown
from turret.json_types import JsonObject
from turret.server.auth import Caller
from turret.server.shadows import LOW_PRIORITY
from turret.server.state import ServerState
from turret.server.thread_pool import ThreadPool
from turret.store.batches import Batch, Lost, Part, State

POLL_SECONDS = 0.5  # between two looks for a batch
BEAT_SECONDS = 5.0  # between two renewals of a claim
AT_ONCE = 16  # lines that are answered at a time
AT_ONCE_BYTES = 8 << 20  # of these lines together
MOST_LINES = 50_000  # of a file
LONGEST_WAIT = 60.0  # seconds until a line that was refused is tried again
AGAIN = (429, 503)  # statuses after which a line is tried again
MOST_CUSTOM_ID = 512  # characters


@dataclass(frozen=True)
class Line:
    """One request of a batch."""

    custom_id: str
    body: bytes
    number: int


class BatchRunner:
    """The batches that this server works on. `run` lives in the server's event loop.

    Args:
        routes: The application without its middleware, which answers the lines.
    """

    def __init__(self, state: ServerState, routes: ASGIApp) -> None:
        self._state, self._routes = state, routes
        self._batches, self._files = state.batches, state.files
        self._pool = ThreadPool("batch", 2, 16, "writes of batches are waiting", 1)
        self._failing = False

    async def run(self) -> None:
        """Answer batches until the server drains."""
        try:
            while not self._state.load.draining:
                try:
                    batch = await self._pool(self._batches.claim)
                    self._failing = False
                    if batch is not None:
                        await self._work(batch)
                        continue
                except TurretError as error:
                    self._report(error)
                await asyncio.sleep(POLL_SECONDS)
        finally:
            self._pool.close()

    def _report(self, error: TurretError) -> None:
        """Log once that the store is out of reach."""
        if not self._failing:
            self._state.log.write("batches", "error", error=type(error).__name__, message=str(error))
        self._failing = True

    async def _work(self, batch: Batch) -> None:
        """Work on a claimed batch until it ends, another process takes it, or the server drains."""
        beat = asyncio.create_task(self._beat(batch))
        try:
            await self._answer(batch)
        except Lost:
            self._state.log.write("batch", batch=batch.id, lost=True)
        except TurretError:
            raise  # the store is out of reach: the batch continues later
        except Exception as error:  # a bug must not end the other batches, nor ask these lines for ever
            self._state.log.bug(error, batch=batch.id)
            await self._pool(
                self._batches.end, batch, "failed", error="a bug in turret: the server's log has the batch"
            )
        finally:
            beat.cancel()
            with suppress(TurretError):
                self._batches.release(batch)  # also if the loop ends here, so without a thread

    async def _beat(self, batch: Batch) -> None:
        with suppress(Lost, TurretError):  # `_answer` finds that too
            while True:
                await asyncio.sleep(BEAT_SECONDS)
                await self._pool(self._batches.renew, batch)

    async def _answer(self, batch: Batch) -> None:
        try:
            file = await self._pool(self._files.find, batch.owner, batch.input_file)
            with tempfile.TemporaryDirectory(prefix="turret-batch-") as folder:
                opened = self._files.content(file)
                path = await self._pool(opened.__enter__)
                try:
                    if batch.state == "validating":
                        total = await self._pool(validated, path, batch.endpoint, self._state.limits.body_bytes)
                        batch = await self._pool(self._batches.begin, batch, total)
                    with path.open("rb") as read:
                        batch = await self._answer_lines(batch, read)
                finally:
                    await self._pool(opened.__exit__, None, None, None)
                if batch.done == batch.total or batch.state == "cancelling" or _expired(batch):
                    await self._pool(self._finish, batch, Path(folder))
        except (BadRequest, NotFound) as error:
            await self._pool(self._batches.end, batch, "failed", error=str(error))
            self._state.log.write("batch", batch=batch.id, state="failed", message=str(error))

    async def _answer_lines(self, batch: Batch, read: BinaryIO) -> Batch:
        """Answer the lines that are left. Returns the batch as it is then."""
        await self._pool(_skip, read, batch.done)
        number = batch.done
        while not (self._state.load.draining or batch.state == "cancelling" or _expired(batch)):
            lines = await self._pool(next_lines, read, number)
            if not lines:
                break
            number += len(lines)
            results = await asyncio.gather(*(self._line(batch, line) for line in lines))
            if any(each is None for each in results):
                break  # the server drains, or the batch is being cancelled: these lines are asked again, or never
            kept = [each for each in results if each is not None]
            wrong = [text for ok, text in kept if not ok]
            answers = "".join(text for ok, text in kept if ok)
            batch = await self._pool(self._batches.keep, batch, Part(answers, "".join(wrong), len(kept), len(wrong)))
        return await self._pool(self._batches.renew, batch)

    async def _line(self, batch: Batch, line: Line) -> tuple[bool, str] | None:
        """Whether a line was answered, and its line in the file of answers or errors. None if the work must stop."""
        while True:
            caller = self._state.guard.caller_of(batch.owner)
            if caller is None:
                raise BadRequest(
                    "the token that made this batch is not valid any more: make the batch with another one"
                )
            status, headers, body = await self._ask(caller, batch.endpoint, line.body)
            if status not in AGAIN:
                break
            wait = min(LONGEST_WAIT, float(headers.get("retry-after") or 1))
            if not await self._wait(batch, wait):
                return None
        said: JsonObject = {
            "id": f"batch_req_{secrets.token_hex(8)}",
            "custom_id": line.custom_id,
            "response": {"status_code": status, "request_id": headers.get("x-request-id"), "body": json.loads(body)},
            "error": None,
        }
        return status < 400, json.dumps(said, ensure_ascii=False) + "\n"

    async def _wait(self, batch: Batch, seconds: float) -> bool:
        """Wait before a line is tried again. Returns whether it should be."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._state.load.draining or _expired(batch):
                return False
            await asyncio.sleep(min(1.0, max(0.0, until - time.monotonic())))
        return (await self._pool(self._batches.renew, batch)).state != "cancelling"

    async def _ask(self, caller: Caller, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The status, headers and body of one answer."""
        sent: list[Message] = []
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            for message in messages:
                return message
            await asyncio.Event().wait()  # nobody disconnects
            raise AssertionError

        async def send(message: Message) -> None:
            sent.append(message)

        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": None,
            "server": None, "headers": [(b"content-type", b"application/json")],
            "state": {"caller": caller, "priority": LOW_PRIORITY},
        }  # fmt: skip
        await self._routes(scope, receive, send)
        start = sent[0]
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start["headers"]}
        return int(start["status"]), headers, b"".join(each.get("body", b"") for each in sent[1:])

    def _finish(self, batch: Batch, folder: Path) -> None:
        """Put the answers and errors into files of the owner, and end the batch."""
        state: State = "completed" if batch.done == batch.total else "expired"
        state = "cancelled" if batch.state == "cancelling" else state
        answers, errors = folder / "answers", folder / "errors"
        with answers.open("w", encoding="utf-8") as good, errors.open("w", encoding="utf-8") as bad:
            for part in self._batches.parts(batch):
                good.write(part.answers)
                bad.write(part.errors)
        made: dict[str, str | None] = {}
        for name, path, key in (("output", answers, "output_file"), ("error", errors, "error_file")):
            if path.stat().st_size:
                made[key] = self._files.add(batch.owner, f"{batch.id}_{name}.jsonl", f"batch_{name}", path).id
        self._batches.end(batch, state, **made)
        self._state.log.write("batch", batch=batch.id, state=state, lines=batch.done, failed=batch.failed)


def _expired(batch: Batch) -> bool:
    return time.time() > batch.expires


def validated(path: Path, endpoint: str, most_bytes: int) -> int:
    """The number of lines of a file of requests. Raises BadRequest for the first one that cannot be asked."""
    seen: set[str] = set()
    with path.open("rb") as read:
        for number in range(1, MOST_LINES + 2):
            text = read.readline(most_bytes + 1)
            if not text:
                break
            if number > MOST_LINES:
                raise BadRequest(f"the file has more than {MOST_LINES} lines: split it into several batches")
            if len(text) > most_bytes:
                raise BadRequest(f"line {number} has more than {most_bytes} bytes: expected one request on each line")
            line = _parsed(text, number, endpoint)
            if line.custom_id in seen:
                raise BadRequest(f"line {number}: custom_id {shown(line.custom_id)} occurs twice: give each its own")
            seen.add(line.custom_id)
    if not seen:
        raise BadRequest("the file has no line: expected a request on each line")
    return len(seen)


def next_lines(read: BinaryIO, number: int) -> Sequence[Line]:
    """The next lines of a file that was validated, at most `AT_ONCE`. number: of those before."""
    lines: list[Line] = []
    size = 0
    while len(lines) < AT_ONCE and size < AT_ONCE_BYTES and (text := read.readline()):
        size += len(text)
        lines.append(_parsed(text, number + len(lines) + 1, None))
    return lines


def _skip(read: BinaryIO, lines: int) -> None:
    for _ in range(lines):
        read.readline()


def _parsed(text: bytes, number: int, endpoint: str | None) -> Line:
    """A line as a request. endpoint: that it must name; None: it was checked before."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest(
            f"line {number} is not JSON: expected an object with custom_id, method, url and body"
        ) from None
    expected = "expected an object with custom_id, method, url and body"
    if not isinstance(said, dict) or not isinstance(said.get("body"), dict):
        raise BadRequest(f"line {number} has no body: {expected}")
    custom_id = said.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MOST_CUSTOM_ID:
        raise BadRequest(f"line {number} has no custom_id of 1 to {MOST_CUSTOM_ID} characters: {expected}")
    if endpoint is not None and (said.get("method"), said.get("url")) != ("POST", endpoint):
        given = f"{shown(said.get('method'), 20)} {shown(said.get('url'), 60)}"
        raise BadRequest(f"line {number} asks {given}: expected 'POST' {endpoint!r}, the batch's endpoint")
    if said["body"].get("stream"):
        raise BadRequest(f"line {number} asks for a stream: leave stream out, a batch has whole answers")
    return Line(custom_id, json.dumps(said["body"]).encode(), number)
