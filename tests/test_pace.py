"""Which way of stepping a batch is chosen, by what blocks of tokens took."""

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from genssm.pace import GROUP, TEAM, Pace, Way, ways

WHOLE, COLUMNS, SHARES, GROUPS = Way.WHOLE, Way.COLUMNS, Way.SHARES, Way.GROUPS
ALL = (WHOLE, COLUMNS, SHARES)


@pytest.mark.parametrize(
    ("samples", "threads", "expected"),
    [
        (1, 1, (WHOLE,)),
        (GROUP, 1, (WHOLE,)),
        (GROUP + 1, 1, (WHOLE, GROUPS)),
        (1, 2, (WHOLE, COLUMNS)),
        (2, 2, (WHOLE, COLUMNS, SHARES)),
        (TEAM + 1, 2, (SHARES, WHOLE, COLUMNS)),
        (2 * GROUP - 1, 2, (SHARES, WHOLE, COLUMNS)),
        (2 * GROUP, 2, (SHARES,)),
        (64, 2, (SHARES, GROUPS)),
        (64, 16, (SHARES, WHOLE, COLUMNS)),
    ],
)
def test_what_may_be_the_fastest(samples: int, threads: int, expected: tuple[Way, ...]) -> None:
    assert ways(samples, threads) == expected


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("samples", [1, 2, 3, 9, 64, 129])
def test_parts_and_threads_of_a_way(samples: int, threads: int) -> None:
    assert (WHOLE.parts(samples, threads), WHOLE.threads(samples, threads)) == (1, 1)
    assert COLUMNS.parts(samples, threads) == 1
    assert COLUMNS.threads(samples, threads) == min(threads, TEAM)
    shares = min(samples, threads)
    assert (SHARES.parts(samples, threads), SHARES.threads(samples, threads)) == (shares, shares)
    groups = GROUPS.parts(samples, threads)
    assert groups % threads == 0
    assert GROUPS.threads(samples, threads) == threads
    assert -(-samples // groups) <= GROUP


def block(pace: Pace, seconds: dict[Way, float], steps: int = 32) -> Way:
    """The way of the next block, which takes so many seconds a step."""
    way = pace.choose(steps, whole=True)
    pace.took(way, steps, seconds[way] * steps)
    return way


@pytest.mark.parametrize("fastest", ALL)
def test_the_fastest_way_is_found_and_kept(fastest: Way) -> None:
    pace, seconds = Pace(ALL), {way: 0.7 if way is fastest else 1.0 for way in ALL}
    assert [block(pace, seconds) for _ in range(6)] == [*ALL, *ALL]
    later = [block(pace, seconds) for _ in range(1000)]
    assert later[:4] == 4 * [fastest]
    others = [i for i, way in enumerate(later) if way is not fastest]
    assert 12 <= len(others) <= 36  # now and then another, to compare
    assert others[-1] < 900  # ever more rarely


def test_steps_to_the_next_comparison_double_up_to_a_limit() -> None:
    pace, seconds = Pace((WHOLE, COLUMNS)), {WHOLE: 1.0, COLUMNS: 1.5}
    drawn = [block(pace, seconds) for _ in range(40_000)]
    compared = [i for i, way in enumerate(drawn) if way is COLUMNS][::2]
    gaps = [32 * (later - earlier - 4) for earlier, later in pairwise(compared)]
    assert gaps[:4] == [128, 256, 512, 1024]
    assert gaps[-2:] == [Pace.LONGEST, Pace.LONGEST]


def test_another_way_must_gain_a_tenth() -> None:
    pace = Pace(ALL)
    for _ in range(100):
        block(pace, {WHOLE: 1.0, COLUMNS: 0.95, SHARES: 0.92})
    assert pace.way is WHOLE


def test_a_single_busy_block_decides_nothing() -> None:
    """Neither where it is another way's, nor where it is that of the choice."""
    seconds = {WHOLE: 1.0, COLUMNS: 0.6, SHARES: 0.8}
    for busy, turn in ((COLUMNS, 4), (WHOLE, 0), (WHOLE, 3)):
        pace = Pace(ALL)
        for i in range(6):
            block(pace, seconds | ({busy: 1.9} if i == turn else {}))
        assert pace.way is COLUMNS


def test_a_way_that_is_hopeless_has_no_second_turn() -> None:
    pace, seconds = Pace(ALL), {WHOLE: 1.0, COLUMNS: 30.0, SHARES: 0.8}
    assert [block(pace, seconds) for _ in range(6)] == [*ALL, WHOLE, SHARES, SHARES]


def test_a_comparison_that_a_busy_moment_decided_is_soon_repeated() -> None:
    pace = Pace((WHOLE, COLUMNS))
    for _ in range(3):
        block(pace, {WHOLE: 1.0, COLUMNS: 5.0})
    better = {WHOLE: 1.0, COLUMNS: 0.6}
    assert [block(pace, better) for _ in range(9)].count(COLUMNS) >= 2
    assert pace.way is COLUMNS


def test_a_way_that_has_become_slow_is_left_soon() -> None:
    pace, seconds = Pace(ALL), {WHOLE: 1.0, COLUMNS: 0.6, SHARES: 5.0}
    for _ in range(1000):
        block(pace, seconds)
    assert pace.way is COLUMNS
    busy = {WHOLE: 1.0, COLUMNS: 30.0, SHARES: 50.0}
    assert [block(pace, busy) for _ in range(12)].count(COLUMNS) <= 5
    assert pace.way is WHOLE


Weather = Callable[[int, random.Random], float]
WEATHERS: dict[str, Weather] = {
    "noise": lambda i, chance: max(0.3, chance.gauss(1, 0.3)),
    "busy blocks": lambda i, chance: 3.0 if chance.random() < 0.2 else 1.0,
    "busy phases": lambda i, chance: 2.0 if i // 3 % 2 else 1.0,
    "long busy phases": lambda i, chance: 2.0 if i // 100 % 2 else 1.0,
}


@pytest.mark.parametrize("seconds", [(1, 0.6, 2), (1, 0.6, 5), (1, 3, 0.55), (0.5, 1, 1)])
@pytest.mark.parametrize("weather", WEATHERS)
def test_a_busy_machine_costs_little(weather: str, seconds: tuple[float, float, float]) -> None:
    """Over the fastest way for all blocks, which no one knows."""
    chance, pace, spent, least = random.Random(0), Pace(ALL), 0.0, 0.0
    for i in range(4000):
        now = WEATHERS[weather](i, chance)
        times = {way: time * now for way, time in zip(ALL, seconds, strict=True)}
        spent += times[block(pace, times)]
        least += min(times.values())
    assert spent < 1.12 * least


def test_short_blocks_tell_nothing_and_call_no_team() -> None:
    pace, seconds = Pace(ALL), {WHOLE: 1.0, COLUMNS: 0.1, SHARES: 1.0}
    assert [block(pace, seconds, steps=8) for _ in range(20)] == 20 * [WHOLE]
    for _ in range(6):
        block(pace, seconds)
    assert pace.choose(32, whole=True) is COLUMNS
    assert pace.choose(8, whole=True) is WHOLE


def test_short_blocks_move_no_samples() -> None:
    """Neither from the one part that they lie in at first, nor back into one at the end."""
    pace = Pace((SHARES, GROUPS))
    assert pace.choose(8, whole=True) is WHOLE
    assert pace.choose(32, whole=True) is SHARES
    assert pace.choose(8, whole=False) is SHARES


def test_one_way_is_not_compared() -> None:
    pace = Pace((WHOLE,))
    assert {block(pace, {WHOLE: 1.0}) for _ in range(100)} == {WHOLE}
