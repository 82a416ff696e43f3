"""From tokens to features: embeddings, what was read before, and the place in an image or clip."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genssm.blocks import PhasedLinear
from genssm.config import ModelConfig
from genssm.recall import NOTHING, Recall

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


def window_of(
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


def look(
    inputs: Inputs, recall: Recall, tokens: Tensor, history: Tensor, tables: Tensor,
    position: int | Tensor, rate: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What goes into stack and head for tokens (B, L), and history and tables after them.

    The first of them stands at ``position``; for L = 1, every row may have its own, (B,).
    """
    length = tokens.shape[1]
    first, window = window_of(tokens, history, inputs.config.kept, position)
    x, prediction = inputs(window, position, first, rate)
    recalled, tables = recall(window, length, tables)
    known = recalled if prediction is None else prediction
    return x, known, torch.cat([first, window[:, length:]], 1), tables
