"""What the tests of both fast steppers draw with, and how they read what was drawn."""

from collections.abc import Sequence

import torch

from genssm.engine import CompiledGeneration, Drawn, Generation
from genssm.sampling import SamplingConfig

PROMPT = torch.tensor([20, 3, 1, 4])
SETTINGS = [
    SamplingConfig(),
    SamplingConfig(temperature=0),
    SamplingConfig(temperature=0.7, top_k=5),
    SamplingConfig(top_k=1000),
    SamplingConfig(top_p=0.8),
    SamplingConfig(min_p=0.2),
    SamplingConfig(repetition_penalty=1.5, temperature=1.3, top_k=12, top_p=0.9, min_p=0.05),
    SamplingConfig(repetition_penalty=0.5, temperature=0),
    SamplingConfig(top_p=1e-9),
    SamplingConfig(top_k=1, temperature=100),
    SamplingConfig(top_k=2**31 - 1, top_p=0.9, temperature=1e-310),
    SamplingConfig(repetition_penalty=0.01),
]


def drawn(generation: Generation | CompiledGeneration, steps: int) -> list[list[Drawn]]:
    """Steps by sample."""
    result: dict[int, list[Drawn]] = {}
    for _ in range(steps):
        for d in generation.step():
            result.setdefault(d.sample, []).append(d)
    return list(result.values())


def tokens_of(samples: Sequence[Sequence[Drawn]]) -> list[list[int]]:
    return [[d.token for d in sample] for sample in samples]
