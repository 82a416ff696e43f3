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
        prompt: Tensor,
        config: SamplingConfig,
        *,
        seed: int,
        indices: Sequence[int],
    ) -> None:
        self.model, self.config = model, config
        self.active = list(range(len(indices)))
        self._streams = [RandomStream(seed, i) for i in indices]
        with one_thread():
            logits, state = read(model, prompt)
        rows = torch.zeros(len(indices), dtype=torch.int64)
        self._logits, self._state = logits[rows], state.rows(rows)
        self._seen = torch.zeros(len(indices), logits.shape[-1], dtype=torch.bool)
        self._seen[:, prompt[prompt < logits.shape[-1]]] = True
        self._pending: Tensor | None = None  # drawn, not yet read by the model

    def step(self) -> list[Drawn]:
        """Draw one token for every active sample."""
        if not self.active:
            return []
        with one_thread():
            if self._pending is not None:
                self._logits, self._state = self.model.step(self._pending, self._state)
            logits = self._logits
            if self.config.repetition_penalty != 1:
                logits = penalize(logits, self._seen, self.config.repetition_penalty)
            p = probabilities(logits, self.config)
            uniform = [self._streams[i].next() for i in self.active]
            tokens = draw(p, torch.tensor(uniform, dtype=torch.float64))
            chosen = self._logits.gather(-1, tokens[:, None])[:, 0]
            bits = (self._logits.logsumexp(-1) - chosen) / math.log(2)
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
        self.active = [self.active[row] for row in kept]
        rows = torch.tensor(kept, dtype=torch.int64)
        self._logits, self._state = self._logits[rows], self._state.rows(rows)
        self._seen = self._seen[rows]
        if self._pending is not None:
            self._pending = self._pending[rows]


def read(model: RecurrentModel, prompt: Tensor) -> tuple[Tensor, State]:
    """Read a prompt (L,) in parallel, in pieces → logits (1, V) of the next token, state."""
    if len(prompt) == 0:
        raise ValueError("a prompt needs at least its start token")
    state = model.initial_state(1)
    logits = torch.empty(0)
    for i in range(0, len(prompt), PIECE):
        logits, state = model.prefill(prompt[None, i : i + PIECE], state)
    return logits[:, -1], state


@contextmanager
def one_thread() -> Iterator[None]:
    """Step on one thread: a step is too short to be worth waiting for a second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
