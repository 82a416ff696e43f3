"""From logits to tokens."""

import math
import re

import pytest
import torch
from torch import Tensor

from genssm.sampling import (
    RandomStream,
    SamplingConfig,
    draw,
    guided,
    new_seed,
    penalize,
    probabilities,
)

LOGITS = torch.tensor([[0.5, 2.0, -1.0, 1.0, 0.0]]).log_softmax(-1)


def by_hand(config: SamplingConfig) -> Tensor:
    """The filters one token at a time, in the stated order."""
    p = [math.exp(x / config.temperature) for x in LOGITS[0].tolist()]
    p = [x / sum(p) for x in p]
    ranked = sorted(range(len(p)), key=lambda i: -p[i])
    if config.top_k:
        p = [x if i in ranked[: config.top_k] else 0.0 for i, x in enumerate(p)]
        p = [x / sum(p) for x in p]
    if config.top_p < 1:
        kept, mass = [], 0.0
        for i in ranked:
            if mass < config.top_p:
                kept.append(i)
            mass += p[i]
        p = [x if i in kept else 0.0 for i, x in enumerate(p)]
        p = [x / sum(p) for x in p]
    p = [x if x >= config.min_p * max(p) else 0.0 for x in p]
    return torch.tensor([[x / sum(p) for x in p]], dtype=torch.float64)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.5),
        SamplingConfig(temperature=3),
        SamplingConfig(top_k=2),
        SamplingConfig(top_k=99),
        SamplingConfig(top_p=0.6),
        SamplingConfig(top_p=1e-9),
        SamplingConfig(min_p=0.3),
        SamplingConfig(temperature=0.7, top_k=4, top_p=0.9, min_p=0.1),
    ],
)
def test_filters_equal_the_definition(config: SamplingConfig) -> None:
    torch.testing.assert_close(probabilities(LOGITS, config), by_hand(config))


@pytest.mark.parametrize("plausible", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("guidance", [-0.5, 0.3, 1.0, 1.7, 4.0])
def test_guidance_over_one_leaves_only_what_is_plausible_without_it(
    guidance: float, plausible: float
) -> None:
    own, other = 3 * torch.randn(2, 5, 200, generator=torch.Generator().manual_seed(0))
    config, plain = SamplingConfig(temperature=0.9), SamplingConfig()
    actual = probabilities(guided(own, other, guidance, plausible), config)
    each = [torch.full((5, 1), x) for x in (guidance, plausible)]
    torch.testing.assert_close(
        probabilities(guided(own, other, *each), config), actual, rtol=1e-4, atol=1e-8
    )
    expected = probabilities(other + guidance * (own - other), config)
    if guidance > 1:
        p = probabilities(own, plain)
        expected[p < plausible * p.amax(-1, keepdim=True)] = 0
        assert bool((expected == 0).any()) == (plausible > 0)
    expected /= expected.sum(-1, keepdim=True)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-8)


def test_temperature_zero_takes_the_likeliest() -> None:
    p = probabilities(LOGITS, SamplingConfig(temperature=0))
    assert p.tolist() == [[0.0, 1.0, 0.0, 0.0, 0.0]]


def test_tiny_temperature_does_not_overflow() -> None:
    for temperature in (1e-3, 1e-40, 1e-310):
        p = probabilities(LOGITS * 1e4, SamplingConfig(temperature=temperature))
        assert p.tolist() == [[0.0, 1.0, 0.0, 0.0, 0.0]]


def test_repetition_penalty_lowers_what_was_seen() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]


def test_draw_inverts_the_distribution() -> None:
    p = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).double().expand(5, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 1 - 1e-16]).double()
    assert draw(p, uniform).tolist() == [0, 0, 2, 2, 3]


def test_draws_follow_the_probabilities() -> None:
    stream = RandomStream(7, 0)
    n = 20_000
    p = torch.tensor([[0.1, 0.2, 0.7]]).double().expand(n, -1)
    tokens = draw(p, torch.tensor([stream.next() for _ in range(n)]).double())
    share = torch.bincount(tokens, minlength=3) / n
    torch.testing.assert_close(share.double(), p[0], atol=0.015, rtol=0)  # over 4 deviations


def test_streams_depend_on_seed_and_index_alone() -> None:
    def numbers(seed: int, index: int) -> list[float]:
        stream = RandomStream(seed, index)
        return [stream.next() for _ in range(5)]

    assert numbers(1, 2) == numbers(1, 2)
    assert len({tuple(numbers(seed, index)) for seed in range(5) for index in range(5)}) == 25
    long = [(7 * 2**32 + 5, 0), (5, 7), (7 * 2**32 + 5, 1), (2**32, 0), (0, 1)]
    assert len({tuple(numbers(*pair)) for pair in long}) == len(long)
    assert all(0 <= x < 1 for x in numbers(0, 0))
    stream = RandomStream(1, 2)
    assert [*stream.take(3), stream.next(), *stream.take(1)] == numbers(1, 2)


def test_new_seeds_differ_and_are_valid() -> None:
    seeds = {new_seed() for _ in range(20)}
    assert len(seeds) == 20
    assert all(RandomStream(seed, 0) for seed in seeds)


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"temperature": -1}, "0 <= temperature <= 100, got -1"),
        ({"temperature": math.nan}, "0 <= temperature <= 100, got nan"),
        ({"top_k": -1}, "0 <= top_k < 2^31, got -1"),
        ({"top_k": 2**70}, f"0 <= top_k < 2^31, got {2**70}"),
        ({"top_p": 0}, "1e-9 <= top_p <= 1, got 0"),
        ({"top_p": 1e-300}, "1e-9 <= top_p <= 1, got 1e-300"),
        ({"top_p": 1.5}, "1e-9 <= top_p <= 1, got 1.5"),
        ({"plausible": 1.5}, "0 <= plausible <= 1, got 1.5"),
        ({"min_p": -0.1}, "0 <= min_p <= 1, got -0.1"),
        ({"min_p": 2, "top_k": -2}, "0 <= top_k < 2^31, got -2; 0 <= min_p <= 1, got 2"),
        ({"repetition_penalty": 0}, "0.01 <= repetition_penalty <= 10, got 0"),
    ],
)
def test_settings_out_of_range_are_refused_and_named(setting: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=f"^sampling needs {re.escape(rule)}$"):
        SamplingConfig(**setting)


def test_seed_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="seed must lie in"):
        RandomStream(-1, 0)


def test_a_seed_has_the_numbers_that_it_has_always_had():
    """Those of the recipes in files that were shared."""
    assert RandomStream(1, 2).take(2).tolist() == [0.2996269638247443, 0.0739441105013603]
    assert RandomStream(2**40, 1).take(2).tolist() == [0.6745206697895387, 0.5523800198552875]
