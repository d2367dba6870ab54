"""PostgreSQL ends in the middle of transactions and comes back, again and again, under batches and questions."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx2
import pytest
from server.echo import FINGERPRINT, LABELS
from server.test_batches import ended, line, read, sent, started
from store.bundles import tensors, write_bundle

from turret.store import usage
from turret.workspace import Workspace

LINES, RESTARTS = 240, 4


@contextmanager
def asking(url: str, answered: Counter[int]) -> Iterator[None]:
    """A client that asks one question after the other for the length of the block, and counts the statuses."""
    over = threading.Event()

    def ask() -> None:
        with httpx2.Client(base_url=url, trust_env=False, timeout=60) as client:
            while not over.is_set():
                got = client.post("/v1/classify", json={"model": "a", "input": "one two"})
                answered[got.status_code] += 1
                time.sleep(0.02)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=120)
        assert not thread.is_alive()


@pytest.mark.slow
def test_postgresql_restarts_in_transactions_and_every_line_and_answer_is_counted_once(
    new_url, postgres_server, tmp_path
) -> None:
    url, answered = new_url(), Counter[int]()
    workspace = Workspace(url)
    said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}, "task": {"kind": "classify", "labels": list(LABELS)}}
    workspace.store.put("a", write_bundle(tmp_path / "bundles", tensors(1), said=said))
    with ExitStack() as servers:
        programs = [servers.enter_context(started(url, "0.05")) for _ in range(2)]
        clients = [client for client, _ in programs]
        with ExitStack() as asked:
            for client in clients:
                asked.enter_context(asking(str(client.base_url).removesuffix("/v1/"), answered))
            batches = [sent(client, [line(number) for number in range(LINES)]) for client in clients]
            for _ in range(RESTARTS):
                time.sleep(2.0)
                postgres_server.restart()
            done = [ended(client, batch, seconds=120) for client, batch in zip(clients, batches, strict=True)]
        for client, batch in zip(clients, done, strict=True):
            assert (batch.status, batch.request_counts.completed) == ("completed", LINES)
            assert list(read(client, batch.output_file_id)) == [f"n{number}" for number in range(LINES)]
        for _, process in programs:
            process.terminate()
        assert [process.wait(timeout=60) for _, process in programs] == [0, 0]
    counted = sum(each.answers for each in usage.read_usage(workspace.store.database()))
    assert answered[200] > 100
    assert counted == answered[200] + 2 * LINES
    assert workspace.store.verify().problems == ()
