"""The sampling loop."""

import math
import re
from collections.abc import Callable

import pytest
import torch

from genssm import engine
from genssm.conversion import to_recurrent
from genssm.engine import Generation, begin, read
from genssm.finite import NotFiniteError
from genssm.model import RecurrentModel, SequenceModel
from genssm.sampling import RandomStream, SamplingConfig, draw, probabilities
from genssm.stepper import choose
from genssm.threads import torch_threads

MakeModel = Callable[..., SequenceModel]
PROMPT = torch.tensor([20, 3, 1, 4])
WIDTHS = {"isotropic": (32,), "pooled": (32, 32, 64)}  # whole vectors: see Generation


def started(
    model: RecurrentModel, config: SamplingConfig, *, seed: int, indices: range
) -> Generation:
    return Generation(model, read(model, PROMPT), config, seed=seed, indices=indices)


def drawn(generation: Generation, steps: int) -> dict[int, list[tuple[int, float]]]:
    """Tokens and bits by sample."""
    result: dict[int, list[tuple[int, float]]] = {}
    for _ in range(steps):
        for d in generation.step():
            result.setdefault(d.sample, []).append((d.token, d.bits))
    return result


@pytest.mark.parametrize("kind", ["isotropic", "pooled"])
def test_generation_equals_drawing_from_the_whole_convolution(
    make_model: MakeModel, kind: str
) -> None:
    model = make_model(kind)
    config = SamplingConfig(temperature=0.9, top_k=15)
    generation = started(to_recurrent(model), config, seed=5, indices=range(1))
    tokens = PROMPT.tolist()
    stream = RandomStream(5, 0)
    for token, bits in drawn(generation, 30)[0]:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[:, -1]
        uniform = torch.tensor([stream.next()], dtype=torch.float64)
        assert token == int(draw(probabilities(logits, config), uniform))
        expected = -float(logits.log_softmax(-1)[0, token]) / math.log(2)
        assert bits == pytest.approx(expected, abs=1e-3)
        tokens.append(token)


@pytest.mark.parametrize("kind", ["isotropic", "pooled"])
def test_samples_do_not_depend_on_their_company(make_model: MakeModel, kind: str) -> None:
    recurrent = to_recurrent(make_model(kind, d_model=WIDTHS[kind]))
    config = SamplingConfig(repetition_penalty=1.3)
    together = drawn(started(recurrent, config, seed=1, indices=range(5)), 25)
    for i in range(5):
        alone = started(recurrent, config, seed=1, indices=range(i, i + 1))
        assert drawn(alone, 25)[0] == together[i]
    assert len({tuple(tokens) for tokens in together.values()}) == 5


def test_finished_samples_leave_without_a_trace(make_model: MakeModel) -> None:
    recurrent = to_recurrent(make_model("pooled", d_model=WIDTHS["pooled"]))

    def start() -> Generation:
        return started(recurrent, SamplingConfig(), seed=2, indices=range(3))

    complete = drawn(start(), 20)
    generation = start()
    first = drawn(generation, 7)
    generation.finish({1})
    rest = drawn(generation, 13)
    assert generation.active == [0, 2]
    assert 1 not in rest
    for i in (0, 2):
        assert first[i] + rest[i] == complete[i]
    generation.finish({0, 2})
    assert generation.step() == []


@pytest.mark.parametrize("weights", ["eager", "fp32"])
def test_samples_leave_with_what_they_have_said(weights: str, make_model: MakeModel) -> None:
    """A repetition penalty goes by a sample's own tokens, also when others have left."""
    recurrent = to_recurrent(make_model("isotropic", d_model=(32,)))
    engine, kind = ("eager", "fp32") if weights == "eager" else ("cpu", weights)
    stepper, start = choose(recurrent, engine, kind), read(recurrent, PROMPT)
    config = SamplingConfig(repetition_penalty=5.0)
    complete = drawn(begin(stepper, start, config, seed=2, indices=range(3)), 40)
    generation = begin(stepper, start, config, seed=2, indices=range(3))
    first = drawn(generation, 9)
    generation.finish({0})
    rest = drawn(generation, 31)
    for i in (1, 2):
        assert first[i] + rest[i] == complete[i]


@pytest.mark.parametrize("weights", ["eager", "fp32"])
def test_the_start_of_a_text_is_no_repeated_end(weights: str, make_model: MakeModel) -> None:
    recurrent = to_recurrent(make_model("isotropic"))
    engine, kind = ("eager", "fp32") if weights == "eager" else ("cpu", weights)
    start = read(recurrent, torch.tensor([19, 3]))
    start.logits[:] = 0
    start.logits[:, [5, 19]] = torch.tensor([30.0, 40.0])
    generation = begin(
        choose(recurrent, engine, kind), start,
        SamplingConfig(temperature=0, repetition_penalty=10), seed=0, indices=[0],
    )  # fmt: skip
    assert generation.step()[0].token == 19


def test_guided_samples_leave_without_a_trace(make_model: MakeModel) -> None:
    recurrent = to_recurrent(make_model("pooled", d_model=WIDTHS["pooled"]))
    streams = [read(recurrent, PROMPT), read(recurrent, torch.tensor([21, 3, 1, 4]))]

    def start() -> Generation:
        return Generation(
            recurrent, streams[0], SamplingConfig(), seed=2, indices=range(3),
            guide=streams[1], guidance=2.0,
        )  # fmt: skip

    complete = drawn(start(), 20)
    generation = start()
    first = drawn(generation, 7)
    generation.finish({1})
    rest = drawn(generation, 13)
    for i in (0, 2):
        assert first[i] + rest[i] == complete[i]
    snapshot = generation.snapshot()
    assert snapshot.samples == (0, 2)
    assert [len(t) for t in snapshot.state.tensors()[1:]] == [2] * (
        len(snapshot.state.tensors()) - 1
    )


