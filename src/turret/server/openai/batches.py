"""`/v1/batches`: many requests in one file, answered in the background, in OpenAI's format."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Path, Query, Request
from pydantic import BaseModel, Field

from turret.errors import BadRequest
from turret.server.routes import BATCH, Model, View, owner_of, router
from turret.store.batches import Batch

questions = router("infer")
BatchId = Annotated[str, Path(min_length=1, max_length=60)]
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


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


@questions.post("/v1/batches")
async def create_batch(body: BatchRequest, view: View, request: Request) -> BatchObject:
    """Queue a file of requests. They are answered with a lower priority than all others, also after a restart."""
    return _shown(await view.control(_add, view, owner_of(request.state.caller), body))


def _add(view: View, owner: str, body: BatchRequest) -> Batch:
    file = view.services.files.find(owner, body.input_file_id)
    if file.purpose != BATCH:
        raise BadRequest(f"{file.id} has the purpose {file.purpose}: expected a file of the purpose {BATCH}")
    return view.services.batches.add(owner, body.endpoint, file.id, body.metadata)


@questions.get("/v1/batches")
async def list_batches(
    view: View,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=60)] = None,
) -> BatchList:
    """The caller's batches, the newest first."""
    owner = owner_of(request.state.caller)
    found = await view.control(view.services.batches.listed, owner, after=after, limit=limit + 1)
    shown = [_shown(each) for each in found[:limit]]
    return BatchList(
        data=shown,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(found) > limit,
    )


@questions.get("/v1/batches/{batch_id}")
async def show_batch(batch_id: BatchId, view: View, request: Request) -> BatchObject:
    """One of the caller's batches."""
    return _shown(await view.control(view.services.batches.find, owner_of(request.state.caller), batch_id))


@questions.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(batch_id: BatchId, view: View, request: Request) -> BatchObject:
    """End a batch early. What is answered by then stays, in the output file."""
    return _shown(await view.control(view.services.batches.cancel, owner_of(request.state.caller), batch_id))


def _shown(batch: Batch) -> BatchObject:
    errors = None
    if batch.error is not None:
        errors = BatchErrors(data=[BatchError(code="invalid_request", message=batch.error)])
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
