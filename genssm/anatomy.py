"""A model from the inside: what its layers remember, its state as it moves, its views side by side.

For people who look: everything comes in small steps, so that a page can show it as it is measured.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genssm.blocks import Block, Pool
from genssm.codec import Image
from genssm.conversion import certify
from genssm.engine import Generation, Reading, begin, read
from genssm.model import SequenceModel
from genssm.pipeline import Pipeline
from genssm.sampling import SamplingConfig
from genssm.sampling_benchmark import (
    MARGIN,
    WARM_UP,
    build_transformer,
    last_logits,
    measure_cached,
    measure_recomputed,
)
from genssm.threads import torch_threads

TIMED = 64  # steps that a race takes the time of
BANDS = 8  # groups of features that a layer's state is shown as
CALIBRATED = 256  # tokens of the probe that set the scale of the levels
HEADROOM = 1.4
POLES = 24  # features whose poles are drawn


@dataclass(frozen=True)
class LayerMemory:
    """What one layer remembers, in tokens."""

    name: str
    kernel: list[float]  # the strongest of its kernels, scaled to a largest value of 1
    poles: list[tuple[float, float]]  # exp(Δλ) of some features, the upper half plane
    half_lives: tuple[float, float, float]  # shortest, median, longest
    difference: float  # of the views, relative to the largest output
    spectral_radius: float
    stride: int  # tokens per position of this layer


@dataclass(frozen=True)
class Agreement:
    """The largest differences of the logits at one position, against the convolution."""

    position: int
    step: float  # of stepping, token by token
    prefill: float  # of reading in parallel
    scale: float  # the largest logit


@dataclass(frozen=True)
class Lap:
    """Milliseconds that one more token takes after ``length`` tokens, on one thread."""

    length: int
    step: float
    convolution: float  # of the whole context again
    transformer: float | None  # GPT-2 of as many parameters with its cache; None if not to be had


def _blocks(model: SequenceModel) -> dict[str, tuple[Block, int]]:
    """The blocks of a model, depth first, and the tokens per position of each."""
    pools = {name: m.stride for name, m in model.named_modules() if isinstance(m, Pool)}
    return {
        name: (m, math.prod(s for pool, s in pools.items() if name.startswith(f"{pool}.")))
        for name, m in model.named_modules()
        if isinstance(m, Block)
    }


def probe_of(pipe: Pipeline) -> Tensor:
    """The real tokens that came with a checkpoint, (L,); the boundary alone where none did."""
    return torch.tensor(pipe.config["probe"] or [pipe.codec.boundary])


@torch.no_grad()
def memories(pipe: Pipeline, length: int = 512) -> list[LayerMemory]:
    """Kernel, poles and half-lives of every layer, from the first to the last."""
    probe = probe_of(pipe)[:256]
    reports = {r.name: r for r in certify(pipe.model, pipe.recurrent, probe, pipe.rate).layers}
    found = []
    for name, (block, stride) in _blocks(pipe.model).items():
        report = reports[name]
        kernels = block.ssm.kernel(length, pipe.rate)[:, 0]
        strongest = kernels[kernels.square().sum(-1).argmax()]
        every = max(1, block.ssm.d_model // POLES)
        poles = torch.linalg.eigvals(block.ssm.to_continuous(pipe.rate).A[::every]).exp()
        upper = poles[poles.imag >= 0]
        upper = upper[:: max(1, len(upper) // 200)]  # as many as can be told apart
        found.append(
            LayerMemory(
                name,
                (strongest / strongest.abs().max().clamp(min=1e-30)).tolist(),
                list(zip(upper.real.tolist(), upper.imag.tolist(), strict=True)),
                report.half_lives,
                report.difference,
                report.spectral_radius,
                stride,
            )
        )
    return found


@torch.no_grad()
def agreements(pipe: Pipeline, tokens: Tensor) -> Iterator[Agreement]:
    """Step through tokens (L,) and compare every position with the convolution of all of them."""
    convolved = pipe.model(tokens[None], pipe.rate)[0].double()
    read_at_once = pipe.recurrent.prefill(tokens[None])[0][0].double()
    state = pipe.recurrent.initial_state(1)
    for i, token in enumerate(tokens):
        logits, state = pipe.recurrent.step(token[None], state)
        yield Agreement(
            i,
            float((logits[0].double() - convolved[i]).abs().max()),
            float((read_at_once[i] - convolved[i]).abs().max()),
            float(convolved[i].abs().max()),
        )


class StateView:
    """Levels of a model's state: for every layer ``BANDS`` groups of features, 0 … 255.

    Features are ordered by Δ, the longest memory first. A level is the magnitude of the states of a
    group; 255 is ``HEADROOM`` times the largest that it reaches on the model's probe.
    """

    def __init__(self, pipe: Pipeline) -> None:
        blocks = _blocks(pipe.model)
        self.names = list(blocks)
        self._orders = [block.ssm.dt().argsort() for block, _ in blocks.values()]
        state, largest = pipe.recurrent.initial_state(1), torch.full((self.rows,), 1e-12)
        for token in probe_of(pipe)[:CALIBRATED]:
            _, state = pipe.recurrent.step(token[None], state)
            largest = torch.maximum(largest, self._magnitudes(state.layers))
        self._scale = HEADROOM * largest

    @property
    def rows(self) -> int:
        return BANDS * len(self.names)

    def levels(self, layers: tuple) -> np.ndarray:
        """``State.layers`` of one sequence → uint8 (rows,)."""
        return (255 * (self._magnitudes(layers) / self._scale).clamp(0, 1)).byte().numpy()

    def _magnitudes(self, layers: tuple) -> Tensor:
        bands = []
        for x, order in zip(_leaves(layers), self._orders, strict=True):
            energy = x[0].abs().square().mean(-1)[order]  # (H,)
            bands += [part.mean().sqrt() for part in energy.tensor_split(BANDS)]
        return torch.stack(bands)


def _leaves(layers: tuple) -> list[Tensor]:
    """The states of the blocks, depth first; a pool's state is (group, queue, inner stack)."""
    found: list[Tensor] = []
    for layer in layers:
        found += [layer] if isinstance(layer, Tensor) else _leaves(layer[2])
    return found


