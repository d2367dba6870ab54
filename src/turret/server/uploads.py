"""Files that clients send: over `/v1/files`, and in a form of the console. A file belongs to the token that sent it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

from fastapi import Request, params
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from turret.errors import BadRequest, plainly
from turret.server.auth import Caller
from turret.server.services import View
from turret.store.client_files import TABLE, ClientFile
from turret.workspace.queueing import require_table_name

BATCH = "batch"  # the purpose of a file with requests
PURPOSES = (BATCH, TABLE)
PIECE = 1 << 20  # bytes of a file that are in memory at a time
MOST_FIELD = 1024  # bytes of a field beside the file
FileId = Annotated[str, params.Path(min_length=1, max_length=60)]  # in an address


def owner_of(caller: Caller) -> str:
    """Whose files and batches a caller has; "" on a server without tokens."""
    return "" if caller.name is None else caller.key


async def read_form(request: Request) -> FormData:
    """The form of a request with one file. Close the form or the request afterwards. Raises BadRequest."""
    try:
        return await request.form(max_files=1, max_fields=8, max_part_size=MOST_FIELD)
    except HTTPException as error:
        raise BadRequest(f"the form cannot be read: {error.detail}") from None


async def keep(view: View, owner: str, sent: UploadFile, purpose: str) -> ClientFile:
    """Store a file of a form. Raises BadRequest, or DataError for a table whose name is not that of one."""
    name = sent.filename or ""
    if "\0" in name:
        raise BadRequest("the name of the file has a NUL character: give another name")
    if purpose == TABLE:
        require_table_name(name)
    return await view.control(_add, view, owner, sent, purpose)


def _add(view: View, owner: str, sent: UploadFile, purpose: str) -> ClientFile:
    with tempfile.TemporaryDirectory(prefix="turret-file-") as folder:
        path = Path(folder) / "sent"
        with path.open("wb") as write:
            shutil.copyfileobj(sent.file, write, PIECE)
        return view.services.files.add(owner, plainly(sent.filename or "file")[:255], purpose, path)
