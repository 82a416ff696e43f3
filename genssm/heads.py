"""Heads: from features to the probabilities of the next token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from genssm.blocks import Linear
from genssm.recall import NOTHING


class _LinearLogProb(torch.autograd.Function):
    """log softmax(W x + b)[target] in slices that stay in the cache, recalled tokens strengthened.

    Keeps softmax minus target in the precision of x, exact relative to it also where the softmax
    is near 1, so that the backward pass is three products.
    """

    size = 1 << 19  # logits in a slice

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, recalled: Tensor,
        strength: Tensor,
    ) -> Tensor:  # fmt: skip
        """x (T, H), weight (V, H), bias (V,), target (T,), recalled and strength (T, K) → (T,).

        The result is at least float32.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        residual = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
        log_p = torch.empty(len(x), dtype=dtype, device=x.device)
        rows = max(1, _LinearLogProb.size // len(weight))
        for i in range(0, len(x), rows):
            part = slice(i, i + rows)
            logits = torch.addmm(bias, x[part], weight.mT)
            logits = _strengthened(logits, recalled[part], strength[part])
            every = torch.log_softmax(logits, -1, dtype)
            chosen = every.gather(-1, target[part, None])
            log_p[part] = chosen[:, 0]
            residual[part] = every.exp_().scatter_(-1, target[part, None], chosen.expm1())
        ctx.save_for_backward(x, weight, recalled, residual)
        return log_p

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, Tensor]:
        x, weight, recalled, residual = ctx.saved_tensors
        scale = -g[:, None]
        dx = (residual @ weight * scale).to(x.dtype)
        dweight = residual.mT @ (x * scale).to(x.dtype)
        dbias = (residual.mT @ scale.to(x.dtype))[:, 0]
        dstrength = residual.gather(-1, recalled.clamp(min=0)) * scale.to(x.dtype)
        return dx, dweight, dbias, None, None, dstrength.masked_fill(recalled == NOTHING, 0.0)


def _at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _strengthened(logits: Tensor, recalled: Tensor, strength: Tensor) -> Tensor:
    """Add strength (…, K) to the logits (…, V) of the recalled tokens (…, K), in place."""
    strength = strength.to(logits.dtype).masked_fill(recalled == NOTHING, 0.0)
    for k in range(recalled.shape[-1]):  # two orders may recall one token
        place = recalled[..., k : k + 1].clamp(min=0)
        logits.scatter_add_(-1, place, strength[..., k : k + 1])
    return logits


class Softmax(nn.Module):
    """One logit a token; those of recalled tokens grow by gates, one an order of ``recall``."""

    def __init__(self, d_model: int, n_outputs: int, orders: int) -> None:
        super().__init__()
        self.linear = Linear(d_model, n_outputs)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        self.recall = Linear(d_model, orders) if orders else None
        if self.recall is not None:
            nn.init.zeros_(self.recall.weight)
            nn.init.zeros_(self.recall.bias)

    def logits(self, features: Tensor, known: Tensor) -> Tensor:
        """features (…, H), recalled tokens (…, K) → (…, V)."""
        logits = _at_least_single(self.linear(features))
        if self.recall is None:
            return logits
        return _strengthened(logits, known, self.recall(features))

    def log_prob(self, features: Tensor, known: Tensor, target: Tensor) -> Tensor:
        """Log-likelihood of target (…) in nats, (…)."""
        device = features.device.type
        dtype = features.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        strength = features.new_empty(known.shape) if self.recall is None else self.recall(features)
        with torch.autocast(device, enabled=False):
            log_p = _LinearLogProb.apply(
                features.flatten(0, -2).to(dtype),
                self.linear.weight.to(dtype),
                self.linear.bias.to(dtype),
                target.flatten(),
                known.flatten(0, -2),
                strength.flatten(0, -2).to(dtype),
            )
        return log_p.view(target.shape)


class Logistics(nn.Module):
    """A mixture of logistics over [-1, 1], integrated over the bin of each value.

    Means are offsets from a linear prediction out of earlier values. The outermost bins reach to
    infinity, so the probabilities sum to one. Source: PixelCNN++ (arXiv 1701.05517), Section 2.1;
    bins are integrated by an exact identity instead of switching to the density in the tails.
    """

    mixtures = 10

    def __init__(self, d_model: int, n_outputs: int, orders: int) -> None:
        super().__init__()
        assert orders == 0, "recall is for the softmax head"
        self.n_outputs = n_outputs
        self.linear = Linear(d_model, 3 * self.mixtures)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.linear.bias[self.mixtures : 2 * self.mixtures] = torch.linspace(
                -1, 1, self.mixtures
            )

    def _mixture(self, features: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights, means and inverse scales, each (…, mixtures)."""
        weight, offset, log_scale = _at_least_single(self.linear(features)).chunk(3, -1)
        mean = _at_least_single(prediction) + 0.3 * offset
        inverse = torch.exp(-(log_scale - 2.5).clamp(min=-7.0, max=7.0))
        return F.log_softmax(weight, -1), mean, inverse

    def _log_mass(
        self, log_weight: Tensor, mean: Tensor, inverse: Tensor, values: Tensor
    ) -> Tensor:
        """Log-probability of integer values (…) under mixtures (…, mixtures), broadcast."""
        top = self.n_outputs - 1
        half = 1 / top
        centred = (values.to(mean.dtype) * (2 * half) - 1)[..., None] - mean
        first, last = (values == 0)[..., None], (values == top)[..., None]
        # σ(b) - σ(a) = σ(b) σ(-a) (1 - exp(a - b)), without cancellation
        width = torch.log(-torch.expm1(-2 * half * inverse)).expand_as(centred)
        log_p = (
            F.logsigmoid((centred + half) * inverse).masked_fill(last, 0.0)
            + F.logsigmoid((half - centred) * inverse).masked_fill(first, 0.0)
            + width.masked_fill(first | last, 0.0)
        )
        return torch.logsumexp(log_p + log_weight, -1)

    def logits(self, features: Tensor, known: Tensor) -> Tensor:
        """features (…, H), a linear prediction (…, 1) → normalised log-probabilities (…, V)."""
        values = torch.arange(self.n_outputs, device=features.device)
        log_weight, mean, inverse = self._mixture(features, known)
        return self._log_mass(
            log_weight[..., None, :], mean[..., None, :], inverse[..., None, :], values
        )

    def log_prob(self, features: Tensor, known: Tensor, target: Tensor) -> Tensor:
        """Log-likelihood of target (…) in nats, (…)."""
        return self._log_mass(*self._mixture(features, known), target)


# By name; each is made of the width of the features, the number of tokens and of orders of recall.
HEADS: dict[str, type[Softmax | Logistics]] = {
    "softmax": Softmax,
    "logistics": Logistics,
}