def trace(
    pipe: Pipeline,
    view: StateView,
    start: Reading,
    config: SamplingConfig,
    seed: int,
    tokens: int,
) -> Iterator[tuple[int, np.ndarray]]:
    """Draw token by token with the reference engine: (token, levels of the state before it)."""
    generation = Generation(pipe.recurrent, start, config, seed=seed, indices=[0])
    for _ in range(tokens):
        token = generation.step()[0].token
        yield token, view.levels(generation.snapshot().state.layers)
        if token == pipe.codec.boundary:
            return


def has_transformers() -> bool:
    """Whether a GPT-2 can take part in a race."""
    return importlib.util.find_spec("transformers") is not None


def race_lengths(pipe: Pipeline) -> list[int]:
    """Lengths at which ``race`` takes the time; a picture has an end."""
    most = pipe.codec.length - TIMED - WARM_UP if isinstance(pipe.codec, Image) else 4096
    return [length for length in (128, 256, 512, 1024, 2048, 4096) if length <= most]


@torch.no_grad()
def race(pipe: Pipeline, lengths: Sequence[int]) -> Iterator[Lap]:
    """The time of one more token at growing lengths: step, convolution, and a Transformer."""
    transformer: Any = None
    if has_transformers():
        size = sum(p.numel() for p in pipe.model.parameters())
        transformer = build_transformer(size, pipe.model.config, max(lengths) + MARGIN)
    probe = probe_of(pipe)
    convolved = partial(last_logits, pipe.model, rate=pipe.rate)
    for length in lengths:
        context = probe.repeat(-(-length // len(probe)))[:length]
        with torch_threads(1):
            lap = Lap(
                length,
                _stepped(pipe, context),
                1000 / measure_recomputed(convolved, length, 1),
                transformer and 1000 / measure_cached(transformer, length, 1),
            )
        yield lap


def _stepped(pipe: Pipeline, context: Tensor) -> float:
    """Milliseconds of one step after the tokens (L,): the best of three times ``TIMED``."""
    start = read(pipe.recurrent, context)
    generation = begin(pipe.stepper, start, SamplingConfig(), seed=0, indices=[0])
    for _ in range(WARM_UP):
        generation.step()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(TIMED):
            generation.step()
        times.append(time.perf_counter() - began)
    return 1000 * min(times) / TIMED
