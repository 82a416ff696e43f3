"""The sequence model: blocks and pools of state space layers between an embedding and a head.

Trained by convolution (``SequenceModel``), sampled by recurrence (``RecurrentModel``): one map.
Pools follow SaShiMi (arXiv 2202.09729): a pooled layer contains a stack, delayed by one group.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from genssm.layers import LAYERS, TrainedLayer, build_layer
from genssm.recall import NOTHING, Recall
from genssm.recurrence import Recurrence, without_autocast
from genssm.settings import check_types

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes a model. Level 0 is the outermost; ``pools`` lie between levels."""

    vocab_size: int  # token ids read: values, then the boundary, then class labels
    n_outputs: int  # token ids predicted: 0 … n_outputs-1
    d_model: tuple[int, ...] = (256,)  # width of each level
    n_layers: tuple[int, ...] = (6,)  # blocks of each level, after its pool
    pools: tuple[int, ...] = ()  # stride from each level to the next
    layer: str = "s4d"  # a key of LAYERS
    layer_settings: dict[str, Any] = field(default_factory=dict, hash=False)  # of its class
    d_state: int = 32  # N, complex pairs counted twice
    l_max: int = 1024  # training length in tokens (the kernel length S4 is parametrised for)
    dt_min: float = 1e-3  # range of the initial Δ, in steps of the layer's own level
    dt_max: float = 1e-1
    expand: int = 2  # width of the feed-forward part over d_model
    dropout: float = 0.0
    head: str = "softmax"  # a key of HEADS
    taps: tuple[int, ...] = ()  # earlier values read as numbers: k is the value k before the target
    token_taps: tuple[int, ...] = ()  # earlier tokens with their own embeddings, counted likewise
    recall: tuple[int, ...] = ()  # k: the head knows what followed the last k tokens before
    recall_slots: int = 4096  # contexts of each order that are remembered
    image_shape: tuple[int, int, int] | None = None  # (rows, columns, channels): learned positions
    conditioned: bool = False  # the first token, a class label, is also added at every position
    opening: int = 0  # so many tokens behind the label are added at every position, too
    # Lengths that the first of them tells, by the last ids predicted: the part of the length that
    # has passed is added, too.
    durations: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        levels = len(self.d_model)
        if not levels or len(self.n_layers) != levels or len(self.pools) != levels - 1:
            raise ValueError(
                "d_model and n_layers need one entry a level and pools one fewer; got "
                f"d_model={self.d_model}, n_layers={self.n_layers}, pools={self.pools}"
            )
        rules: list[tuple[bool, str]] = [
            (1 <= self.n_outputs <= self.vocab_size, "1 <= n_outputs <= vocab_size"),
            (min(self.d_model) >= 1, "every d_model >= 1"),
            (min(self.n_layers) >= 0, "every n_layers >= 0"),
            (all(p >= 2 for p in self.pools), "every pool >= 2"),
            (self.layer in LAYERS, f"layer is one of {', '.join(LAYERS)}"),
            (self.head in HEADS, f"head is one of {', '.join(HEADS)}"),
            (self.d_state in range(2, 2049, 2), "d_state is 2, 4, … 2048"),
            (self.l_max >= 1, "l_max >= 1"),
            (self.l_max <= 2**31, "l_max <= 2^31"),
            (0 < self.dt_min <= self.dt_max <= 1e6, "0 < dt_min <= dt_max <= 10^6"),
            (self.expand >= 1, "expand >= 1"),
            (0 <= self.dropout < 1, "0 <= dropout < 1"),
            (all(k >= 1 for k in (*self.taps, *self.token_taps)), "every tap >= 1"),
            (max(*self.taps, *self.token_taps, 0, 0) <= 2**16, "every tap <= 2^16"),
            (all(k >= 1 for k in self.recall), "every order of recall >= 1"),
            (max(self.recall, default=0) <= 2**10, "every order of recall <= 2^10"),
            (self.recall_slots in range(16, 2**20 + 1, 16), "recall_slots is 16, 32, … 2^20"),
            (len(self.recall) * self.recall_slots <= 2**22, "orders × recall_slots <= 2^22"),
            (self.head == "softmax" or not self.recall, "recall is for the softmax head"),
            (min(self.image_shape or (1,)) >= 1, "every side of image_shape >= 1"),
            (self.head != "logistics" or bool(self.taps), "the logistics head needs taps"),
            (not self.taps or self.n_outputs >= 2, "taps of at least 2 values"),
            (self.opening in range(10), "opening in 0 … 9"),
            (self.conditioned or not self.opening, "an opening needs conditioned"),
            (self.opening > 0 or not self.durations, "durations need an opening"),
            (min(self.durations, default=1) >= 1, "every duration >= 1"),
            (len(self.durations) < self.n_outputs, "fewer durations than n_outputs"),
        ]
        broken = [rule for holds, rule in rules if not holds]
        if broken:
            raise ValueError(f"the model config must satisfy: {'; '.join(broken)}; got {self}")
        if reserved := self.layer_settings.keys() & {"dt_min", "dt_max", "bidirectional"}:
            raise ValueError(
                f"layer_settings must not hold {', '.join(sorted(reserved))}: the model sets "
                "dt_min and dt_max, and an autoregressive model reads no future"
            )

    @property
    def period(self) -> int:
        """Tokens after which the phases of all pools, and the channels of a pixel, repeat."""
        return math.lcm(math.prod(self.pools), self.channels)

    @property
    def values(self) -> int:
        """Tokens that are numbers, where they are read so: of a softmax the first 256, at most."""
        return self.n_outputs if self.head == "logistics" else min(self.n_outputs, 256)

    @property
    def kept(self) -> int:
        """Tokens at the beginning that a model never forgets: the label and the opening."""
        return int(self.conditioned) + self.opening

    @property
    def channels(self) -> int:
        """Values per pixel, 1 for text and sound."""
        return self.image_shape[2] if self.image_shape else 1


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
        return RecurrentBlock(_frozen(self.norm), self.ssm.to_recurrent(rate), _frozen(self.mixer))


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
        return RecurrentPool(self.stride, _frozen(self.down), inner, _frozen(self.up))


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


