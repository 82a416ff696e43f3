"""The sequence model: its views agree, it is causal, and its heads are exact likelihoods."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genssm.blocks import Linear
from genssm.config import ModelConfig
from genssm.conversion import to_recurrent
from genssm.heads import Logistics, _LinearLogProb
from genssm.inputs import PARTS, Inputs
from genssm.layers import StateSpace
from genssm.model import RecurrentModel, SequenceModel, State
from genssm.recall import NOTHING

Near = Callable[[Tensor, Tensor, float], None]
MakeModel = Callable[..., SequenceModel]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
PERIOD = 6  # of every model with pools in conftest

everywhere = pytest.mark.parametrize(
    ("kind", "layer"),
    [(kind, layer) for kind in ("isotropic", "pooled", "image") for layer in ("s4d", "s4")],
)
any_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])


class Readout(nn.Module):
    """A head that shows what heads read, in the precision of the model: logits are float32."""

    def logits(self, features: Tensor, known: Tensor) -> Tensor:
        return torch.cat([features, known], -1)


def in_precision(model: SequenceModel, dtype: torch.dtype) -> SequenceModel:
    if dtype == torch.float64:
        model = model.double()
        model.head = Readout()  # type: ignore[assignment]
    return model


def draw(model: SequenceModel, batch: int, length: int) -> Tensor:
    return torch.randint(0, model.config.n_outputs, (batch, length))


def by_steps(model: RecurrentModel, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """Logits (B, L, V) of stepping through tokens (B, L), and the state after."""
    logits = []
    for t in range(tokens.shape[1]):
        at_t, state = model.step(tokens[:, t], state)
        logits.append(at_t)
    return torch.stack(logits, 1), state


def assert_same_state(actual: State, expected: State, near: Near, tolerance: float) -> None:
    assert torch.equal(actual.position, expected.position)
    assert torch.equal(actual.history, expected.history)
    for a, b in zip(actual.tensors(), expected.tensors(), strict=True):
        near(a, b, tolerance)


@everywhere
@any_dtype
@pytest.mark.parametrize("length", [1, 5, 6, 7, 29, 70])
@torch.no_grad()
def test_step_and_prefill_match_convolution(
    kind: str, layer: str, dtype: torch.dtype, length: int,
    make_model: MakeModel, assert_near: Near,
):  # fmt: skip
    """Whether or not the strides divide the length, and beyond the l_max of 24."""
    model = in_precision(make_model(kind, layer), dtype)
    tokens = draw(model, 2, length)
    expected, tolerance = model(tokens), TOLERANCES[dtype]
    recurrent = to_recurrent(model)
    logits, stepped = by_steps(recurrent, tokens, recurrent.initial_state(2))
    assert_near(logits, expected, tolerance)
    logits, prefilled = recurrent.prefill(tokens)
    assert_near(logits, expected, tolerance)
    assert_same_state(prefilled, stepped, assert_near, tolerance)


@everywhere
@torch.no_grad()
def test_one_converted_model_reads_and_steps_at_any_rate(
    kind: str, layer: str, make_model: MakeModel, assert_near: Near
):
    model = in_precision(make_model(kind, layer), torch.float64)
    tokens = draw(model, 2, 20)
    recurrent = to_recurrent(model)
    logits, state = recurrent.prefill(tokens[:, :15], rate=0.5)
    for t in range(15, 20):
        last, state = recurrent.step(tokens[:, t], state, 0.5)
        logits = torch.cat([logits, last[:, None]], 1)
    assert_near(logits, model(tokens, 0.5), 1e-6)


@pytest.mark.parametrize("shape", [(2, 100, 192), (1, 1024, 33), (3, 5, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_without_gradients_are_those_with(
    shape: tuple[int, int, int], bias: bool, assert_near: Near
):
    linear, u = Linear(shape[-1], 50, bias=bias), torch.randn(shape)
    expected = linear(u)
    with torch.no_grad():
        assert_near(linear(u), expected, 1e-5)


@everywhere
@torch.no_grad()
def test_steps_go_on_from_a_prompt_of_every_phase(
    kind: str, layer: str, make_model: MakeModel, assert_near: Near
):
    model = in_precision(make_model(kind, layer), torch.float64)
    tokens = draw(model, 2, 2 * PERIOD + 3)
    expected = model(tokens)
    recurrent = to_recurrent(model)
    for length in range(2 * PERIOD + 1):
        logits, state = recurrent.prefill(tokens[:, :length])
        rest, _ = by_steps(recurrent, tokens[:, length:], state)
        assert_near(torch.cat([logits, rest], 1), expected, 1e-9)


@everywhere
@any_dtype
@torch.no_grad()
def test_prefill_in_pieces_of_every_phase_matches_convolution(
    kind: str, layer: str, dtype: torch.dtype, make_model: MakeModel, assert_near: Near
):
    model = in_precision(make_model(kind, layer), dtype)
    tokens = draw(model, 2, 3 * PERIOD + 1)
    expected = model(tokens)
    recurrent = to_recurrent(model)
    for first in range(PERIOD + 1):
        for second in (1, PERIOD):
            pieces, state = [], None
            for piece in tokens.tensor_split([first, first + second], 1):
                logits, state = recurrent.prefill(piece, state)
                pieces.append(logits)
            assert_near(torch.cat(pieces, 1), expected, TOLERANCES[dtype])
    last, after = recurrent.read(tokens)
    assert_near(last, expected[:, -1], TOLERANCES[dtype])
    assert all(map(torch.equal, after.tensors(), recurrent.prefill(tokens)[1].tensors()))


@everywhere
@torch.no_grad()
def test_logits_depend_on_no_later_token(kind: str, layer: str, make_model: MakeModel):
    model = make_model(kind, layer).double()
    tokens = draw(model, 1, 4 * PERIOD)
    before = model(tokens)
    for t in range(4 * PERIOD):
        changed = tokens.clone()
        changed[:, t] = (tokens[:, t] + 7) % model.config.n_outputs
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=2e-6)
        assert float((after[:, t] - before[:, t]).abs().max()) > 1e-3


@everywhere
@torch.no_grad()
def test_step_gives_a_row_the_same_bits_in_any_company(
    kind: str, layer: str, make_model: MakeModel
):
    """For widths that fill the vectors of the processor, as those of the recipes do."""
    widths = (32,) if kind == "isotropic" else (32, 64, 32)
    recurrent = to_recurrent(make_model(kind, layer, d_model=widths, d_state=16))
    tokens = torch.randint(0, recurrent.config.n_outputs, (5, 2 * PERIOD + 1))
    together, _ = by_steps(recurrent, tokens, recurrent.initial_state(5))
    for row in range(5):
        alone, _ = by_steps(recurrent, tokens[row : row + 1], recurrent.initial_state(1))
        assert torch.equal(alone[0], together[row])


@everywhere
@torch.no_grad()
def test_state_does_not_grow(kind: str, layer: str, make_model: MakeModel):
    recurrent = to_recurrent(make_model(kind, layer))
    state = recurrent.initial_state(2)
    shapes = [(t.shape, t.dtype) for t in state.tensors()]
    for length in (1, 10, 40):
        tokens = torch.randint(0, recurrent.config.n_outputs, (2, length))
        for after in (recurrent.prefill(tokens)[1], by_steps(recurrent, tokens, state)[1]):
            assert int(after.position) == length
            assert [(t.shape, t.dtype) for t in after.tensors()] == shapes


@everywhere
@torch.no_grad()
def test_rows_of_a_state_can_be_repeated_dropped_and_reordered(
    kind: str, layer: str, make_model: MakeModel
):
    recurrent = to_recurrent(make_model(kind, layer))
    prompt = torch.randint(0, recurrent.config.n_outputs, (3, PERIOD + 1))
    _, state = by_steps(recurrent, prompt, recurrent.initial_state(3))
    rows = torch.tensor([2, 0, 0])
    token = torch.tensor([4, 4, 5])
    logits, after = recurrent.step(token, state.rows(rows))
    assert int(after.position) == PERIOD + 2
    for i, row in enumerate(rows.tolist()):
        _, alone = by_steps(recurrent, prompt[row : row + 1], recurrent.initial_state(1))
        expected, _ = recurrent.step(token[i : i + 1], alone)
        torch.testing.assert_close(logits[i], expected[0])


def test_arguments_may_be_named_in_any_order(make_model: MakeModel):
    recurrent = to_recurrent(make_model("image"))
    state, tokens = recurrent.initial_state(2), torch.tensor([[1, 2], [3, 4]])
    expected, after = recurrent.prefill(tokens, state)
    assert torch.equal(recurrent.prefill(state=state, tokens=tokens)[0], expected)
    stepped, _ = recurrent.step(rate=1.0, state=after, token=tokens[:, 0])
    assert torch.equal(stepped, recurrent.step(tokens[:, 0], after)[0])


@torch.no_grad()
def test_a_step_leaves_the_state_it_was_given_unchanged(make_model: MakeModel):
    recurrent = to_recurrent(make_model("image"))
    _, state = recurrent.prefill(torch.randint(0, 256, (2, 5)))
    copies = [t.clone() for t in state.tensors()]
    recurrent.step(torch.tensor([1, 2]), state)
    recurrent.prefill(torch.tensor([[1, 2, 3], [4, 5, 6]]), state)
    assert all(map(torch.equal, state.tensors(), copies))


@torch.no_grad()
def test_converted_model_no_longer_follows_the_trained_one(make_model: MakeModel):
    model = make_model("pooled")
    recurrent = to_recurrent(model)
    tokens = draw(model, 1, 9)
    before, _ = by_steps(recurrent, tokens, recurrent.initial_state(1))
    for parameter in model.parameters():
        parameter.add_(1)
    after, _ = by_steps(recurrent, tokens, recurrent.initial_state(1))
    assert torch.equal(before, after)
    assert not any(p.requires_grad for p in recurrent.parameters())


@everywhere
def test_log_prob_is_the_log_softmax_at_the_target(
    kind: str, layer: str, make_model: MakeModel, assert_near: Near
):
    model = make_model(kind, layer)
    tokens = draw(model, 3, 40)
    log_p = torch.log_softmax(model(tokens)[:, :-1], -1)
    expected = log_p.gather(-1, tokens[:, 1:, None])[..., 0]
    assert_near(model.log_prob(tokens), expected, 1e-5)


@pytest.mark.parametrize("kind", ["isotropic", "image"])
def test_log_prob_has_the_gradient_of_the_log_softmax(
    kind: str, make_model: MakeModel, assert_near: Near
):
    model = make_model(kind)
    tokens = draw(model, 3, 200)  # the softmax head works in slices of 512 targets
    weights = torch.randn(3, 199)
    parameters = list(model.parameters())
    fast = torch.autograd.grad((model.log_prob(tokens) * weights).sum(), parameters)
    log_p = torch.log_softmax(model(tokens[:, :-1]), -1)
    naive = (log_p.gather(-1, tokens[:, 1:, None])[..., 0] * weights).sum()
    for actual, expected in zip(fast, torch.autograd.grad(naive, parameters), strict=True):
        assert_near(actual, expected, 1e-3)


@pytest.mark.parametrize("kind", ["isotropic", "pooled", "image"])
def test_bfloat16_autocast_gives_a_finite_loss_near_that_of_float32(
    kind: str, make_model: MakeModel
):
    model = make_model(kind)
    tokens = draw(model, 2, 30)
    with torch.autocast("cpu", torch.bfloat16):
        log_p = model.log_prob(tokens)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p, model.log_prob(tokens), rtol=0.05, atol=0.1)
    log_p.mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_autocast_leaves_the_linear_prediction_exact(make_model: MakeModel):
    """A bin is 2/255 wide; bfloat16 knows no more of numbers near 1."""
    model = make_model("image")
    tokens = draw(model, 2, 30)
    _, prediction = model.features(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.features(tokens)[1], prediction)


@pytest.mark.parametrize("kind", ["isotropic", "image"])
def test_models_in_float64_predict_in_float64(kind: str, make_model: MakeModel):
    model = make_model(kind).double()
    tokens = draw(model, 2, 30)
    assert model(tokens).dtype == model.log_prob(tokens).dtype == torch.float64
    logits, _ = to_recurrent(model).prefill(tokens)
    assert float((logits - model(tokens)).detach().abs().max()) < 1e-9


def test_taps_reach_the_highest_of_few_values(make_model: MakeModel):
    model = make_model("isotropic", taps=(1, 3))
    values = model.inputs.values(torch.tensor([0, 19, 20, 22, -1]))
    assert values.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0]


# How far the means lie and how wide the logistics are: narrower than a bin to wider than [-1, 1].
@pytest.mark.parametrize("mean", [0.0, 0.5, -1.0, 30.0, -1e4])
@pytest.mark.parametrize("log_scale", [-100.0, -4.5, 0.0, 3.0, 20.0, 100.0])
@pytest.mark.parametrize("n_outputs", [2, 256, 257])
def test_logistic_probabilities_sum_to_one(n_outputs: int, mean: float, log_scale: float):
    head = Logistics(4, n_outputs, 0)
    with torch.no_grad():
        head.linear.bias[2 * head.mixtures :] = log_scale
        logits = head.logits(torch.randn(3, 4), torch.full((3, 1), mean))
    assert logits.shape == (3, n_outputs)
    assert not bool(logits.isnan().any())
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(3), rtol=0, atol=2e-5)


@pytest.mark.parametrize("log_scale", [-100.0, 0.0, 20.0])
def test_logistic_likelihood_has_finite_gradients(log_scale: float, make_model: MakeModel):
    model = make_model("image")
    assert isinstance(model.head, Logistics)
    with torch.no_grad():
        model.head.linear.bias[2 * Logistics.mixtures :] = log_scale
    model.log_prob(torch.tensor([[256, 0, 255, 128, 0, 0, 255, 255]])).sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_logistic_mass_is_the_integral_over_the_bin():
    head = Logistics(4, 256, 0).double()
    features, prediction = torch.zeros(1, 4).double(), torch.tensor([[0.1]]).double()
    with torch.no_grad():
        head.linear.bias.add_(torch.randn_like(head.linear.bias), alpha=0.3)
        weight, offset, log_scale = head.linear.bias.chunk(3)
        edges = (torch.arange(257).double() - 0.5) / 127.5 - 1
        edges[0], edges[-1] = -torch.inf, torch.inf
        scale = torch.exp(log_scale - 2.5)
        cumulative = torch.sigmoid((edges[:, None] - 0.1 - 0.3 * offset) / scale)
        expected = (cumulative.diff(dim=0) * weight.softmax(-1)).sum(-1)
        actual = head.logits(features, prediction)[0].exp()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-9)


def test_prediction_at_t_is_of_the_token_after_t():
    """A model shown a cycle learns to name the next element, not the one just read."""
    config = ModelConfig(vocab_size=6, n_outputs=5, d_model=(16,), n_layers=(1,), d_state=8)
    model = SequenceModel(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    tokens = torch.tensor([3, 1, 4, 0, 2] * 5)[None]
    for _ in range(40):
        optimizer.zero_grad()
        loss = -model.log_prob(tokens).mean()
        loss.backward()
        optimizer.step()
    assert model(tokens).argmax(-1)[0, 5:-1].tolist() == tokens[0, 6:].tolist()
    recurrent = to_recurrent(model)
    logits, state = recurrent.prefill(tokens[:, :10])
    written = []
    for _ in range(10):
        logits, state = recurrent.step(logits.view(-1, 5)[-1:].argmax(-1), state)
        written.append(int(logits.argmax()))
    assert written == [1, 4, 0, 2, 3, 1, 4, 0, 2, 3]


@pytest.mark.parametrize("kind", ["isotropic", "pooled", "image"])
@pytest.mark.parametrize("layer", ["s4", "s4d"])
def test_parameter_groups_are_a_partition_of_the_parameters(
    kind: str, layer: str, make_model: MakeModel
):
    model = make_model(kind, layer)
    groups = model.parameter_groups()
    grouped = [id(p) for group in groups.values() for p in group]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    spaces = [m for m in model.modules() if isinstance(m, StateSpace)]
    assert len(groups["dynamics"]) == sum(len(m.dynamics) for m in spaces)
    hidden = [m for m in model.stack.modules() if isinstance(m, Linear)]
    assert {id(p) for p in groups["matrices"]} == {id(m.weight) for m in hidden}
    assert all(p.dim() == 2 for p in groups["matrices"])


def silent_inputs(model: SequenceModel) -> Inputs:
    """The inputs of a model with all parameters set to zero."""
    for parameter in model.inputs.parameters():
        parameter.zero_()
    return model.inputs


@torch.no_grad()
def test_a_tap_reads_the_value_so_many_before_the_target(make_model: MakeModel):
    inputs = silent_inputs(make_model("image", conditioned=False))
    assert inputs.taps is not None
    taps = inputs.config.taps
    for j in range(len(taps)):
        inputs.taps.weight[:, j, j] = 1  # feature j is tap j
    tokens = torch.tensor([[258, *range(10, 250, 12)]])  # a label, then values
    features, _ = inputs(F.pad(tokens, (inputs.reach, 0), value=-1), 0, tokens[:, :0])
    for t in range(tokens.shape[1]):
        for j, k in enumerate(taps):
            source = t + 1 - k  # the target stands at t + 1
            value = float(tokens[0, source]) / 127.5 - 1 if source >= 1 else 0.0
            assert float(features[0, t, j]) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("position", [0, 10])
@torch.no_grad()
def test_image_positions_are_those_of_the_target(position: int, make_model: MakeModel):
    inputs = silent_inputs(make_model("image", conditioned=False))
    shape = inputs.config.image_shape
    assert shape is not None
    for axis, table in enumerate(inputs.positions):
        table[:, axis] = torch.arange(shape[axis]).float()  # feature j is the index on axis j
    window = torch.zeros(1, inputs.reach + 20, dtype=torch.int64)
    features, _ = inputs(window, position, window[:, :0])
    for t in range(20):  # position 0 reads the start and predicts the first value
        expected = np.unravel_index(position + t, shape)
        assert features[0, t, :3].tolist() == list(expected)


@torch.no_grad()
def test_weights_of_taps_go_with_the_channel_of_the_target(make_model: MakeModel):
    inputs = silent_inputs(make_model("image", conditioned=False))
    assert inputs.taps is not None
    inputs.taps.weight[:, 0, 0] = torch.tensor([1.0, 2.0, 3.0])  # tap 1 by channel
    window = torch.full((1, inputs.reach + 12), 255)
    for position in range(4):
        features, _ = inputs(window, position, window[:, :0])
        expected = [1.0 + (position + t) % 3 for t in range(12)]
        assert features[0, :, 0].tolist() == expected


@torch.no_grad()
def test_logistic_means_follow_the_prediction_of_their_channel(make_model: MakeModel):
    inputs = silent_inputs(make_model("image", conditioned=False))
    assert inputs.prediction is not None
    near = inputs.config.taps.index(3)  # the same channel of the pixel before
    inputs.prediction.weight[:, 0, near] = 1
    tokens = torch.tensor([[256, 10, 20, 30, 40, 50, 60]])
    window = F.pad(tokens, (inputs.reach, 0), value=-1)
    _, prediction = inputs(window, 0, window[:, :0])
    assert prediction is not None
    expected = [0.0, 0.0, 0.0, *(v / 127.5 - 1 for v in (10, 20, 30, 40))]
    assert prediction[0, :, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_start_tokens_and_labels_are_read_as_tokens_but_not_as_values(make_model: MakeModel):
    model = make_model("image")
    ids = torch.tensor([[0, 255, 256, 258, -1]])
    assert model.inputs.values(ids).tolist() == [[-1.0, 1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("length", [0, 1])
@torch.no_grad()
def test_the_shortest_sequences_are_no_exception(length: int, make_model: MakeModel):
    for kind in ("isotropic", "pooled", "image"):
        model = make_model(kind)
        tokens = draw(model, 2, length)
        assert model(tokens).shape == (2, length, model.config.n_outputs)
        logits, state = to_recurrent(model).prefill(tokens)
        assert logits.shape == (2, length, model.config.n_outputs)
        assert int(state.position) == length
        assert model.log_prob(draw(model, 2, 1)).shape == (2, 0)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[0, 23]]), r"0 … 22, got 0 … 23"),
        (torch.tensor([[-1, 3]]), r"0 … 22, got -1 … 3"),
        (torch.tensor([1, 2]), r"integers of shape \(B, L\), got \(2,\) torch.int64"),
        (torch.tensor([[0.5]]), r"integers of shape \(B, L\), got \(1, 1\) torch.float32"),
    ],
)
def test_tokens_out_of_range_are_refused(tokens: Tensor, message: str, make_model: MakeModel):
    model = make_model("isotropic")
    for read in (model, to_recurrent(model).prefill):
        with pytest.raises(ValueError, match=message):
            read(tokens)


@pytest.mark.parametrize("token", [23, -1])
def test_steps_refuse_what_is_no_token(token: int, make_model: MakeModel):
    recurrent = to_recurrent(make_model("isotropic"))
    with pytest.raises(ValueError, match="token ids must lie in 0 … 22"):
        recurrent.step(torch.tensor([token]), recurrent.initial_state(1))


def test_readings_refuse_what_does_not_fit(make_model: MakeModel):
    recurrent = to_recurrent(make_model("isotropic"))
    with pytest.raises(ValueError, match="at least one token"):
        recurrent.read(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="state is of 2 sequences, the tokens are of 3"):
        recurrent.prefill(torch.zeros(3, 4, dtype=torch.int64), recurrent.initial_state(2))


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"n_outputs": 0}, "1 <= n_outputs"),
        ({"n_outputs": 11}, "n_outputs <= vocab_size"),
        ({"d_model": ()}, "one entry a level"),
        ({"d_model": (8, 8)}, "one entry a level"),
        ({"n_layers": (1, 1)}, "one entry a level"),
        ({"pools": (2,)}, "one entry a level"),
        ({"d_model": (0,)}, "every d_model >= 1"),
        ({"n_layers": (-1,)}, "every n_layers >= 0"),
        ({"d_model": (8, 8), "n_layers": (1, 1), "pools": (1,)}, "every pool >= 2"),
        ({"layer_settings": {"bidirectional": True}}, "layer_settings must not hold bidirectional"),
        ({"layer_settings": {1: 2}}, "layer_settings must be dict"),
        ({"layer": "lstm"}, r"layer is one of lssl, s4, .*s4d-real"),
        ({"head": "gauss"}, "head is one of softmax, logistics"),
        ({"d_state": 7}, "d_state is 2, 4"),
        ({"d_state": 0}, "d_state is 2, 4"),
        ({"l_max": 0}, "l_max >= 1"),
        ({"dt_min": 0.0}, "0 < dt_min"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "dt_min <= dt_max"),
        ({"expand": 0}, "expand >= 1"),
        ({"dropout": 1.0}, "dropout < 1"),
        ({"taps": (1, 0)}, "every tap >= 1"),
        ({"taps": (10**30,)}, "every tap <= 2"),
        ({"recall": (2000,)}, "every order of recall <= 2"),
        ({"recall": (1, 2, 3, 4, 5), "recall_slots": 2**20}, "orders × recall_slots <= 2"),
        ({"dt_max": 10**400}, "dt_max <= 10"),
        ({"l_max": 2**40}, "l_max <= 2"),
        ({"token_taps": (0,)}, "every tap >= 1"),
        ({"recall": (0,)}, "every order of recall >= 1"),
        ({"recall": (1,), "recall_slots": 24}, "recall_slots is 16, 32"),
        ({"head": "logistics"}, "the logistics head needs taps"),
        ({"head": "logistics", "recall": (1,)}, "recall is for the softmax head"),
        ({"image_shape": (4, 4)}, "image_shape"),
        ({"image_shape": (4, 4, 0)}, "image_shape"),
    ],
)
def test_config_refuses_what_no_model_can_have(settings: dict[str, Any], rule: str):
    with pytest.raises(ValueError, match=rule):
        ModelConfig(
            **{"vocab_size": 10, "n_outputs": 10, "d_model": (8,), "n_layers": (1,)} | settings
        )


@pytest.mark.parametrize(
    "settings", [{"d_model": 64}, {"d_state": "32"}, {"taps": 3}, {"dropout": "no"}]
)
def test_config_refuses_values_of_the_wrong_type(settings: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ModelConfig(vocab_size=10, n_outputs=10, **settings)


def test_config_survives_json(make_model: MakeModel):
    import json

    config = make_model("image").config
    assert ModelConfig(**json.loads(json.dumps(asdict(config)))) == config
    assert config.period == PERIOD
    assert config.channels == 3


@pytest.mark.parametrize("size", [14, 1 << 19])
def test_log_probabilities_have_the_right_gradients(size: int, monkeypatch: pytest.MonkeyPatch):
    """In slices of two rows, and in one."""
    monkeypatch.setattr(_LinearLogProb, "size", size)
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 3), (7, 3), (7,))
    )
    target = torch.randint(0, 7, (5,))
    recalled = torch.tensor([[NOTHING, 3], [2, 2], [NOTHING, NOTHING], [int(target[3]), 0], [1, 6]])
    strength = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    actual = _LinearLogProb.apply(x, weight, bias, target, recalled, strength)
    logits = x @ weight.mT + bias
    for row, k in (recalled != NOTHING).nonzero().tolist():
        logits = logits + strength[row, k] * F.one_hot(recalled[row, k], 7) * F.one_hot(
            torch.tensor(row), 5
        ).unsqueeze(-1)
    torch.testing.assert_close(actual, torch.log_softmax(logits, -1)[torch.arange(5), target])
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, strength: _LinearLogProb.apply(
            x, weight, bias, target, recalled, strength
        ),
        (x, weight, bias, strength),
    )


@torch.no_grad()
@pytest.mark.parametrize("rate", [1.0, 0.5, 0.7])
def test_a_conditioned_model_reads_its_opening_at_every_position(
    rate: float, make_model: MakeModel
) -> None:
    inputs = make_model("pooled").inputs
    plain = make_model("pooled", conditioned=False, opening=0, durations=()).inputs
    own = plain.state_dict().keys()
    plain.load_state_dict({n: p for n, p in inputs.state_dict().items() if n in own})
    # Labels are 21, 22; 17, 18, 19 are the durations 5, 9, 14; of 20, "any", it is open. The level
    # is any other token.
    first = torch.tensor([[21, 18, 3], [22, 17, 20], [22, 20, 4]])
    window = torch.cat([first, torch.randint(0, 17, (3, 9))], 1)
    assert inputs.condition is not None
    assert inputs.progress is not None
    features = inputs(window, 0, first, rate)[0]
    for t in range(12):
        expected = plain(window, 0, window[:, :0])[0][:, t]
        expected = expected + inputs.condition.weight[first[:, : t + 1]].sum(1)
        passed = max(0, t - 2)  # samples before the one that is predicted
        rows = [min(PARTS, int(passed * rate * PARTS / n)) for n in (9, 5)]
        if t >= 1:
            expected = expected + inputs.progress.table[[*rows, PARTS + 1]]
        torch.testing.assert_close(features[:, t], expected)


@torch.no_grad()
@pytest.mark.parametrize("rate", [1.0, 0.7])
def test_an_opening_is_heard_from_where_it_is_read(rate: float, make_model: MakeModel) -> None:
    model = make_model("pooled")
    tokens = torch.randint(0, 17, (1, 12))
    tokens[0, :3] = torch.tensor([21, 17, 3])
    for column, other in ((1, 19), (2, 5)):
        changed = tokens.clone()
        changed[0, column] = other
        differs = (model(tokens, rate) - model(changed, rate)).abs().amax(-1)[0] > 1e-4
        assert differs.tolist() == [False] * column + [True] * (12 - column)
    recurrent, stepped = to_recurrent(model, rate), []
    state = recurrent.initial_state(1)
    for t in range(12):
        logits, state = recurrent.step(tokens[:, t], state)
        stepped.append(logits)
    torch.testing.assert_close(torch.stack(stepped, 1), model(tokens, rate), rtol=1e-4, atol=1e-5)
    remembered, _ = recurrent.remembered(tokens)
    assert torch.equal(remembered, state.history)


@torch.no_grad()
def test_a_foretold_opening_is_read_whatever_comes(make_model: MakeModel) -> None:
    model = to_recurrent(make_model("pooled"))
    told, expected = torch.tensor([[18, 3, 5, 6, 18]]), torch.tensor([[20, 20, 5, 6, 18]])
    _, state = model.prefill(torch.tensor([[21]]))
    foretold = model.foretold(state, 20)
    wanted, after = model.prefill(expected, state)
    logits, state = model.prefill(told, foretold)
    assert torch.equal(logits, wanted)
    assert all(map(torch.equal, state.tensors(), after.tensors()))
    for t in range(5):
        logits, foretold = model.step(told[:, t], foretold)
        torch.testing.assert_close(logits, wanted[:, t])
    assert torch.equal(model.foretold(after, 20).history, after.history)  # nothing is left to tell


@torch.no_grad()
@pytest.mark.parametrize(
    "added", [{"conditioned": True}, {"token_taps": (2, 3)}, {"recall": (1, 2)}]
)
def test_a_new_input_changes_nothing(added: dict[str, Any]):
    """So that a model trained without can go on with it."""
    settings = {"vocab_size": 23, "n_outputs": 20, "d_model": (8,), "n_layers": (1,)}
    plain = SequenceModel(ModelConfig(**settings))
    richer = SequenceModel(ModelConfig(**settings, **added))
    richer.load_state_dict(plain.state_dict(), strict=False)
    tokens = torch.randint(0, 20, (2, 9))
    assert torch.equal(plain(tokens), richer(tokens))


@torch.no_grad()
def test_taps_of_tokens_add_a_row_for_each_earlier_token(make_model: MakeModel):
    inputs = make_model("isotropic").inputs
    assert inputs.config.token_taps == (2, 4)
    tokens = torch.randint(0, 20, (2, 7))
    window = F.pad(tokens, (inputs.reach, 0), value=NOTHING)
    for t in range(7):
        expected = inputs.embedding.weight[tokens[:, t]]
        if t >= 1:
            expected = expected + inputs.token_taps[0][tokens[:, t - 1]]
        if t >= 3:
            expected = expected + inputs.token_taps[1][tokens[:, t - 3]]
        torch.testing.assert_close(inputs(window, 0, window[:, :0])[0][:, t], expected)


def test_dropout_is_of_training_alone(make_model: MakeModel):
    model, tokens = make_model("isotropic", dropout=0.5), torch.randint(0, 20, (2, 9))
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_the_intervals_begin_in_the_range_of_the_config(make_model: MakeModel):
    config = replace(make_model("pooled").config, dt_min=0.5, dt_max=0.6)
    found = [p.exp() for n, p in SequenceModel(config).named_parameters() if n.endswith("log_dt")]
    assert len(found) == sum(config.n_layers)
    assert all(bool(((dt >= 0.5 - 1e-6) & (dt <= 0.6 + 1e-6)).all()) for dt in found)
