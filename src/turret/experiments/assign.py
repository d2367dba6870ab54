"""Which arm a unit sees: a salted hash gives it a point for good, every point belongs to an arm. Knows numbers only.

    key   = BLAKE2b-128(salt, unit)                     the unit as it is stored: no name of a user is
    point = the first 32 bits of the key                in [0, GRID)
    arm   = the arm of the segment that holds the point

The segments are part of the experiment, so every replica and every restart gives the same answer. When weights change,
an arm that shrinks gives up points and an arm that grows takes from those: exactly the points that must, sum over
arms of max(0, new - old), change hands, which no rule that looks at the new weights alone can do for three arms and
more.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping

GRID = 1 << 32
Segments = tuple[tuple[int, str], ...]  # (end, arm): the arm of the points from the end before, up to `end`


def key_of(salt: str, unit: str) -> str:
    """The unit as it is stored, 32 hex digits."""
    return hashlib.blake2b(unit.encode(errors="surrogatepass"), key=salt.encode()[:64], digest_size=16).hexdigest()


def point_of(key: str) -> int:
    return int(key[:8], 16)


def arm_at(segments: Segments, point: int) -> str:
    """The arm of a point in [0, GRID)."""
    return segments[bisect_right([end for end, _ in segments], point)][1]


def counts_of(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights that add up to 1 as whole points that add up to GRID: the largest remainders get the points left over."""
    exact = {arm: weight * GRID for arm, weight in weights.items()}
    counts = {arm: int(points) for arm, points in exact.items()}
    order = sorted(exact, key=lambda arm: counts[arm] - exact[arm])
    for arm in order[: max(GRID - sum(counts.values()), 0)]:
        counts[arm] += 1
    counts[max(counts, key=lambda arm: counts[arm])] += GRID - sum(counts.values())
    return counts


def points(segments: Segments) -> dict[str, int]:
    """How many points each arm has."""
    found: dict[str, int] = {}
    start = 0
    for end, arm in segments:
        found[arm] = found.get(arm, 0) + end - start
        start = end
    return found


def laid_out(weights: Mapping[str, float]) -> Segments:
    """The first split."""
    return _joined([(points, arm) for arm, points in counts_of(weights).items()])


def moved(segments: Segments, weights: Mapping[str, float]) -> Segments:
    """The split with these weights in which the fewest points change hands."""
    wanted = counts_of(weights)
    surplus = {arm: have - wanted.get(arm, 0) for arm, have in points(segments).items()}
    lacking = {arm: want - points(segments).get(arm, 0) for arm, want in wanted.items()}
    pieces: list[tuple[int, str]] = []  # length and arm, from the end to the beginning
    ends = [0, *(end for end, _ in segments)]
    for place in range(len(segments) - 1, -1, -1):
        arm, length = segments[place][1], ends[place + 1] - ends[place]
        given = min(max(surplus[arm], 0), length)
        surplus[arm] -= given
        for taker in wanted:
            taken = min(max(lacking[taker], 0), given)
            lacking[taker] -= taken
            given -= taken
            length -= taken
            pieces.append((taken, taker))
        pieces.append((length, arm))
    return _joined(pieces[::-1])


def _joined(pieces: list[tuple[int, str]]) -> Segments:
    """Lengths as ends, without empty pieces, neighbours of one arm as one."""
    found: list[tuple[int, str]] = []
    end = 0
    for length, arm in pieces:
        if length == 0:
            continue
        end += length
        if found and found[-1][1] == arm:
            found[-1] = (end, arm)
        else:
            found.append((end, arm))
    return tuple(found)
