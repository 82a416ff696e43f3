"""What the fast steppers share: the draws that are asked of them, and how they refuse a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from genssm.sampling import SamplingConfig

M = TypeVar("M")

EXACT = "fp32"  # the weights themselves, which the eager model has, too


class UnsupportedError(ValueError):
    """A stepper cannot run this model here; the message says why."""


@dataclass(frozen=True)
class Draws(Generic[M]):
    """Samples whose next tokens are to be drawn, with all that decides them."""

    memory: M  # their rows; if they are guided, then those of the guides in the same order
    uniforms: np.ndarray[Any, Any]  # (S, n): n tokens a sample
    config: SamplingConfig
    seen: np.ndarray[Any, Any]  # (S, V) bool: what the penalty holds down; drawn tokens join it
    guidance: float = 1.0  # logits are guide + guidance·(own - guide)

    @property
    def settings(self) -> list[float]:
        """What decides a draw besides logits and chance, as numbers, in the order of its use."""
        c = self.config
        return [
            self.guidance, c.plausible, c.repetition_penalty, c.temperature, c.top_k, c.top_p,
            c.min_p,
        ]  # fmt: skip
