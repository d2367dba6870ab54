"""`/v1/files` and `/v1/batches`: sent and read by OpenAI's own client, kept in the store, per owner."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from server.echo import FINGERPRINT, KILLER, LABELS, words
from sqlalchemy import select
from store.bundles import tensors, write_bundle

from turret.database import batches
from turret.errors import StoreError
from turret.server.limits import RequestLimits
from turret.server.openai import batches as batch_routes
from turret.store import client_files, usage
from turret.store.batches import MOST_TRIES, Batches
from turret.workspace import Workspace

TESTS = Path(__file__).parents[1]


def client_of(running: Any, token: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=token, max_retries=0)


def line(number: int, **more: Any) -> dict[str, Any]:
    body = {"model": "a", "prompt": f"text {number}"}
    return {"custom_id": f"n{number}", "method": "POST", "url": "/v1/completions", "body": body} | more


def sent(client: openai.OpenAI, lines: list[dict[str, Any]], endpoint: str = "/v1/completions") -> Any:
    return sent_text(client, "".join(json.dumps(each) + "\n" for each in lines), endpoint)


def sent_text(client: openai.OpenAI, content: str, endpoint: str = "/v1/completions") -> Any:
    file = client.files.create(file=("requests.jsonl", io.BytesIO(content.encode())), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")  # type: ignore[arg-type]


def ended(client: openai.OpenAI, batch: Any, seconds: float = 20) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = client.batches.retrieve(batch.id)
        if found.status in ("completed", "failed", "cancelled", "expired"):
            return found
        time.sleep(0.05)
    raise AssertionError(client.batches.retrieve(batch.id))


def read(client: openai.OpenAI, file: str | None) -> dict[str, dict[str, Any]]:
    if file is None:
        return {}
    lines = [json.loads(each) for each in client.files.content(file).text.splitlines()]
    assert len({each["custom_id"] for each in lines}) == len(lines)
    return {each["custom_id"]: each["response"] for each in lines}


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(batch_routes, "POLL_SECONDS", 0.02)


@pytest.fixture
def clients() -> Iterator[Callable[..., openai.OpenAI]]:
    opened: list[openai.OpenAI] = []

    def make(running: Any, token: str = "none") -> openai.OpenAI:
        opened.append(client_of(running, token))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def test_every_line_of_a_batch_is_answered_as_a_request_would_be(serve, put, clients) -> None:
    version = put()
    running = serve()
    client = clients(running)
    wrong = line(40, body={"model": "a", "prompt": "x", "max_tokens": -1})
    batch = ended(client, sent(client, [*(line(number) for number in range(40)), wrong]))
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (41, 40, 1)
    answers, errors = read(client, batch.output_file_id), read(client, batch.error_file_id)
    assert list(answers) == [f"n{number}" for number in range(40)]
    for number in range(40):
        said = answers[f"n{number}"]
        assert said["status_code"] == 200
        assert said["body"]["choices"][0]["text"] == "".join(words(version.digest, f"text {number}"))
    assert errors["n40"]["status_code"] == 400
    assert errors["n40"]["body"]["error"]["param"] == "max_tokens"
    assert set(running.engine.priorities) == {-1}  # below every other request


@pytest.mark.slow
def test_a_batch_of_embeddings_and_one_of_chats(serve, put, clients) -> None:
    put()
    client = clients(serve())
    for url, body in (
        ("/v1/embeddings", {"model": "echo", "input": "x"}),
        ("/v1/chat/completions", {"model": "a", "messages": [{"role": "user", "content": "x"}]}),
    ):
        batch = ended(client, sent(client, [line(1, url=url, body=body)], url))
        assert (batch.status, batch.request_counts.completed) == ("completed", 1)
        (answer,) = read(client, batch.output_file_id).values()
        assert answer["body"]["object"] in ("list", "chat.completion")


def test_a_file_that_cannot_be_asked_fails_with_its_line(serve, put, clients) -> None:
    put()
    client = clients(serve())
    for lines, message, number in (
        ([line(1), line(1)], "line 2: custom_id 'n1' occurs twice", 2),
        ([line(1, url="/v1/classify")], "line 1 asks 'POST' '/v1/classify'", 1),
        ([line(1, body=None)], "line 1 has no body", 1),
        ([line(1, body={"model": "a", "prompt": "x", "stream": True})], "line 1 asks for a stream", 1),
        ([], "the file has no line", None),
    ):
        batch = ended(client, sent(client, lines))
        assert batch.status == "failed"
        assert message in batch.errors.data[0].message
        assert batch.errors.data[0].line == number
        assert batch.output_file_id is None


def test_blank_lines_at_the_end_of_a_file_are_no_requests(serve, put, clients, monkeypatch) -> None:
    monkeypatch.setattr(batch_routes, "MOST_LINES", 2)
    put()
    client = clients(serve())
    lines = [json.dumps(line(number)) for number in range(2)]
    for content, status, message in (
        ("\n".join(lines) + "\n\n", "completed", ""),
        ("\n".join(lines) + "\n\r\n \n\n  ", "completed", ""),
        ("\n\n".join(lines), "failed", "line 2 is blank"),
        ("\n\n", "failed", "the file has no line"),
    ):
        batch = ended(client, sent_text(client, content))
        assert batch.status == status, batch
        assert message in ("" if batch.errors is None else batch.errors.data[0].message)
        if status == "completed":
            assert (batch.request_counts.total, batch.request_counts.completed) == (2, 2)
            assert list(read(client, batch.output_file_id)) == ["n0", "n1"]


def test_a_file_of_too_many_lines_is_refused_before_any_is_asked(serve, put, clients, monkeypatch) -> None:
    monkeypatch.setattr(batch_routes, "MOST_LINES", 30)
    put()
    running = serve()
    client = clients(running)
    batch = ended(client, sent(client, [line(number) for number in range(31)]))
    assert "more than 30 lines" in batch.errors.data[0].message
    assert running.engine.priorities == []


@pytest.mark.slow
def test_a_batch_goes_on_in_another_server_and_asks_no_answered_line_again(
    serve, put, workspace, clients, until
) -> None:
    put()
    first = serve(pace=0.1)
    client = clients(first)
    batch = sent(client, [line(number) for number in range(64)])
    until(lambda: 0 < client.batches.retrieve(batch.id).request_counts.completed < 64)
    first.stop()
    with workspace.store.database().reading() as connection:
        kept = connection.execute(select(batches.c.done).where(batches.c.id == batch.id)).scalar_one()
    second = serve()
    client = clients(second)
    done = ended(client, batch)
    assert (done.status, done.request_counts.completed) == ("completed", 64)
    assert list(read(client, done.output_file_id)) == [f"n{number}" for number in range(64)]
    assert len(second.engine.priorities) == 64 - kept


@pytest.mark.slow
def test_a_cancelled_batch_keeps_what_was_answered(serve, put, clients, until) -> None:
    put()
    client = clients(serve(pace=0.02))
    batch = sent(client, [line(number) for number in range(200)])
    until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = ended(client, batch)
    assert done.status == "cancelled"
    assert 0 < done.request_counts.completed < 200
    assert len(read(client, done.output_file_id)) == done.request_counts.completed
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


@pytest.mark.slow
def test_files_and_batches_belong_to_the_token_that_made_them(serve, put, workspace, clients) -> None:
    put()
    tokens = [workspace.tokens.create(name, scopes=("infer",))[1] for name in ("one", "two")]
    running = serve()
    mine, other = (clients(running, token) for token in tokens)
    batch = ended(mine, sent(mine, [line(1)]))
    assert [each.id for each in mine.batches.list()] == [batch.id]
    assert {each.purpose for each in mine.files.list()} == {"batch", "batch_output"}
    assert list(other.files.list()) == list(other.batches.list()) == []
    for ask in (
        lambda: other.batches.retrieve(batch.id),
        lambda: other.batches.cancel(batch.id),
        lambda: other.files.retrieve(batch.input_file_id),
        lambda: other.files.content(batch.output_file_id),
        lambda: other.files.delete(batch.input_file_id),
        lambda: other.batches.create(
            input_file_id=batch.input_file_id, endpoint="/v1/completions", completion_window="24h"
        ),
    ):
        with pytest.raises(openai.NotFoundError):
            ask()
    assert mine.files.delete(batch.input_file_id).deleted
    assert batch.input_file_id not in {each.id for each in mine.files.list()}


@pytest.mark.slow
def test_a_batch_of_a_revoked_token_fails(serve, put, workspace, clients, until) -> None:
    put()
    _, token = workspace.tokens.create("gone", scopes=("infer",))
    _, other = workspace.tokens.create("boss", scopes=("infer",))
    running = serve(pace=0.02)
    client = clients(running, token)
    batch = sent(client, [line(number) for number in range(200)])
    until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
    workspace.tokens.revoke("gone")
    until(lambda: running.served.batches.find("token gone", batch.id).ended, seconds=10)
    assert "not valid any more" in str(running.served.batches.find("token gone", batch.id).error)
    assert clients(running, other).models.list()


@pytest.mark.slow
def test_a_spent_quota_makes_a_batch_wait_and_not_fail(serve, put, workspace, clients) -> None:
    put()
    _, token = workspace.tokens.create("few", scopes=("infer",), requests_per_minute=300)
    client = clients(serve(), token)
    started = time.monotonic()
    batch = ended(client, sent(client, [line(number) for number in range(310)]), seconds=60)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (310, 0)
    assert time.monotonic() - started > 1.5  # 10 of them had to wait for 5 a second


@pytest.mark.slow
def test_a_million_lines_are_refused_without_being_in_memory(serve, put, clients, tmp_path) -> None:
    put()
    running = serve()
    client = clients(running)
    path = tmp_path / "requests.jsonl"
    with path.open("w") as write:
        write.writelines(json.dumps(line(number)) + "\n" for number in range(1_000_000))
    before = psutil.Process().memory_info().rss
    file = client.files.create(file=path, purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    batch = ended(client, batch, seconds=60)
    assert "more than 50000 lines" in batch.errors.data[0].message
    assert psutil.Process().memory_info().rss - before < path.stat().st_size


@contextmanager
def started(store: object, pace: str = "0.02", **named: str) -> Iterator[tuple[openai.OpenAI, subprocess.Popen[str]]]:
    """A client of a server in a process of its own, which is killed at the end of the block, and the process."""
    command = [sys.executable, str(TESTS / "server" / "echo_server.py"), str(store), pace]
    words = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])} | named
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True, env=words) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                yield client, process
        finally:
            process.kill()


@contextmanager
def killed(store: Path) -> Iterator[openai.OpenAI]:
    with started(store) as (client, _):
        yield client


@pytest.mark.slow
def test_a_batch_goes_on_after_a_kill(workspace, put, until) -> None:
    put()
    with killed(workspace.store.root) as client:
        batch = sent(client, [line(number) for number in range(150)])
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 20, seconds=20)
    with killed(workspace.store.root) as client:
        done = ended(client, batch, seconds=30)
        assert (done.status, done.request_counts.completed) == ("completed", 150)
        assert list(read(client, done.output_file_id)) == [f"n{number}" for number in range(150)]


def asked(workspace: Any) -> int:
    """The requests that were counted."""
    return sum(each.requests for each in usage.read_usage(workspace.store.database(make=True)))


@pytest.fixture(params=["folder", "url"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path, new_url: Callable[..., str]) -> Workspace:
    """A store in a folder, or on PostgreSQL and S3, with an adapter `a`."""
    workspace = Workspace(tmp_path / "store" if request.param == "folder" else new_url())
    said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}, "task": {"kind": "classify", "labels": list(LABELS)}}
    workspace.store.put("a", write_bundle(tmp_path / "bundles", tensors(1), said=said))
    return workspace


@pytest.mark.slow
def test_no_line_that_was_answered_is_asked_again_after_sigterm(anywhere, until) -> None:
    prompts = ["a" + " word" * (number % 12) for number in range(80)]  # so that lines in flight end at other times
    lines = [line(number, body={"model": "a", "prompt": prompt}) for number, prompt in enumerate(prompts)]
    batch, stops = None, 0
    while True:
        with started(anywhere.store, "0.1") as (client, process):
            batch = batch or sent(client, lines)
            least = min(80, client.batches.retrieve(batch.id).request_counts.completed + 15)
            until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= least, seconds=60)  # noqa: B023
            done = ended(client, batch) if least == 80 else None
            answers = read(client, done.output_file_id) if done else {}
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
            if done:
                break
            stops += 1
    assert stops >= 2
    assert (done.status, list(answers)) == ("completed", [f"n{number}" for number in range(80)])
    assert asked(anywhere) == 80


@pytest.mark.slow
def test_a_line_that_kills_the_server_fails_after_three_tries_and_the_others_are_answered(anywhere, until) -> None:
    lines = [line(number) for number in range(40)]
    lines[7] = line(7, body={"model": "a", "prompt": KILLER})
    batch, deaths = None, 0
    for _ in range(6):
        with started(anywhere.store, "0.01", TURRET_LEASE_SECONDS="1.0") as (client, process):
            batch = batch or sent(client, lines)
            until(lambda: process.poll() is not None or client_says_ended(client, batch), seconds=60)  # noqa: B023
            if process.poll() is None:
                done = client.batches.retrieve(batch.id)
                answers, errors = read(client, done.output_file_id), client.files.content(done.error_file_id).text
                break
            deaths += 1
    assert deaths == MOST_TRIES
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 39, 1)
    assert list(answers) == [f"n{number}" for number in range(40) if number != 7]
    (error,) = map(json.loads, errors.splitlines())
    assert (error["custom_id"], error["response"], error["error"]["code"]) == ("n7", None, "server_died")


def client_says_ended(client: openai.OpenAI, batch: Any) -> bool:
    try:
        return client.batches.retrieve(batch.id).status in ("completed", "failed")
    except openai.APIConnectionError:
        return False


@pytest.mark.slow
def test_a_server_killed_while_it_ends_a_batch_leaves_one_file_of_answers(anywhere, until) -> None:
    for _ in range(2):
        with started(anywhere.store, "0", TURRET_LEASE_SECONDS="1.0", ECHO_DIES_IN_FINISH="1") as (client, process):
            if _ == 0:
                batch = sent(client, [line(1), line(2, body={"model": "a", "prompt": "x", "max_tokens": -1})])
            until(lambda: process.poll() is not None, seconds=30)
    with started(anywhere.store, "0", TURRET_LEASE_SECONDS="1.0") as (client, _process):
        done = ended(client, batch, seconds=30)
        purposes = sorted(each.purpose for each in client.files.list())
    assert (done.status, purposes) == ("completed", ["batch", "batch_error", "batch_output"])
    assert asked(anywhere) <= 2


def test_a_batch_whose_owner_has_spent_its_quota_holds_up_no_other(serve, put, workspace, clients, until) -> None:
    put()
    _, spent = workspace.tokens.create("spent", scopes=("infer",), requests_per_minute=1)
    _, other = workspace.tokens.create("other", scopes=("infer",))
    running = serve()
    stuck, free = clients(running, spent), clients(running, other)
    first = sent(stuck, [line(number) for number in range(5)])
    until(lambda: stuck.batches.retrieve(first.id).request_counts.completed == 1, seconds=20)  # then its quota is spent
    second = ended(free, sent(free, [line(number) for number in range(40)]))
    assert (second.status, second.request_counts.completed) == ("completed", 40)
    waiting = stuck.batches.retrieve(first.id)
    assert (waiting.status, waiting.request_counts.completed) == ("in_progress", 1)
    stuck.batches.cancel(first.id)
    assert ended(stuck, first).status == "cancelled"


@pytest.mark.slow
def test_a_batch_without_a_limit_of_its_owner_is_answered_in_the_same_time(serve, put, workspace, clients) -> None:
    """The control of the test before: the first batch ends too, if no quota stops it."""
    put()
    tokens = [workspace.tokens.create(name, scopes=("infer",))[1] for name in ("one", "two")]
    one, two = (clients(running, token) for running in [serve()] for token in tokens)
    first, second = sent(one, [line(number) for number in range(5)]), sent(two, [line(number) for number in range(40)])
    assert (ended(one, first).status, ended(two, second).status) == ("completed", "completed")


def test_tenants_take_turns_so_a_long_batch_does_not_hold_up_a_short_one(
    serve, put, workspace, clients, monkeypatch
) -> None:
    monkeypatch.setattr(batch_routes, "TURN_SECONDS", 0.2)
    put()
    tokens = [workspace.tokens.create(name, scopes=("infer",))[1] for name in ("long", "short")]
    running = serve(pace=0.01)
    long, short = (clients(running, token) for token in tokens)
    batches = [sent(long, [line(number) for number in range(2000)]) for _ in range(2)]
    quick = ended(short, sent(short, [line(number) for number in range(10)]))
    assert quick.status == "completed"
    assert {long.batches.retrieve(each.id).status for each in batches} <= {"in_progress", "validating"}


def test_outputs_that_do_not_fit_end_a_batch_with_a_reason_and_no_other(
    serve, put, workspace, clients, monkeypatch
) -> None:
    put()
    tokens = [workspace.tokens.create(name, scopes=("infer",))[1] for name in ("full", "other")]
    running = serve()
    full, other = (clients(running, token) for token in tokens)
    big = full.files.create(file=("big", b"x" * 20_000), purpose="batch")
    monkeypatch.setattr(client_files, "MOST_BYTES", 22_000)
    first = sent(full, [line(number) for number in range(12)])
    second = ended(other, sent(other, [line(number) for number in range(12)]))
    first = ended(full, first)
    assert (second.status, first.status) == ("completed", "failed")
    assert "delete some files" in first.errors.data[0].message
    full.files.delete(big.id)
    assert ended(full, sent(full, [line(number) for number in range(12)])).status == "completed"


def test_a_custom_id_with_half_a_character_keeps_all_answers(serve, put, clients) -> None:
    put()
    client = clients(serve())
    lines = [line(1), line(2, custom_id="half \ud800"), line(3, custom_id="whole \N{WAVE DASH}")]
    batch = ended(client, sent(client, lines))
    assert (batch.status, batch.request_counts.completed) == ("completed", 3)
    assert set(read(client, batch.output_file_id)) == {"n1", "half \ud800", "whole \N{WAVE DASH}"}


@pytest.mark.slow
def test_the_claim_of_a_batch_is_renewed_after_a_store_that_did_not_answer(
    serve, put, clients, until, monkeypatch
) -> None:
    put()
    renewed: list[bool] = []
    renew = Batches.renew

    def fails_at_first(self: Batches, batch: Any) -> None:
        renewed.append(len(renewed) > 1)
        if not renewed[-1]:
            raise StoreError("the store does not answer")
        renew(self, batch)

    monkeypatch.setattr(batch_routes, "BEATS", 30.0 / 0.05)
    monkeypatch.setattr(Batches, "renew", fails_at_first)
    client = clients(serve(pace=0.05))
    batch = sent(client, [line(number, body={"model": "a", "prompt": "x " * 30}) for number in range(20)])
    until(lambda: sum(renewed) > 1, seconds=30)
    assert renewed[:2] == [False, False]
    assert ended(client, batch, seconds=60).status == "completed"


def test_a_damaged_file_fails_its_batch_and_no_other(serve, put, workspace, clients) -> None:
    put()
    running = serve()
    client = clients(running)
    content = json.dumps(line(1)).encode()
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    (blob,) = [blob for blob in (workspace.store.root / "blobs").rglob("*") if blob.is_file() and same(blob, content)]
    blob.chmod(0o644)
    blob.write_bytes(content.replace(b"text", b"tent"))
    first = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    second = sent(client, [line(1)])
    assert "damaged" in ended(client, first).errors.data[0].message
    assert ended(client, second).status == "completed"


def same(path: Path, content: bytes) -> bool:
    return path.stat().st_size == len(content) and path.read_bytes() == content


def test_a_file_beyond_the_limit_is_413_and_what_is_no_form_is_415(serve, put) -> None:
    put()
    client = serve(limits=RequestLimits(file_bytes=1000)).client()
    got = client.post("/v1/files", files={"file": ("x", b"x" * 2000)}, data={"purpose": "batch"})
    assert (got.status_code, got.json()["error"]["code"]) == (413, "too_large")
    got = client.post("/v1/files", files={"file": ("x", b"x" * 100)}, data={"purpose": "vision"})
    said = "purpose 'vision': expected batch or fine-tune"
    assert (got.status_code, got.json()["error"]["message"]) == (400, said)
    assert client.post("/v1/files", json={"file": "x"}).status_code == 415
    assert client.post("/v1/files", data={"purpose": "batch"}).status_code in (400, 415)


def test_a_deleted_file_is_off_the_disk_at_once_and_a_listed_one_is_not(serve, put, workspace, clients) -> None:
    put()
    client = clients(serve())
    kept, gone = (client.files.create(file=("f", content), purpose="batch") for content in (b"kept", b"gone"))
    client.files.delete(gone.id)
    contents = [path.read_bytes() for path in (workspace.store.root / "blobs").rglob("*") if path.is_file()]
    assert b"kept" in contents
    assert b"gone" not in contents
    assert workspace.store.gc().removed == ()
    assert client.files.content(kept.id).content == b"kept"


def test_a_name_of_a_file_with_nul_is_refused(serve, put) -> None:
    put()
    client = serve().client()
    body = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
    body += b'Content-Disposition: form-data; name="file"; filename="a%00b"\r\n\r\n{}\r\n--x--\r\n'
    for name, status in ((b"a\0b", 400), (b"ab", 200)):
        headers = {"content-type": "multipart/form-data; boundary=x"}
        assert client.post("/v1/files", content=body.replace(b"a%00b", name), headers=headers).status_code == status
