"""`/v1/files` and `/v1/batches`: many requests in one file, answered in the background, in OpenAI's format."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import secrets
import tempfile
import time
from array import array
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from fastapi import Query, Request, params
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.types import ASGIApp, Message

from turret.errors import BadRequest, Corrupt, LeaseLost, NotFound, StoreError, TooLarge, TurretError, quote
from turret.json_types import JsonObject
from turret.server.routes import (
    BATCH,
    PIECE,
    PURPOSES,
    FileId,
    Model,
    Owner,
    RequestState,
    View,
    answer_of_route,
    find_file,
    keep,
    read_form,
    router,
)
from turret.server.routing import LOW_PRIORITY
from turret.server.services import Services
from turret.store import leases
from turret.store.batches import MOST_TRIES, WHOLE_FILE, Answer, Batch, State
from turret.store.client_files import ClientFile
from turret.turns import ThreadPool

questions = router("infer")


# --- files ------------------------------------------------------------------------------------------------------------
# `/v1/files`: tables, batches and their answers, in OpenAI's format. A file belongs to the token that sent it.


_FORM: JsonObject = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(PURPOSES)},
    },
}
UPLOAD: JsonObject = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}
CONTENT: dict[int | str, JsonObject] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class ListPage(BaseModel):
    object: Literal["list"] = "list"
    first_id: str | None
    last_id: str | None
    has_more: bool


class Files(ListPage):
    data: list[FileObject]


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


@questions.post("/v1/files", openapi_extra=UPLOAD)
async def upload(view: View, owner: Owner, request: Request) -> FileObject:
    """Send a table to train on, or a file with a request on each line for a batch, as `multipart/form-data`."""
    form = await read_form(request)
    try:
        sent, purpose = form.get("file"), form.get("purpose")
        if unknown := next((name for name in form if name not in ("file", "purpose")), None):
            raise BadRequest(f"{ascii(unknown)[:60]}: unknown key, expected file and purpose")
        if not isinstance(sent, UploadFile):
            raise BadRequest("file: expected a file in a form (multipart/form-data)")
        if not isinstance(purpose, str) or purpose not in PURPOSES:
            raise BadRequest(f"purpose {ascii(purpose)[:40]}: expected {' or '.join(PURPOSES)}")
        return _shown_file(await keep(view, owner, sent, purpose))
    finally:
        await form.close()


@questions.get("/v1/files")
async def list_files(
    view: View,
    owner: Owner,
    purpose: Annotated[str | None, Query(max_length=32)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=60)] = None,
) -> Files:
    """The caller's files, the newest first."""
    found = await view.control(view.services.files.list_files, owner, purpose=purpose, after=after, limit=limit + 1)
    return Files(**_page([_shown_file(each) for each in found[:limit]], more=len(found) > limit))


def _page(shown: Sequence[FileObject | BatchObject], *, more: bool) -> JsonObject:
    """A page of a list, with the ids of its ends."""
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    return {"data": shown, "first_id": first, "last_id": last, "has_more": more}


@questions.get("/v1/files/{file_id}/content", response_class=StreamingResponse, responses=CONTENT)
async def read_file(file_id: FileId, view: View, owner: Owner) -> StreamingResponse:
    """The bytes of a file, checked against its digest before the first one is sent."""
    found = await view.control(view.services.files.find, owner, file_id)
    opened = ExitStack()
    read = await view.control(_open_file, opened, view, found)  # now: it may be deleted before the last piece is sent

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while piece := await run_in_threadpool(read.read, PIECE):
                yield piece
        finally:
            opened.close()  # not on a thread: the loop may be ending

    return StreamingResponse(
        pieces(), media_type="application/octet-stream", headers={"content-length": str(found.blob.bytes)}
    )


def _open_file(opened: ExitStack, view: View, file: ClientFile) -> BinaryIO:
    return opened.enter_context(opened.enter_context(view.services.files.content(file)).open("rb"))


@questions.get("/v1/files/{file_id}")
async def show_file(file_id: FileId, view: View, owner: Owner) -> FileObject:
    """One of the caller's files."""
    return _shown_file(await view.control(view.services.files.find, owner, file_id))


