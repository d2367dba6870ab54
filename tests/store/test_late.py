"""No acknowledged version loses a file if a request to the object store is late, lost, refused or repeated."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from store.bundles import tensors, write_bundle
from store.s3_proxy import DEEDS, Proxy, proxied, through

from turret.errors import TurretError
from turret.store import Store

LARGE = 1_400_000  # float32: more than the smallest part that S3 accepts


@pytest.fixture
def proxy(s3_server) -> Iterator[tuple[Proxy, str]]:
    with proxied(s3_server) as made:
        yield made


@pytest.mark.slow
def test_a_delete_that_arrives_after_its_content_was_put_again_takes_nothing(new_url, make_bundle, proxy) -> None:
    """The connection drops, the client retries, gc ends, a put is acknowledged, and then the first request arrives."""
    url, bundle = new_url(), make_bundle(tensors(1))
    store = Store(url)
    store.put("a", bundle)
    store.delete("a@1")
    collecting = through(proxy[1], url)
    proxy[0].rule("late", "DELETE", times=2)
    with suppress(TurretError):
        collecting.gc()
    assert proxy[0].caught.is_set()
    assert str(store.put("a", bundle)) == "a@2"
    assert proxy[0].release() == 2
    assert store.verify().problems == ()
    store.gc()
    assert store.verify().orphans == 0


@dataclass
class Beside:
    """A store behind the proxy, another one past it, and a bundle that both put."""

    ours: Store
    other: Store
    bundle: Path
    folder: Path
    said: list[str] = field(default_factory=list)  # acknowledged by our command

    def collected(self) -> None:
        """The bundle was put and deleted, and is ready for a gc."""
        self.other.delete(str(self.other.put("ours", self.bundle)))


def gc(beside: Beside) -> Callable[[], object]:
    beside.collected()
    return beside.ours.gc


def put(beside: Beside) -> Callable[[], object]:
    beside.collected()
    return lambda: beside.said.append(str(beside.ours.put("ours", beside.bundle)))


def put_what_is_listed(beside: Beside) -> Callable[[], object]:
    beside.other.put("listed", beside.bundle)
    return put(beside)


def delete(beside: Beside) -> Callable[[], object]:
    version = str(beside.other.put("ours", beside.bundle))
    return lambda: beside.ours.delete(version)


def export(beside: Beside) -> Callable[[], object]:
    version = str(beside.other.put("ours", beside.bundle))
    target = beside.folder / uuid.uuid4().hex

    def act() -> None:
        beside.ours.materialize(version, target)
        assert (target / "manifest.json").read_bytes() == (beside.bundle / "manifest.json").read_bytes()

    return act


def rollback(beside: Beside) -> Callable[[], object]:
    first, second = (beside.other.put("ours", each) for each in (beside.bundle, write_bundle(beside.folder, b"x")))
    for each in (first, second):
        beside.other.promote(str(each), "production")
    return lambda: beside.ours.rollback("ours")


VERBS = {each.__name__: each for each in (gc, put, put_what_is_listed, delete, export, rollback)}
REQUESTS = {"gc": 7, "put": 4, "put_what_is_listed": 4, "delete": 0, "export": 3, "rollback": 3}  # at least


def carried_out(act: Callable[[], object], problems: list[BaseException]) -> threading.Thread:
    """Run the command in its own thread; it may fail with one line."""

    def run() -> None:
        try:
            act()
        except TurretError as error:
            if "\n" in str(error):
                problems.append(error)
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def reached(proxy: Proxy, thread: threading.Thread) -> bool:
    """Whether the request of the rule came before the command ended."""
    while thread.is_alive() and not proxy.caught.is_set():
        thread.join(0.01)
    return proxy.caught.is_set()


def every_request(url: str, proxied: tuple[Proxy, str], verb: str, deed: str, folder: Path, *, size: int = 4) -> int:
    """Apply the rule to each request of the command in turn, during a put of the same content; returns their number."""
    proxy, address = proxied
    other, ours, number = Store(url), through(address, url), 0
    ours._blobs._part = 5 << 20
    other.put("first", write_bundle(folder, tensors(0)))
    while True:
        bundle = write_bundle(folder, tensors(int(uuid.uuid4()) % (1 << 32), size))
        beside = Beside(ours, other, bundle, folder)
        ours._shared.owns_files = False  # a new process checks which catalog owns the files
        act, problems = VERBS[verb](beside), list[BaseException]()
        proxy.rule(deed, skip=number)
        thread = carried_out(act, problems)
        came = reached(proxy, thread)
        acknowledged = str(other.put(f"again{number}", bundle))
        if deed != "hold":
            thread.join(timeout=120)  # late requests arrive after their process ended
        proxy.release()
        thread.join(timeout=120)
        assert not thread.is_alive()
        assert problems == []
        for _ in range(2):
            found = other.verify()
            assert [each for each in found.problems if "is not a readable" not in each.problem] == [], (number, deed)
            other.gc()
        listed = {str(version) for version in other.list()}
        assert {acknowledged, *beside.said} <= listed
        for version in listed:
            other.delete(version, force=True)  # so that the next round has no more to check
        if not came:
            return number
        number += 1


@pytest.mark.slow
@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("verb", VERBS)
def test_whatever_happens_to_any_request_no_acknowledged_version_misses_a_file(
    new_url, proxy, tmp_path, verb, deed
) -> None:
    assert every_request(new_url(), proxy, verb, deed, tmp_path) >= REQUESTS[verb]


@pytest.mark.slow
@pytest.mark.parametrize("deed", DEEDS)
def test_whatever_happens_to_a_request_of_an_upload_in_parts_no_version_misses_a_file(
    new_url, proxy, tmp_path, deed
) -> None:
    """Create, two parts, complete: a request that was carried out and answered 503 is an error when it is repeated."""
    assert every_request(new_url(), proxy, "put", deed, tmp_path, size=LARGE) >= 7


def test_a_verb_through_the_proxy_is_seen_there(new_url, proxy, make_bundle) -> None:
    """The control: the requests in the tests above are those of the command, and no others."""
    url, bundle = new_url(), make_bundle(tensors(1))
    other, store = Store(url), through(proxy[1], url)
    other.put("a", bundle)
    other.delete("a@1")
    proxy[0].rule("none", "none")
    store.gc()
    assert [each.method for each in proxy[0].seen].count("DELETE") == 3
    proxy[0].rule("none", "none")
    other.put("a", bundle)
    assert proxy[0].seen == []
