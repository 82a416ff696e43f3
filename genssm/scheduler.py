"""Many requests on one model: each gets short turns, comes and goes, and harms no other."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Unpack

import torch

from genssm.codec import Raw
from genssm.engine import Reading
from genssm.pipeline import LARGEST_BATCH, Pipeline, Sample, Session
from genssm.request import Plan, Request, Settings
from genssm.stepper import CompiledModel


class BusyError(RuntimeError):
    """There is no room for another request at present."""


class Job:
    """A request under way. Iterate for its pieces, (sample, piece), as ``Session`` yields them.

    Whoever stops iterating leaves: the job is cancelled, and what was drawn is kept.
    """

    def __init__(self, pipe: Pipeline, plan: Plan, state: Reading | None, until: float) -> None:
        self.plan = plan
        self._pipe, self._state, self._until = pipe, state, until
        self._cancelled = threading.Event()
        self._pieces: queue.SimpleQueue[tuple[int, Raw] | None] = queue.SimpleQueue()
        self._session: Session | None = None
        self._source: Iterator[tuple[int, Raw]] = iter(())
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[tuple[int, Raw]]:
        try:
            while (piece := self._pieces.get()) is not None:
                yield piece
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

    def _turn(self) -> bool:
        """One piece of work: the prompt, or the next piece. False when there is no more."""
        if self._cancelled.is_set() or time.monotonic() > self._until:
            return False
        if self._session is None:
            self._session = next(self._pipe.batches(self.plan, self._state))
            self._source = iter(self._session)
            return True
        piece = next(self._source, None)
        if piece is None:
            return False
        self._pieces.put(piece)
        return True


class Scheduler:
    """Turns for the requests on one model, in the order in which they wait.

    Requests share the model's weights and nothing else, so that no result depends on the company.
    A compiled model has one worker for each core that torch may use; the eager model has one, for
    torch brings its own threads. Stepping requests one by one, not as rows of one batch, lets
    each have its own length, settings and position; with weights in the processor's cache a batch
    would gain less than a factor of two.
    """

    def __init__(self, pipe: Pipeline, *, limit: int = 16) -> None:
        """``limit``: requests that may be under way; more are turned away with BusyError."""
        self.pipe, self.limit = pipe, limit
        self._lock = threading.Lock()
        self._jobs = 0
        self._turns: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        compiled = isinstance(pipe.stepper, CompiledModel)
        self._workers = [
            threading.Thread(target=self._work, name=f"genssm {pipe.name} {i}", daemon=True)
            for i in range(torch.get_num_threads() if compiled else 1)
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
        **settings: Unpack[Settings],
    ) -> Job:
        """Begin a request; the arguments are those of ``Pipeline.sample``.

        After ``seconds`` it ends with what it has. Raises ValueError for a prompt or setting that
        does not fit, and BusyError when too many requests are under way.
        """
        request = Request(**settings)  # type: ignore[arg-type]
        plan = self.pipe.plan(prompt, request, state)
        if len(plan.indices) > LARGEST_BATCH or request.rank > 1:
            raise ValueError(f"one request makes at most {LARGEST_BATCH} samples, without rank")
        job = Job(self.pipe, plan, state, time.monotonic() + seconds)
        with self._lock:
            if self._jobs >= self.limit:
                raise BusyError(
                    f"{self._jobs} requests are under way, the most there is room for; "
                    "try again in a moment"
                )
            self._jobs += 1
        self._turns.put(job)
        return job

    def close(self) -> None:
        """End the workers after the requests under way have had one more turn."""
        for _ in self._workers:
            self._turns.put(None)
        for worker in self._workers:
            worker.join()

    def _work(self) -> None:
        while (job := self._turns.get()) is not None:
            try:
                more = job._turn()
            except Exception as error:  # whatever goes wrong is this request's alone
                job._error, more = error, False
            if more:
                self._turns.put(job)
                continue
            with self._lock:
                self._jobs -= 1
            job._pieces.put(None)
