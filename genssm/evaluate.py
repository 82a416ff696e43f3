"""Exact likelihood: bits of raw data under a model, and bits per unit of a data set."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice

import torch
from torch import Tensor

from genssm.codec import Codec
from genssm.conversion import to_recurrent
from genssm.data import Example
from genssm.finite import NotFiniteError
from genssm.model import RecurrentModel, SequenceModel
from genssm.recurrence import without_autocast

_LN2 = math.log(2)
LONGEST = 16_384  # tokens convolved at once; longer sequences go on from the recurrent state
_HEAD = 4_096  # tokens whose logits are held at once
_BATCH = 16_384  # tokens evaluated at once: more do not fit the caches


@torch.no_grad()
def token_bits(model: SequenceModel, tokens: Tensor, rate: float = 1.0) -> Tensor:
    """Bits of tokens[:, 1:] given those before: (B, L + 1) → (B, L) float32, by convolution.

    ``rate`` scales Δ in every layer.
    Memory is bounded: logits are made in slices, and beyond ``LONGEST`` tokens the sequence is read
    in pieces, the state of the recurrence carrying over.

    Raises NotFiniteError, a ValueError, where a prediction is no number.
    """
    reader, targets = tokens[:, :-1], tokens[:, 1:]
    if reader.shape[1] > LONGEST:
        return _token_bits_in_pieces(to_recurrent(model, rate), reader, targets)
    with without_autocast(tokens):
        bits = _convolved_token_bits(model, reader, targets, rate)
    if not bool(bits.isfinite().all()):
        recurrent = to_recurrent(model, rate)
        raise NotFiniteError(recurrent, recurrent.read(reader)[1])
    return bits


def _convolved_token_bits(
    model: SequenceModel, reader: Tensor, targets: Tensor, rate: float
) -> Tensor:
    features, known = model.features(reader, rate)
    bits = []
    step = max(1, _HEAD // len(reader))
    for i in range(0, reader.shape[1], step):
        part = slice(i, i + step)
        log_p = model.head.log_prob(features[:, part], known[:, part], targets[:, part])
        bits.append(log_p / -_LN2)
    return torch.cat(bits, 1) if bits else features.new_zeros(targets.shape)


def _token_bits_in_pieces(model: RecurrentModel, reader: Tensor, targets: Tensor) -> Tensor:
    state, bits = model.initial_state(len(reader)), []
    for i in range(0, reader.shape[1], _HEAD):
        part = slice(i, i + _HEAD)
        logits, state = model.prefill(reader[:, part], state)
        log_p = torch.log_softmax(logits, -1).gather(-1, targets[:, part, None])[..., 0]
        bits.append(log_p / -_LN2)
        if not bool(bits[-1].isfinite().all()):
            raise NotFiniteError(model, state)
    return torch.cat(bits, 1)


@dataclass(frozen=True)
class Evaluation:
    """``value`` is bits / units; units are bytes, dimensions (pixel values) or samples."""

    value: float
    unit: str
    bits: float
    tokens: int
    units: int
    examples: int
    words: int = 0  # of text: between blanks, and one for the end of each line

    @property
    def word_perplexity(self) -> float | None:
        """2^(bits / words); None for other data than text, or if no float is as large (text without
        blanks).

        Words are what stands between blanks, and each line's end counts as one, as where WikiText's
        perplexity is counted; the text is what it is, with no word replaced by <unk>.
        """
        exponent = self.bits / self.words if self.words else math.inf
        return 2.0**exponent if exponent < sys.float_info.max_exp else None

    def facts(self) -> dict[str, object]:
        """JSON-able, of text with its word perplexity."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "words"}
        if self.words:
            facts |= {"words": self.words, "word_perplexity": self.word_perplexity}
        return facts


def evaluate(
    model: SequenceModel,
    codec: Codec,
    examples: Iterable[Example],
    limit: int | None = None,
    rate: float = 1.0,
) -> Evaluation:
    """The mean exact likelihood over at most ``limit`` examples, each from its start.

    ``rate`` scales Δ in every layer. Raises NotFiniteError as ``token_bits`` does.
    """
    bits, tokens, units, count, words = 0.0, 0, 0, 0, 0
    for batch in _batches((e, codec.encode(e.raw, e.label)) for e in islice(examples, limit)):
        longest = max(len(sequence) for _, sequence in batch)
        padded = torch.full((len(batch), longest), codec.boundary)
        for row, (_, sequence) in enumerate(batch):
            padded[row, : len(sequence)] = sequence
        scored = token_bits(model, padded.to(model.norm.weight.device), rate).cpu()
        for row, (example, sequence) in enumerate(batch):
            bits += float(scored[row, : len(sequence) - 1].double().sum())
            tokens += len(sequence) - 1
            units += codec.units(example.raw)
            count += 1
            if isinstance(example.raw, str):
                words += len(example.raw.split()) + example.raw.count("\n")
    if units == 0:
        raise ValueError("the data holds nothing to evaluate")
    return Evaluation(bits / units, codec.unit, bits, tokens, units, count, words)


def _batches(
    encoded: Iterable[tuple[Example, Tensor]],
) -> Iterator[list[tuple[Example, Tensor]]]:
    """Groups of similar length, to spare padding, of at most ``_BATCH`` tokens (or one example)."""
    iterator = iter(encoded)
    while window := list(islice(iterator, 64)):
        batch: list[tuple[Example, Tensor]] = []
        for item in sorted(window, key=lambda item: len(item[1])):
            if batch and (len(batch) + 1) * len(item[1]) > _BATCH:
                yield batch
                batch = []
            batch.append(item)
        yield batch
