"""The models behind a page: converted on first use, one scheduler each, shared by all visitors."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from genssm.codec import Raw
from genssm.pipeline import Pipeline, load
from genssm.sampling import new_seed
from genssm.scheduler import BusyError, Job, Scheduler
from genssm.session import Sample

SHIPPED = ("wiki", "cifar10", "digits")
UPDATES = 18  # of the page, a second
SECONDS = 90.0  # after which a request ends with what it has
LIMIT = 16  # requests under way on one model
WAITING = 32  # visitors who wait for a place, on one model
PATIENCE = 0.2  # seconds between two looks at the line
LARGEST_SEED = 2**32 - 1  # that the box for it takes

READING = "reading the prompt …"
FIRST = "compiling the sampling loop, once on a machine: 5 to 15 seconds …"


class RefusedError(ValueError):
    """A request that is not begun; the message says why."""


class Visit:
    """One request of one visitor: waiting, under way or over."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.replaced = False  # by a later request of the visitor, whose answer is shown
        self.over = False
        self._left = threading.Event()
        self._drawn: list[Sample] = []

    def stop(self) -> None:
        """Leave the line, or end the request; what was drawn stays."""
        self._left.set()
        if self.job is not None:
            self.job.cancel()

    @property
    def left(self) -> bool:
        return self._left.is_set()

    def wait(self, seconds: float) -> None:
        """Until the visitor leaves, at most so long."""
        self._left.wait(seconds)

    def samples(self) -> list[Sample]:
        """What has been drawn so far."""
        return self._drawn if self.job is None else self.job.samples()

    def end(self) -> None:
        """Keep what was drawn, not the states it was drawn with."""
        self._drawn, self.job, self.over = self.samples(), None, True


