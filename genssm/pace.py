"""How a batch is stepped fastest: found out by the clock, from the blocks that are drawn anyway."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from enum import Enum, auto

GROUP = 8  # samples that a thread steps side by side, where that is faster than all at once


class Way(Enum):
    """How samples are stepped. What is drawn is the same in each, to the last bit."""

    WHOLE = auto()  # all at once, by one thread
    COLUMNS = auto()  # all at once, by threads that share the columns of every vector
    SHARES = auto()  # in as many parts as there are threads, one each
    GROUPS = (
        auto()
    )  # in parts of about ``GROUP``, so that states stay in a core's cache for a block

    @property
    def divides(self) -> bool:
        """Whether it steps the samples in parts."""
        return self in (Way.SHARES, Way.GROUPS)

    def parts(self, samples: int, threads: int) -> int:
        """Into how many parts it divides so many samples."""
        if self is Way.SHARES:
            return min(samples, threads)
        return threads * -(-samples // (threads * GROUP)) if self is Way.GROUPS else 1

    def threads(self, samples: int, threads: int) -> int:
        """How many of so many threads it uses."""
        return min(self.parts(samples, threads), threads) if self is not Way.COLUMNS else threads


def ways(samples: int, threads: int) -> list[Way]:
    """What may be the fastest, the likeliest first. Shares that are large need no trial."""
    if threads == 1:
        return [Way.WHOLE, Way.GROUPS] if samples > GROUP else [Way.WHOLE]
    if samples >= threads * GROUP:
        return [Way.SHARES, Way.GROUPS] if samples > threads * GROUP else [Way.SHARES]
    return [Way.WHOLE, Way.COLUMNS, Way.SHARES] if samples > 1 else [Way.WHOLE, Way.COLUMNS]


class Pace:
    """Which way is the fastest. Others are tried soon at first, then ever more rarely.

    A trial costs no more than what it is slower by. One that is lost may have met a busy moment,
    so the next comes after twice as many steps and not never; when blocks begin to take much longer
    than when the choice was made, it comes at once.
    """

    SHORT = 16  # steps of a block that is too short to tell, or for threads to meet in every step
    TRIES = 2  # blocks of a trial, of which the faster counts
    SOON, LONGEST = 128, 2**17  # steps from a trial to the next
    SLOWER = 1.5  # times as long, in as many blocks running: something has changed
    GAIN = 0.9  # of the time, at most, for more threads

    def __init__(self) -> None:
        self.way: Way | None = None  # the choice
        self._last: deque[float] = deque(maxlen=self.TRIES)  # seconds of a step by it, by block
        self._usual = float("inf")  # the same when the choice was made
        self._trials: dict[Way, list[float]] = {}  # seconds of a step by each of the others
        self._left, self._patience = 0, self.SOON
        self._lock = threading.Lock()

    def choose(self, options: Sequence[Way], steps: int) -> Way:
        """How to draw the next block of so many steps: one of the ``ways``."""
        with self._lock:
            if self.way is None or self.way not in options:
                self.way, self._left = options[0], 0
                self._last.clear()
                self._trials.clear()
            if steps < self.SHORT:
                return options[0] if self.way is Way.COLUMNS else self.way
            if len(self._last) == self.TRIES and self._left <= 0 and not self._trials:
                self._trials = {way: [] for way in options if way is not self.way}
            tried = ((way, times) for way, times in self._trials.items() if way in options)
            return next((way for way, times in tried if len(times) < self.TRIES), self.way)

    def took(self, way: Way, steps: int, seconds: float) -> None:
        """What ``choose`` said, and what came of it."""
        if steps < self.SHORT:
            return
        with self._lock:
            if way is self.way:
                self._last.append(seconds / steps)
                slow = len(self._last) == self.TRIES and min(self._last) > self.SLOWER * self._usual
                self._left = 0 if slow else self._left - steps
            elif way in self._trials:
                self._trials[way].append(seconds / steps)
                if all(len(times) >= self.TRIES for times in self._trials.values()):
                    self._decide()

    def _decide(self) -> None:
        """Make the choice anew: all have been tried."""
        assert self.way is not None
        times = {way: min(tried) for way, tried in self._trials.items()}
        times[self.way] = min(self._last)
        best = min(times, key=lambda way: times[way] * (self.GAIN if way is Way.WHOLE else 1))
        if best is not self.way:
            self.way, self._patience = best, self.SOON
            self._last = deque(self._trials[best], self.TRIES)
        self._usual, self._left = times[best], self._patience
        self._patience = min(2 * self._patience, self.LONGEST)
        self._trials.clear()