def build_stack(config: ModelConfig, level: int = 0) -> Stack:
    """The stack of a level: the pool that holds the levels below it, then its blocks."""
    d_model, stride = config.d_model[level], math.prod(config.pools[:level])
    layers: list[nn.Module] = []
    if level < len(config.pools):
        inner = build_stack(config, level + 1)
        layers.append(Pool(d_model, config.d_model[level + 1], config.pools[level], inner))
    for _ in range(config.n_layers[level]):
        ssm = build_layer(
            config.layer,
            d_model,
            config.d_state,
            max(1, config.l_max // stride),
            dt_min=config.dt_min,
            dt_max=config.dt_max,
            **config.layer_settings,
        )
        layers.append(Block(ssm, d_model, config.expand, config.dropout))
    return Stack(layers)


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


PARTS = 64  # of a clip, which a model with durations tells apart


class Progress(nn.Module):
    """How much of a clip has passed: an embedding of its part, floor(PARTS · time / duration).

    A row more is for what comes after the duration, one for a clip whose duration is open.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.first = config.n_outputs - len(config.durations)  # the id of the first duration
        self.durations: Tensor
        self.register_buffer("durations", torch.tensor(config.durations), persistent=False)
        self.table = nn.Parameter(torch.zeros(PARTS + 2, config.d_model[0]))

    def pace(self, rate: float) -> Tensor:
        """Parts a token, for each duration, (durations,) float32: every stepper counts by these."""
        return (rate * PARTS / self.durations.double()).float()

    def forward(self, duration: Tensor, time: Tensor, rate: float) -> Tensor:
        """Tokens of durations (B, 1), samples before that to predict (B, L) → (B, L, H)."""
        which = duration - self.first
        told = (which >= 0) & (which < len(self.durations))
        pace = self.pace(rate)[which.where(told, 0)].double()
        part = (time * pace).clamp(0, PARTS).long()
        return self.table[part.where(told, PARTS + 1)]


class Inputs(nn.Module):
    """Tokens to features: embeddings, earlier values as numbers, position in an image or clip."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model = config.d_model[0]
        self.config = config
        # Tokens before the current one that are read.
        taps = (*config.taps, *config.token_taps, *(k + 1 for k in config.recall))
        self.reach = max(taps, default=1) - 1
        self.embedding = nn.Embedding(config.vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.token_taps = nn.ParameterList(
            nn.Parameter(torch.zeros(config.vocab_size, d_model)) for _ in config.token_taps
        )
        self.taps = (
            PhasedLinear(len(config.taps), d_model, config.channels) if config.taps else None
        )
        self.prediction = None
        if config.head == "logistics":
            self.prediction = PhasedLinear(len(config.taps), 1, config.channels)
            near = {config.channels}  # the same channel of the pixel to the left, and above
            if config.image_shape:
                near.add(config.image_shape[1] * config.channels)
            weights = [0.5 if k in near else 0.0 for k in config.taps]
            with torch.no_grad():
                self.prediction.weight[:] = torch.tensor(weights)
        self.positions = nn.ParameterList(
            nn.Parameter(torch.zeros(size, d_model)) for size in config.image_shape or ()
        )
        self.condition = nn.Embedding(config.vocab_size, d_model) if config.conditioned else None
        if self.condition is not None:
            nn.init.zeros_(self.condition.weight)
        self.progress = Progress(config) if config.durations else None

    def history(self, batch: int, device: torch.device) -> Tensor:
        """``State.history`` before any token."""
        return torch.full((batch, self.config.kept + self.reach), NOTHING, device=device)

    def values(self, tokens: Tensor) -> Tensor:
        """The values, 0 … ``config.values`` - 1, on [-1, 1]; 0 for other tokens and NOTHING."""
        top = self.config.values - 1
        inside = (tokens >= 0) & (tokens <= top)
        dtype = self.embedding.weight.dtype
        return torch.where(inside, tokens.to(dtype) * (2 / top) - 1, 0.0)

    def forward(
        self, window: Tensor, position: int | Tensor, first: Tensor, rate: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """window (B, reach + L): the tokens at position … position + L - 1 and ``reach`` before.

        For L = 1, every row may have a position of its own, (B,).
        ``first`` (B, kept) are the first tokens of the sequence, NOTHING where none is read yet.
        A clip lasts 1 / ``rate`` times as long as its duration token tells.
        Returns features (B, L, H) and, for the logistics head, a linear prediction of
        the next value (B, L, 1).
        """
        length = window.shape[1] - self.reach
        x = self.embedding(window[:, self.reach :])
        start = position[:, None] if isinstance(position, Tensor) else position
        t = start + torch.arange(length, device=window.device)  # (L,) or (B, L)
        if self.condition is not None:
            told = self.condition(first.clamp(min=0))  # NOTHING, while nothing is read
            x = x + told[:, :1]
            for column in range(1, first.shape[1]):
                added = told[:, column : column + 1]
                if column == 1 and self.progress is not None:
                    time = (t - self.config.opening).expand(len(first), -1)
                    added = added + self.progress(first[:, 1:2], time, rate)
                unread = (t < column).expand(len(first), -1)
                x = x + added.masked_fill(unread[..., None], 0.0)
        last = self.reach + 1
        for k, table in zip(self.config.token_taps, self.token_taps, strict=True):
            earlier = window[:, last - k : last - k + length]
            rows = F.embedding(earlier.clamp(min=0), table)
            x = x + rows.masked_fill((earlier == NOTHING)[..., None], 0.0)
        prediction = None
        if self.taps is not None:
            values = self.values(window)
            columns = [values[:, last - k : last - k + length] for k in self.config.taps]
            tapped = torch.stack(columns, -1)  # (B, L, taps)
            x = x + self.taps(tapped, position)
            if self.prediction is not None:
                with torch.autocast(tapped.device.type, enabled=False):  # bins are 2/255 wide
                    prediction = self.prediction(tapped, position)
        if self.config.image_shape is not None:
            rows, columns, channels = self.config.image_shape
            row = (t // (columns * channels)).clamp(max=rows - 1)
            for table, index in zip(
                self.positions, (row, t // channels % columns, t % channels), strict=True
            ):
                x = x + table[index]
        return x, prediction


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

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = Linear(config.d_model[0], config.n_outputs)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        self.recall = Linear(config.d_model[0], len(config.recall)) if config.recall else None
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

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_outputs = config.n_outputs
        self.linear = Linear(config.d_model[0], 3 * self.mixtures)
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


HEADS: dict[str, Callable[[ModelConfig], Softmax | Logistics]] = {
    "softmax": Softmax,
    "logistics": Logistics,
}


class SequenceModel(nn.Module):
    """An autoregressive model of token sequences in the convolutional view.

    The prediction at position t is of the token after ``tokens[:, t]``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.inputs = Inputs(config)
        self.stack = build_stack(config)
        self.norm = nn.LayerNorm(config.d_model[0])
        self.head = HEADS[config.head](config)
        self.recall = Recall(config.recall, config.recall_slots, config.n_outputs)

    def features(self, tokens: Tensor, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """tokens (B, L) → what the head reads: features (B, L, H), and what is known without them.

        That is a linear prediction (B, L, 1), or recalled tokens (B, L, K).
        """
        _check_tokens(tokens, self.config)
        history = self.inputs.history(len(tokens), tokens.device)
        tables = self.recall.empty(len(tokens), tokens.device)
        x, known, _, _ = _look(self.inputs, self.recall, tokens, history, tables, 0, rate)
        if tokens.shape[1]:  # a layer needs a position; nothing has no features, only a shape
            x = self.stack(x, rate)
        return self.norm(x), known

    def forward(self, tokens: Tensor, rate: float = 1.0) -> Tensor:
        """tokens (B, L) → logits (B, L, V); ``rate`` scales Δ in every layer."""
        return self.head.logits(*self.features(tokens, rate))

    def log_prob(self, tokens: Tensor, read: Tensor | None = None) -> Tensor:
        """Log-likelihood of tokens[:, 1:] given those before, in nats: (B, L) → (B, L - 1).

        With ``read`` (B, L - 1), given these instead of the tokens before.
        """
        read = tokens[:, :-1] if read is None else read
        return self.head.log_prob(*self.features(read), tokens[:, 1:])

    def parameter_groups(self) -> dict[str, list[Tensor]]:
        """Parameters by how they are trained.

        "dynamics": Λ, Δ and the like, declared by the layers; "matrices": hidden linear maps;
        "others": embeddings, norms, biases, output matrices C and D, the head.
        """
        groups: dict[str, list[Tensor]] = {"dynamics": [], "matrices": [], "others": []}
        seen: set[Tensor] = set()
        for module in self.modules():
            if isinstance(module, TrainedLayer):
                seen.update(own := [getattr(module, name) for name in module.dynamics])
                groups["dynamics"] += own
        for module in self.stack.modules():
            if isinstance(module, Linear):
                seen.add(module.weight)
                groups["matrices"].append(module.weight)
        groups["others"] = [p for p in self.parameters() if p not in seen]
        return groups


def _window(
    tokens: Tensor, history: Tensor, kept: int, position: int | Tensor
) -> tuple[Tensor, Tensor]:
    """The first tokens of the sequence (B, kept), and tokens (B, L) behind the last in ``history``.

    The first of the tokens stands at ``position``, an integer or (B,) integers. What ``history``
    holds at the place of one of them is read instead of it: see ``RecurrentModel.foretold``.
    """
    first, length = history[:, :kept], tokens.shape[1]
    if kept and length:
        start = position[:, None] if isinstance(position, Tensor) else position
        place = (torch.arange(kept, device=tokens.device) - start).expand(len(tokens), -1)
        now = tokens.gather(1, place.clamp(0, length - 1))  # those that are among these
        new = (first == NOTHING) & (place >= 0) & (place < length)
        first = torch.where(new, now, first)
        t = start + torch.arange(length, device=tokens.device)
        for column in range(kept):
            tokens = torch.where(t == column, first[:, column : column + 1], tokens)
    return first, torch.cat([history[:, kept:], tokens], 1)


def _look(
    inputs: Inputs, recall: Recall, tokens: Tensor, history: Tensor, tables: Tensor,
    position: int | Tensor, rate: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What goes into stack and head for tokens (B, L), and history and tables after them.

    The first of them stands at ``position``; for L = 1, every row may have its own, (B,).
    """
    length = tokens.shape[1]
    first, window = _window(tokens, history, inputs.config.kept, position)
    x, prediction = inputs(window, position, first, rate)
    recalled, tables = recall(window, length, tables)
    known = recalled if prediction is None else prediction
    return x, known, torch.cat([first, window[:, length:]], 1), tables


def _check_tokens(tokens: Tensor, config: ModelConfig) -> None:
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"tokens must be integers of shape (B, L), got {tuple(tokens.shape)} {tokens.dtype}"
        )
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size):
        raise ValueError(
            f"token ids must lie in 0 … {config.vocab_size - 1}, "
            f"got {int(tokens.min())} … {int(tokens.max())}"
        )


def _frozen(module: M) -> M:
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


def _named_states(stack: RecurrentStack, states: tuple, name: str) -> Iterator[tuple[str, Tensor]]:
    for i, (layer, state) in enumerate(zip(stack.layers, states, strict=True)):
        place = f"{name}.layers.{i}"
        if isinstance(layer, RecurrentPool):
            group, queue, inner = state
            yield place, group
            yield from _named_states(layer.inner, inner, f"{place}.inner")
            yield f"{place}.up", queue
        else:
            yield f"{place}.ssm", state


def map_nested(function: Callable[..., Tensor], *nodes: Tensor | tuple) -> Any:
    """A function of tensors, of each place in nested tuples of one shape, depth first."""
    if all(isinstance(node, Tensor) for node in nodes):
        return function(*nodes)
    assert not any(isinstance(node, Tensor) for node in nodes), "of one shape"
    return tuple(map_nested(function, *children) for children in zip(*nodes, strict=True))


class State(NamedTuple):
    """All that a recurrent model remembers; its size does not depend on the tokens read."""

    position: Tensor  # () int64 on the CPU: tokens read; all else has a row for each sequence
    # (B, kept + reach) int64, the first tokens and the last, for the taps; NOTHING before any
    history: Tensor
    recall: Tensor  # (B, K, slots, 2) int32: what ``Recall`` keeps
    layers: tuple  # nested as the model is

    def tensors(self) -> list[Tensor]:
        """All tensors, depth first."""

        def walk(node: Tensor | tuple) -> list[Tensor]:
            return (
                [node] if isinstance(node, Tensor) else [t for child in node for t in walk(child)]
            )

        return walk(tuple(self))

    def rows(self, index: Tensor) -> "State":
        """The state of the batch rows ``index``: repeat, drop or reorder sequences."""
        return State(self.position, *map_nested(lambda tensor: tensor[index], self[1:]))


def _as_trained(
    method: Callable[Concatenate["RecurrentModel", P], R],
) -> Callable[Concatenate["RecurrentModel", P], R]:
    """Without gradients, and in the weights' own precision whatever the autocast around."""

    @functools.wraps(method)
    def exact(self: "RecurrentModel", *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), without_autocast(self.norm.weight):
            return method(self, *args, **kwargs)

    return exact


class RecurrentModel(nn.Module):
    """A ``SequenceModel`` as a recurrence: constant time and memory per token."""

    def __init__(self, model: SequenceModel, rate: float = 1.0) -> None:
        super().__init__()
        self.config = model.config
        self.rate = rate
        self.inputs = _frozen(model.inputs)
        self.stack = model.stack.to_recurrent(rate)
        self.norm = _frozen(model.norm)
        self.head = _frozen(model.head)
        self.recall = model.recall

    def initial_state(self, batch: int = 1) -> State:
        """The state before any token."""
        device = self.norm.weight.device
        history = self.inputs.history(batch, device)
        recall = self.recall.empty(batch, device)
        return State(torch.tensor(0), history, recall, self.stack.initial_state(batch))

    def foretold(self, state: State, token: int) -> State:
        """The state in which the rest of the opening is this token, whatever will be read.

        So a stream reads it as open while another one, drawn together with it, is told.
        """
        kept, history = self.config.kept, state.history.clone()
        first = history[:, :kept]
        first[first == NOTHING] = token
        return state._replace(history=history)

    def state_bytes(self) -> int:
        """Bytes of the state of one sequence, whatever its length."""
        return sum(t.nbytes for t in self.initial_state(1).tensors())

    def remembered(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``State.history`` and ``State.recall`` after tokens (B, L) from the beginning, L >= 1."""
        history = self.inputs.history(len(tokens), tokens.device)
        first, window = _window(tokens, history, self.config.kept, 0)
        recall = self.recall.empty(len(tokens), tokens.device)
        _, recall = self.recall(window, tokens.shape[1], recall)
        return torch.cat([first, window[:, tokens.shape[1] :]], 1), recall

    def named_states(self, state: State) -> Iterator[tuple[str, Tensor]]:
        """The layers' states by the modules that compute them, in the order of a step."""
        return _named_states(self.stack, state.layers, "stack")

    def look(
        self, tokens: Tensor, history: Tensor, recall: Tensor, position: int | Tensor,
        rate: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """``_look`` with the rate that the model was converted at."""
        rate *= self.rate
        return _look(self.inputs, self.recall, tokens, history, recall, position, rate)

    @_as_trained
    def prefill(
        self, tokens: Tensor, state: State | None = None, rate: float = 1.0
    ) -> tuple[Tensor, State]:
        """Read tokens (B, L) in parallel, from any state → logits (B, L, V) and the state after.

        ``rate`` scales Δ in every layer, from what the model was converted at.
        """
        features, known, state = self._features(tokens, state, rate)
        return self.head.logits(features, known), state

    @_as_trained
    def read(
        self, tokens: Tensor, state: State | None = None, rate: float = 1.0
    ) -> tuple[Tensor, State]:
        """``prefill`` that predicts only what comes after all tokens, L >= 1: logits (B, V)."""
        features, known, state = self._features(tokens, state, rate)
        if not features.shape[1]:
            raise ValueError("a reading needs at least one token, L >= 1; got none")
        return self.head.logits(features[:, -1], known[:, -1]), state

    def _features(
        self, tokens: Tensor, state: State | None, rate: float
    ) -> tuple[Tensor, Tensor, State]:
        """What the head reads after each token, and the state after all."""
        _check_tokens(tokens, self.config)
        state = self.initial_state(tokens.shape[0]) if state is None else state
        if len(tokens) != len(state.history):
            raise ValueError(
                f"the state is of {len(state.history)} sequences, the tokens are of {len(tokens)}"
            )
        x, known, history, recall = self.look(
            tokens, state.history, state.recall, int(state.position), rate
        )
        x, layers = self.stack.prefill(x, state.layers, int(state.position), rate)
        after = State(state.position + tokens.shape[1], history, recall, layers)
        return self.norm(x), known, after

    @_as_trained
    def step(self, token: Tensor, state: State, rate: float = 1.0) -> tuple[Tensor, State]:
        """Read one token (B,) → logits (B, V) of the next, and the state after; rate as above."""
        if token.shape != (len(state.history),):
            raise ValueError(
                f"token must be of shape (B,) with B = {len(state.history)} as the state; got "
                f"{tuple(token.shape)}"
            )
        _check_tokens(token[:, None], self.config)
        x, known, history, recall = self.look(
            token[:, None], state.history, state.recall, int(state.position), rate
        )
        x, layers = self.stack.step(x[:, 0], state.layers, int(state.position), rate)
        return (
            self.head.logits(self.norm(x), known[:, 0]),
            State(state.position + 1, history, recall, layers),
        )
