"""The steps that CUDA graphs replay, against the eager model; most of it without a GPU.

On a CPU the same steps run one by one. What only a GPU can show is marked, and skipped without one.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing import PROMPT, SETTINGS, drawn, tokens_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from typer.testing import CliRunner

from genssm import bulk, cuda, sampling
from genssm.blocks import Linear
from genssm.checkpoint import Checkpoint, save
from genssm.cli import app
from genssm.conversion import to_recurrent
from genssm.cuda import LONGEST, TILE, CapturedModel, Memory, TiledLinear
from genssm.engine import (
    CompiledGeneration,
    Drawn,
    Generation,
    begin,
    draw_ahead,
    read,
)
from genssm.finite import NotFiniteError
from genssm.model import RecurrentModel, SequenceModel, State
from genssm.pipeline import Pipeline
from genssm.provenance import RecipeError
from genssm.request import Request
from genssm.sampling import SamplingConfig
from genssm.scheduler import Scheduler
from genssm.stepper import Stepper, check_choice, choose, describe
from genssm.stepping import Draws

MakeModel = Callable[..., SequenceModel]
AssertNear = Callable[[Tensor, Tensor, float], None]

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: captures CUDA graphs"
)
CPU = torch.device("cpu")
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}  # of logits, over the largest
ARCHITECTURES = {
    "S4D, taps of tokens": ("isotropic", "s4d"),
    "S4 of rank 1": ("isotropic", "s4"),
    "S4 of rank 2": ("isotropic", "s4-legt"),
    "LSSL": ("isotropic", "lssl"),
    "pools of S4D, conditioned": ("pooled", "s4d"),
    "pools of S4, conditioned": ("pooled", "s4"),
    "taps, positions and logistics": ("image", "s4d"),
}


def captured(model: RecurrentModel, weights: str = "fp32") -> CapturedModel:
    return CapturedModel(model, weights, CPU)


def assert_same(samples: list[list[Drawn]], expected: list[list[Drawn]]) -> None:
    """The same tokens; their bits to rounding."""
    assert tokens_of(samples) == tokens_of(expected)
    for sample, other in zip(samples, expected, strict=True):
        assert [d.bits for d in sample] == pytest.approx([d.bits for d in other], abs=1e-3)


def prompts(model: RecurrentModel, batch: int) -> tuple[Tensor, State]:
    """A batch of different random prompts, read up to within a group of the pools."""
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(0, model.config.vocab_size, (batch, 7), generator=generator)
    logits, state = model.prefill(tokens)
    return logits[:, -1], state


def step(
    model: CapturedModel, memory: Memory, config: SamplingConfig, steps: int, seed: int = 0
) -> Tensor:
    """Draw and read tokens (B, steps)."""
    uniforms = np.random.default_rng(seed).random((memory.batch, steps))
    seen = np.zeros((memory.batch, model.config.n_outputs), np.bool_)
    tokens, _ = model.generate(Draws(memory, uniforms, config, seen))
    return torch.from_numpy(tokens)


@pytest.mark.parametrize("weights", TOLERANCE)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_equal_the_eager_ones(
    make_model: MakeModel, assert_near: AssertNear, architecture: str, weights: str
) -> None:
    """Logits and states, one step at a time and many, through every phase of the pools."""
    eager = to_recurrent(make_model(*ARCHITECTURES[architecture]))
    model = captured(eager, weights)
    logits, state = prompts(eager, 3)
    memory = model.load(state, logits)
    assert torch.equal(model.logits(memory), logits)
    for steps in (*[1] * 11, 2 * LONGEST):
        for token in step(model, memory, SamplingConfig(), steps, seed=steps).mT:
            logits, state = eager.step(token, state)
        assert_near(model.logits(memory), logits, TOLERANCE[weights])
        for a, b in zip(model.save(memory).tensors(), state.tensors(), strict=True):
            assert a.dtype == b.dtype
            assert_near(a, b, TOLERANCE[weights])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_equal_the_eager_ones(make_model: MakeModel, architecture: str, batch: int) -> None:
    eager = to_recurrent(make_model(*ARCHITECTURES[architecture]))
    start = read(eager, PROMPT)

    def sampled(stepper: Stepper) -> list[list[Drawn]]:
        indices = range(2, 2 + batch)
        return drawn(begin(stepper, start, SamplingConfig(), seed=7, indices=indices), 100)

    assert_same(sampled(captured(eager)), sampled(eager))


@pytest.mark.parametrize("config", SETTINGS)
def test_every_setting_draws_the_eager_tokens(
    make_model: MakeModel, config: SamplingConfig
) -> None:
    eager = to_recurrent(make_model("pooled"))
    start = read(eager, PROMPT)
    expected, samples = (
        drawn(begin(stepper, start, config, seed=7, indices=range(3)), 45)
        for stepper in (eager, captured(eager))
    )
    assert_same(samples, expected)


def test_every_row_has_settings_of_its_own() -> None:
    """All settings in one batch, on logits of which many are equal."""
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)).mul(8).round() / 4
    numbers = [Draws(None, np.zeros((1, 1)), c, np.zeros((1, 1))).settings for c in SETTINGS]
    rows = cuda.probabilities(
        logits.expand(len(SETTINGS), -1), torch.tensor(numbers, dtype=torch.float64), True
    )
    for row, config in zip(rows, SETTINGS, strict=True):
        torch.testing.assert_close(row[None], sampling.probabilities(logits, config))


@pytest.mark.parametrize("guidance", [-0.5, 0.3, 1.7])
@pytest.mark.parametrize("kind", ["isotropic", "pooled", "image"])
def test_guided_draws_equal_the_eager_ones(
    make_model: MakeModel, kind: str, guidance: float
) -> None:
    eager = to_recurrent(make_model(kind))
    config = SamplingConfig(plausible=0.05, repetition_penalty=1.2, temperature=0.9, top_p=0.95)
    label = eager.config.vocab_size - 1
    streams = [read(eager, torch.tensor([first, 3, 1, 4])) for first in (label, label - 1)]

    def guided(stepper: Stepper) -> Generation | CompiledGeneration:
        return begin(
            stepper, streams[0], config, seed=7, indices=range(3), guide=streams[1],
            guidance=guidance,
        )  # fmt: skip

    expected, generation = drawn(guided(eager), 45), guided(captured(eager))
    first = drawn(generation, 7)
    generation.finish({1})
    rest = drawn(generation, 38)
    assert_same([first[0] + rest[0], first[2] + rest[1]], [expected[0], expected[2]])


def test_draws_guided_by_an_open_stream_equal_the_eager_ones(make_model: MakeModel) -> None:
    eager = to_recurrent(make_model("pooled"))
    own, guide = (read(eager, torch.tensor([start])) for start in (21, 20))
    guide = replace(guide, state=eager.foretold(guide.state, 20))
    settings: dict[str, Any] = {"seed": 7, "indices": range(3), "guide": guide, "guidance": 2.0}
    expected, actual = (
        drawn(begin(stepper, own, SamplingConfig(), **settings), 30)
        for stepper in (eager, captured(eager))
    )
    assert_same(actual, expected)


@pytest.mark.parametrize("kind", ["isotropic", "pooled", "image"])
def test_generations_that_share_a_batch_draw_what_they_would_alone(
    make_model: MakeModel, kind: str
) -> None:
    """Of other prompts, positions, settings, seeds and counts, one of them guided."""
    model = captured(to_recurrent(make_model(kind)))
    period, label = model.config.period, model.config.vocab_size - 1
    texts = [torch.randint(0, 20, (3 + i * period,)) for i in range(4)]

    def start(i: int) -> CompiledGeneration:
        guide = read(model, torch.cat([torch.tensor([label]), texts[i][1:]]))
        generation = begin(
            model, read(model, texts[i]), SETTINGS[i + 3], seed=i, indices=range(1 + i % 3),
            guide=guide if i == 2 else None, guidance=1.5 if i == 2 else 1.0,
        )  # fmt: skip
        assert isinstance(generation, CompiledGeneration)
        return generation

    expected = [drawn(start(i), 63) for i in range(4)]
    generations = [start(i) for i in range(4)]
    results: list[list[list[Drawn]]] = [[] for _ in generations]
    for _ in range(5):
        draw_ahead(generations)
        for generation, steps in zip(generations, results, strict=True):
            steps += [generation.step() for _ in range(generation.ahead)]
    for i, steps in enumerate(results):
        assert len(steps) > 25
        assert_same(
            [list(sample) for sample in zip(*steps, strict=True)],
            [sample[: len(steps)] for sample in expected[i]],
        )


def assert_company_does_not_matter(model: CapturedModel) -> None:
    """Rows among more than a tile of others come out as in smaller batches, to the last bit."""
    logits, state = prompts(model.model, TILE + 3)
    everyone = model.load(state, logits)
    step(model, everyone, SamplingConfig(), 10)
    for batch in (1, 3):
        memory = model.load(state.rows(torch.arange(batch)), logits[:batch])
        step(model, memory, SamplingConfig(), 10)
        for a, b in zip(memory.tensors, everyone.tensors, strict=True):
            assert torch.equal(a, b[:batch])


@pytest.mark.parametrize("weights", TOLERANCE)
@pytest.mark.parametrize("kind", ["isotropic", "pooled", "image"])
def test_a_row_does_not_depend_on_its_company(
    make_model: MakeModel, kind: str, weights: str
) -> None:
    """To the last bit, for widths of whole vectors, in less and more than a tile."""
    widths = (32, 32, 64)[: 1 if kind == "isotropic" else 3]
    model = captured(to_recurrent(make_model(kind, d_model=widths)), weights)
    assert_company_does_not_matter(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_go_back_and_forth(make_model: MakeModel, architecture: str) -> None:
    model = captured(to_recurrent(make_model(*ARCHITECTURES[architecture])))
    logits, state = prompts(model.model, 4)
    memory = model.load(state, logits)
    for a, b in zip(model.save(memory).tensors(), state.tensors(), strict=True):
        assert torch.equal(a, b)
    parts = [model.rows([memory], rows) for rows in ([0, 1], [2, 3])]
    some = model.save(model.rows(parts, [3, 1]))
    for a, b in zip(some.tensors(), state.rows(torch.tensor([3, 1])).tensors(), strict=True):
        assert torch.equal(a, b)
    before = [tensor.clone() for tensor in state.tensors()]
    step(model, memory, SamplingConfig(), 3)
    assert all(map(torch.equal, state.tensors(), before))  # a memory is a copy


def test_memory_stays_in_place_and_does_not_grow(make_model: MakeModel) -> None:
    """One board for batches that differ a little, a graph a phase, one of whole periods."""
    model = captured(to_recurrent(make_model("pooled")))
    period, places = model.config.period, set()
    for batch in (3, 4, 3):
        logits, state = prompts(model.model, batch)
        memory = model.load(state, logits)
        for steps in (1, 2, LONGEST, 3 * LONGEST + 1):
            step(model, memory, SamplingConfig(), steps)
            (board,) = model._boards.values()
            places.add(tuple(tensor.data_ptr() for tensor in board.tensors))
    assert len(places) == 1
    whole = LONGEST // period * period
    singles = {(phase, 1, False) for phase in range(period)}
    assert set(board.steps) == singles | {(0, whole, False)}


def test_long_periods_are_stepped_one_by_one(make_model: MakeModel) -> None:
    model = captured(to_recurrent(make_model("pooled", pools=(5, 7))))
    assert list(model._pieces(33, 4)) == [(33, 1), (34, 1), (0, 1), (1, 1)]


def to_fake_gpu(module: nn.Module) -> None:
    """Parameters and buffers become tensors without content on a GPU that need not be there."""
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(parameter.to("cuda"), requires_grad=False))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to("cuda"))
    for child in module.children():
        to_fake_gpu(child)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_wait_for_nothing_and_stay_on_the_device(
    make_model: MakeModel, architecture: str
) -> None:
    """Traced without values: a step that asked for one, or left the device, would raise."""
    model = captured(to_recurrent(make_model(*ARCHITECTURES[architecture])), "bf16")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        to_fake_gpu(model._net)
        model.device = torch.device("cuda")
        board = model._board(2)
        for filtered in (False, True):
            model._advance(board, 1, model.config.period, filtered)  # every phase, across the last
        assert {tensor.device.type for tensor in board.tensors} == {"cuda"}
        with pytest.raises(DataDependentOutputException):
            bool(board.tokens[0, 0] > 0)
        with pytest.raises(RuntimeError, match="two different devices"):
            board.positions + torch.zeros(2)


@pytest.mark.parametrize("weights", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 4, TILE, 2 * TILE])
def test_products_by_tiles_are_products(rows: int, weights: str, assert_near: AssertNear) -> None:
    linear = Linear(24, 40)
    x = torch.randn(rows, 24)
    dtype = cuda.WEIGHTS[weights]
    product = x.to(dtype).float() @ linear.weight.detach().to(dtype).float().mT
    expected = product.to(dtype).float() + linear.bias.detach()
    y = TiledLinear(linear, dtype)(x)
    assert y.dtype == torch.float32
    assert_near(y, expected, 1e-6 if weights == "fp32" else 1e-2)


def test_predictions_that_are_no_numbers_name_the_layer(make_model: MakeModel) -> None:
    broken = make_model("isotropic")
    with torch.no_grad():
        broken.stack.layers[1].mixer.up.weight[0, 0] = float("nan")
    model = captured(to_recurrent(broken))
    generation = begin(model, read(model, PROMPT), SamplingConfig(), seed=0, indices=[0])
    with pytest.raises(NotFiniteError, match=r"stack\.layers\.1\.mixer\.up\.weight"):
        drawn(generation, 4)


class FakeStreams:
    """The streams of torch.cuda, and a graph whose capture fails as torch's does."""

    def __init__(self) -> None:
        self.current: Any = self

    def wait_stream(self, stream: object) -> None:
        pass

    @contextmanager
    def stream(self, chosen: object) -> Iterator[None]:
        before, self.current = self.current, chosen
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: object, pool: object, stream: object, **_: object) -> Iterator[None]:
        self.current = stream  # which it leaves only after a capture that succeeds
        yield
        raise RuntimeError("operation not permitted")