@questions.delete("/v1/files/{file_id}")
async def delete_file(file_id: FileId, view: View, owner: Owner) -> DeletedFile:
    """Delete a file. It is refused while a batch that has not ended reads it."""
    await view.control(view.services.files.delete, owner, file_id)
    return DeletedFile(id=file_id)


def _shown_file(file: ClientFile) -> FileObject:
    return FileObject(
        id=file.id, bytes=file.blob.bytes, created_at=file.created, filename=file.name, purpose=file.purpose
    )


# --- batches ----------------------------------------------------------------------------------------------------------


BatchId = Annotated[str, params.Path(min_length=1, max_length=60)]
Endpoint = Literal[
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/classify",
    "/v1/decisions",
    "/v1/systemone",
    "/v1/score",
    "/v1/rerank",
]
Id = Annotated[str, Field(min_length=1, max_length=60)]
Key = Annotated[str, Field(max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class BatchRequest(Model):
    input_file_id: Id = Field(description="A file of purpose batch: a request on each line.")
    endpoint: Endpoint
    completion_window: Literal["24h"] = "24h"
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None


class RequestCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchError(BaseModel):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchObject(BaseModel):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None


class BatchList(ListPage):
    data: list[BatchObject]


@questions.post("/v1/batches")
async def create_batch(body: BatchRequest, view: View, owner: Owner) -> BatchObject:
    """Queue a file of requests. They are answered with a lower priority than all others, also after a restart."""
    return _batch_object(await view.control(_add, view, owner, body))


def _add(view: View, owner: str, body: BatchRequest) -> Batch:
    file = find_file(view, owner, body.input_file_id, BATCH)
    return view.services.batches.add(owner, body.endpoint, file.id, body.metadata)


@questions.get("/v1/batches")
async def list_batches(
    view: View,
    owner: Owner,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=60)] = None,
) -> BatchList:
    """The caller's batches, the newest first."""
    found = await view.control(view.services.batches.list_batches, owner, after=after, limit=limit + 1)
    return BatchList(**_page([_batch_object(each) for each in found[:limit]], more=len(found) > limit))


@questions.get("/v1/batches/{batch_id}")
async def show_batch(batch_id: BatchId, view: View, owner: Owner) -> BatchObject:
    """One of the caller's batches."""
    return _batch_object(await view.control(view.services.batches.find, owner, batch_id))


@questions.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(batch_id: BatchId, view: View, owner: Owner) -> BatchObject:
    """End a batch early. What is answered by then stays, in the output file."""
    return _batch_object(await view.control(view.services.batches.cancel, owner, batch_id))


def _batch_object(batch: Batch) -> BatchObject:
    errors = None
    if batch.error is not None:
        named = NAMED_LINE.match(batch.error)
        line = None if named is None else int(named[1])
        errors = BatchErrors(data=[BatchError(code="invalid_request", message=batch.error, line=line)])
    times = {f"{state}_at": when for state, when in batch.times.items()}
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=errors,
        input_file_id=batch.input_file,
        status=batch.state,
        output_file_id=batch.output_file,
        error_file_id=batch.error_file,
        created_at=batch.created,
        expires_at=batch.expires,
        request_counts=RequestCounts(total=batch.total, completed=batch.done - batch.failed, failed=batch.failed),
        metadata=dict(batch.notes) if batch.notes is not None else None,
        **times,
    )


# --- batch runner -----------------------------------------------------------------------------------------------------
# Answers the batches of a store, one at a time, a few lines of it at a time.
#
# Each line goes through the same routes as a request over HTTP, as its owner's token, with a lower priority. So it is
# validated, counted and charged like one. If a quota is spent or a queue is full, the batch steps aside, and the
# batches of others go on. A server that drains takes no new line, and waits for the answers of those in flight.


