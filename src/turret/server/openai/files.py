"""`/v1/files`: tables, batches and their answers, in OpenAI's format. A file belongs to the token that sent it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Annotated, BinaryIO, Literal

from fastapi import Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from turret.errors import BadRequest
from turret.json_types import JsonObject
from turret.server.routes import PIECE, PURPOSES, FileId, View, keep, owner_of, read_form, router
from turret.store.client_files import ClientFile

questions = router("infer")
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


@questions.post("/v1/files", openapi_extra=UPLOAD)
async def upload(view: View, request: Request) -> FileObject:
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
        return _shown(await keep(view, owner_of(request.state.caller), sent, purpose))
    finally:
        await form.close()


@questions.get("/v1/files")
async def list_files(
    view: View,
    request: Request,
    purpose: Annotated[str | None, Query(max_length=32)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=60)] = None,
) -> Files:
    """The caller's files, the newest first."""
    owner = owner_of(request.state.caller)
    found = await view.control(view.services.files.listed, owner, purpose=purpose, after=after, limit=limit + 1)
    shown = [_shown(each) for each in found[:limit]]
    return Files(
        data=shown,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(found) > limit,
    )


@questions.get("/v1/files/{file_id}/content", response_class=StreamingResponse, responses=CONTENT)
async def read_file(file_id: FileId, view: View, request: Request) -> StreamingResponse:
    """The bytes of a file, checked against its digest before the first one is sent."""
    found = await view.control(view.services.files.find, owner_of(request.state.caller), file_id)
    opened = ExitStack()
    read = await view.control(_opened, opened, view, found)  # now: it may be deleted before the last piece is sent

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while piece := await run_in_threadpool(read.read, PIECE):
                yield piece
        finally:
            opened.close()  # not on a thread: the loop may be ending

    return StreamingResponse(
        pieces(), media_type="application/octet-stream", headers={"content-length": str(found.blob.bytes)}
    )


def _opened(opened: ExitStack, view: View, file: ClientFile) -> BinaryIO:
    return opened.enter_context(opened.enter_context(view.services.files.content(file)).open("rb"))


@questions.get("/v1/files/{file_id}")
async def show_file(file_id: FileId, view: View, request: Request) -> FileObject:
    """One of the caller's files."""
    return _shown(await view.control(view.services.files.find, owner_of(request.state.caller), file_id))


@questions.delete("/v1/files/{file_id}")
async def delete_file(file_id: FileId, view: View, request: Request) -> DeletedFile:
    """Delete a file. It is refused while a batch that has not ended reads it."""
    owner = owner_of(request.state.caller)
    await view.control(view.services.files.delete, owner, file_id)
    return DeletedFile(id=file_id)


def _shown(file: ClientFile) -> FileObject:
    return FileObject(
        id=file.id, bytes=file.blob.bytes, created_at=file.created, filename=file.name, purpose=file.purpose
    )