def test_what_cannot_be_captured_runs_step_by_step(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the stream that was there before, for which other work waits."""
    eager = to_recurrent(make_model("pooled"))
    model, start = captured(eager), read(eager, PROMPT)
    outer, model._stream, model._pool = FakeStreams(), FakeStreams(), None
    for name, fake in {
        "CUDAGraph": object, "device": nullcontext, "stream": outer.stream, "graph": outer.graph,
        "current_stream": lambda: outer.current,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    model._captures = True
    with pytest.warns(UserWarning, match=r"not captured.*not permitted") as warnings:
        samples = drawn(begin(model, start, SamplingConfig(), seed=1, indices=[0]), 50)
    assert len(warnings) == 1
    assert outer.current is outer
    assert_same(samples, drawn(begin(eager, start, SamplingConfig(), seed=1, indices=[0]), 50))


def test_a_gpu_without_room_is_one_sentence(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError

    model = captured(to_recurrent(make_model("isotropic")))
    monkeypatch.setattr(model, "_advance", fill)
    logits, state = prompts(model.model, 3)
    with pytest.raises(MemoryError, match="no memory for 4 rows of this model; ask for fewer"):
        step(model, model.load(state, logits), SamplingConfig(), 1)
    assert not model._boards  # whose memory fewer rows can have


def test_the_largest_batch_is_bounded_by_its_states(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = captured(to_recurrent(make_model("isotropic")))
    state = model.model.state_bytes()
    for size, expected in ((2**40, 1024), (300 * state, 256), (1, 64)):
        monkeypatch.setattr(cuda, "STATES", size)
        assert model.largest_batch == expected


# As a user chooses it


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine cuda is to be had, its steps run on the CPU."""
    monkeypatch.setattr(cuda, "check_choice", lambda weights: None)
    monkeypatch.setattr("genssm.stepper.default_device", lambda: CPU)


def test_the_choice_is_shown_and_checked(make_model: MakeModel, on_cpu: None) -> None:
    model = to_recurrent(make_model("isotropic"))
    assert describe(choose(model, "cuda")) == "cuda bf16"
    assert describe(choose(model, "cuda", "fp32")) == "cuda fp32"
    assert describe(choose(model)) == "cpu bf16"
    with pytest.warns(UserWarning, match="runs eagerly.*cuda is for float32 models"):
        assert isinstance(choose(model.double(), "cuda"), RecurrentModel)


def test_the_command_draws_by_it(
    make_checkpoint: Callable[[str], Checkpoint], on_cpu: None, tmp_path: Path
) -> None:
    folder = str(save(make_checkpoint("text"), tmp_path / "text"))
    options = ["sample", "-m", folder, "--max-tokens", "40", "--seed", "1", "--json", "-n", "3"]
    texts = {}
    for engine, name in (("cuda", "cuda fp32"), ("eager", "eager")):
        choice = ["--engine", engine, "--weights", "fp32"]
        result = CliRunner().invoke(app, [*options, *choice])
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        assert [line["engine"] for line in lines] == [name] * 3
        texts[engine] = [line["text"] for line in lines]
    assert texts["cuda"] == texts["eager"]


def test_what_the_engine_has_not_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, make_checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda has weights fp32 and bf16, got 'int8'"):
        check_choice("cuda", "int8")
    folder = str(save(make_checkpoint("text"), tmp_path / "text"))
    result = CliRunner().invoke(app, ["sample", "-m", folder, "--engine", "cuda"])
    assert result.exit_code == 2
    assert result.stderr == (
        "genssm: the engine cuda needs a CUDA device, which torch does not find here\n"
    )


def test_recipes_name_what_rounds(
    make_checkpoint: Callable[[str], Checkpoint], on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("audio")
    exact, rounded = (Pipeline("small", checkpoint, engine="cuda", weights=w) for w in TOLERANCE)
    assert exact.stepped_weights == "cuda fp32"
    samples = rounded.sample(count=2, max_tokens=50, seed=3)
    recipe = rounded.recipe(samples)
    assert recipe is not None
    assert recipe.weights == "cuda bf16"
    again = Pipeline("small", checkpoint).repeat(recipe)
    assert [s.tokens for s in again] == [s.tokens for s in samples]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="'cuda bf16': the engine cuda needs a CUDA device"):
        Pipeline("small", checkpoint).repeat(recipe)


def test_states_pass_from_engine_to_engine(
    make_checkpoint: Callable[[str], Checkpoint], on_cpu: None, tmp_path: Path
) -> None:
    """Read by one, drawn on with by the other, and kept in a file between."""
    checkpoint = make_checkpoint("audio")
    pipes = [Pipeline("small", checkpoint, engine=e, weights="fp32") for e in ("cuda", "eager")]
    readings = []
    for pipe in pipes:
        session = pipe.start("one", max_tokens=30, seed=4, snapshot_every=8)
        session.run()
        pipe.save_state(session.reading(), tmp_path / "state")
        readings.append(pipe.load_state(tmp_path / "state"))
    assert torch.equal(readings[0].tokens, readings[1].tokens)
    for a, b in zip(readings[0].state.tensors(), readings[1].state.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    further = [
        p.sample(state=r, max_tokens=30, seed=5) for p, r in zip(pipes, readings[::-1], strict=True)
    ]
    assert further[0][0].tokens == further[1][0].tokens


def test_requests_share_a_batch(make_checkpoint: Callable[[str], Checkpoint], on_cpu: None) -> None:
    pipe = Pipeline("small", make_checkpoint("audio"), engine="cuda", weights="fp32")
    eager = Pipeline("small", pipe.checkpoint, engine="eager")
    scheduler = Scheduler(pipe)
    settings = [{"max_tokens": 20 + i, "seed": i, "count": 1 + i % 2} for i in range(5)]
    try:
        jobs = [scheduler.submit("two", **s) for s in settings]
        for job, s in zip(jobs, settings, strict=True):
            expected = eager.sample("two", **s)
            assert [sample.tokens for sample in job.run()] == [e.tokens for e in expected]
    finally:
        scheduler.close()


def test_folders_are_drawn_in_the_largest_batches(
    make_checkpoint: Callable[[str], Checkpoint],
    on_cpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "ROWS", (4, 8))
    pipe = Pipeline("small", make_checkpoint("text"), engine="cuda", weights="fp32")
    assert pipe.side_by_side == 8
    request = Request(count=11, seed=5, max_tokens=6)
    eager = Pipeline("small", pipe.checkpoint, engine="eager")
    for name, each in (("cuda", pipe), ("eager", eager)):
        assert bulk.sample_to_folder(each, tmp_path / name, request, None) == 11
    for file in (tmp_path / "eager").glob("*.txt"):
        assert (tmp_path / "cuda" / file.name).read_bytes() == file.read_bytes()


# On a GPU


@needs_gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_graphs_draw_the_eager_tokens(make_model: MakeModel, architecture: str) -> None:
    eager = to_recurrent(make_model(*ARCHITECTURES[architecture]))
    model, start = CapturedModel(eager, "fp32", torch.device("cuda")), read(eager, PROMPT)
    for config in (SETTINGS[0], SETTINGS[6]):
        samples, expected = (
            drawn(begin(stepper, start, config, seed=7, indices=range(3)), 100)
            for stepper in (model, eager)
        )
        assert_same(samples, expected)
    assert model._captures


@needs_gpu
@pytest.mark.parametrize("weights", TOLERANCE)
def test_graphs_step_as_the_eager_model(
    make_model: MakeModel, assert_near: AssertNear, weights: str
) -> None:
    eager = to_recurrent(make_model("image"))
    model = CapturedModel(eager, weights, torch.device("cuda"))
    logits, state = prompts(eager, 3)
    memory = model.load(state, logits)
    for steps in (*[1] * 7, 2 * LONGEST):
        for token in step(model, memory, SamplingConfig(), steps, seed=steps).mT:
            logits, state = eager.step(token, state)
        assert_near(model.logits(memory), logits, 10 * TOLERANCE[weights])
    assert model._captures


@needs_gpu
@pytest.mark.parametrize("weights", TOLERANCE)
def test_a_row_of_a_graph_does_not_depend_on_its_company(
    make_model: MakeModel, weights: str
) -> None:
    eager = to_recurrent(make_model("pooled", d_model=(32, 32, 64)))
    model = CapturedModel(eager, weights, torch.device("cuda"))
    assert_company_does_not_matter(model)


@needs_gpu
def test_replays_take_no_more_memory(make_model: MakeModel) -> None:
    eager = to_recurrent(make_model("pooled"))
    model, taken = CapturedModel(eager, "bf16", torch.device("cuda")), []
    logits, state = prompts(eager, 4)
    memory = model.load(state, logits)
    for _ in range(4):
        step(model, memory, SamplingConfig(), 3 * LONGEST)
        taken.append(torch.cuda.memory_allocated())
    assert taken[-1] == taken[1]