POLL_SECONDS = 0.5  # between two looks for a batch
BEATS = 4  # renewals of a lease while it lasts
AT_ONCE = 16  # lines that are answered at a time
AT_ONCE_BYTES = 8 << 20  # of these lines together
MOST_LINES = 50_000  # of a file
TURN_SECONDS = 5.0  # of a batch, if batches of others wait
KEEP_AFTER = 0.5  # seconds from an answer until it is kept
KEEP_SECONDS = 300.0  # for which answers are kept in memory while the store is out of reach
FAILED_SECONDS = 5.0  # for which a batch steps aside if the store or the disk is out of reach
MOST_FILES = 4  # of batches that are open
MOST_DEATHS = 30  # of servers that work on a batch
READ_BYTES = 1 << 20  # bytes that are read at a time
AGAIN = (429, 503)  # statuses after which a line is tried again
MOST_CUSTOM_ID = 512  # characters
NAMED_LINE = re.compile(r"line (\d+)\b")  # how the message about a line begins


@dataclass(frozen=True)
class Line:
    """One request of a batch."""

    custom_id: str
    body: bytes
    number: int  # the first line is 0


class BatchRunner:
    """The batches that this server works on. `run` lives in the server's event loop.

    Args:
        routes: The application without its middleware, which answers the lines.
    """

    def __init__(self, services: Services, routes: ASGIApp) -> None:
        self._services, self._routes = services, routes
        self._batches, self._files = services.batches, services.files
        self._pool = ThreadPool("batch", 2, 16, "writes of batches are waiting", 1)
        self._failing = False
        self._files_open: dict[str, Lines] = {}
        self.working = False  # whether answers are awaited or kept

    async def run(self) -> None:
        """Answer batches until the server drains."""
        try:
            while not self._services.load.draining:
                self.working = True
                try:
                    batch = await self._pool(self._batches.claim)
                    if batch is not None:
                        await self._work(batch)
                        continue
                    self._failing = False
                except TurretError as error:
                    self._report(error)
                except Exception as error:  # a bug must not end the batches of all
                    self._services.log.bug(error)
                finally:
                    self.working = False
                await asyncio.sleep(POLL_SECONDS)
        finally:
            for lines in self._files_open.values():
                lines.close()
            self._pool.close()

    def _report(self, error: TurretError | OSError) -> None:
        """Log once that the store, or the disk of this machine, is out of reach."""
        if not self._failing:
            self._services.log.write("batches", "error", error=type(error).__name__, message=str(error))
        self._failing = True

    async def _work(self, batch: Batch) -> None:
        """Work on a claimed batch until it ends or steps aside, another process takes it, or the server drains."""
        beat, aside = asyncio.create_task(self._beat(batch)), 0.0
        try:
            aside = await self._answer(batch)
            self._failing = False
        except LeaseLost:
            self._services.log.write("batch", batch=batch.id, lost=True)
        except (TurretError, OSError) as error:  # the batch continues later, and the others now
            self._report(error)
            aside = FAILED_SECONDS
        except asyncio.CancelledError:
            with suppress(TurretError):
                self._batches.release(batch)  # the loop ends here, so without a thread
            raise
        except Exception as error:  # a bug must not end the other batches, nor ask these lines for ever
            self._services.log.bug(error, batch=batch.id)
            with suppress(TurretError):
                await self._fail(batch, "a bug in turret: the server's log has the batch")
        finally:
            beat.cancel()
        with suppress(TurretError):
            await self._pool(self._batches.release, batch, aside)

    async def _beat(self, batch: Batch) -> None:
        while True:
            await asyncio.sleep(leases.lease_seconds() / BEATS)
            try:
                await self._pool(self._batches.renew, batch)
            except LeaseLost:  # `_answer` finds that too
                return
            except TurretError:
                continue

    async def _answer(self, batch: Batch) -> float:
        """Answer lines of a batch. Returns the seconds for which it must step aside."""
        deaths, aside, problem = batch.unanswered.get(WHOLE_FILE, 0), 0.0, None
        try:
            if deaths >= (MOST_TRIES if batch.state == "validating" else MOST_DEATHS):
                problem = f"servers died {deaths} times while they worked on this batch: send its lines one by one"
            elif not _is_over(batch):
                lines = await self._open_lines(batch)
                if batch.state == "validating":
                    total = await self._pool(
                        validate_requests, lines.path, batch.endpoint, self._services.limits.body_bytes
                    )
                    batch = await self._pool(self._batches.begin, batch, total)
                batch, again = await self._answer_lines(batch, lines)
                aside = again or 0.0
            if problem or _is_over(batch):
                self._close(batch.id)
                await self._pool(self._finish, batch, problem)
            return aside
        except (BadRequest, NotFound, TooLarge) as error:
            await self._fail(batch, str(error))
        except Corrupt:
            await self._fail(batch, "the stored bytes of the batch's file are damaged: send the file again")
        return 0.0

    async def _fail(self, batch: Batch, problem: str) -> None:
        self._close(batch.id)
        await self._pool(self._batches.end, batch, "failed", error=problem)
        self._services.log.write("batch", batch=batch.id, state="failed", message=problem)

    async def _open_lines(self, batch: Batch) -> Lines:
        """The lines of a batch's file. The last few files stay open, since batches take turns."""
        if batch.id not in self._files_open:
            while len(self._files_open) >= MOST_FILES:
                self._close(next(iter(self._files_open)))
            file = await self._pool(self._files.find, batch.owner, batch.input_file)
            self._files_open[batch.id] = await self._pool(Lines, self._files.content(file))
        return self._files_open[batch.id]

    def _close(self, id: str) -> None:
        if (lines := self._files_open.pop(id, None)) is not None:
            lines.close()

    async def _answer_lines(self, batch: Batch, lines: Lines) -> tuple[Batch, float | None]:
        """Answer the lines that are left, and return the batch as it is then.

        It ends early if the server drains, if another owner's batch waits for its turn, or if a line was refused; then
        it also returns the seconds for which the batch must step aside. Each answer is kept, whatever ends this.
        """
        asked: dict[asyncio.Task[Answer | float], int] = {}
        ready: list[Answer] = []
        turn_ends, aside = time.monotonic() + TURN_SECONDS, None
        try:
            while True:
                over = aside is not None or self._services.load.draining or _is_over(batch)
                if not over and time.monotonic() > turn_ends:
                    over = await self._pool(self._batches.others_wait, batch)
                    turn_ends += 0 if over else TURN_SECONDS
                lost = (each for each, tries in batch.unanswered.items() if each != WHOLE_FILE and tries >= MOST_TRIES)
                ready += [_given_up(each, lines) for each in lost]
                next = [] if over else choose_lines(_without(batch, ready), asked.values(), lines.size)
                if ready or next:
                    batch = await self._keep(batch, ready, [*asked.values(), *next])
                    ready.clear()
                for line in await self._pool(lines.read, [] if batch.state == "cancelling" else next):
                    task = asyncio.create_task(self._line(batch, line))
                    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # looked at here too
                    asked[task] = line.number
                if not asked:
                    return batch, aside
                aside = await _some(asked, ready) if aside is None else max(aside, await _some(asked, ready) or 0.0)
        except asyncio.CancelledError:  # the server's time to drain is over
            done = [each.result() for each in asked if each.done() and not each.cancelled() and not each.exception()]
            answers = [*ready, *(each for each in done if isinstance(each, Answer))]
            with suppress(TurretError):
                self._batches.keep(batch, answers)  # the loop ends here, so without a thread
            raise
        finally:
            for task in asked:
                task.cancel()

    async def _keep(self, batch: Batch, answers: Sequence[Answer], asking: Sequence[int]) -> Batch:
        """Keep answers, also those that had to wait until the store could be reached again."""
        until = time.monotonic() + KEEP_SECONDS
        while True:
            try:
                return await self._pool(self._batches.keep, batch, list(answers), asking)
            except StoreError as error:
                if isinstance(error, LeaseLost) or time.monotonic() > until:
                    raise
                self._report(error)
                await asyncio.sleep(POLL_SECONDS)

    async def _line(self, batch: Batch, line: Line) -> Answer | float:
        """The answer of a line, or the seconds after which it may be asked again."""
        caller = self._services.guard.caller_of(batch.owner)
        if caller is None:
            raise BadRequest("the token that made this batch is not valid any more: make the batch with another one")
        state: RequestState = {"caller": caller, "priority": LOW_PRIORITY}
        status, headers, body = await answer_of_route(self._routes, batch.endpoint, line.body, state, _nobody_leaves)
        if status in AGAIN:
            return float(headers.get("retry-after") or 1)
        # The body is one JSON value, which is not decoded here: it may be large.
        response = f'{{"status_code": {status}, "request_id": {json.dumps(headers.get("x-request-id"))}, "body": '
        response += body.decode().replace("\n", " ") + "}"
        return Answer(line.number, _encode_line(line, response, "null"), status < 400)

    def _finish(self, batch: Batch, problem: str | None) -> None:
        """Put the answers and errors into files of the owner, and end the batch, in one transaction."""
        state: State = "completed" if _is_answered(batch) else "expired"
        state = "failed" if problem else "cancelled" if batch.state == "cancelling" else state
        with tempfile.TemporaryDirectory(prefix="turret-batch-") as folder:
            answers, errors = Path(folder) / "answers", Path(folder) / "errors"
            with answers.open("w", encoding="utf-8") as good, errors.open("w", encoding="utf-8") as bad:
                for each in self._batches.parts(batch):
                    (good if each.ok else bad).write(each.text)
            named = {"output": answers, "error": errors}
            written = {name: path for name, path in named.items() if path.stat().st_size}

            def end(connection: Connection, made: Sequence[ClientFile]) -> None:
                files = {f"{name}_file": file.id for name, file in zip(written, made, strict=True)}
                self._batches.end_in(connection, batch, state, error=problem, **files)

            new = [(f"{batch.id}_{name}.jsonl", f"batch_{name}", path) for name, path in written.items()]
            self._files.add_all(batch.owner, new, end)
        self._services.log.write("batch", batch=batch.id, state=state, lines=batch.done, failed=batch.failed)


