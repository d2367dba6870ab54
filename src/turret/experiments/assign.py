"""Assign units to arms: a salted hash gives each unit a point, and each point belongs to an arm.

    key   = BLAKE2b-128(salt, unit)                     stored instead of the unit, so no user name is stored
    point = the first 32 bits of the key                in [0, GRID)
    arm   = the arm of the segment that holds the point

The segments are stored with the experiment, so all server processes give the same answer, also after a restart. If
weights change, arms that shrink give points to arms that grow. The number of points that change their arm is the least
possible: the sum over arms of max(0, new - old). A rule that looks only at the new weights cannot reach this for three
or more arms.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping

GRID = 1 << 32
Segments = tuple[tuple[int, str], ...]  # (end, arm): the arm of the points below `end`, from the end before it


def key_of(salt: str, unit: str) -> str:
    """The hash that is stored for a unit: 32 hex digits."""
    return hashlib.blake2b(unit.encode(errors="surrogatepass"), key=salt.encode()[:64], digest_size=16).hexdigest()


def point_of(key: str) -> int:
    return int(key[:8], 16)


def arm_at(segments: Segments, point: int) -> str:
    """The arm of a point in [0, GRID)."""
    return segments[bisect_right([end for end, _ in segments], point)][1]


def counts_of(weights: Mapping[str, float]) -> dict[str, int]:
    """Convert weights that add up to 1 to points that add up to GRID, by largest remainders."""
    exact = {arm: weight * GRID for arm, weight in weights.items()}
    counts = {arm: int(points) for arm, points in exact.items()}
    order = sorted(exact, key=lambda arm: counts[arm] - exact[arm])
    for arm in order[: max(GRID - sum(counts.values()), 0)]:
        counts[arm] += 1
    counts[max(counts, key=lambda arm: counts[arm])] += GRID - sum(counts.values())
    return counts


def points(segments: Segments) -> dict[str, int]:
    """The number of points of each arm."""
    found: dict[str, int] = {}
    start = 0
    for end, arm in segments:
        found[arm] = found.get(arm, 0) + end - start
        start = end
    return found


def laid_out(weights: Mapping[str, float]) -> Segments:
    """The first segments of an experiment."""
    return _join_pieces([(points, arm) for arm, points in counts_of(weights).items()])


def move_segments(segments: Segments, weights: Mapping[str, float]) -> Segments:
    """The segments with these weights in which the fewest points change their arm."""
    old, new = points(segments), counts_of(weights)
    surplus = {arm: count - new.get(arm, 0) for arm, count in old.items()}
    missing = {arm: count - old.get(arm, 0) for arm, count in new.items()}
    pieces: list[tuple[int, str]] = []  # length and arm, from the last point to the first
    ends = [0, *(end for end, _ in segments)]
    for place in range(len(segments) - 1, -1, -1):
        arm, length = segments[place][1], ends[place + 1] - ends[place]
        free = min(max(surplus[arm], 0), length)
        surplus[arm] -= free
        for taker in new:
            taken = min(max(missing[taker], 0), free)
            missing[taker] -= taken
            free -= taken
            length -= taken
            pieces.append((taken, taker))
        pieces.append((length, arm))
    return _join_pieces(pieces[::-1])


def _join_pieces(pieces: list[tuple[int, str]]) -> Segments:
    """Convert (length, arm) to (end, arm), without empty pieces, and with neighbours of one arm joined."""
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
