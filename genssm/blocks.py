"""Blocks and pools of state space layers, in stacks: trained by convolution, run by recurrence.

Pools follow SaShiMi (arXiv 2202.09729): a pooled layer contains a stack, delayed by one group.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from genssm.layers import TrainedLayer
from genssm.recurrence import Recurrence

M = TypeVar("M", bound=nn.Module)


class Linear(nn.Linear):
    """``nn.Linear`` that treats the rows of a (B, features) input one by one.

    A batched product may round a row differently in other company; stepping uses (B, features),
    so a sample depends on its own seed and prompt alone. Sequences (B, L, features) are unaffected.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 2:
            return _by_onednn(input, self) if _onednn_pays(input) else super().forward(input)
        weight = self.weight.mT.expand(input.shape[0], -1, -1)
        y = torch.bmm(input[:, None], weight)[:, 0]
        return y if self.bias is None else y + self.bias


def _onednn_pays(u: Tensor) -> bool:
    """Whether a product that needs no gradient is faster by oneDNN than by MKL.

    Outside autocast torch multiplies float32 on a CPU by MKL, which takes AVX2 on processors that
    are not Intel's; oneDNN takes AVX-512 and is twice as fast there, copies included.
    """
    return (
        u.device.type == "cpu"
        and u.dtype == torch.float32
        and u.numel() >= 1 << 14
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def _by_onednn(u: Tensor, linear: nn.Linear) -> Tensor:
    weight, bias = (None if t is None else t.to_mkldnn() for t in (linear.weight, linear.bias))
    return F.linear(u.to_mkldnn(), cast(Tensor, weight), bias).to_dense()


class Mixer(nn.Module):
    """What follows the state space layer, position by position: gated linear, then feed-forward."""

    def __init__(self, d_model: int, channels: int, expand: int, dropout: float) -> None:
        super().__init__()
        self.gate = Linear(channels * d_model, 2 * d_model)
        self.norm = nn.LayerNorm(d_model)
        self.up = Linear(d_model, expand * d_model)
        self.down = Linear(expand * d_model, d_model)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual x (…, H) and layer output y (…, H·M) → (…, H)."""
        x = x + self.dropout(F.glu(self.gate(F.silu(y)), -1))
        return x + self.dropout(self.down(F.silu(self.up(self.norm(x)))))


class Block(nn.Module):
    """Norm, state space layer, mixer, with residuals: (B, L, H) → (B, L, H)."""

    def __init__(self, ssm: TrainedLayer, d_model: int, expand: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.ssm = ssm
        self.mixer = Mixer(d_model, ssm.channels, expand, dropout)

    def forward(self, u: Tensor, rate: float = 1.0) -> Tensor:
        return self.mixer(u, self.ssm(self.norm(u), rate))

    @torch.no_grad()
    def make_identity(self) -> None:
        """Let the block return its input, until it is trained."""
        gate, down = self.mixer.gate, self.mixer.down
        value = slice(gate.out_features // 2)  # F.glu multiplies it by the sigmoid of the rest
        for tensor in (gate.weight[value], gate.bias[value], down.weight, down.bias):
            tensor.zero_()

    def to_recurrent(self, rate: float = 1.0) -> "RecurrentBlock":
        return RecurrentBlock(frozen(self.norm), self.ssm.to_recurrent(rate), frozen(self.mixer))


class Pool(nn.Module):
    """u + up(inner(down(groups of u))), delayed by one group so that it stays causal."""

    def __init__(self, d_model: int, d_inner: int, stride: int, inner: "Stack") -> None:
        super().__init__()
        self.stride = stride
        self.down = Linear(stride * d_model, d_inner)
        self.inner = inner
        self.up = Linear(d_inner, stride * d_model)

    def forward(self, u: Tensor, rate: float = 1.0) -> Tensor:
        """u (B, L, H) of any length; a group counts once it is complete."""
        length = u.shape[1]
        full = length - length % self.stride
        if not full:
            return u
        grouped = rearrange(u[:, :full], "b (g s) h -> b g (s h)", s=self.stride)
        z = self.up(self.inner(self.down(grouped), rate))
        z = rearrange(z, "b g (s h) -> b (g s) h", s=self.stride)
        return u + F.pad(z, (0, 0, self.stride, 0))[:, :length]

    def to_recurrent(self, rate: float = 1.0) -> "RecurrentPool":
        inner = self.inner.to_recurrent(rate)
        return RecurrentPool(self.stride, frozen(self.down), inner, frozen(self.up))


class Stack(nn.Module):
    """Layers in sequence."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, u: Tensor, rate: float = 1.0) -> Tensor:
        for layer in self.layers:
            u = layer(u, rate)
        return u

    def to_recurrent(self, rate: float = 1.0) -> "RecurrentStack":
        return RecurrentStack([cast(Any, layer).to_recurrent(rate) for layer in self.layers])


class PhasedLinear(nn.Module):
    """A linear map with its own weights for each phase of the position (channel of a pixel)."""

    def __init__(self, n_in: int, n_out: int, phases: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_in)
        self.weight = nn.Parameter(torch.empty(phases, n_out, n_in).uniform_(-bound, bound))

    def forward(self, x: Tensor, position: int | Tensor) -> Tensor:
        """x (B, L, n_in), whose first entry stands at ``position`` → (B, L, n_out).

        Rows of one entry, L = 1, may each stand at a position (B,) of their own.
        """
        phases = self.weight.shape[0]
        if isinstance(position, Tensor):
            weight = self.weight[position % phases]  # (B, n_out, n_in)
            return (weight * x).sum(-1)[:, None]
        y = x.new_empty(*x.shape[:-1], self.weight.shape[1])
        for i in range(min(phases, x.shape[1])):
            w = self.weight[(position + i) % phases].to(x.dtype)
            # Row by row for a single position, as in Linear.
            rows = x[:, i::phases]
            y[:, i::phases] = torch.bmm(rows, w.mT.expand(rows.shape[0], -1, -1))
        return y


def frozen(module: M) -> M:
    """A copy that is not trained."""
    return copy.deepcopy(module).requires_grad_(False).eval()


class RecurrentBlock(nn.Module):
    """``Block`` one position, or one piece of a prompt, at a time."""

    def __init__(self, norm: nn.Module, ssm: Recurrence, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.ssm, self.mixer = norm, ssm, mixer

    def initial_state(self, batch: int) -> Tensor:
        return self.ssm.initial_state(batch)

    def prefill(
        self, u: Tensor, state: Tensor, position: int, rate: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        y, state = self.ssm.prefill(self.norm(u), state, rate)
        return self.mixer(u, y), state

    def step(
        self, u: Tensor, state: Tensor, position: int, rate: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        y, state = self.ssm.step(self.norm(u), state, rate)
        return self.mixer(u, y), state


class RecurrentPool(nn.Module):
    """``Pool`` by the phase ``position % stride``.

    State: ``group (B, stride, H)``, the inputs of the group being filled; ``queue``, of the same
    shape, what the last complete group adds to this one; and the state of the inner stack.
    """

    def __init__(self, stride: int, down: Linear, inner: "RecurrentStack", up: Linear) -> None:
        super().__init__()
        self.stride, self.down, self.inner, self.up = stride, down, inner, up

    def initial_state(self, batch: int) -> tuple:
        weight = self.down.weight
        empty = weight.new_zeros(batch, self.stride, weight.shape[1] // self.stride)
        return empty, empty, self.inner.initial_state(batch)

    def prefill(
        self, u: Tensor, state: tuple, position: int, rate: float = 1.0
    ) -> tuple[Tensor, tuple]:
        group, queue, inner = state
        phase = position % self.stride
        joined = torch.cat([group[:, :phase], u], 1)  # from the start of the current group
        length = joined.shape[1]
        full = length - length % self.stride
        grouped = rearrange(joined[:, :full], "b (g s) h -> b g (s h)", s=self.stride)
        z, inner = self.inner.prefill(self.down(grouped), inner, position // self.stride, rate)
        added = rearrange(self.up(z), "b g (s h) -> b (g s) h", s=self.stride)
        queue = torch.cat([queue, added], 1)
        y = u + queue[:, phase:length]
        group = F.pad(joined[:, full:], (0, 0, 0, self.stride - (length - full)))
        return y, (group, queue[:, full:], inner)

    def step(
        self, u: Tensor, state: tuple, position: int, rate: float = 1.0
    ) -> tuple[Tensor, tuple]:
        group, queue, inner = state
        phase = position % self.stride
        y = u + queue[:, phase]
        group = torch.cat([group[:, :phase], u[:, None], group[:, phase + 1 :]], 1)
        if phase == self.stride - 1:
            joined = rearrange(group, "b s h -> b (s h)")
            z, inner = self.inner.step(self.down(joined), inner, position // self.stride, rate)
            queue = rearrange(self.up(z), "b (s h) -> b s h", s=self.stride)
            group = torch.zeros_like(group)
        return y, (group, queue, inner)


class RecurrentStack(nn.Module):
    """``Stack`` with one state a layer."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def _layers(self) -> list[Any]:  # RecurrentBlock or RecurrentPool
        return list(self.layers)

    def initial_state(self, batch: int) -> tuple:
        return tuple(layer.initial_state(batch) for layer in self._layers())

    def prefill(
        self, u: Tensor, state: tuple, position: int, rate: float = 1.0
    ) -> tuple[Tensor, tuple]:
        states = []
        for layer, before in zip(self._layers(), state, strict=True):
            u, after = layer.prefill(u, before, position, rate)
            states.append(after)
        return u, tuple(states)

    def step(
        self, u: Tensor, state: tuple, position: int, rate: float = 1.0
    ) -> tuple[Tensor, tuple]:
        states = []
        for layer, before in zip(self._layers(), state, strict=True):
            u, after = layer.step(u, before, position, rate)
            states.append(after)
        return u, tuple(states)


def named_states(stack: RecurrentStack, states: tuple, name: str) -> Iterator[tuple[str, Tensor]]:
    """The states of a stack by the modules that compute them, in the order of a step."""
    for i, (layer, state) in enumerate(zip(stack.layers, states, strict=True)):
        place = f"{name}.layers.{i}"
        if isinstance(layer, RecurrentPool):
            group, queue, inner = state
            yield place, group
            yield from named_states(layer.inner, inner, f"{place}.inner")
            yield f"{place}.up", queue
        else:
            yield f"{place}.ssm", state


def map_nested(function: Callable[..., Tensor], *nodes: Tensor | tuple) -> Any:
    """A function of tensors, of each place in nested tuples of one shape, depth first."""
    if all(isinstance(node, Tensor) for node in nodes):
        return function(*nodes)
    assert not any(isinstance(node, Tensor) for node in nodes), "of one shape"
    return tuple(map_nested(function, *children) for children in zip(*nodes, strict=True))
