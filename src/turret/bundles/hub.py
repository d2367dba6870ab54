"""Files to the Hub in one commit, and which commit of a repository is the newest.

The token is huggingface_hub's own: HF_TOKEN, or what `hf auth login` stored. It is never part of an error. A Hub that
does not answer is given up after `PATIENCE` seconds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub import errors as hub
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from turret.errors import HubError, listed, one_line

PATIENCE = 15.0  # seconds without an answer
TAG = "turret"  # in the front matter of every card that turret writes
OF_GIT = {".gitattributes"}  # the Hub's own file of a new repository
ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class Commit:
    """A commit that a push made, or found if nothing has changed."""

    id: str
    url: str
    private: bool
    created: bool  # the repository is new
    changed: bool  # the commit is new


def check_id(hub_id: str) -> str:
    """The id of a repository. Raises HubError unless it is OWNER/NAME."""
    if not ID.fullmatch(hub_id) or ".." in hub_id or "--" in hub_id:
        raise HubError(f"{one_line(hub_id, 60)!a} is no id of the Hub: expected OWNER/NAME, such as me/sentiment")
    return hub_id


def push(folder: Path, hub_id: str, message: str, *, ours: Collection[str], public: bool, force: bool) -> Commit:
    """Make the repository hold the files of `folder`, in one commit. A new repository is private unless `public`.

    Args:
        ours: names that such a folder can have; those that are not in it are removed from the repository.
        force: also replace files that turret did not write.

    Raises:
        HubError: the Hub cannot be reached or refuses, or the repository holds something else.
    """
    api = huggingface_hub.HfApi()
    with bounded(), _plain_errors(hub_id):
        info, created = _info(api, hub_id), False
        if info is None:
            api.create_repo(check_id(hub_id), private=not public)
            info, created = api.model_info(hub_id, timeout=PATIENCE), True
        there = {each.rfilename for each in info.siblings or ()}
        if not force:
            _refuse_foreign(hub_id, there, info.tags or ())
        new = {path.name for path in folder.iterdir()}
        operations: list[huggingface_hub.CommitOperationAdd | huggingface_hub.CommitOperationDelete] = [
            huggingface_hub.CommitOperationAdd(name, folder / name) for name in sorted(new)
        ]
        operations += [huggingface_hub.CommitOperationDelete(name) for name in sorted(there & set(ours) - new)]
        made = api.create_commit(hub_id, operations, commit_message=message, parent_commit=info.sha)
    return Commit(
        made.oid, f"{api.endpoint}/{hub_id}", private=bool(info.private), created=created, changed=made.oid != info.sha
    )


def newest(hub_id: str, revision: str | None) -> str:
    """The commit of a branch, a tag or a commit; None: of the main branch.

    Raises:
        HubError: there is no such repository or revision, or the Hub cannot be reached (`unreachable` is True).
    """
    with bounded(), _plain_errors(hub_id):
        info = huggingface_hub.HfApi().model_info(hub_id, revision=revision, timeout=PATIENCE)
        return str(info.sha)


def _info(api: huggingface_hub.HfApi, hub_id: str) -> huggingface_hub.ModelInfo | None:
    """What the Hub says of a repository; None if there is none that this token may see."""
    try:
        return api.model_info(hub_id, timeout=PATIENCE)
    except (hub.GatedRepoError, hub.DisabledRepoError):
        raise
    except hub.RepositoryNotFoundError:
        return None


def _refuse_foreign(hub_id: str, there: Collection[str], tags: Collection[str]) -> None:
    foreign = sorted(set(there) - OF_GIT)
    if foreign and TAG not in tags:
        raise HubError(
            f"{hub_id} holds {listed(foreign, 60)}, which turret did not write: choose another name, or give --force, "
            "which replaces files of the same names"
        )


@contextmanager
def bounded() -> Iterator[None]:
    """In the block no request of huggingface_hub waits longer than PATIENCE, and it prints nothing."""
    session, shown, level = huggingface_hub.get_session(), not are_progress_bars_disabled(), hub_logging.get_verbosity()
    before = session.timeout
    session.timeout = httpx2.Timeout(PATIENCE)
    hub_logging.set_verbosity(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        session.timeout = before
        hub_logging.set_verbosity(level)
        if shown:
            enable_progress_bars()


@contextmanager
def _plain_errors(hub_id: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError of one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
        cause: Exception = error
        while isinstance(cause, RuntimeError) and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__  # huggingface_hub wraps what an upload raises
        raise _plain(hub_id, cause) from None


def _plain(hub_id: str, error: Exception) -> HubError:
    if isinstance(error, (hub.GatedRepoError, hub.DisabledRepoError)):
        return HubError(f"{hub_id}: the Hub denies access: accept its licence there, and log in with `hf auth login`")
    if isinstance(error, hub.RevisionNotFoundError):
        return HubError(f"{hub_id} has no such revision on the Hub: name one of its branches, tags or commits")
    if isinstance(error, hub.HfHubHTTPError):
        status = error.response.status_code
        return HubError(_refusal(hub_id, status), unreachable=status >= 500)
    if isinstance(error, hub.OfflineModeIsEnabled):
        return HubError(f"{hub_id}: HF_HUB_OFFLINE is set, so the Hub is not asked: unset it", unreachable=True)
    if isinstance(error, httpx2.TimeoutException):
        return HubError(f"{hub_id}: the Hub did not answer for {PATIENCE:g} seconds: try again later", unreachable=True)
    if isinstance(error, httpx2.HTTPError):
        return HubError(f"{hub_id}: the Hub cannot be reached ({type(error).__name__}): try again", unreachable=True)
    return HubError(f"{hub_id}: {one_line(str(error), 160)}: check the id, and try again")


def _refusal(hub_id: str, status: int) -> str:
    """The error for an answer of the Hub, in words of our own: the answer may repeat what was sent."""
    if status == 401:
        return f"{hub_id} is not there, or wants a token: check the name, log in with `hf auth login` or set HF_TOKEN"
    if status == 403:
        return f"{hub_id}: the token may not write there: use one with write access, or an owner that is yours"
    if status == 404:
        return f"{hub_id} is not on the Hub, or the token may not see it: check the name, or use `hf auth login`"
    if status in (409, 412):
        return f"{hub_id} was changed by another push at the same time: try again"
    if status == 429:
        return f"{hub_id}: the Hub has too many requests from here: wait a few minutes, and try again"
    return f"{hub_id}: the Hub answered {status}: try again later"