def test_a_prompt_read_in_pieces_gives_the_same_logits(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    recurrent = to_recurrent(make_model("pooled"))
    prompt = torch.randint(0, 20, (41,))
    whole = read(recurrent, prompt)
    monkeypatch.setattr(engine, "PIECE", 7)
    pieces = read(recurrent, prompt)
    torch.testing.assert_close(pieces.logits, whole.logits)
    assert int(pieces.state.position) == 41
    continued = read(recurrent, prompt[20:], read(recurrent, prompt[:20]))
    torch.testing.assert_close(continued.logits, whole.logits)
    torch.testing.assert_close(continued.tokens, prompt)


def test_threads_change_no_bit_of_a_prompt(make_model: MakeModel) -> None:
    recurrent = to_recurrent(make_model("pooled", d_model=WIDTHS["pooled"]))
    prompt = torch.randint(0, 20, (3 * engine.SHORT,))
    readings = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            readings.append(read(recurrent, prompt))
    for other in readings[1:]:
        assert torch.equal(other.logits, readings[0].logits)
        assert all(map(torch.equal, other.state.tensors(), readings[0].state.tensors()))


def test_an_empty_prompt_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match="start token"):
        read(to_recurrent(make_model("isotropic")), torch.tensor([], dtype=torch.int64))


def test_stepping_leaves_the_number_of_threads_as_it_was(make_model: MakeModel) -> None:
    before = torch.get_num_threads()
    recurrent = to_recurrent(make_model("isotropic"))
    drawn(started(recurrent, SamplingConfig(), seed=0, indices=range(1)), 2)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("weights", ["eager", "fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stack.layers.1.mixer.up.weight", math.nan),
        ("stack.layers.1.mixer.up.weight", math.inf),
        ("stack.layers.1.mixer.gate.weight", math.nan),
        ("stack.layers.1.mixer.gate.bias", math.nan),
        ("head.linear.weight", math.nan),
        ("head.linear.bias", math.nan),
        ("head.linear.bias", math.inf),
    ],
)
def test_predictions_that_are_no_numbers_name_the_layer(
    name: str, value: float, weights: str, temperature: float, make_model: MakeModel
):
    """One value among many; the prompt is read by a model that is whole."""
    whole, model = make_model("isotropic"), make_model("isotropic")
    with torch.no_grad():
        parameter = model.get_parameter(name)
        parameter.view(-1)[parameter.numel() // 2 + 3] = value  # gates: in the second half
    engine, kind = ("eager", "fp32") if weights == "eager" else ("cpu", weights)
    stepper, start = choose(to_recurrent(model), engine, kind), read(to_recurrent(whole), PROMPT)
    config = SamplingConfig(temperature=temperature)
    generation = begin(stepper, start, config, seed=0, indices=[0])
    with pytest.raises(NotFiniteError, match=re.escape(name)):
        drawn(generation, 6)


@pytest.mark.parametrize("weights", ["eager", "fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("isotropic", "stack.layers.1.ssm"),
        ("pooled", "stack.layers.0.inner.layers.0.inner.layers.0.ssm"),
        ("pooled", "stack.layers.0.inner.layers.1.ssm"),
        ("pooled", "stack.layers.1.ssm"),
    ],
)
def test_states_that_grow_without_bound_name_the_layer(
    kind: str, name: str, weights: str, make_model: MakeModel
) -> None:
    recurrent = to_recurrent(make_model(kind))
    recurrent.get_submodule(name).get_buffer("a").mul_(1e6)
    engine, precision = ("eager", "fp32") if weights == "eager" else ("cpu", weights)
    start = read(to_recurrent(make_model(kind)), PROMPT)
    stepper = choose(recurrent, engine, precision)
    generation = begin(stepper, start, SamplingConfig(), seed=0, indices=[0, 1])
    with pytest.raises(
        NotFiniteError, match=f"without bound, first in {re.escape(name)} or what enters"
    ):
        drawn(generation, 60)


def test_heads_that_overflow_are_told_from_layers(make_model: MakeModel) -> None:
    recurrent = to_recurrent(make_model("isotropic"))
    weight = recurrent.get_submodule("head.linear").get_parameter("weight")
    weight.copy_(3e38 * weight.sign())
    start = read(to_recurrent(make_model("isotropic")), PROMPT)
    generation = begin(recurrent, start, SamplingConfig(), seed=0, indices=[0])
    with pytest.raises(NotFiniteError, match="not what the head makes of them"):
        drawn(generation, 6)


def test_a_snapshot_of_a_guided_sample_is_its_own(make_model: MakeModel) -> None:
    """Not that of the guide, which reads the same tokens without the class."""
    recurrent = to_recurrent(make_model("pooled"))
    own, guide = (read(recurrent, torch.tensor([first, 3, 1, 4])) for first in (21, 20))
    generation = Generation(
        recurrent, own, SamplingConfig(), seed=2, indices=range(2), guide=guide, guidance=2.0
    )
    steps = [generation.step() for _ in range(9)]
    for i in range(2):
        told = torch.tensor([21, 3, 1, 4, *(step[i].token for step in steps)])
        found = generation.snapshot().reading(i, told)
        expected = read(recurrent, told[: int(found.state.position)])
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert len(found.tokens) >= 12
