"""The sampling loop: one model, several samples of one prompt side by side, eager or in blocks."""

from __future__ import annotations

import functools
import math
import sys
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from genssm.blocks import map_nested
from genssm.cuda import CapturedModel
from genssm.finite import NotFiniteError
from genssm.model import RecurrentModel, State
from genssm.pace import Pace, Way, ways
from genssm.pool import in_threads
from genssm.sampling import RandomStream, SamplingConfig, draw, guided, penalize, probabilities
from genssm.stepper import CompiledModel, Stepper, team
from genssm.stepping import Draws
from genssm.threads import allowed_threads, one_thread, torch_threads

PIECE = 2048  # prompt tokens read at once: bounds the memory of long prompts
SHORT = 256  # tokens that are read before a second thread would have begun
BLOCK = 32  # tokens of a sample that the compiled loop draws at once, after 1, 2, 4, …

T = TypeVar("T")


class Drawn(NamedTuple):
    """One token of one sample; ``bits`` is -log2 of its probability under the model itself."""

    sample: int
    token: int
    bits: float


@dataclass(frozen=True, eq=False)
class Reading:
    """A sequence as the model remembers it: what was read, the state after it, what comes next."""

    tokens: Tensor  # (L,) int64, start token first
    logits: Tensor  # (1, V) of the next token
    state: State  # of one sequence
    owner: tuple[str, float] | None = None  # content hash and rate of the model, where known


class Generation:
    """Samples that continue one prompt. Each ``step`` draws a token for every active sample.

    A sample depends on its prompt, settings, seed and index alone: the prompt is read once for all,
    rows are computed one by one, and every sample has its own random stream. This holds to the last
    bit for widths that are multiples of 32, as all shipped models have; for others torch rounds the
    activations at the end of a vector differently, and the last digits may depend on the batch.
    """

    def __init__(
        self,
        model: RecurrentModel,
        start: Reading,
        config: SamplingConfig,
        *,
        seed: int,
        indices: Sequence[int],
        guide: Reading | None = None,
        guidance: float = 1.0,
    ) -> None:
        """``guide``: what was read without the class; logits are guide + guidance·(start - guide).

        Both streams step in one batch, first all rows of ``start``, then all rows of ``guide``.
        """
        self.model, self.config, self.guidance = model, config, guidance
        self.active = list(range(len(indices)))
        self._streams = [RandomStream(seed, i) for i in indices]
        self._guided = guide is not None
        logits, state = _streams_of(start, guide)
        rows = torch.arange(len(logits)).repeat_interleave(len(indices))
        self._logits, self._state = logits[rows], state.rows(rows)
        self._seen = torch.zeros(len(indices), logits.shape[-1], dtype=torch.bool)
        self._seen[:, _repeatable(start, logits.shape[-1])] = True
        self._pending: Tensor | None = None  # drawn, not yet read by the model

    ahead = 0  # steps that are drawn already: none

    def step(self) -> list[Drawn]:
        """Draw one token for every active sample."""
        if not self.active:
            return []
        with one_thread():
            if self._pending is not None:
                read = self._pending.repeat(1 + self._guided)
                self._logits, self._state = self.model.step(read, self._state)
                self._pending = None  # so that an interruption does not have it read again
            logits = own = self._logits[: len(self.active)]
            if self._guided:
                other = self._logits[len(self.active) :]
                logits = guided(own, other, self.guidance, self.config.plausible)
            if self.config.repetition_penalty != 1:
                logits = penalize(logits, self._seen, self.config.repetition_penalty)
            p = probabilities(logits, self.config)
            uniform = [self._streams[i].next() for i in self.active]
            tokens = draw(p, torch.tensor(uniform, dtype=torch.float64))
            chosen = own.gather(-1, tokens[:, None])[:, 0]
            bits = (own.logsumexp(-1) - chosen) / math.log(2)
            if not bool(bits.isfinite().all()):
                raise NotFiniteError(self.model, self._state)
            self._seen.scatter_(-1, tokens[:, None], True)
            self._pending = tokens
        return [
            Drawn(*drawn) for drawn in zip(self.active, tokens.tolist(), bits.tolist(), strict=True)
        ]

    def finish(self, samples: set[int]) -> None:
        """Take samples out of the batch; the others go on as if nothing happened."""
        kept = [row for row, sample in enumerate(self.active) if sample not in samples]
        if len(kept) == len(self.active):
            return
        rows = torch.tensor(kept, dtype=torch.int64)
        every = torch.cat([rows + i * len(self.active) for i in range(1 + self._guided)])
        self.active = [self.active[row] for row in kept]
        self._logits, self._state = self._logits[every], self._state.rows(every)
        self._seen = self._seen[rows]
        if self._pending is not None:
            self._pending = self._pending[rows]

    def present(self) -> None:
        """None: the token drawn last is read only with the next step; see ``snapshot``."""

    def snapshot(self) -> Snapshot:
        """What the model remembers of every active sample, without the token drawn last."""
        rows = torch.arange(len(self.active))
        return Snapshot(tuple(self.active), self._logits[rows], self._state.rows(rows))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """States of several samples at one position."""

    samples: tuple[int, ...]
    logits: Tensor  # (B, V)
    state: State

    def reading(self, sample: int, tokens: Tensor) -> Reading:
        """The reading of one sample, which began with tokens (L,)."""
        row = torch.tensor([self.samples.index(sample)])
        read = tokens[: int(self.state.position)]
        return Reading(read, self.logits[row], self.state.rows(row))