async def _nobody_leaves() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


class Lines:
    """The lines of a local file, read one by one. The file is there until `close`."""

    def __init__(self, content: AbstractContextManager[Path]) -> None:
        with ExitStack() as opened:
            self.path = opened.enter_context(content)
            self._file = opened.enter_context(self.path.open("rb"))
            self._starts = array("q", [0])
            while piece := self._file.readline(READ_BYTES):  # a line may be as long as the file
                if piece.endswith(b"\n"):
                    self._starts.append(self._file.tell())
            if self._file.tell() > self._starts[-1]:
                self._starts.append(self._file.tell())
            self._opened = opened.pop_all()

    def size(self, number: int) -> int:
        """The bytes of a line; the first one is 0."""
        return self._starts[number + 1] - self._starts[number]

    def read(self, numbers: Sequence[int]) -> Sequence[Line]:
        """Lines of a file that was validated."""
        found = []
        for number in numbers:
            self._file.seek(self._starts[number])
            found.append(_parse_line(self._file.read(self.size(number)), number, None))
        return found

    def close(self) -> None:
        self._opened.close()


def choose_lines(batch: Batch, asked: Collection[int], size: Callable[[int], int]) -> list[int]:
    """The lines to ask next, beside those that are asked already. size: the bytes of a line.

    A line that was in flight when a server died is asked alone, after the others.
    """
    if any(batch.unanswered[line] for line in asked):
        return []
    left = sorted(line for line in batch.unanswered if line >= 0 and line not in asked)
    fresh = itertools.chain((line for line in left if not batch.unanswered[line]), range(batch.taken, batch.total))
    found: list[int] = []
    bytes = sum(map(size, asked))
    for line in itertools.islice(fresh, AT_ONCE - len(asked)):
        if bytes >= AT_ONCE_BYTES:
            break
        found.append(line)
        bytes += size(line)
    return found or ([] if asked else left[:1])


