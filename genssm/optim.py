"""Optimisation: Muon for the hidden matrices, AdamW for everything else, and the rate over time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from genssm.model import SequenceModel


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this device."""
    if device.type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return True


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """Approximately U Vᵀ of the singular value decomposition of each matrix in G (k, m, n).

    Quintic Newton-Schulz iteration in G's dtype, for which bfloat16 suffices: the singular values
    end between 0.7 and 1.2 anyway. Source: K. Jordan et al., "Muon" (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for hidden weight matrices.

    Unlike in ``torch.optim.Muon`` matrices of one shape go together, and the iteration runs in
    bfloat16 only where that is fast: on a CPU without such instructions it is 18 times slower.
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
                    updates.append(p.grad.lerp(state["momentum"], group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                stacked = torch.stack(updates)
                fast = torch.bfloat16 if has_fast_bfloat16(stacked.device) else torch.float32
                for p, update in zip(params, orthogonalize(stacked.to(fast)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def build_optimizers(
    model: SequenceModel, lr: float, matrix_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon over "matrices"; AdamW over the rest, "dynamics" at most at 1e-3 and never decayed."""
    groups = model.parameter_groups()
    return [
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


def rate(step: int, progress: float, warmup: int, decay: float) -> float:
    """Factor on the learning rates: a linear warm-up, a plateau, a linear descent to zero.

    ``progress`` runs from 0 to 1 over the training; the descent takes its last ``decay`` part.
    """
    return min(1.0, (step + 1) / max(1, warmup)) * min(1.0, max(0.0, (1 - progress) / decay))
