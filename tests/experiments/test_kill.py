"""If a command of an experiment is killed, all of it was done or nothing, including the alias."""

from __future__ import annotations

import pytest
from store.test_kill import unfinished

VERBS = ("start", "ramp", "outcome", "stop", "settle", "watch")


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_every_file_operation_of_a_verb_it_was_done_or_was_not(tmp_path, verb) -> None:
    ended, _ = unfinished(tmp_path / "store", "operations", verb, 1, 500)
    assert ended["killed"] >= 1
    assert ended["done"] == 1


@pytest.mark.slow
def test_killed_within_a_write_of_any_verb_it_was_done_or_was_not(tmp_path) -> None:
    ended, _ = unfinished(tmp_path / "store", "writes", ",".join(VERBS), 300_000, 75_000)
    assert ended["killed"] >= len(VERBS)
    assert ended.total() == 4 * len(VERBS)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_killed_again_and_again_at_random_moments(tmp_path, verb) -> None:
    ended, _ = unfinished(tmp_path / "store", "moments", verb, 50, 7)
    assert ended.total() >= 25
