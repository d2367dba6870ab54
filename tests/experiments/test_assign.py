"""A unit always sees the same arm, and a change of weights moves the fewest possible units."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from turret.experiments import assign
from turret.experiments.assign import GRID, arm_at, counts_of, key_of, laid_out, move_segments, point_of, points

ARMS = ("control", "candidate", "candidate2", "candidate3")


def weights() -> st.SearchStrategy[dict[str, float]]:
    """Weights of some arms, which add up to 1; some are 0."""
    parts = st.lists(st.integers(0, 1000), min_size=2, max_size=4).filter(any)
    return parts.map(lambda some: {arm: part / sum(some) for arm, part in zip(ARMS, some, strict=False)})


def different(before: assign.Segments, after: assign.Segments) -> int:
    """The number of points with another arm."""
    edges = sorted({0, *(end for end, _ in before), *(end for end, _ in after)})
    return sum(high - low for low, high in pairwise(edges) if arm_at(before, low) != arm_at(after, low))


@given(weights())
def test_every_point_belongs_to_one_arm_and_each_arm_has_its_weight(wanted) -> None:
    segments = laid_out(wanted)
    assert segments[-1][0] == GRID
    assert [end for end, _ in segments] == sorted({end for end, _ in segments})
    for arm, weight in wanted.items():
        assert abs(points(segments).get(arm, 0) / GRID - weight) < 1e-9


@given(st.lists(weights(), min_size=2, max_size=6))
def test_a_change_of_weights_moves_exactly_as_many_points_as_it_must(ramp) -> None:
    segments = laid_out(ramp[0])
    for wanted in ramp[1:]:
        before, now = points(segments), counts_of(wanted)
        must = sum(max(0, count - before.get(arm, 0)) for arm, count in now.items())
        after = move_segments(segments, wanted)
        assert different(segments, after) == must
        assert points(after) == {arm: count for arm, count in now.items() if count}
        segments = after


def test_laying_out_anew_would_move_more() -> None:
    """The control of the test above: with three arms, a split from the new weights alone moves too many."""
    first, then = (
        {"control": 0.5, "candidate": 0.3, "candidate2": 0.2},
        {"control": 0.2, "candidate": 0.3, "candidate2": 0.5},
    )
    assert different(laid_out(first), move_segments(laid_out(first), then)) < different(laid_out(first), laid_out(then))


def test_a_ramp_keeps_everybody_who_saw_the_candidate_and_units_fall_as_weighted() -> None:
    keys = [point_of(key_of("salt", f"user {number}")) for number in range(20_000)]
    segments, before = laid_out({"control": 0.95, "candidate": 0.05}), set[int]()
    for share in (0.05, 0.2, 0.5):
        segments = move_segments(segments, {"control": 1 - share, "candidate": share})
        there = {key for key in keys if arm_at(segments, key) == "candidate"}
        assert before <= there
        assert abs(len(there) / len(keys) - share) < 4 * (share * (1 - share) / len(keys)) ** 0.5
        before = there


def test_another_process_gives_the_same_key_and_another_salt_another_split() -> None:
    code = "from turret.experiments.assign import key_of; print(key_of('salt', 'Zoë \\ud800'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == key_of("salt", "Zoë \ud800")
    halves = laid_out({"control": 0.5, "candidate": 0.5})
    same = [
        arm_at(halves, point_of(key_of("one", str(n)))) == arm_at(halves, point_of(key_of("other", str(n))))
        for n in range(4000)
    ]
    assert abs(sum(same) / len(same) - 0.5) < 0.04
