"""`/v1/files`: files of batches and their answers, in OpenAI's format. A file belongs to the token that sent it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path as LocalPath
from typing import Annotated, BinaryIO, Literal

from fastapi import Path, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from turret.errors import BadRequest, plainly
from turret.json_types import JsonObject
from turret.server.auth import Caller
from turret.server.routes import State, router
from turret.server.state import ServerState
from turret.store.client_files import ClientFile

questions = router("infer")
BATCH = "batch"  # the purpose of a file with requests
PIECE = 1 << 20  # bytes of a file that are in memory at a time
MOST_FIELD = 1024  # bytes of a field beside the file
FileId = Annotated[str, Path(min_length=1, max_length=60)]
_FORM: JsonObject = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "const": BATCH}},
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


class Files(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def owner_of(caller: Caller) -> str:
    """Whose files and batches a caller has; "" on a server without tokens."""
    return "" if caller.name is None else caller.key


@questions.post("/v1/files", openapi_extra=UPLOAD)
async def upload(state: State, request: Request) -> FileObject:
    """Send a file with a request on each line, for a batch. The body is `multipart/form-data`."""
    try:
        form = await request.form(max_files=1, max_fields=8, max_part_size=MOST_FIELD)
    except HTTPException as error:
        raise BadRequest(f"the form cannot be read: {error.detail}") from None
    try:
        sent, purpose = form.get("file"), form.get("purpose")
        if unknown := next((name for name in form if name not in ("file", "purpose")), None):
            raise BadRequest(f"{ascii(unknown)[:60]}: unknown key, expected file and purpose")
        if not isinstance(sent, UploadFile):
            raise BadRequest("file: expected a file in a form (multipart/form-data)")
        if purpose != BATCH:
            raise BadRequest(f"purpose {ascii(purpose)[:40]}: expected {BATCH}")
        if "\0" in (sent.filename or ""):
            raise BadRequest("the name of the file has a NUL character: give another name")
        return _shown(await state.control(_add, state, owner_of(request.state.caller), sent))
    finally:
        await form.close()


def _add(state: ServerState, owner: str, sent: UploadFile) -> ClientFile:
    with tempfile.TemporaryDirectory(prefix="turret-file-") as folder:
        path = LocalPath(folder) / "sent"
        with path.open("wb") as write:
            shutil.copyfileobj(sent.file, write, PIECE)
        return state.files.add(owner, plainly(sent.filename or "file")[:255], BATCH, path)


@questions.get("/v1/files")
async def list_files(
    state: State,
    request: Request,
    purpose: Annotated[str | None, Query(max_length=32)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=60)] = None,
) -> Files:
    """The caller's files, the newest first."""
    owner = owner_of(request.state.caller)
    found = await state.control(state.files.listed, owner, purpose=purpose, after=after, limit=limit + 1)
    shown = [_shown(each) for each in found[:limit]]
    return Files(
        data=shown,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(found) > limit,
    )


@questions.get("/v1/files/{file_id}/content", response_class=StreamingResponse, responses=CONTENT)
async def read_file(file_id: FileId, state: State, request: Request) -> StreamingResponse:
    """The bytes of a file, checked against its digest before the first one is sent."""
    found = await state.control(state.files.find, owner_of(request.state.caller), file_id)
    opened = ExitStack()
    read = await state.control(_opened, opened, state, found)  # now: it may be deleted before the last piece is sent

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while piece := await run_in_threadpool(read.read, PIECE):
                yield piece
        finally:
            opened.close()  # not on a thread: the loop may be ending

    return StreamingResponse(
        pieces(), media_type="application/octet-stream", headers={"content-length": str(found.blob.bytes)}
    )


def _opened(opened: ExitStack, state: ServerState, file: ClientFile) -> BinaryIO:
    return opened.enter_context(opened.enter_context(state.files.content(file)).open("rb"))


@questions.get("/v1/files/{file_id}")
async def show_file(file_id: FileId, state: State, request: Request) -> FileObject:
    """One of the caller's files."""
    return _shown(await state.control(state.files.find, owner_of(request.state.caller), file_id))


@questions.delete("/v1/files/{file_id}")
async def delete_file(file_id: FileId, state: State, request: Request) -> DeletedFile:
    """Delete a file. It is refused while a batch that has not ended reads it."""
    owner = owner_of(request.state.caller)
    await state.control(state.files.delete, owner, file_id)
    return DeletedFile(id=file_id)


def _shown(file: ClientFile) -> FileObject:
    return FileObject(
        id=file.id, bytes=file.blob.bytes, created_at=file.created, filename=file.name, purpose=file.purpose
    )
