"""Batches of tokens, each decided by the seed and the number of the step alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from genssm.codec import ANY, Audio, Image

_PIECE = 2**22  # tokens of a stream that are looked at together


@dataclass(frozen=True)
class Batch:
    """tokens (B, L + 1) int64; weights (B, L) float32, 0 where the target is padding.

    ``read`` (B, L) is what a model reads in the place of tokens[:, :-1].
    """

    tokens: Tensor
    weights: Tensor | None = None
    read: Tensor | None = None

    def cut(self, length: int) -> Batch:
        """The first ``length`` targets of every sequence."""
        weights, read = (None if t is None else t[:, :length] for t in (self.weights, self.read))
        return Batch(self.tokens[:, : length + 1], weights, read)


def _random(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class TextBatches:
    """Windows of a token stream; the batch of a step depends on the seed and the step alone.

    In the stream every document begins with the boundary token, and windows begin anywhere. Without
    ``boundary`` a window may run on into later documents, and the model reads what came before;
    the boundary tells it that a new one begins. With it, a window counts up to the next boundary
    alone: no target is predicted from another document. In neither is one predicted from later
    tokens.
    """

    def __init__(
        self,
        stream: np.ndarray,
        batch_size: int,
        length: int,
        seed: int,
        boundary: int | None = None,
    ) -> None:
        least = length + 1 if boundary is None else 2
        if len(stream) < least:
            raise ValueError(
                f"the text has {len(stream)} tokens, and windows of length {length} need {least}; "
                "take a smaller length or more text"
            )
        self.stream, self.batch_size, self.length, self.seed = stream, batch_size, length, seed
        self.boundary = boundary

    def batch(self, step: int) -> Batch:
        last = len(self.stream) - (self.length if self.boundary is None else 1)
        return self.windows(_random(self.seed, step).integers(0, last, self.batch_size))

    def windows(self, starts: np.ndarray) -> Batch:
        """The windows that begin at these positions of the stream."""
        tokens = torch.full((len(starts), self.length + 1), self.boundary or 0)
        for row, start in zip(tokens, starts, strict=True):
            window = self.stream[start : start + self.length + 1]
            row[: len(window)] = torch.from_numpy(window.astype(np.int64))
        if self.boundary is None:
            return Batch(tokens)
        ended = (tokens[:, 1:] == self.boundary).cumsum(1)  # 1 at the end of the first document
        inside = (ended == 0) | ((ended == 1) & (tokens[:, 1:] == self.boundary))
        tokens[:, 1:][~inside] = self.boundary  # what follows is not even read
        return Batch(tokens, inside.float())


class _Shuffled:
    """Visits n items in a fresh order each epoch, ``size`` items a step."""

    def __init__(self, n: int, size: int, seed: int) -> None:
        if n < size:
            raise ValueError(f"a batch of {size} needs at least {size} examples, got {n}")
        self.n, self.size, self.seed = n, size, seed
        self.epoch, self.order = -1, np.arange(n)

    def indices(self, step: int) -> np.ndarray:
        epoch, at = divmod(step, self.n // self.size)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, _random(self.seed, epoch).permutation(self.n)
        return self.order[at * self.size : (at + 1) * self.size]


class PictureBatches:
    """Pictures with their class as start token, or "any" where it is not known (-1); a tenth of the
    others have "any", too."""

    def __init__(
        self,
        pictures: np.ndarray,
        labels: np.ndarray | None,
        codec: Image,
        batch_size: int,
        seed: int,
        flip: bool,
    ) -> None:
        self.shuffled = _Shuffled(len(pictures), batch_size, seed)
        codec.array(pictures[0])
        self.pictures, self.codec = pictures, codec
        self.labels = labels if codec.labels else None
        self.seed, self.flip = seed, flip

    def batch(self, step: int) -> Batch:
        random = _random(self.seed, step, 1)
        sequences = []
        for i in self.shuffled.indices(step):
            picture = np.asarray(self.pictures[i])
            if self.flip and random.random() < 0.5:
                picture = picture[:, ::-1]
            label = ANY
            if random.random() >= 0.1 and self.labels is not None and self.labels[i] >= 0:
                label = self.codec.labels[self.labels[i]]
            sequences.append(self.codec.encode(picture, label))
        return Batch(torch.stack(sequences))


class ClipBatches:
    """Clips of similar length together, their label as start token, the boundary as last target.

    A clip longer than ``length`` is as many sequences as can hold it: one at its beginning, one at
    its end, the others anywhere, anew each epoch. One that does not begin with the clip reads the
    label, the level and ``context`` samples, and predicts what follows: nothing is learned as if
    the clip began there. With durations it would have to be told how much of the clip has
    passed; of clips with them the beginning alone is trained. Batches are padded to ``least``
    tokens.

    In the stream every clip begins with its start token. A tenth of them have "any" instead; of
    those with a part of a class ("7_jackson"), three tenths more have the class ("7").

    With ``noise``, what a model reads is noisy and what it predicts is not, so that it learns to
    come back from errors of its own. Its standard deviation, in steps of mu-law, is drawn for every
    clip from 0 … ``noise``. Source: LPCNet (arXiv 1810.11846). With ``fade``, a part of every
    eighth clip is read quieter than it is, by up to so many dB.

    Of the clips of a codec with durations or levels, a twentieth is read with each of them open,
    and another with all, or half of those with "any". They are predicted once a clip and decide
    all of it, so that they count as much as ``opening_weight``
    samples.
    """

    group = 16  # batches whose clips are sorted by length together
    opening_weight = 32

    def __init__(
        self,
        stream: np.ndarray,
        codec: Audio,
        batch_size: int,
        length: int,
        seed: int,
        noise: float = 0.0,
        fade: float = 0.0,
        context: int = 0,
        least: int = 1,
    ) -> None:
        self.stream, self.codec, self.batch_size, self.seed = stream, codec, batch_size, seed
        self.noise, self.fade, self.context, self.least = noise, fade, context, least
        begins = _where(stream, lambda t: (t == codec.boundary) | (t >= codec.n_outputs))
        whole = np.append(begins[1:], len(stream)) - begins  # the opening, the samples and the end
        self.too_long = int((whole > length).sum())
        own = max(1, length - codec.opening - context)  # what a part adds that is not the first
        more = np.maximum(0, whole - length) * (not codec.durations)
        parts = 1 - (-more // own)
        self.begins, self.parts = np.repeat(begins, parts), np.repeat(parts, parts)
        self.part = np.arange(len(self.begins)) - np.repeat(parts.cumsum() - parts, parts)
        self.lengths = np.repeat(np.minimum(whole, length), parts)
        self.beyond = np.repeat(whole, parts) - self.lengths  # so much later the last part begins
        n = len(self.begins)
        together = min(self.group * batch_size, n // batch_size * batch_size)
        if together == 0:
            or_parts = "" if codec.durations else f", or parts of {length} tokens of longer ones"
            raise ValueError(f"a batch of {batch_size} needs as many clips{or_parts}; got {n}")
        self.shuffled = _Shuffled(n, together, seed)

    def batch(self, step: int) -> Batch:
        per_group = self.shuffled.size // self.batch_size
        turn, at = divmod(step, per_group)
        chosen = np.array(sorted(self.shuffled.indices(turn), key=self.lengths.__getitem__))
        order = _random(self.seed, turn, 1).permutation(per_group)
        random = _random(self.seed, step, 2)
        members = chosen[order[at] * self.batch_size : (order[at] + 1) * self.batch_size]
        later = self._later(members, _random(self.seed, step, 6))
        lengths, opening = self.lengths[members], self.codec.opening
        longest = max(int(lengths.max()), self.least)
        tokens = torch.full((self.batch_size, longest + 1), self.codec.boundary)
        weights = torch.zeros(self.batch_size, longest)
        for row, (i, n) in enumerate(zip(members, lengths, strict=True)):
            head = int(self.begins[i]) + 1 + opening
            first = head + int(later[row])
            ended = later[row] == self.beyond[i]
            told = self.stream[head - opening : head]
            samples = self.stream[first : first + n - opening - int(ended)]
            tokens[row, 0] = self._start(int(self.stream[head - opening - 1]), random.random())
            known = np.concatenate([told, samples]).astype(np.int64)
            tokens[row, 1 : len(known) + 1] = torch.from_numpy(known)
            weights[row, :n] = 1
            weights[row, :opening] = self.opening_weight
            if later[row]:
                weights[row, : opening + self.context] = 0
        if not (self.noise or self.fade or opening):
            return Batch(tokens, weights)
        read = tokens[:, :-1].clone()
        if self.fade:
            read = self._faded(read, lengths, _random(self.seed, step, 5))
        if self.noise:
            read = self._noisy(read, _random(self.seed, step, 3))
        if opening:
            shape = (self.batch_size, opening + 1)
            chance = torch.from_numpy(_random(self.seed, step, 4).random(shape))
            limit = torch.where(read[:, :1] == self.codec.boundary, 0.5, 0.05)
            everything = chance[:, opening:] < limit
            hidden = (chance[:, :opening] < 0.05) | everything
            read[:, 1 : opening + 1][hidden] = self.codec.boundary
        return Batch(tokens, weights, read)

    def _later(self, members: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """How many samples after the beginning of its clip each of these sequences begins."""
        beyond, chance = self.beyond[members], random.random(len(members))
        part, last = self.part[members], self.parts[members] - 1
        between = 1 + (chance * (beyond - 1)).astype(np.int64)
        return np.where(part == 0, 0, np.where(part == last, beyond, between))

    def _faded(self, tokens: Tensor, lengths: np.ndarray, random: np.random.Generator) -> Tensor:
        """Tokens (B, L), of which samples in a part of every eighth row are quieter."""
        ends = np.sort(random.random((len(tokens), 2)), 1) * lengths[:, None]
        gain = 10 ** (-self.fade / 20 * random.random(len(tokens)))
        time, chosen = np.arange(tokens.shape[1]), random.random(len(tokens)) < 1 / 8
        inside = (time >= ends[:, :1]) & (time < ends[:, 1:]) & chosen[:, None]
        faded = self.codec.scaled(tokens, torch.from_numpy(gain)[:, None])
        return torch.where(torch.from_numpy(inside), faded, tokens)

    def _noisy(self, tokens: Tensor, random: np.random.Generator) -> Tensor:
        """Tokens (B, L), of which samples are off; labels and boundaries are not."""
        level = self.noise * random.random((len(tokens), 1))
        shift = np.rint(level * random.standard_normal(tokens.shape)).astype(np.int64)
        top = self.codec.boundary - 1  # of the values of samples
        return torch.where(tokens <= top, (tokens + torch.from_numpy(shift)).clamp(0, top), tokens)

    def _start(self, start: int, chance: float) -> int:
        """The start token of a clip, or of its class, or "any"."""
        if chance < 0.1:
            return self.codec.boundary
        label = self.codec.label_of(start)
        broader = None if label is None else self.codec.broader(label)
        return start if broader is None or chance >= 0.4 else self.codec.start(broader)


def _where(stream: np.ndarray, wanted: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Where a stream holds wanted tokens, piece by piece."""
    found = [
        i + np.flatnonzero(wanted(stream[i : i + _PIECE])) for i in range(0, len(stream), _PIECE)
    ]
    return np.concatenate(found) if found else np.zeros(0, np.int64)
