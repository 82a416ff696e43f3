"""Measurements of the engine cuda: tokens per second in batches, and GPT-2 beside it."""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from genssm.benchmark import REFERENCE, machine
from genssm.config import ModelConfig
from genssm.cuda import WEIGHTS, CapturedModel
from genssm.engine import BLOCK, begin
from genssm.sampling import SamplingConfig
from genssm.sampling_benchmark import (
    FULL,
    MARGIN,
    SMALL,
    WARM_UP,
    Extent,
    Report,
    Subject,
    build_transformer,
    measure_cached,
    random_subject,
)

# About as S4 was sampled in its paper (arXiv 2111.00396): pictures of 3,072 values by the width and
# pools of its base model, text by 16 layers of width 1,024, with the 4,096 tokens of our own model.
SHAPES = {
    "reference": REFERENCE,
    "CIFAR-10, d=128, pools 3·4·4": ModelConfig(
        vocab_size=257, n_outputs=256, d_model=(128, 256, 512, 1024), n_layers=(4, 4, 4, 4),
        pools=(3, 4, 4), layer="s4", d_state=64, l_max=3072,
    ),
    "WikiText-103, d=1024, 16 layers": ModelConfig(
        vocab_size=4096, n_outputs=4096, d_model=(1024,), n_layers=(16,), layer="s4", d_state=64,
        l_max=1024, expand=4,
    ),
}  # fmt: skip
BATCHES = (1, 64, 1024)
CONTEXT = 1024  # tokens that the Transformer has in its cache


@dataclass(frozen=True)
class BatchSpeed:
    """Tokens drawn a second, of all samples together: the median of the repeats."""

    model: str
    engine: str
    weights: str
    batch: int
    context: int | None  # what the speed depends on: of ours, it does not
    parameters: int
    tokens_per_second: float | None  # None: the memory does not suffice


def measure_captured(
    subject: Subject, weights: str, batch: int, device: torch.device, extent: Extent
) -> float:
    """Tokens a second of whole blocks and whole periods, handed out as to a user."""
    model = CapturedModel(subject.recurrent, weights, device)
    config, indices = SamplingConfig(), range(batch)
    generation = begin(model, subject.start, config, seed=0, indices=indices)

    def seconds(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            generation.step()
        return time.perf_counter() - started

    unit = math.lcm(BLOCK, model.config.period)
    seconds(WARM_UP + unit)  # all graphs are captured by then
    steps = unit * max(1, round(extent.seconds / seconds(unit)))
    return batch * steps / statistics.median(seconds(steps) for _ in range(extent.repeats))


def measure_shape(
    name: str, config: ModelConfig, device: torch.device, extent: Extent
) -> Iterator[BatchSpeed]:
    """Ours and a GPT-2 of as many parameters, as wide as the widest level, by weights and batch."""
    subject, model = random_subject(name, config)
    ours = sum(p.numel() for p in model.parameters())
    context = extent.contexts[0]
    transformer, theirs = None, 0
    if importlib.util.find_spec("transformers") is not None:
        wide = replace(config, d_model=(max(config.d_model),), n_layers=(1,), pools=())
        transformer = build_transformer(ours, wide, context + MARGIN).to(device)
        theirs = sum(p.numel() for p in transformer.parameters())
    for weights, dtype in WEIGHTS.items():
        for batch in extent.batches:
            speed = _unless_full(measure_captured, subject, weights, batch, device, extent)
            yield BatchSpeed(name, "genssm cuda", weights, batch, None, ours, speed)
            if transformer is not None:
                other: nn.Module = transformer.to(dtype)
                speed = _unless_full(measure_cached, other, context, extent.repeats, batch)
                engine = "GPT-2 with KV cache"
                yield BatchSpeed(name, engine, weights, batch, context, theirs, speed)


def _unless_full(measure: Any, *arguments: Any) -> float | None:
    try:
        return measure(*arguments)
    except (torch.cuda.OutOfMemoryError, MemoryError):
        torch.cuda.empty_cache()
        return None


def benchmark_cuda(
    device: torch.device, small: bool = False, report: Report = lambda line: None
) -> dict[str, Any]:
    """All measurements, JSON-able; ``report`` gets every figure as a line when it is there.

    ``device`` may be a CPU, for a look at the measurement itself: nothing is captured there.
    """
    extent = replace(FULL, batches=BATCHES, contexts=(CONTEXT,))
    shapes = SHAPES
    if small:
        extent, shapes = SMALL, {"reference": SMALL.reference}
    facts: dict[str, Any] = {"machine": machine(device.type), "speeds": []}
    for name, config in shapes.items():
        for speed in measure_shape(name, config, device, extent):
            facts["speeds"].append(asdict(speed))
            report(_line(speed))
    return facts


def _line(speed: BatchSpeed) -> str:
    figure = (
        "does not fit" if speed.tokens_per_second is None else f"{speed.tokens_per_second:,.0f}"
    )
    context = "" if speed.context is None else f", context {speed.context}"
    return (
        f"{speed.model}, {speed.engine} {speed.weights}, {speed.parameters:,} parameters, "
        f"batch {speed.batch}{context}: {figure} tokens/s"
    )
