"""How a batch is stepped fastest: found out by the clock, from the blocks that are drawn anyway."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from genssm.pool import Forkable

GROUP = 8  # samples that a thread steps side by side, where that is faster than all at once
TEAM = 4  # threads that may share the columns of every vector

_lock = Forkable()  # of all paces: what they do is short


class Way(Enum):
    """How samples are stepped. What is drawn is the same in each, to the last bit."""

    WHOLE = auto()  # all at once, by one thread
    COLUMNS = auto()  # all at once, by threads that share the columns of every vector
    SHARES = auto()  # in as many parts as there are threads, one each
    GROUPS = auto()  # in parts of about ``GROUP``, whose states stay in a core's cache for a block

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
        return min(threads, TEAM if self is Way.COLUMNS else self.parts(samples, threads))


def ways(samples: int, threads: int) -> tuple[Way, ...]:
    """What may be the fastest, the likeliest first. Large shares need no comparison."""
    if threads == 1:
        return (Way.WHOLE, Way.GROUPS) if samples > GROUP else (Way.WHOLE,)
    if samples >= threads * GROUP:
        return (Way.SHARES, Way.GROUPS) if samples > threads * GROUP else (Way.SHARES,)
    if samples == 1:
        return (Way.WHOLE, Way.COLUMNS)
    if samples <= TEAM:
        return (Way.WHOLE, Way.COLUMNS, Way.SHARES)
    return (Way.SHARES, Way.WHOLE, Way.COLUMNS)


class Pace:
    """Which of some ways is the fastest: they are compared soon at first, then ever more rarely.

    They take turns, a block each, so that all meet the same load of the machine. A comparison costs
    no more than what the others are slower by. A busy moment may decide one, so there is always
    another, after twice as many steps; it comes sooner where blocks begin to take much longer than
    when the choice was made. Only a clear gain changes the choice.
    """

    SHORT = 16  # steps from which on a block tells how fast a way is
    TURNS = 2  # blocks of each way in a comparison, of which the faster counts
    HOPELESS = 1.5  # times as long as the choice: no second turn
    GAIN = 0.9  # of the time, at most, for another choice
    SOON, LONGEST = 128, 2**17  # steps from a comparison to the next
    SLOWER = 1.5  # times as long, two blocks running: something has changed

    def __init__(self, options: Sequence[Way]) -> None:
        self.options, self.way = options, options[0]
        self._turns: dict[Way, list[float]] = {}  # seconds of a step, in the comparison under way
        self._usual, self._slow = float("inf"), 0  # seconds when it was chosen; slow blocks running
        self._done, self._patience = 0, 0  # steps since the choice; steps that it holds

    def choose(self, steps: int, whole: bool) -> Way:
        """How to draw the next block of so many steps; ``whole``: of samples that lie in one part.

        A short block is not worth waking threads, or moving samples.
        """
        with _lock.held:
            if steps < self.SHORT:
                return self.way if self.way.divides and not whole else Way.WHOLE
            if self._done >= self._patience and not self._turns and len(self.options) > 1:
                others = (way for way in self.options if way is not self.way)
                self._turns = {way: [] for way in (self.way, *others)}
            return min(self._turns, key=lambda way: len(self._turns[way]), default=self.way)

    def took(self, way: Way, steps: int, seconds: float) -> None:
        """What ``choose`` said, and what came of it."""
        if steps < self.SHORT:
            return
        with _lock.held:
            if way in self._turns:
                self._turns[way].append(seconds / steps)
                self._compare()
            elif way is self.way:
                self._done += steps
                self._slow = self._slow + 1 if seconds / steps > self.SLOWER * self._usual else 0
                if self._slow >= 2 and self._done >= self._patience // 8:
                    self._done = self._patience

    def _compare(self) -> None:
        """Choose, if all have had their turns."""
        if own := self._turns[self.way]:
            limit = self.HOPELESS * min(own)
            hopeless = [way for way, times in self._turns.items() if min(times, default=0) > limit]
            for way in hopeless:
                del self._turns[way]
        if any(len(times) < self.TURNS for times in self._turns.values()):
            return
        times = {way: min(tried) for way, tried in self._turns.items()}
        best = min(times, key=lambda way: times[way])
        if times[best] > self.GAIN * times[self.way]:
            best = self.way
        longer = self._patience // 2 if best is not self.way else 2 * self._patience
        self._patience = min(max(longer, self.SOON), self.LONGEST)
        self.way, self._usual, self._slow, self._done = best, times[best], 0, 0
        self._turns = {}
