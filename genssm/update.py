"""One step of a training: a batch, in parts, over all processes, to one update of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from genssm.batches import Batch
from genssm.blocks import Block, Mixer
from genssm.distributed import World
from genssm.model import SequenceModel
from genssm.optim import has_fast_bfloat16

_LN2 = math.log(2)
ALONE = World()


class Autoregressive(Protocol):
    """What is trained: a module with the likelihood of tokens (B, L + 1), nats of L each."""

    def log_prob(self, tokens: Tensor, read: Tensor | None = None) -> Tensor: ...


class Objective(nn.Module):
    """What some sequences add to the loss of a batch."""

    def __init__(self, model: Autoregressive) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, share: Tensor, read: Tensor | None = None) -> Tensor:
        """Nats of tokens (B, L + 1), each target counted by its share (B, L) → ().

        ``read`` (B, L) is read in the place of tokens[:, :-1].
        """
        return -(self.model.log_prob(tokens, read) * share).sum()


def spread(model: SequenceModel, world: World, shard: bool = False) -> nn.Module:
    """The objective of a model over the processes of a world.

    Each holds all of the weights (DistributedDataParallel), or with ``shard`` a part of every
    tensor (``fully_shard``, block by block). Build the optimizers after this: sharding replaces the
    parameters.
    """
    objective = Objective(model)
    if world.size == 1:
        return objective
    if not shard:
        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(objective, device_ids=ids)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


def compile_pointwise(model: SequenceModel) -> None:
    """Compile what follows each state space layer, position by position, with ``torch.compile``.

    The convolutions have their own kernels. Raises ValueError where there is no compiler.
    """
    import shutil

    if not torch.cuda.is_available() and not (shutil.which("c++") or shutil.which("g++")):
        raise ValueError("compile needs a C++ compiler (g++); install one or leave compile=False")
    for module in model.modules():
        if isinstance(module, Mixer):
            module.compile(dynamic=True)


@dataclass(frozen=True)
class Step:
    """What one step did."""

    bits: float  # mean loss in bits per token, over all processes
    finite: bool  # whether the gradient was, and so the weights were updated


def train_step(
    objective: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batch: Batch,
    clip: float,
    seed: tuple[int, ...],
    *,
    accumulate: int = 1,
    world: World = ALONE,
) -> Step:
    """One update by the mean loss of a batch. A step that is not finite is left out.

    Every process is given the whole batch and takes its own rows, ``accumulate`` parts one after
    the other; so the loss does not depend on the number of processes or parts. Dropout is seeded
    by ``seed`` and a part's first row: with it, 2 processes equal 1 that accumulates 2 parts.
    """
    objective.train()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    parameters = list(objective.parameters())
    device = parameters[0].device
    devices = [device] if device.type == "cuda" else []
    loss = 0.0
    parts = list(_parts(batch, accumulate, world))
    for i, (row, *part) in enumerate(parts):
        with (
            torch.random.fork_rng(devices),
            torch.autocast(device.type, torch.bfloat16, has_fast_bfloat16(device)),
            _synchronised(objective, i == len(parts) - 1),
        ):
            torch.manual_seed(int(np.random.SeedSequence((*seed, row)).generate_state(1)[0]))
            nats = objective(*(None if t is None else t.to(device) for t in part))
            (nats * world.size).backward()  # gradients are averaged over the processes
        loss += float(nats.detach())
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    finite = bool(norm.isfinite())
    if finite:
        for optimizer in optimizers:
            optimizer.step()
    return Step(world.sums([loss])[0] / _LN2, finite)


def check_parts(rows: int, accumulate: int, world: World) -> int:
    """Parts of a batch of so many rows. Raises ValueError if they cannot be equal."""
    parts = world.size * accumulate
    if rows % parts:
        raise ValueError(
            f"batch_size must be divisible by processes × accumulate ({world.size} × {accumulate}),"
            f" got {rows}"
        )
    return parts


def _parts(
    batch: Batch, accumulate: int, world: World
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """First row, tokens, shares and what is read of the parts that are this process's."""
    rows, parts = len(batch.tokens), check_parts(len(batch.tokens), accumulate, world)
    weights = batch.weights
    if weights is None:
        weights = torch.ones(rows, batch.tokens.shape[1] - 1)
    share = weights / weights.sum()
    size = rows // parts
    for row in range(world.rank * accumulate * size, (world.rank + 1) * accumulate * size, size):
        part = slice(row, row + size)
        read = None if batch.read is None else batch.read[part]
        yield row, batch.tokens[part], share[part], read


def _synchronised(objective: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Gradients are sent once a step, with its last part."""
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(last)
    elif isinstance(objective, DistributedDataParallel) and not last:
        return objective.no_sync()
    return nullcontext()
