"""Optimisation: Muon for the hidden matrices, AdamW for the rest, the rate, averaged weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this device."""
    if device.type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return True


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """Approximately U Vᵀ of the singular value decomposition of each matrix in G (k, m, n).

    Quintic Newton-Schulz iteration in G's dtype, for which bfloat16 suffices: most singular values
    end between 0.7 and 1.2 anyway, those of a square matrix that were near zero below.
    Source: K. Jordan et al., "Muon" (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        # a X + (b A + c A A) X, with the sums inside the products
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


def _whole(matrix: Tensor) -> Tensor:
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


def _like(p: Tensor, update: Tensor) -> Tensor:
    """A whole matrix, cut as p is."""
    if not isinstance(p, DTensor):
        return update
    whole = DTensor.from_local(update, p.device_mesh, [Replicate()], run_check=False)
    return whole.redistribute(placements=p.placements)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for hidden weight matrices.

    Unlike in ``torch.optim.Muon`` matrices of one shape go together, and the iteration runs in
    bfloat16 only where that is fast: on a CPU without such instructions it is 18 times slower.
    An orthogonal update needs the whole matrix: of sharded parameters the momentum stays sharded,
    the updates of one shape are gathered, and every process keeps its part of the result.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    assert p.grad is not None
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(state["momentum"], group["momentum"])
                    updates.append(_whole(update))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                stacked = torch.stack(updates)
                fast = torch.bfloat16 if has_fast_bfloat16(stacked.device) else torch.float32
                for p, update in zip(params, orthogonalize(stacked.to(fast)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(_like(p, update.to(p.dtype)), alpha=-scale)


class Grouped(Protocol):
    """A model that tells how its parameters are trained; see ``SequenceModel``."""

    def parameter_groups(self) -> dict[str, list[Tensor]]: ...


def build_optimizers(
    model: Grouped, lr: float, matrix_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon over "matrices"; AdamW over the rest, "dynamics" at most at 1e-3 and never decayed."""
    groups = model.parameter_groups()
    optimizers: list[torch.optim.Optimizer] = [
        Muon(groups["matrices"], matrix_lr, weight_decay),
        torch.optim.AdamW(
            [
                {"params": groups["others"], "lr": lr},
                {"params": groups["dynamics"], "lr": min(lr, 1e-3)},
            ],
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        ),
    ]
    for group in _groups(optimizers):
        group["initial_lr"] = group["lr"]
    return optimizers


def scale_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every learning rate to ``factor`` times the one it was built with."""
    for group in _groups(optimizers):
        group["lr"] = factor * group["initial_lr"]


def _groups(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[dict[str, Any]]:
    return (group for optimizer in optimizers for group in optimizer.param_groups)


SCHEDULES = ("linear", "cosine")


def rate(step: int, progress: float, warmup: int, decay: float, schedule: str = "linear") -> float:
    """Factor on the learning rates: a linear warm-up, a plateau, a descent to zero.

    ``progress`` runs from 0 to 1 over the training; the descent, of the form ``schedule``, takes
    its last ``decay`` part: 1 is all of it.
    """
    left = min(1.0, max(0.0, (1 - progress) / decay))
    if schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return min(1.0, (step + 1) / max(1, warmup)) * left


@torch.no_grad()
def average(
    averages: dict[str, Tensor], weights: Mapping[str, Tensor], decay: float, n: int
) -> None:
    """Update number ``n`` (from 1) of an exponential moving average of the weights, in place.

    The early average is short, (1 + n) / (10 + n), so that the beginning is soon forgotten.
    """
    d = min(decay, (1 + n) / (10 + n))
    for name, mean in averages.items():
        mean.lerp_(weights[name].detach(), 1 - d)