def _without(batch: Batch, answers: Sequence[Answer]) -> Batch:
    """The batch as it will be when these answers are kept."""
    kept = {each.line for each in answers}
    return replace(batch, unanswered={line: lost for line, lost in batch.unanswered.items() if line not in kept})


async def _some(asked: dict[asyncio.Task[Answer | float], int], ready: list[Answer]) -> float | None:
    """Move some answers to `ready`. Returns the longest time after which a line may be asked again, if one must be."""
    until, again = float("inf"), None
    while asked and len(ready) < AT_ONCE // 2:
        wait = None if until == float("inf") else max(0.0, until - time.monotonic())
        done, _ = await asyncio.wait(asked, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            break
        until = min(until, time.monotonic() + KEEP_AFTER)
        for task in done:
            said = task.result()
            if isinstance(said, Answer):
                ready.append(said)
            else:
                again = max(said, again or 0.0)
            del asked[task]
    return again


def _given_up(number: int, lines: Lines) -> Answer:
    """The answer of a line that servers died of."""
    message = f"the server died {MOST_TRIES} times while it answered this line: it is not asked again"
    problem = json.dumps({"code": "server_died", "message": message})
    return Answer(number, _encode_line(lines.read([number])[0], "null", problem), ok=False)


def _encode_line(line: Line, response: str, error: str) -> str:
    """A line of a file of answers or errors. The id is in ASCII: it may have halves of characters."""
    id, custom_id = json.dumps(f"batch_req_{secrets.token_hex(8)}"), json.dumps(line.custom_id)
    return f'{{"id": {id}, "custom_id": {custom_id}, "response": {response}, "error": {error}}}\n'


def _is_answered(batch: Batch) -> bool:
    return batch.state != "validating" and batch.done == batch.total


def _is_over(batch: Batch) -> bool:
    """Whether no line of a batch is to be asked any more."""
    return _is_answered(batch) or batch.state == "cancelling" or time.time() > batch.expires


def validate_requests(path: Path, endpoint: str, most_bytes: int) -> int:
    """The number of requests in a file, one on each line. Blank lines at its end are no requests.

    Raises:
        BadRequest: for the first line that cannot be asked.
    """
    seen: set[str] = set()
    with path.open("rb") as read:
        for number in range(1, MOST_LINES + 2):
            text = read.readline(most_bytes + 1)
            if not text:
                break
            if not text.strip():
                _check_blank_end(read, number)
                break
            if number > MOST_LINES:
                raise BadRequest(f"the file has more than {MOST_LINES} lines: split it into several batches")
            if len(text) > most_bytes:
                raise BadRequest(f"line {number} has more than {most_bytes} bytes: expected one request on each line")
            line = _parse_line(text, number - 1, endpoint)
            if line.custom_id in seen:
                raise BadRequest(f"line {number}: custom_id {quote(line.custom_id)} occurs twice: give each its own")
            seen.add(line.custom_id)
    if not seen:
        raise BadRequest("the file has no line: expected a request on each line")
    return len(seen)


def _check_blank_end(read: BinaryIO, number: int) -> None:
    """Raises BadRequest if a request follows a blank line. number: of that line, from 1."""
    while piece := read.read(READ_BYTES):
        if piece.strip():
            raise BadRequest(f"line {number} is blank: expected one request on each line")


def _parse_line(text: bytes, number: int, endpoint: str | None) -> Line:
    """A line as a request. number: from 0; endpoint: that it must name, None if it was checked before."""
    where = f"line {number + 1}"
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest(f"{where} is not JSON: expected an object with custom_id, method, url and body") from None
    expected = "expected an object with custom_id, method, url and body"
    if not isinstance(said, dict) or not isinstance(said.get("body"), dict):
        raise BadRequest(f"{where} has no body: {expected}")
    custom_id = said.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MOST_CUSTOM_ID:
        raise BadRequest(f"{where} has no custom_id of 1 to {MOST_CUSTOM_ID} characters: {expected}")
    if endpoint is not None and (said.get("method"), said.get("url")) != ("POST", endpoint):
        given = f"{quote(said.get('method'), 20)} {quote(said.get('url'), 60)}"
        raise BadRequest(f"{where} asks {given}: expected 'POST' {endpoint!r}, the batch's endpoint")
    if said["body"].get("stream"):
        raise BadRequest(f"{where} asks for a stream: leave stream out, a batch has whole answers")
    return Line(custom_id, json.dumps(said["body"]).encode(), number)
