"""From logits to tokens: temperature, filters, penalties, and one random stream per sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from genssm.settings import check_types


@dataclass(frozen=True)
class SamplingConfig:
    """How a token is drawn. Filters apply in the order of the fields, each to what is left.

    ``temperature`` 0 takes the most likely token; ``plausible`` 0, ``top_k`` 0, ``top_p`` 1,
    ``min_p`` 0 and ``repetition_penalty`` 1 do nothing.
    """

    plausible: float = 0.0  # of what is guided beyond 1, see ``guided``
    repetition_penalty: float = 1.0  # CTRL (arXiv 1909.05858), Section 4.1
    temperature: float = 1.0
    top_k: int = 0  # keep the k most likely tokens
    top_p: float = 1.0  # keep the fewest tokens that hold this probability (nucleus)
    min_p: float = 0.0  # keep tokens at least this likely relative to the likeliest

    def __post_init__(self) -> None:
        check_types(self)
        rules = {
            "plausible": (0 <= self.plausible <= 1, "0 <= … <= 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 10, "0.01 <= … <= 10"),
            "temperature": (0 <= self.temperature <= 100, "0 <= … <= 100"),
            "top_k": (0 <= self.top_k < 2**31, "0 <= … < 2^31"),
            "top_p": (1e-9 <= self.top_p <= 1, "1e-9 <= … <= 1"),  # single precision has it
            "min_p": (0 <= self.min_p <= 1, "0 <= … <= 1"),
        }
        broken = [
            f"{rule.replace('…', name)}, got {getattr(self, name)}"
            for name, (holds, rule) in rules.items()
            if not holds
        ]
        if broken:
            raise ValueError(f"sampling needs {'; '.join(broken)}")

    def changed(self, **settings: float | int | None) -> SamplingConfig:
        """A copy in which settings that are not None are replaced."""
        return replace(self, **{k: v for k, v in settings.items() if v is not None})  # type: ignore[arg-type]


def penalize(logits: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """Make seen tokens less likely: positive logits are divided by ``penalty``, others multiplied.

    logits (B, V), seen (B, V) bool, penalty a number or (B, 1) → (B, V).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def guided(
    own: Tensor, other: Tensor, guidance: float | Tensor, plausible: float | Tensor
) -> Tensor:
    """Logits other + guidance·(own - other), all (B, V); the last two numbers or (B, 1).

    Beyond 1, only tokens are left that are at least so ``plausible`` in ``own``, relative to the
    likeliest: where both hold a token improbable, their difference is noise, and guidance stresses
    it. Source: Li et al., "Contrastive Decoding" (arXiv 2210.15097), Section 3.2.
    """
    logits = torch.lerp(other, own, guidance)
    improbable = (own - own.amax(-1, keepdim=True)).exp() < plausible
    return logits.masked_fill(improbable & (guidance > 1), -math.inf)


def probabilities(logits: Tensor, config: SamplingConfig) -> Tensor:
    """The distribution that is drawn from: logits (B, V) → float64 (B, V), rows sum to one."""
    logits = logits.double()
    if config.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    # Relative to the likeliest, so that no temperature is too low.
    p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / config.temperature, -1)
    if 0 < config.top_k < p.shape[-1]:
        least = p.topk(config.top_k, -1).values[:, -1:]
        p = renormalized(p, p >= least)
    if config.top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < config.top_p  # the likeliest is always kept
        p = renormalized(p, torch.zeros_like(kept).scatter(-1, order, kept))
    if config.min_p > 0:
        p = renormalized(p, p >= config.min_p * p.amax(-1, keepdim=True))
    return p


def renormalized(p: Tensor, kept: Tensor) -> Tensor:
    """p (B, V) where it is kept, to the sum 1 again."""
    p = p * kept
    return p / p.sum(-1, keepdim=True)


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """Inverse transform sampling: p (B, V), uniform (B,) on [0, 1) → tokens (B,) int64."""
    cdf = p.cumsum(-1)
    target = (uniform * cdf[:, -1])[:, None]
    tokens = torch.searchsorted(cdf, target, right=True)[:, 0]
    last = p.shape[-1] - 1 - (p.flip(-1) > 0).to(torch.int8).argmax(-1)  # guards rounding
    return torch.minimum(tokens, last)


class RandomStream:
    """Uniform numbers of one sample, a function of seed and sample index alone."""

    def __init__(self, seed: int, index: int) -> None:
        check_seed(seed)
        if seed < 2**32:
            sequence = np.random.SeedSequence([seed, index])
        else:  # whose two words would run into the index
            sequence = np.random.SeedSequence(seed, spawn_key=(index,))
        self._generator = np.random.Generator(np.random.Philox(sequence))

    def next(self) -> float:
        """The next number on [0, 1)."""
        return float(self._generator.random())

    def take(self, count: int) -> np.ndarray:
        """The next ``count`` numbers, (count,) float64."""
        return self._generator.random(count)


def check_seed(seed: int) -> None:
    """Raise ValueError unless the seed fits 63 bits."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"the seed must lie in 0 … 2^63 - 1, got {seed}")


def new_seed() -> int:
    """A fresh seed from the operating system, short enough to type again."""
    return int(np.random.SeedSequence().generate_state(1)[0])
