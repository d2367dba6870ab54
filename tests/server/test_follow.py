"""The server follows aliases once versions are loaded: no request waits, and a failed load changes nothing."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field

import pytest

from turret.errors import AdapterError
from turret.server.routing import RETRY_SECONDS, AliasWatcher
from turret.store import Pointing, aliases


@dataclass
class World:
    """The parts of a store and an engine that `AliasWatcher` uses."""

    number: int = 0
    points: dict[tuple[str, str], Pointing] = field(default_factory=dict)
    memory: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)
    room: int = 100  # adapters
    now: float = 0.0
    looks: int = 0
    fingerprints = frozenset(("ours",))

    def move(self, reference: str | None, name: str = "a", alias: str = "production", base: str = "ours") -> None:
        self.number += 1
        if reference is None:
            del self.points[name, alias]
        else:
            number = int(reference.partition("@")[2])
            self.points[name, alias] = Pointing(name, alias, number, f"sha256:{reference}", base, "then")

    def last_move(self) -> int:
        return self.number

    def in_memory(self, digest: str) -> bool:
        return digest in self.memory

    def pointing(self):
        self.looks += 1
        return self.number, list(self.points.values())

    def warm(self, reference: str) -> None:
        if reference in self.bad:
            raise AdapterError(f"{reference} cannot be mounted")
        self.memory.add(f"sha256:{reference}")

    def warm_ahead(self, reference: str) -> bool:
        if len(self.memory) >= self.room:
            return False
        self.warm(reference)
        return True

    def follow(self) -> AliasWatcher:
        return AliasWatcher(self, self, "production", lambda: self.now)  # type: ignore[arg-type]


def test_the_followed_alias_is_loaded_beforehand_and_then_it_is_ready() -> None:
    world = World()
    world.move("a@1")
    world.move("b@2", name="b", alias="candidate")
    follow = world.follow()
    assert not follow.ready
    follow.poll()
    assert follow.ready
    assert world.memory == {"sha256:a@1"}
    assert follow.exact("a@production") == follow.exact("a") == "a@1"
    assert follow.exact("b@candidate") == "b@2"
    assert [follow.exact(each) for each in ("b", "a@7", "a@beta", "../x")] == ["b", "a@7", "a@beta", "../x"]


def test_a_server_is_not_ready_before_it_has_followed_what_it_read() -> None:
    world, ready = World(), []
    world.move("a@1")
    follow = world.follow()

    class Watched(dict):
        def get(self, key, *default):
            ready.append(follow.ready)
            return super().get(key, *default)

    follow._in_force = Watched()
    follow.poll()
    assert ready
    assert not any(ready), "no request is sent here while the followed alias is not loaded"
    assert follow.ready, "the control"


def test_an_alias_that_fails_in_an_unexpected_way_stops_no_other_and_is_tried_again() -> None:
    world = World()
    for name in "abc":
        world.move(f"{name}@1", name=name)
    follow = world.follow()
    follow.poll()
    for name in "abc":
        world.move(f"{name}@2", name=name)
    warm, broken = world.warm, ["a@2"]

    def breaks(reference: str) -> None:
        if reference in broken:
            raise RuntimeError("the connection is closed")
        warm(reference)

    world.warm = breaks
    with pytest.raises(RuntimeError, match="closed"):
        follow.poll()
    assert [follow.version_of(name, None) for name in "abc"] == [1, 2, 2]
    broken.clear()
    world.now += RETRY_SECONDS
    follow.poll()
    assert follow.version_of("a", None) == 2
    assert not follow.failed_moves


def test_loading_ahead_takes_a_little_time_of_each_look() -> None:
    world = World()
    for number in range(5):
        world.move(f"n{number}@1", name=f"n{number}")
    follow = world.follow()

    def slow(reference: str) -> bool:
        world.now += 0.4
        world.memory.add(reference)
        return True

    world.warm_ahead = slow
    follow.poll(0.5)
    assert (len(world.memory), follow.ready) == (2, False)
    follow.poll(0.5)
    follow.poll(0.5)
    assert (len(world.memory), follow.ready) == (5, True)


def test_what_nobody_asks_yet_is_loaded_as_long_as_there_is_room_and_evicts_nothing() -> None:
    world = World(room=2)
    for name in "abcd":
        world.move(f"{name}@1", name=name)
    follow = world.follow()
    follow.poll()
    assert follow.ready
    assert world.memory == {"sha256:a@1", "sha256:b@1"}
    assert [follow.version_of(name, None) for name in "abcd"] == [1, 1, 1, 1]
    for name in "ad":
        world.move(f"{name}@2", name=name)
    follow.poll()
    assert world.memory == {"sha256:a@1", "sha256:b@1", "sha256:a@2"}, "the one that replaces one in memory alone"
    assert (follow.version_of("a", None), follow.version_of("d", None)) == (2, 2)
    assert (follow.failures, follow.failed_moves) == (0, {})


def test_nothing_is_read_while_no_alias_moves() -> None:
    world = World()
    world.move("a@1")
    follow = world.follow()
    for _ in range(10):
        follow.poll()
    assert world.looks == 1


def test_a_version_takes_over_only_once_it_is_warm() -> None:
    world = World()
    world.move("a@1")
    follow = world.follow()
    follow.poll()
    meant: list[str] = []
    world.warm = lambda reference: meant.append(follow.exact("a"))
    world.move("a@2")
    follow.poll()
    assert meant == ["a@1"]
    assert follow.exact("a") == "a@2"


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_in_force_is_told_and_tried_again() -> None:
    world = World(bad={"a@2"})
    world.move("a@1")
    follow = world.follow()
    follow.poll()
    world.move("a@2")
    follow.poll()
    follow.poll()
    assert follow.exact("a") == "a@1"
    trouble = follow.failed_moves["a", "production"]
    assert (trouble.version, trouble.problem) == ("a@2", "a@2 cannot be mounted")
    assert follow.failures == 1
    world.now += RETRY_SECONDS
    world.bad.clear()
    follow.poll()
    assert follow.exact("a") == "a@2"
    assert follow.failed_moves == {}


def test_going_back_ends_the_trouble() -> None:
    world = World(bad={"a@2"})
    world.move("a@1")
    follow = world.follow()
    follow.poll()
    world.move("a@2")
    follow.poll()
    world.move("a@1")
    follow.poll()
    assert follow.failed_moves == {}
    assert follow.exact("a") == "a@1"


def test_an_alias_of_a_version_that_is_not_in_memory_moves_at_once_and_loads_nothing() -> None:
    world = World()
    world.move("a@1", alias="candidate")
    follow = world.follow()
    follow.poll()
    world.move("a@2", alias="candidate")
    follow.poll()
    assert follow.exact("a@candidate") == "a@2"
    assert world.memory == set()
    world.memory.add("sha256:a@2")
    world.move("a@3", alias="candidate")
    follow.poll()
    assert "sha256:a@3" in world.memory


def test_an_alias_that_is_taken_away_is_the_stores_to_say() -> None:
    world = World()
    world.move("a@1")
    follow = world.follow()
    follow.poll()
    world.move(None)
    follow.poll()
    assert follow.exact("a@production") == "a@production"


def test_versions_of_another_base_are_not_followed_and_never_take_over() -> None:
    world = World()
    world.move("a@1")
    world.move("z@1", name="z", base="theirs")
    follow = world.follow()
    follow.poll()
    assert follow.exact("z") == "z"
    world.move("a@2", base="theirs")
    follow.poll()
    assert follow.exact("a") == "a@1"
    assert "another base" in follow.failed_moves["a", "production"].problem


def test_a_number_that_is_another_version_now_is_seen_by_its_digest() -> None:
    world = World()
    world.move("a@1")
    follow = world.follow()
    follow.poll()
    world.number += 1
    world.points["a", "production"] = Pointing("a", "production", 1, "sha256:other", "ours", "then")
    follow.poll()
    assert follow._in_force["a", "production"].digest == "sha256:other"


def test_plain_names_mean_the_followed_alias() -> None:
    world = World()
    world.move("a@1")
    world.move("a@2", alias="candidate")
    world.move("b@1", name="b")
    follow = AliasWatcher(world, world, "candidate", lambda: 0.0)  # type: ignore[arg-type]
    follow.poll()
    assert [follow.exact(each) for each in ("a", "a@production", "b")] == ["a@2", "a@1", "b"]
    assert [follow.with_alias(each) for each in ("a", "a@production", "b")] == ["a@candidate", "a@production", "b"]
    assert world.memory == {"sha256:a@2"}


# --- with a server, a store and other processes' changes -------------------------------------------------------


def model_of(client, model: str = "a") -> str:
    got = client.post("/v1/classify", json={"model": model, "input": "x"})
    assert got.status_code == 200, got.text
    return got.json()["model"]


def test_what_another_process_promotes_is_served_within_a_second_and_no_question_waits_for_a_load(
    serve, put, workspace, until
) -> None:
    put()
    put()
    workspace.promote("a@1", "production")
    running = serve(load_seconds=0.2)
    client = running.client()
    assert model_of(client) == "a@1"
    workspace.promote("a@2", "production")
    until(lambda: model_of(client) == "a@2", seconds=2)  # a second, and one for a busy machine
    workspace.rollback("a")
    until(lambda: model_of(client) == "a@1", seconds=2)
    assert running.engine.cold == []


def test_a_version_that_is_deleted_before_its_successor_is_warm_loses_no_request(serve, put, workspace) -> None:
    put()
    put()
    workspace.promote("a@1", "production")
    running = serve(load_seconds=0.3)
    client = running.client()
    workspace.promote("a@2", "production")
    workspace.delete("a@1")
    assert model_of(client) == "a@2"


def test_a_bad_version_that_another_process_promotes_is_told_and_the_old_one_answers(
    serve, put, workspace, until
) -> None:
    put()
    put()
    workspace.promote("a@1", "production")
    running = serve()
    running.engine.broken.add("a@2")
    client = running.client()
    workspace.promote("a@2", "production")
    until(lambda: running.view.aliases.failed_moves)
    assert model_of(client) == "a@1"
    (alias,) = client.get("/api/aliases").json()["aliases"]
    assert (alias["version"], alias["serving"]) == ("a@2", "a@1")
    assert alias["problem"].startswith("a@2: a@2 cannot be mounted")
    assert "secret" not in alias["problem"]
    assert "turret_follow_trouble 1.0" in client.get("/metrics").text
    got = client.post("/v1/classify", json={"model": "a@2", "input": "x"})
    assert got.status_code == 409
    assert "secret" not in got.text


@pytest.mark.slow
def test_a_server_that_cannot_reach_the_store_says_once_that_it_follows_no_more_and_once_that_it_does_again(
    serve, put, workspace, until
) -> None:
    put()
    workspace.promote("a@1", "production")
    running = serve()
    client, root = running.client(), workspace.store.root
    assert "turret_following 1.0" in client.get("/metrics").text
    away = root.rename(root.with_name("away"))
    until(lambda: "turret_following 0.0" in client.get("/metrics").text)
    until(lambda: len(followed(running, "turret-tokens")) == 1 and running.view.aliases.failures > 20)
    assert client.get("/readyz").status_code == 200
    away.rename(root)
    until(lambda: "turret_following 1.0" in client.get("/metrics").text)
    for part in ("turret-follow", "turret-tokens"):
        assert followed(running, part) == [False, True]


def followed(running, part: str) -> list[bool]:
    """The log lines of one follower: whether it reaches the store."""
    said = [json.loads(line) for line in running.lines.getvalue().splitlines()]
    return [line["following"] for line in said if line["event"] == "follow" and line["part"] == part]


def test_an_alias_that_is_flipped_1000_times_between_looks_is_the_last_one() -> None:
    world = World()
    world.move("a@1")
    follow = world.follow()
    follow.poll()
    for flip in range(1000):
        world.move(f"a@{flip % 7 + 1}")
        if flip % 3 == 0:
            follow.poll()
    follow.poll()
    assert follow.exact("a") == f"a@{999 % 7 + 1}"
    assert follow.failed_moves == {}


@pytest.mark.parametrize("flips", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_an_alias_that_is_flipped_again_and_again_is_always_one_of_the_two_and_the_last_at_the_end(
    serve, put, workspace, until, flips
) -> None:
    put()
    put()
    workspace.promote("a@1", "production")
    running = serve()
    store = workspace.store
    ended, seen = threading.Event(), set()

    def ask() -> None:
        client = running.client()
        while not ended.is_set():
            seen.add(model_of(client))

    asking = threading.Thread(target=ask)
    asking.start()
    versions = [store.resolve("a@1"), store.resolve("a@2")]
    database = store.database()
    for flip in range(flips):
        with database.writing() as connection:
            aliases.move_alias(connection, versions[(flip + 1) % 2], "production")
    ended.set()
    asking.join(timeout=10)
    assert seen <= {"a@1", "a@2"}
    client = running.client()
    until(lambda: model_of(client) == "a@1", seconds=2)
    assert running.engine.cold == []
