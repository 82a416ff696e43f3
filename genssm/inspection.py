"""What a checkpoint is, and how exactly its convolution and its recurrence agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genssm.model import RecurrentModel, SequenceModel
from genssm.pipeline import Pipeline


@dataclass(frozen=True)
class Agreement:
    """Largest absolute differences in logits from the convolution, over ``tokens`` positions."""

    tokens: int
    step: float  # stepping token by token
    prefill: float  # reading in parallel


@torch.no_grad()
def agreement(model: SequenceModel, recurrent: RecurrentModel, tokens: Tensor) -> Agreement:
    """Compare the logits of the convolution with those of the recurrence on tokens (L,)."""
    convolved = model(tokens[None])[0]
    prefilled, _ = recurrent.prefill(tokens[None])
    state, step = recurrent.initial_state(1), 0.0
    for t, token in enumerate(tokens):
        logits, state = recurrent.step(token[None], state)
        step = max(step, float((logits[0] - convolved[t]).abs().max()))
    prefill = float((prefilled[0] - convolved).abs().max()) if len(tokens) else 0.0
    return Agreement(len(tokens), step, prefill)


def inspect(pipe: Pipeline) -> dict[str, Any]:
    """Facts of a model, JSON-able: sizes, training, metrics and the agreement of its views."""
    probe = torch.tensor(pipe.config["probe"], dtype=torch.int64)
    measured = agreement(pipe.model, pipe.recurrent, probe)
    state = pipe.recurrent.initial_state(1)
    return {
        "model": pipe.name,
        "modality": pipe.modality,
        "parameters": sum(p.numel() for p in pipe.model.parameters()),
        "state_bytes": sum(t.numel() * t.element_size() for t in state.tensors()),
        "period": pipe.model.config.period,
        "config": pipe.config["model"],
        "codec": pipe.config["codec"],
        "training": pipe.config["training"],
        "metrics": pipe.config["metrics"],
        "compared_tokens": measured.tokens,
        "largest_difference_step": measured.step,
        "largest_difference_prefill": measured.prefill,
    }
