"""What shapes a model."""

import math
from dataclasses import dataclass, field
from typing import Any

from genssm.heads import HEADS
from genssm.layers import LAYERS
from genssm.settings import check_types


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
