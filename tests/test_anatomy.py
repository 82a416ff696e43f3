"""A model from the inside: what is shown is what the model does."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from genssm import anatomy
from genssm.checkpoint import Checkpoint
from genssm.pipeline import Pipeline
from genssm.sampling import SamplingConfig


@pytest.fixture(scope="module", params=["text", "image", "audio"])
def pipe(request: pytest.FixtureRequest, make_checkpoint: Callable[[str], Checkpoint]) -> Pipeline:
    made = make_checkpoint(request.param)
    probe = tuple(made.codec.encode(_raw(request.param)).tolist())
    return Pipeline("toy", Checkpoint(made.model, made.codec, probe=probe), engine="eager")


def _raw(modality: str) -> object:
    random = np.random.default_rng(0)
    if modality == "text":
        return "a short text"
    if modality == "image":
        return random.integers(0, 256, (4, 3, 3), np.uint8)
    return (0.3 * random.standard_normal(40)).astype(np.float32)


def test_memories_are_those_of_the_layers(pipe: Pipeline) -> None:
    found = anatomy.memories(pipe, 32)
    blocks = anatomy._blocks(pipe.model)
    assert [memory.name for memory in found] == list(blocks)
    for memory, (block, stride) in zip(found, blocks.values(), strict=True):
        assert memory.stride == stride
        assert max(map(abs, memory.kernel)) == pytest.approx(1)
        kernels = block.ssm.kernel(32)[:, 0].detach()
        strongest = kernels[kernels.square().sum(-1).argmax()]
        shown = torch.tensor(memory.kernel)
        torch.testing.assert_close(shown, strongest / strongest.abs().max(), rtol=0, atol=1e-5)
        stepped = dict(pipe.recurrent.named_modules())[memory.name].ssm.a.flatten()  # of S4D
        poles = torch.tensor([complex(x, y) for x, y in memory.poles], dtype=stepped.dtype)
        apart = torch.minimum(
            (poles[:, None] - stepped).abs(), (poles[:, None] - stepped.conj()).abs()
        )
        assert float(apart.amin(1).max()) < 1e-5
        assert all(y >= 0 and x * x + y * y < 1 for x, y in memory.poles)
        assert memory.half_lives == tuple(sorted(memory.half_lives))
    period = pipe.model.config.period
    assert max(memory.stride for memory in found) == period


def test_agreement_is_measured_at_every_position(pipe: Pipeline) -> None:
    tokens = torch.tensor(pipe.config["probe"])
    found = list(anatomy.agreements(pipe, tokens))
    assert [a.position for a in found] == list(range(len(tokens)))
    assert all(a.step < 1e-3 * a.scale and a.prefill < 1e-3 * a.scale for a in found)
    with torch.no_grad():
        pipe.recurrent.head.linear.bias += 0.5
    try:
        shifted = list(anatomy.agreements(pipe, tokens))
    finally:
        with torch.no_grad():
            pipe.recurrent.head.linear.bias -= 0.5
    assert all(a.step > 1e-2 for a in shifted)


def test_a_trace_draws_what_a_sample_draws(pipe: Pipeline) -> None:
    view = anatomy.StateView(pipe)
    start = pipe.read()
    config = SamplingConfig(temperature=0.9)
    drawn = list(anatomy.trace(pipe, view, start, config, 3, 12))
    expected = pipe.sample(temperature=0.9, top_p=1.0, max_tokens=12, seed=3)[0]
    assert [token for token, _ in drawn] == expected.tokens
    assert all(levels.shape == (view.rows,) for _, levels in drawn)
    # Before the first token, the levels are those of the state of the prompt.
    np.testing.assert_array_equal(drawn[0][1], view.levels(start.state.layers))
    assert any((a != b).any() for (_, a), (_, b) in itertools.pairwise(drawn))


def test_the_levels_of_no_state_are_zero(pipe: Pipeline) -> None:
    view = anatomy.StateView(pipe)
    assert not view.levels(pipe.recurrent.initial_state(1).layers).any()
    assert view.rows == anatomy.BANDS * len(view.names)


def test_a_race_times_every_runner(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "TIMED", 2)
    monkeypatch.setattr(anatomy, "WARM_UP", 1)
    monkeypatch.setattr(anatomy, "has_transformers", lambda: False)
    laps = list(anatomy.race(pipe, [8, 16]))
    assert [lap.length for lap in laps] == [8, 16]
    assert all(lap.step > 0 and lap.convolution > 0 and lap.transformer is None for lap in laps)


def test_a_checkpoint_without_a_probe_is_looked_at_too(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anatomy, "has_transformers", lambda: False)
    bare = Pipeline("toy", Checkpoint(pipe.model, pipe.codec), engine="eager")
    assert anatomy.probe_of(bare).tolist() == [bare.codec.boundary]
    assert [lap.length for lap in anatomy.race(bare, [3])] == [3]
    view = anatomy.StateView(bare)
    _, state = bare.recurrent.step(anatomy.probe_of(bare), bare.recurrent.initial_state(1))
    assert view.levels(state.layers).max() == int(255 / anatomy.HEADROOM)


@pytest.mark.skipif(not anatomy.has_transformers(), reason="needs transformers")
def test_a_race_leaves_the_random_numbers_of_others(pipe: Pipeline) -> None:
    before = torch.random.get_rng_state()
    list(anatomy.race(pipe, [3]))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_picture_sets_the_length_of_the_race(pipe: Pipeline) -> None:
    lengths = anatomy.race_lengths(pipe)
    assert lengths == ([] if pipe.modality == "image" else [128, 256, 512, 1024, 2048, 4096])
