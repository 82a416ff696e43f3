"""Many requests on one model: each gets short turns, comes and goes, and harms no other."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Unpack

from genssm.codec import Raw
from genssm.cuda import CapturedModel
from genssm.engine import CompiledGeneration, Reading, draw_ahead
from genssm.pace import GROUP
from genssm.pipeline import LARGEST_BATCH, Pipeline
from genssm.request import Plan, Request, Settings
from genssm.session import Sample, Session
from genssm.stepper import CompiledModel
from genssm.threads import allowed_threads


class BusyError(RuntimeError):
    """There is no room for another request at present."""


class Job:
    """A request under way. Iterate for its pieces, (sample, piece), as ``Session`` yields them.

    Whoever stops iterating leaves: the job is cancelled, and what was drawn is kept.
    """

    def __init__(
        self, pipe: Pipeline, plan: Plan, state: Reading | None, until: float, snapshot_every: int
    ) -> None:
        self.plan = plan
        self._until = until
        self._cancelled = threading.Event()
        self._pieces: queue.SimpleQueue[tuple[int, Raw] | None] = queue.SimpleQueue()
        self._session: Session | None = None
        self._beginning = pipe.beginning(plan, state, snapshot_every)
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[tuple[int, Raw]]:
        try:
            while (piece := self._pieces.get()) is not None:
                yield piece
            self._pieces.put(None)  # for whoever iterates again
        finally:
            self.cancel()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End the job at its next turn. A finished job stays as it is."""
        self._cancelled.set()

    def samples(self) -> list[Sample]:
        """What has been drawn so far; nothing before the first turn."""
        return [] if self._session is None else self._session.samples()

    def reading(self, sample: int = 0) -> Reading:
        """What the model remembers of a sample, to go on from; see ``Session.reading``."""
        if self._session is None:
            raise ValueError(
                "this request has not had its first turn; there is nothing to continue"
            )
        return self._session.reading(sample)

    def run(self) -> list[Sample]:
        """Wait for the end."""
        for _ in self:
            pass
        return self.samples()

    @property
    def _hungry(self) -> CompiledGeneration | None:
        """What draws for this job, if its next turn has to draw in the compiled loop."""
        if self._session is None or self._cancelled.is_set():
            return None
        generation = self._session.generation
        if isinstance(generation, CompiledGeneration) and not generation.ahead:
            return generation
        return None

    def _turn(self) -> bool:
        """A piece of the prompt, or what the next block gives. False when there is no more."""
        if self._cancelled.is_set() or time.monotonic() > self._until:
            return False
        if self._session is None:
            self._session = next(self._beginning)
        else:
            for piece in self._session.ready():
                self._pieces.put(piece)
        return self._session is None or bool(self._session.generation.active)


class Scheduler:
    """Turns for the requests on one model, in the order in which they wait.

    In the compiled loop those that wait for a block of tokens share it as rows of one batch, if
    they have the same phase in the model's pools; they join and leave between blocks, each with
    its own prompt, length, position, settings and random stream. No result depends on the company,
    to the last bit. For 8 requests on one core of an AMD EPYC (Zen 5, busy) that made 1.6 times as
    many tokens a second of ``wiki`` as turns one by one, and 1.2 of ``digits``, where Python's part
    is larger; for 16, shared out in groups of 8, 1.4 and 1.5.

    A compiled model has one worker for each core that torch may use; the eager model has one, for
    torch brings its own threads, and steps requests one by one. On a GPU there is one, too, and all
    that wait at one phase make one batch.
    """

    def __init__(self, pipe: Pipeline, *, limit: int = 16) -> None:
        """``limit``: requests that may be under way; more are turned away with BusyError."""
        self.pipe, self.limit = pipe, limit
        self._jobs, self._closed = 0, False
        self._waiting: deque[Job | None] = deque()
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        compiled = isinstance(pipe.stepper, CompiledModel)
        captured = isinstance(pipe.stepper, CapturedModel)
        self._together = LARGEST_BATCH if captured else GROUP  # rows of a batch, about
        self._workers = [
            threading.Thread(target=self._work, name=f"genssm {pipe.name} {i}", daemon=True)
            for i in range(allowed_threads() if compiled else 1)
        ]
        for worker in self._workers:
            worker.start()

    @property
    def busy(self) -> int:
        """Requests under way."""
        return self._jobs

    def submit(
        self,
        prompt: Raw = None,
        *,
        state: Reading | None = None,
        seconds: float = 3600.0,
        snapshot_every: int = 0,
        **settings: Unpack[Settings],
    ) -> Job:
        """Begin a request; the arguments are those of ``Pipeline.sample``.

        After ``seconds`` it ends with what it has. ``snapshot_every``: as of ``Pipeline.start``;
        with it, ``Job.reading`` hands out the state itself and reads nothing again. Raises
        ValueError for a prompt or setting that does not fit, BusyError when too many requests
        are under way, and RuntimeError after ``close``.
        """
        request = Request.of(**settings)
        plan = self.pipe.plan(prompt, request, state)
        if request.rank > 1 or request.count > LARGEST_BATCH:
            raise ValueError(
                f"one request makes at most {LARGEST_BATCH} samples, without rank; got "
                f"count={request.count}, rank={request.rank}"
            )
        job = Job(self.pipe, plan, state, time.monotonic() + seconds, snapshot_every)
        with self._arrived:
            if self._closed:
                raise RuntimeError("this scheduler is closed; make another one")
            if self._jobs >= self.limit:
                raise BusyError(
                    f"{self._jobs} requests are under way, the most there is room for; "
                    "try again in a moment"
                )
            self._jobs += 1
            self._waiting.append(job)
            self._arrived.notify()
        return job

    def close(self) -> None:
        """End the workers after the turns that are due; requests then end with what they have."""
        with self._lock:
            self._closed = True
        self._queue([None] * len(self._workers))
        for worker in self._workers:
            worker.join()
        self._end([job for job in self._waiting if job is not None], None)
        self._waiting.clear()

    def _queue(self, jobs: Sequence[Job | None]) -> None:
        with self._arrived:
            self._waiting.extend(jobs)
            self._arrived.notify(len(jobs))

    def _company(self) -> list[Job]:
        """The job that has waited longest, and those that can share its block; none at the end."""
        with self._arrived:
            while not self._waiting:
                self._arrived.wait()
            first = self._waiting.popleft()
            if first is None:
                return []
            company, generation = [first], first._hungry
            if generation is None:
                return company
            share = -(-(1 + len(self._waiting)) // len(self._workers))  # others work, too
            rows = generation.rows
            for job in list(self._waiting):
                other = None if job is None else job._hungry
                if job is None or other is None or other.place != generation.place:
                    continue
                if len(company) == share or rows + other.rows > self._together:
                    break
                company.append(job)
                rows += other.rows
            for job in company[1:]:
                self._waiting.remove(job)
            return company

    def _work(self) -> None:
        while company := self._company():
            try:
                hungry = [g for job in company if (g := job._hungry) is not None]
                if hungry:
                    draw_ahead(hungry, None if self._jobs == 1 else 1)
            except Exception as error:
                self._end(company, error)
                continue
            while company:  # which then holds no job that has left
                job = company.pop(0)
                try:
                    more, error = job._turn(), None
                except Exception as raised:  # whatever goes wrong is this request's alone
                    more, error = False, raised
                if more:
                    self._queue([job])
                else:
                    self._end([job], error)

    def _end(self, jobs: list[Job], error: Exception | None) -> None:
        with self._lock:
            self._jobs -= len(jobs)
        for job in jobs:
            job._error = error
            job._pieces.put(None)
