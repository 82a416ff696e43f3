"""Exact likelihood: by convolution, in pieces and by stepping it is the same number."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genssm import evaluate as evaluation
from genssm.checkpoint import Checkpoint
from genssm.codec import Audio, Codec, Text
from genssm.conversion import to_recurrent
from genssm.data import Example
from genssm.evaluate import Evaluation, evaluate, token_bits
from genssm.finite import NotFiniteError
from genssm.heads import Logistics, Softmax
from genssm.model import SequenceModel

Near = Callable[[Tensor, Tensor, float], None]
MakeModel = Callable[..., SequenceModel]
MakeCheckpoint = Callable[[str], Checkpoint]
kinds = pytest.mark.parametrize("kind", ["isotropic", "pooled", "image"])
modalities = pytest.mark.parametrize("modality", ["text", "image", "audio"])


def bits_by_steps(model: SequenceModel, tokens: Tensor, rate: float = 1.0) -> Tensor:
    """Bits of tokens[1:] given those before, (L + 1,) → (L,), one step at a time."""
    recurrent = to_recurrent(model, rate)
    state, bits = recurrent.initial_state(1), []
    for token, target in pairwise(tokens):
        logits, state = recurrent.step(token[None], state)
        bits.append(-torch.log_softmax(logits[0], -1)[target] / math.log(2))
    return torch.stack(bits) if bits else torch.zeros(0)


@kinds
@pytest.mark.parametrize("layer", ["s4", "s4d"])
def test_token_bits_are_those_of_stepping(
    kind: str, layer: str, make_model: MakeModel, assert_near: Near
):
    model = make_model(kind, layer)
    tokens = torch.randint(0, model.config.n_outputs, (2, 50))
    bits = token_bits(model, tokens)
    assert bits.dtype == torch.float32
    assert not bits.requires_grad
    for row in range(2):
        assert_near(bits[row], bits_by_steps(model, tokens[row]), 1e-4)


@kinds
@pytest.mark.parametrize(("longest", "head"), [(16_384, 4), (16_384, 7), (30, 13), (1, 1)])
def test_token_bits_in_pieces_are_those_of_the_whole(
    kind: str, longest: int, head: int,
    make_model: MakeModel, assert_near: Near, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    model = make_model(kind)
    tokens = torch.randint(0, model.config.n_outputs, (2, 40))
    whole = token_bits(model, tokens)
    monkeypatch.setattr(evaluation, "LONGEST", longest)
    monkeypatch.setattr(evaluation, "_HEAD", head)
    assert_near(token_bits(model, tokens), whole, 1e-4)


@kinds
def test_token_bits_of_a_start_alone_are_none(kind: str, make_model: MakeModel):
    assert token_bits(make_model(kind), torch.tensor([[1], [2]])).shape == (2, 0)


@modalities
def test_evaluation_is_the_sum_over_examples_each_from_its_start(
    modality: str, make_checkpoint: MakeCheckpoint, examples: dict[str, list[Any]]
):
    checkpoint = make_checkpoint(modality)
    model, codec = checkpoint.model, checkpoint.codec
    labels = (*codec.labels[:2], None) if codec.labels else (None, None, None)
    given = [Example(raw, label) for raw, label in zip(examples[modality], labels, strict=True)]
    result = evaluate(model, codec, given)
    sequences = [codec.encode(e.raw, e.label) for e in given]
    bits = sum(float(bits_by_steps(model, tokens).sum()) for tokens in sequences)
    units = sum(codec.units(e.raw) for e in given)
    assert result.bits == pytest.approx(bits, rel=1e-5)
    assert result.units == units
    assert result.value == pytest.approx(bits / units, rel=1e-5)
    assert result.tokens == sum(len(tokens) - 1 for tokens in sequences)
    assert result.examples == 3
    assert result.unit == codec.unit


def test_padding_does_not_matter(make_model: MakeModel):
    codec = Audio(8000)
    model = make_model("pooled", vocab_size=257, n_outputs=257)
    waves = [np.sin(np.arange(n) / 3).astype(np.float32) for n in (90, 5, 40, 5, 1, 77)]
    together = evaluate(model, codec, map(Example, waves))
    alone = [evaluate(model, codec, [Example(wave)]) for wave in waves]
    assert together.bits == pytest.approx(sum(e.bits for e in alone), rel=1e-6)
    assert together.units == sum(e.units for e in alone) == 218


def test_limit_takes_the_first_examples_and_reads_no_more(
    make_checkpoint: MakeCheckpoint, examples: dict[str, list[Any]]
):
    checkpoint = make_checkpoint("audio")

    def endless():
        while True:
            yield from map(Example, examples["audio"])

    limited = evaluate(checkpoint.model, checkpoint.codec, endless(), limit=2)
    expected = evaluate(checkpoint.model, checkpoint.codec, map(Example, examples["audio"][:2]))
    assert limited == expected


@modalities
def test_uniform_model_needs_log2_of_the_outputs(
    modality: str, codecs: dict[str, Codec], make_model: MakeModel, examples: dict[str, list[Any]]
):
    codec = codecs[modality]
    sizes = {"vocab_size": codec.vocab_size, "n_outputs": codec.n_outputs}
    model = make_model("isotropic", **sizes, recall=())
    assert isinstance(model.head, Softmax)
    with torch.no_grad():
        model.head.linear.weight.zero_()
        model.head.linear.bias.zero_()
    result = evaluate(model, codec, map(Example, examples[modality]))
    assert result.bits / result.tokens == pytest.approx(math.log2(codec.n_outputs), rel=1e-6)


def test_logistic_likelihood_of_all_values_sums_to_one(make_model: MakeModel):
    model = make_model("image")
    assert isinstance(model.head, Logistics)
    prefix = torch.tensor([258, 7, 200, 31])
    tokens = torch.stack([torch.cat([prefix, torch.tensor([v])]) for v in range(256)])
    probabilities = torch.exp2(-token_bits(model, tokens)[:, -1])
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-5)


def test_empty_documents_count_for_nothing(make_model: MakeModel, text_codec: Text):
    model = make_model("isotropic", vocab_size=400, n_outputs=400)
    with_empty = evaluate(model, text_codec, map(Example, ["", "text", ""]))
    assert with_empty.bits == evaluate(model, text_codec, [Example("text")]).bits
    assert with_empty.units == 4


def test_text_without_blanks_has_no_word_perplexity():
    """Its bits are those of one word, and no float holds two to their power."""
    one = Evaluation(1.0, "bits/byte", 5000.0, 900, 1000, 1, words=1)
    assert one.word_perplexity is None
    assert one.facts()["word_perplexity"] is None
    assert Evaluation(1.0, "bits/byte", 30.0, 9, 30, 1, words=3).word_perplexity == 1024.0


@pytest.mark.parametrize("texts", [[], [""]])
def test_nothing_to_evaluate_is_refused(texts: list[str], make_model: MakeModel, text_codec: Text):
    model = make_model("isotropic", vocab_size=400, n_outputs=400)
    with pytest.raises(ValueError, match="holds nothing to evaluate"):
        evaluate(model, text_codec, map(Example, texts))


@pytest.mark.parametrize("longest", [16_384, 10])
def test_likelihoods_that_are_no_numbers_name_the_layer(
    longest: int, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("isotropic")
    with torch.no_grad():  # what layer 0 adds overflows, and layer 1 norms it
        weight = model.get_parameter("stack.layers.0.mixer.up.weight")
        weight.copy_(3e38 * weight.sign())
    monkeypatch.setattr(evaluation, "LONGEST", longest)
    with pytest.raises(NotFiniteError, match=r"stack\.layers\.1\.ssm or what enters it"):
        token_bits(model, torch.randint(0, model.config.n_outputs, (2, 40)))


@pytest.mark.parametrize("longest", [16_384, 10])
def test_bits_at_another_rate_are_those_of_steps_at_it(
    longest: int, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
):
    """By convolution, whole and in pieces."""
    monkeypatch.setattr(evaluation, "LONGEST", longest)
    monkeypatch.setattr(evaluation, "_HEAD", 7)
    model, tokens = make_model("pooled", "s4"), torch.randint(0, 17, (40,))
    expected = bits_by_steps(model, tokens, 0.5)
    torch.testing.assert_close(
        token_bits(model, tokens[None], 0.5)[0], expected, rtol=1e-4, atol=1e-4
    )
    assert float((expected - token_bits(model, tokens[None])[0]).abs().max()) > 1e-2


def test_words_are_counted_as_those_between_blanks_and_ends_of_lines(
    make_model: MakeModel, text_codec: Text
):
    """An end of a line is a word, as is usual for WikiText."""
    model = make_model("isotropic", vocab_size=400, n_outputs=400)
    assert evaluate(model, text_codec, [Example("one two\n three\n")]).words == 5