@dataclass
class _Part:
    """Samples that are stepped side by side, as one batch."""

    held: list[int]  # the sample of each row of ``seen``
    memory: Any  # the stepper's: their rows; if guided, then those of the guides in the same order
    seen: np.ndarray  # (B, V) bool, for the repetition penalty


class CompiledGeneration:
    """``Generation`` by the compiled loop or CUDA graphs: with float32 weights, the same tokens.

    Blocks of tokens are drawn ahead of what ``step`` hands out. Samples that finish leave at the
    next block. The compiled loop steps samples by several threads and in parts, where that turns
    out to be faster (``Pace``); no sample depends on its company, to the last bit.
    """

    def __init__(
        self,
        model: CompiledModel | CapturedModel,
        start: Reading,
        config: SamplingConfig,
        *,
        seed: int,
        indices: Sequence[int],
        guide: Reading | None = None,
        guidance: float = 1.0,
        limit: int = sys.maxsize,
        snapshots: bool = False,
    ) -> None:
        """``guide``, ``guidance``: as of ``Generation``; ``snapshots``: keep what they need.

        ``limit``: steps after which no more will be asked for.
        """
        self.model, self.config, self.guidance = model, config, guidance
        self._left, self._snapshots = limit, snapshots
        self.active = list(range(len(indices)))
        self._streams = [RandomStream(seed, i) for i in indices]
        logits, state = _streams_of(start, guide)
        rows = torch.arange(len(logits)).repeat_interleave(len(indices))
        size = logits.shape[-1]
        seen = np.zeros((len(indices), size), np.bool_)
        seen[:, _repeatable(start, size).numpy()] = True
        memory = model.load(state.rows(rows), logits[rows])
        self._begun: Snapshot | None = None  # the state before the tokens of ``_ahead``
        self._drawing, self._lock = False, threading.Lock()  # whether the states are changing
        self._parts, self._threads = [_Part(list(self.active), memory, seen)], 1
        self._position, self._size = len(start.tokens), 1
        self._ahead: list[list[Drawn]] = []  # steps drawn and not yet handed out, the last first
        self._error: NotFiniteError | None = None

    @property
    def ahead(self) -> int:
        """Steps that are drawn already."""
        return len(self._ahead)

    @property
    def threads(self) -> int:
        """Threads that step it when it is alone: as many as turned out to be the fastest."""
        return self._threads

    @property
    def place(self) -> tuple[int, int]:
        """Phase and length of the next block; generations of equal ones may share it.

        Blocks are short at first, so that the first token comes soon, and then end at multiples of
        the model's period, whatever the prompt's length.
        """
        size, period = self._size, self.model.config.period
        if size >= period:
            size -= (self._position + size) % period
        return self._position % period, min(size, self._left)

    @property
    def rows(self) -> int:
        """Rows of the batch, without those that have finished since the last block."""
        return len(self.active) * (1 if self.guidance == 1 else 2)

    def step(self) -> list[Drawn]:
        """Draw one token for every active sample."""
        if not self.active:
            return []
        if not self._ahead:
            draw_ahead([self])
        if self._error is not None:
            raise self._error
        return self._ahead.pop()

    def _draw(self, most: int) -> None:
        """The next block, by at most so many threads."""
        samples, size, pace = len(self.active), self.place[1], self._pace(most)
        way = pace.choose(size, len(self._parts) == 1)
        draws, threads = self._draws(size, way.parts(samples, most)), way.threads(samples, most)
        started, taken = time.perf_counter(), True
        if way.divides:
            blocks = in_threads(self.model.generate, draws, threads)
        else:
            with team(threads) as members:
                taken = members == threads
                blocks = self.model.generate_together(draws, members)
        if taken:
            pace.took(way, size, time.perf_counter() - started)
        self._threads = pace.way.threads(samples, most)
        self._take(blocks)

    def _pace(self, most: int) -> Pace:
        """What is known of batches like this one."""
        if self.model.paces is None:
            return Pace([Way.WHOLE])
        samples = len(self.active)
        options = ways(samples, most)
        key = options, samples.bit_length(), self.rows // samples, most
        return self.model.paces.setdefault(key, Pace(options))

    def _draws(self, size: int, parts: int | None = None) -> list[Draws]:
        """What decides the next block, part by part, of as many as there were, if None.

        Until ``_take`` the states are changing.
        """
        with self._lock:
            if self._drawing:
                raise RuntimeError(
                    "the last block of tokens was interrupted, and with it the states; go on from "
                    "what was handed out: pipe.start(state=session.reading())"
                )
            self._drawing = True
        self._parts = self._shared_out(parts or len(self._parts))
        if self._snapshots:
            self._begun = self._joined(self._parts)
        return [
            Draws(
                part.memory,
                np.stack([self._streams[i].take(size) for i in part.held]),
                self.config,
                part.seen,
                self.guidance,
            )
            for part in self._parts
        ]

    def _take(self, blocks: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """The next steps of all samples: tokens and bits of each part."""
        size = blocks[0][0].shape[1]
        self._position, self._size = self._position + size, min(2 * self._size, BLOCK)
        self._left -= size
        if not all(np.isfinite(bits).all() for _, bits in blocks):
            with np.errstate(all="ignore"):
                state = self._joined(self._parts).state
            self._error = NotFiniteError(self.model.model, state)
        parts = zip(self._parts, blocks, strict=True)
        rows = [
            map(Drawn, repeat(sample), *drawn)
            for part, (tokens, bits) in parts
            for sample, *drawn in zip(part.held, tokens.tolist(), bits.tolist(), strict=True)
        ]
        self._ahead = [list(step) for step in zip(*rows, strict=True)]
        self._ahead.reverse()
        self._drawing = False

    def finish(self, samples: set[int]) -> None:
        """Take samples out of the batch; the others go on as if nothing happened."""
        self.active = [sample for sample in self.active if sample not in samples]
        self._ahead = [[d for d in step if d.sample not in samples] for step in self._ahead]

    def snapshot(self) -> Snapshot:
        """What the model remembered of every sample when the block in hand began."""
        assert self._begun is not None, "begun without snapshots, or not yet stepped"
        return self._begun

    def present(self) -> Snapshot | None:
        """What the model remembers of the samples of the last block, all of its tokens included.

        None while a block is being drawn, or tokens of it are still to be handed out.
        """
        with self._lock:
            return None if self._drawing or self._ahead else self._joined(self._parts)

    def _joined(self, parts: list[_Part]) -> Snapshot:
        own = [torch.arange(len(part.held)) for part in parts]  # without guides
        memories = [part.memory for part in parts]
        states = [self.model.save(m).rows(rows) for m, rows in zip(memories, own, strict=True)]
        logits = [self.model.logits(m)[rows] for m, rows in zip(memories, own, strict=True)]
        held = tuple(sample for part in parts for sample in part.held)
        return Snapshot(held, torch.cat(logits), functools.reduce(_beside, states))

    def _shared_out(self, count: int) -> list[_Part]:
        """The active samples in so many parts: those there are, unless some have lost too many."""
        active, count = set(self.active), min(count, len(self.active))
        held = [[sample for sample in part.held if sample in active] for part in self._parts]
        most = max(-(-len(active) // count), 1.25 * len(active) / count)
        if len(held) != count or not all(held) or max(map(len, held)) > most:
            held = [part.tolist() for part in np.array_split(self.active, count)]
        return [self._part(samples) for samples in held]

    def _part(self, held: list[int]) -> _Part:
        """These samples as one part, taken from those that hold them."""
        wanted = set(held)
        parts = [part for part in self._parts if not wanted.isdisjoint(part.held)]
        if len(parts) == 1 and parts[0].held == held:
            return parts[0]
        places, begin = {}, 0  # where the rows of a sample are, its own and that of its guide
        for part in parts:
            for row, sample in enumerate(part.held):
                places[sample] = range(begin + row, begin + part.memory.batch, len(part.held))
            begin += part.memory.batch
        streams = zip(*(places[sample] for sample in held), strict=True)
        rows = [row for stream in streams for row in stream]
        seen = {s: row for part in parts for s, row in zip(part.held, part.seen, strict=True)}
        memory = self.model.rows([part.memory for part in parts], rows)
        return _Part(held, memory, np.stack([seen[sample] for sample in held]))


def draw_ahead(generations: Sequence[CompiledGeneration], threads: int | None = None) -> None:
    """Draw the next block of each; several of one model and one ``place`` are one batch.

    What they draw does not depend on their company, to the last bit. One that is alone may use so
    many ``threads``, as many as torch may if None; several are stepped by this thread.
    """
    first = generations[0]
    if len(generations) == 1:
        first._draw(allowed_threads() if threads is None else threads)
        return
    draws = [generation._draws(first.place[1]) for generation in generations]
    together = iter(first.model.generate_together([d for each in draws for d in each]))
    for generation, each in zip(generations, draws, strict=True):
        generation._take([next(together) for _ in each])


def begin(
    model: Stepper,
    start: Reading,
    config: SamplingConfig,
    *,
    seed: int,
    indices: Sequence[int],
    guide: Reading | None = None,
    guidance: float = 1.0,
    limit: int = sys.maxsize,
    snapshots: bool = False,
) -> Generation | CompiledGeneration:
    """At most ``limit`` steps that go on from ``start``, by the loop that fits the model."""
    if not isinstance(model, RecurrentModel):
        return CompiledGeneration(
            model, start, config, seed=seed, indices=indices, guide=guide, guidance=guidance,
            limit=limit, snapshots=snapshots,
        )  # fmt: skip
    return Generation(
        model, start, config, seed=seed, indices=indices, guide=guide, guidance=guidance
    )


def read(model: Stepper, tokens: Tensor, before: Reading | None = None) -> Reading:
    """Read tokens (L,) in parallel, in pieces, from the start or on from ``before``.

    A long prompt may use all of torch's threads; they change no bit of the result.
    """
    return result_of(read_by_pieces(model, tokens, before))


def result_of(steps: Generator[None, None, T]) -> T:
    """What a generator returns, after all its steps."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def read_by_pieces(
    model: Stepper, tokens: Tensor, before: Reading | None = None
) -> Generator[None, None, Reading]:
    """``read``, step by step: yields between the pieces, returns the reading."""
    if before is None and len(tokens) == 0:
        raise ValueError("a prompt needs at least its start token")
    logits, state = torch.empty(0), model.initial_state(1)
    if before is not None:
        logits, state = before.logits, before.state
    threads = 1 if len(tokens) <= SHORT else allowed_threads()
    for i in range(0, len(tokens), PIECE):
        if i:
            yield
        with torch_threads(threads):
            logits, state = model.read(tokens[None, i : i + PIECE], state)
    return Reading(tokens if before is None else torch.cat([before.tokens, tokens]), logits, state)


def _repeatable(start: Reading, outputs: int) -> Tensor:
    """The tokens of a prompt that may be predicted again; its start is no end of it."""
    tokens = start.tokens[1:]
    return tokens[tokens < outputs]


def _streams_of(start: Reading, guide: Reading | None) -> tuple[Tensor, State]:
    """Logits and state of a sequence and, as a second row, of the one that guides it."""
    if guide is None:
        return start.logits, start.state
    return torch.cat([start.logits, guide.logits]), _beside(start.state, guide.state)


def _beside(first: State, second: State) -> State:
    """Two states at one position as one batch."""
    joined = map_nested(lambda a, b: torch.cat([a, b]), first[1:], second[1:])
    return State(first.position, *joined)
