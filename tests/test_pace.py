"""Which way of stepping a batch is chosen, by what blocks of tokens took."""

import pytest

from genssm.pace import GROUP, Pace, Way, ways

WHOLE, COLUMNS, SHARES, GROUPS = Way.WHOLE, Way.COLUMNS, Way.SHARES, Way.GROUPS
ALL = [WHOLE, COLUMNS, SHARES]


@pytest.mark.parametrize(
    ("samples", "threads", "expected"),
    [
        (1, 1, [WHOLE]),
        (GROUP, 1, [WHOLE]),
        (GROUP + 1, 1, [WHOLE, GROUPS]),
        (1, 2, [WHOLE, COLUMNS]),
        (2, 2, [WHOLE, COLUMNS, SHARES]),
        (2 * GROUP - 1, 2, [WHOLE, COLUMNS, SHARES]),
        (2 * GROUP, 2, [SHARES]),
        (64, 2, [SHARES, GROUPS]),
    ],
)
def test_what_may_be_the_fastest(samples: int, threads: int, expected: list[Way]) -> None:
    assert ways(samples, threads) == expected


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("samples", [1, 2, 3, 9, 64, 129])
def test_parts_and_threads_of_a_way(samples: int, threads: int) -> None:
    assert (WHOLE.parts(samples, threads), WHOLE.threads(samples, threads)) == (1, 1)
    assert (COLUMNS.parts(samples, threads), COLUMNS.threads(samples, threads)) == (1, threads)
    shares = min(samples, threads)
    assert (SHARES.parts(samples, threads), SHARES.threads(samples, threads)) == (shares, shares)
    groups = GROUPS.parts(samples, threads)
    assert groups % threads == 0
    assert GROUPS.threads(samples, threads) == threads
    assert -(-samples // groups) <= GROUP


def block(pace: Pace, seconds: dict[Way, float], options: list[Way] = ALL, steps: int = 32) -> Way:
    """The way of the next block, which takes so many seconds a step."""
    way = pace.choose(options, steps)
    pace.took(way, steps, seconds[way] * steps)
    return way


@pytest.mark.parametrize("fastest", ALL)
def test_the_fastest_way_is_found_and_kept(fastest: Way) -> None:
    pace, seconds = Pace(), {way: 0.5 if way is fastest else 1.0 for way in ALL}
    assert [block(pace, seconds) for _ in range(6)] == [WHOLE, WHOLE, *2 * [COLUMNS], *2 * [SHARES]]
    later = [block(pace, seconds) for _ in range(1000)]
    assert later[:4] == 4 * [fastest]
    assert 12 <= sum(way is not fastest for way in later) <= 36  # now and then another, to compare
    assert all(way is fastest for way in later[-100:])  # ever more rarely
    assert pace.way is fastest


def test_more_threads_must_gain_a_tenth() -> None:
    pace = Pace()
    for _ in range(100):
        block(pace, {WHOLE: 1.0, COLUMNS: 0.95, SHARES: 0.92})
    assert pace.way is WHOLE


def test_a_single_busy_block_decides_nothing() -> None:
    pace, seconds = Pace(), {WHOLE: 1.0, COLUMNS: 0.6, SHARES: 0.8}
    for _ in range(3):
        block(pace, seconds)
    assert block(pace, seconds | {COLUMNS: 5.0}) is COLUMNS
    for _ in range(3):
        block(pace, seconds)
    assert pace.way is COLUMNS


def test_a_trial_that_is_lost_is_soon_repeated() -> None:
    pace = Pace()
    for _ in range(6):
        block(pace, {WHOLE: 1.0, COLUMNS: 5.0, SHARES: 5.0})
    better = {WHOLE: 1.0, COLUMNS: 0.6, SHARES: 5.0}
    assert [block(pace, better) for _ in range(5)] == [*4 * [WHOLE], COLUMNS]
    for _ in range(4):
        block(pace, better)
    assert pace.way is COLUMNS


def test_a_way_that_has_become_slow_is_left_at_once() -> None:
    pace, seconds = Pace(), {WHOLE: 1.0, COLUMNS: 0.6, SHARES: 5.0}
    for _ in range(2000):
        block(pace, seconds)
    assert pace.way is COLUMNS
    busy = {WHOLE: 1.0, COLUMNS: 30.0, SHARES: 50.0}
    assert [block(pace, busy) for _ in range(6)] == [*2 * [COLUMNS], *2 * [WHOLE], *2 * [SHARES]]
    assert pace.way is WHOLE


def test_short_blocks_tell_nothing_and_call_no_team() -> None:
    pace, seconds = Pace(), {WHOLE: 1.0, COLUMNS: 0.1, SHARES: 1.0}
    assert [block(pace, seconds, steps=8) for _ in range(20)] == 20 * [WHOLE]
    for _ in range(6):
        block(pace, seconds)
    assert pace.choose(ALL, 32) is COLUMNS
    assert pace.choose(ALL, 8) is WHOLE


def test_other_options_begin_anew() -> None:
    """Where another number of samples makes others likely, in the middle of a trial, too."""
    pace, seconds = Pace(), {WHOLE: 1.0, COLUMNS: 0.6, SHARES: 0.8, GROUPS: 0.5}
    for _ in range(3):
        block(pace, seconds)
    shared = [SHARES, GROUPS]
    assert [block(pace, seconds, shared) for _ in range(4)] == [*2 * [SHARES], *2 * [GROUPS]]
    assert pace.choose(shared, 32) is GROUPS
    assert pace.choose([WHOLE], 32) is WHOLE
