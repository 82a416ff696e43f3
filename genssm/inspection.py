"""What a checkpoint is, and how exactly its convolution and its recurrence agree."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from genssm.conversion import certify
from genssm.pipeline import Pipeline


def inspect(pipe: Pipeline) -> dict[str, Any]:
    """Facts of a model, JSON-able: sizes, training, metrics and the certificate of its views."""
    probe = torch.tensor(pipe.config["probe"], dtype=torch.int64)
    facts = {
        "model": pipe.name,
        "modality": pipe.modality,
        "parameters": sum(p.numel() for p in pipe.model.parameters()),
        "state_bytes": pipe.recurrent.state_bytes(),
        "period": pipe.model.config.period,
        "config": pipe.config["model"],
        "codec": pipe.config["codec"],
        "training": pipe.config["training"],
        "metrics": pipe.config["metrics"],
    }
    if not len(probe):
        return facts | {"compared_tokens": 0}
    certificate = certify(pipe.model, pipe.recurrent, probe, pipe.rate)
    return facts | {
        "compared_tokens": certificate.tokens,
        "largest_difference_step": certificate.step,
        "largest_difference_prefill": certificate.prefill,
        "divergence_bits_per_token": certificate.divergence,
        "refusal": certificate.refusal(),
        "layers": [asdict(layer) for layer in certificate.layers],
    }