class House:
    """The model of each modality, and who samples from it."""

    def __init__(self, names: Sequence[str] = (), *, limit: int = LIMIT) -> None:
        """``names``: models that take the place of the shipped ones of their modality.

        Raises CheckpointError for a model that is not there or not readable, ValueError for two of
        one modality.
        """
        self.limit = limit
        self._pipes: dict[str, Pipeline] = {}
        for name in names:
            pipe = load(name)
            if Path(name).is_dir():  # whose place is not told to visitors, in recipes
                pipe.name = Path(name).resolve().name
            if pipe.modality in self._pipes:
                raise ValueError(
                    f"{self._pipes[pipe.modality].name!r} and {name!r} both make {pipe.modality}; "
                    "a page shows one model of a kind"
                )
            self._pipes[pipe.modality] = pipe
        for name in SHIPPED:
            if len(self._pipes) == len(SHIPPED):
                break
            pipe = load(name)
            self._pipes.setdefault(pipe.modality, pipe)
        self._schedulers: dict[tuple[str, float], Scheduler] = {}
        self._lines: dict[tuple[str, float], list[Visit]] = {}
        self._latest: WeakValueDictionary[tuple[str, str], Visit] = WeakValueDictionary()
        self._loading, self._lining = threading.Lock(), threading.Lock()
        self._compiled = False  # whether anything was drawn; see FIRST
        self._warming: threading.Thread | None = None

    def pipe(self, modality: str, rate: float = 1.0) -> Pipeline:
        """The model of "text", "image" or "audio"; sound at another rate, too."""
        return self._pipes[modality].at_rate(rate)

    def scheduler(self, modality: str, rate: float = 1.0) -> Scheduler:
        """The one scheduler of a model at a rate, made on first use."""
        with self._loading:
            if (modality, rate) not in self._schedulers:
                pipe = self.pipe(modality, rate)
                self._schedulers[modality, rate] = Scheduler(pipe, limit=self.limit)
            return self._schedulers[modality, rate]

    def warm_up(self) -> threading.Thread:
        """Compile the sampling loop in the background, so that the first visitor waits less."""

        def draw() -> None:
            self.scheduler("text").submit(None, max_tokens=1, seed=0).run()
            self._compiled = True

        self._warming = threading.Thread(target=draw, name="genssm warm-up", daemon=True)
        self._warming.start()
        return self._warming

    def visit(self, visitor: str, tab: str) -> Visit:
        """A new request of a visitor in a tab, where it takes the place of the one before."""
        visit = Visit()
        with self._lining:
            before = self._latest.get((visitor, tab))
            self._latest[visitor, tab] = visit
        if before is not None:
            before.replaced = True
            before.stop()
        return visit

    def stop(self, visitor: str, tab: str) -> None:
        """What Stop does in a tab."""
        visit = self._latest.get((visitor, tab))
        if visit is not None:
            visit.stop()

    def begin(
        self,
        visit: Visit,
        modality: str,
        prompt: Raw = None,
        *,
        rate: float = 1.0,
        seed: float | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Wait in line for a place, then begin a request; yields what a visitor is told meanwhile.

        Afterwards ``visit.job`` is the request, or None for a visitor who left. No seed, or a
        negative one, is a new seed. Raises RefusedError when something does not fit or too many
        wait.
        """
        try:
            settings = {**settings, "seed": chosen_seed(seed), "seconds": SECONDS}
            yield from self._waiting(visit, modality, prompt, rate, settings)
        except (ValueError, BusyError) as error:
            raise RefusedError(str(error)) from error

    def _waiting(
        self, visit: Visit, modality: str, prompt: Raw, rate: float, settings: dict[str, Any]
    ) -> Iterator[str]:
        if (modality, rate) not in self._schedulers:
            yield "loading the model …"
        scheduler = self.scheduler(modality, rate)
        while self._warming is not None and self._warming.is_alive() and not visit.left:
            yield FIRST  # so that the request's own time is that of sampling
            self._warming.join(PATIENCE)
        line = self._lines.setdefault((modality, rate), [])
        with self._lining:
            if len(line) >= WAITING:
                raise BusyError(f"{len(line)} visitors wait already; try again in a minute")
            line.append(visit)
        try:
            while not visit.left:
                ahead = line.index(visit)
                if ahead == 0:
                    with contextlib.suppress(BusyError):
                        visit.job = scheduler.submit(prompt, **settings)
                        return
                yield (
                    f"{scheduler.busy} requests are under way, the most there is room for; "
                    + (f"{ahead} more before you" if ahead else "you are next")
                )
                visit.wait(PATIENCE)
        finally:
            with self._lining:
                line.remove(visit)

    def status(
        self,
        visit: Visit,
        modality: str,
        rate: float = 1.0,
        extra: str = "",
        seed: int | None = None,
        before: Sequence[Sample] = (),
    ) -> str:
        """The line under what is made: seed, speed, the size of the state, the company.

        ``before``: what was drawn in a row before the visit's samples, the first from ``seed``.
        """
        samples = visit.samples()
        drawn = sum(len(s.tokens) for s in (*before, *samples))
        if not samples or not drawn:
            waiting = READING if self._compiled else FIRST
            return "nothing was drawn" if visit.left else waiting
        self._compiled = True
        pipe = self.pipe(modality, rate)
        chosen = samples[0].seed if seed is None else seed
        parts = [f"seed {chosen}", f"{drawn:,} tokens", f"{speed(samples):,.0f} tokens/s"]
        if extra:
            parts.append(extra)
        size = pipe.recurrent.state_bytes() / 1024
        parts += [f"state: {size:.0f} KiB, constant", pipe.engine_name]
        others = self.scheduler(modality, rate).busy - 1
        if others > 0:
            parts.append(f"shared with {others} other{'s' if others > 1 else ''}")
        return " · ".join(parts)


def speed(samples: Sequence[Sample]) -> float:
    """Tokens a second of samples that were drawn side by side."""
    return sum(len(s.tokens) for s in samples) / max(samples[0].seconds, 1e-9)


def chosen_seed(seed: float | None) -> int:
    """What the page's box means: none, or a negative number, is a new seed."""
    if seed is None or seed < 0:
        return new_seed() % (LARGEST_SEED + 1)  # so that it fits the box
    if not seed <= LARGEST_SEED or seed != int(seed):
        raise ValueError(f"a seed is a whole number up to {LARGEST_SEED}, got {seed!r:.40}")
    return int(seed)


def within(value: float, least: float, most: float, name: str) -> float:
    """A number that a visitor chose, or ValueError: programs are not held by the sliders."""
    if not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{name} must lie in {least:g} … {most:g}, got {value!r:.40}")
    return value


def updates(job: Job) -> Iterator[list[tuple[int, Raw]]]:
    """The new pieces, at most ``UPDATES`` times a second, and what is left at the end.

    An error of the job is raised after the last pieces, so that they are shown.
    """
    pieces: list[tuple[int, Raw]] = []
    shown, failure = 0.0, None
    try:
        for piece in job:
            pieces.append(piece)
            if time.perf_counter() - shown >= 1 / UPDATES:
                shown = time.perf_counter()
                yield pieces
                pieces = []
    except (ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        failure = error
    yield pieces
    if failure is not None:
        raise failure
