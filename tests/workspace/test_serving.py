"""A numbered version is resolved at most once per second; aliases and plain names on every request."""

from __future__ import annotations

import pytest
from store.bundles import tensors, write_bundle

from turret import Workspace
from turret.errors import NotFound
from turret.workspace import serving


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    workspace = Workspace(tmp_path / "store")
    for seed in (1, 2):
        workspace.store.put("a", write_bundle(tmp_path / "bundles", tensors(seed)))
    return workspace


def test_a_version_is_looked_up_once_and_refused_a_second_after_it_was_deleted(workspace) -> None:
    clock = Clock()
    source = serving.StoreSource(workspace.store, clock)
    first, second = source.resolve("a@1"), source.resolve("a@2")
    assert [first.digest, second.digest] == [workspace.resolve(each).digest for each in ("a@1", "a@2")]
    workspace.delete("a@1")
    clock.now = 0.9
    assert source.resolve("a@1") is first
    clock.now = 1.1
    with pytest.raises(NotFound):
        source.resolve("a@1")
    assert source.resolve("a@2") == second


def test_an_alias_and_a_plain_name_are_looked_up_each_time(workspace) -> None:
    source = serving.StoreSource(workspace.store, Clock())
    for number in (1, 2, 1):
        workspace.promote(f"a@{number}", "production")
        assert source.resolve("a").number == source.resolve("a@production").number == number


def test_no_more_versions_are_remembered_than_there_is_room_for(workspace, monkeypatch) -> None:
    monkeypatch.setattr(serving, "REMEMBERED", 1)
    source = serving.StoreSource(workspace.store, Clock())
    first = source.resolve("a@1")
    assert source.resolve("a@1") is first
    source.resolve("a@2")
    assert source.resolve("a@1") is not first
