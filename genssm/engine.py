"""The sampling loop: one recurrent model, several samples of one prompt side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from genssm.model import RecurrentModel, State
from genssm.sampling import RandomStream, SamplingConfig, draw, penalize, probabilities

PIECE = 2048  # prompt tokens read at once: bounds the memory of long prompts


@dataclass(frozen=True)
class Drawn:
    """One token of one sample; ``bits`` is -log2 of its probability under the model itself."""

    sample: int
    token: int
    bits: float


@dataclass(frozen=True)
class Reading:
    """A sequence as the model remembers it: what was read, the state after it, what comes next."""

    tokens: Tensor  # (L,) int64, start token first
    logits: Tensor  # (1, V) of the next token
    state: State  # of one sequence


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
        logits, state = start.logits, start.state
        if guide is not None:
            logits = torch.cat([logits, guide.logits])
            state = _beside(state, guide.state)
        rows = torch.arange(len(logits)).repeat_interleave(len(indices))
        self._logits, self._state = logits[rows], state.rows(rows)
        self._seen = torch.zeros(len(indices), logits.shape[-1], dtype=torch.bool)
        self._seen[:, start.tokens[start.tokens < logits.shape[-1]]] = True
        self._pending: Tensor | None = None  # drawn, not yet read by the model

    def step(self) -> list[Drawn]:
        """Draw one token for every active sample."""
        if not self.active:
            return []
        with one_thread():
            if self._pending is not None:
                read = self._pending.repeat(1 + self._guided)
                self._logits, self._state = self.model.step(read, self._state)
            logits = own = self._logits[: len(self.active)]
            if self._guided:
                logits = torch.lerp(self._logits[len(self.active) :], own, self.guidance)
            if self.config.repetition_penalty != 1:
                logits = penalize(logits, self._seen, self.config.repetition_penalty)
            p = probabilities(logits, self.config)
            uniform = [self._streams[i].next() for i in self.active]
            tokens = draw(p, torch.tensor(uniform, dtype=torch.float64))
            chosen = own.gather(-1, tokens[:, None])[:, 0]
            bits = (own.logsumexp(-1) - chosen) / math.log(2)
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

    def snapshot(self) -> Snapshot:
        """What the model remembers of every active sample, without the token drawn last."""
        rows = torch.arange(len(self.active))
        return Snapshot(tuple(self.active), self._logits[rows], self._state.rows(rows))


@dataclass(frozen=True)
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


def read(model: RecurrentModel, tokens: Tensor, before: Reading | None = None) -> Reading:
    """Read tokens (L,) in parallel, in pieces, from the start or on from ``before``."""
    if before is None and len(tokens) == 0:
        raise ValueError("a prompt needs at least its start token")
    logits, state = torch.empty(0), model.initial_state(1)
    if before is not None:
        logits, state = before.logits, before.state
    with one_thread():
        for i in range(0, len(tokens), PIECE):
            every, state = model.prefill(tokens[None, i : i + PIECE], state)
            logits = every[:, -1]
    return Reading(tokens if before is None else torch.cat([before.tokens, tokens]), logits, state)


def _beside(first: State, second: State) -> State:
    """Two states at one position as one batch."""

    def join(a: Tensor | tuple, b: Tensor | tuple) -> Tensor | tuple:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.cat([a, b])
        return tuple(map(join, a, b))

    history = torch.cat([first.history, second.history])
    return State(first.position, history, tuple(map(join, first.layers, second.layers)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Step on one thread: a step is too short to be worth waiting for a second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
