"""The compiled stepper against the eager model, operation by operation and draw by draw."""

import itertools
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from drawing import PROMPT, SETTINGS, drawn, tokens_of
from llvmlite.binding import get_host_cpu_features
from torch import Tensor

import genssm
from genssm.conversion import to_recurrent
from genssm.engine import (
    CompiledGeneration,
    Drawn,
    Generation,
    begin,
    draw_ahead,
    read,
)
from genssm.model import RecurrentModel, SequenceModel, State
from genssm.pace import TEAM, Pace, Way
from genssm.pool import in_threads
from genssm.program import pack
from genssm.sampling import RandomStream, SamplingConfig, guided, probabilities
from genssm.stepper import (
    SCORED,
    CompiledModel,
    Draws,
    UnsupportedError,
    _as_team,
    check_choice,
    choose,
    describe,
    load_kernels,
    team,
)
from genssm.threads import torch_threads

MakeModel = Callable[..., SequenceModel]
AssertNear = Callable[[Tensor, Tensor, float], None]

# Largest difference of logits over the largest logit.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "int8": 5e-2}
OPERATIONS = {
    "S4D, taps of tokens": ("isotropic", "s4d"),
    "S4 of rank 1": ("isotropic", "s4"),
    "S4 of rank 2": ("isotropic", "s4-fourier"),
    "pools of S4D": ("pooled", "s4d"),
    "pools of S4": ("pooled", "s4"),
    "taps, positions and logistics": ("image", "s4d"),
}


def start(model: RecurrentModel, batch: int) -> tuple[Tensor, State, Tensor]:
    """A batch of different random prompts, read, and tokens to go on with (steps, batch)."""
    generator = torch.Generator().manual_seed(batch)
    shape = (20, batch)
    tokens = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    return *model.prefill(tokens[:7].mT), tokens[7:]


@pytest.mark.parametrize("weights", TOLERANCE)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_steps_equal_the_eager_ones(
    make_model: MakeModel, assert_near: AssertNear, operation: str, weights: str
) -> None:
    """From a state within a group of the pools, through every phase of theirs."""
    model = to_recurrent(make_model(*OPERATIONS[operation]))
    compiled = CompiledModel(model, weights)
    logits, state, tokens = start(model, 3)
    memory = compiled.load(state, logits[:, -1])
    assert torch.equal(compiled.logits(memory), logits[:, -1])
    for token in tokens:
        expected, state = model.step(token, state)
        assert_near(compiled.step(token, memory), expected, TOLERANCE[weights])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 processors")
@pytest.mark.parametrize(
    ("name", "features", "weights"),
    [
        ("haswell", "+avx,+avx2,+fma,+bmi2,+f16c", ""),
        ("alderlake", "+avx,+avx2,+fma,+bmi2,+f16c,+avxvnni", "int8"),
        ("generic", "", ""),
    ],
    ids=["AVX2", "AVX-VNNI", "SSE2"],
)
def test_code_for_lesser_processors_steps_alike(
    name: str, features: str, weights: str, tmp_path: Path
) -> None:
    """Tests of this file, compiled for processors without what this one may have."""
    own = get_host_cpu_features()
    if "avxvnni" in features and not own.get("avxvnni"):
        pytest.skip("this processor has no AVX-VNNI")
    if name == "haswell" and own.get("avx2") and not (own.get("avx512f") or own.get("avxvnni")):
        pytest.skip("this processor is one, and the tests themselves have just run on it")
    told = {
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    tests = (
        test_steps_equal_the_eager_ones,
        test_a_row_does_not_depend_on_its_company,
        test_int8_by_whole_numbers_gives_what_floats_give,
    )
    named = [f"{__file__}::{test.__name__}" for test in tests]
    command = [sys.executable, "-m", "pytest", "-q", *named, "-k", weights]
    run = subprocess.run(
        command, env=os.environ | told, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert any(tmp_path.rglob("*.nbc"))  # compiled anew, for what was told


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names x86 features")
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("NUMBA_CPU_NAME", "generic", "1 INT8"),
        ("NUMBA_CPU_FEATURES", "+avx", "1 INT8"),
        ("NUMBA_CPU_FEATURES", "+avx2", "2 PAIRS INT8"),
        ("NUMBA_CPU_FEATURES", "+avx2,+avxvnni", "2 DIGITS INT8"),
        ("NUMBA_CPU_FEATURES", "+avx2,+avxvnni,+avx512f", "4 PAIRS INT8"),
        ("NUMBA_ENABLE_AVX", "0", "1 INT8"),
    ],
)
def test_code_uses_no_more_than_numba_is_told_of(name: str, value: str, expected: str) -> None:
    """An instruction that it does not compile for ends the process."""
    code = (
        "from genssm.stepper import load_kernels; simd = load_kernels()\n"
        "names = {getattr(simd, name): name for name in ('INT8', 'DIGITS', 'PAIRS')}\n"
        "assert set(simd.int8_kinds().values()) <= set(simd.KINDS)\n"
        "print(simd.panels_abreast(simd.FP32), *map(names.get, simd.int8_kinds().values()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {name: value}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.stdout == f"{expected}\n", run.stderr


@pytest.mark.parametrize("kind", ["isotropic", "image"])
def test_int8_by_whole_numbers_gives_what_floats_give(
    make_model: MakeModel, assert_near: AssertNear, kind: str
) -> None:
    """int8 weights times activations, by products of whole numbers and by products of floats."""
    simd = load_kernels()
    if 16 not in simd.int8_kinds():
        pytest.skip("this processor has no AVX2")
    model = to_recurrent(make_model(kind, d_model=(40, 72, 136)[: 1 if kind == "isotropic" else 3]))
    by_numbers, by_floats = CompiledModel(model, "int8-16"), CompiledModel(model, "int8-24")
    assert CompiledModel(model, "int8").stepped_weights == by_numbers.stepped_weights
    assert by_numbers._kind in (simd.DIGITS, simd.PAIRS)
    assert by_floats._kind == simd.INT8
    _, state, tokens = start(model, 5)
    numbers, floats = by_numbers.load(state), by_floats.load(state)
    for token in tokens:
        assert_near(by_numbers.step(token, numbers), by_floats.step(token, floats), 2e-4)


def whole_numbers(work: np.ndarray, kind: str, size: int) -> np.ndarray:
    """What ``quantize`` left at ``size``, behind the ``size`` floats that it read."""
    if kind == "DIGITS":
        digits = work[size : size + size // 2].view(np.uint8).reshape(-1, 2, 4).astype(np.int64)
        return ((digits[:, 1] - 128) * 256 + digits[:, 0]).reshape(-1)  # fours, digit, number
    pairs = work[size : size + size // 2].view(np.int16).reshape(-1, 2, 2)  # fours, pair, number
    return pairs.swapaxes(1, 2).reshape(-1).astype(np.int64)


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-20, 1.0, 1e20, 3e38])
@pytest.mark.parametrize(
    ("size", "finer"),  # the error, in parts of the largest magnitude
    [(64, 65_000), (512, 65_000), (1024, 32_900)],
)
@pytest.mark.parametrize("kind", ["DIGITS", "PAIRS"])
def test_whole_numbers_keep_floats_of_every_magnitude(
    magnitude: float, kind: str, size: int, finer: int
) -> None:
    simd = load_kernels()
    x = np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32) * np.float32(magnitude)
    work = np.concatenate([x, np.zeros(size + 32, np.float32)])
    simd.quantize(getattr(simd, kind), work, 0, size, size)
    whole = whole_numbers(work, kind, size)
    error = np.abs(whole * float(work[2 * size]) - x)
    assert error.max() <= max(1e-30, np.abs(x).max()) / finer
    assert 127 * np.abs(whole).max() * size < 2**31  # the largest sum


def test_sums_of_whole_numbers_are_exact() -> None:
    """By every tile, in groups of panels and what remains: so all processors have the same."""
    simd = load_kernels()
    kind = simd.int8_kinds().get(16)
    if kind is None:
        pytest.skip("this processor has no AVX2")
    name = {simd.DIGITS: "DIGITS", simd.PAIRS: "PAIRS"}[kind]
    inputs, outputs, batch = 512, 7 * 32, 7
    rng, abreast = np.random.default_rng(0), simd.panels_abreast(kind)
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    beside = simd.side_by_side(kind, abreast)
    packed, (scale, *rest) = pack(weight, "int8", beside, fours=True)
    table = np.concatenate([np.zeros_like(scale), np.ones_like(scale), *rest])  # no bias, no scale
    work = np.zeros(batch * (inputs + outputs + inputs + 32), np.float32)
    x = work[: batch * inputs].reshape(batch, inputs)
    x[:] = rng.standard_normal(x.shape)
    y, digits = batch * inputs, batch * (inputs + outputs)
    simd.linear(
        kind, abreast, beside, packed, 0, work, 0, inputs, y, outputs, table, 0, digits, batch, 0,
        outputs,
    )  # fmt: skip
    found = work[y:digits].reshape(batch, outputs)
    weights = np.rint(weight / scale[:, None]).astype(np.int64)
    for row, actual in zip(x, found, strict=True):
        room = np.concatenate([row, np.zeros(inputs + 32, np.float32)])
        simd.quantize(kind, room, 0, inputs, inputs)
        sums = weights @ whole_numbers(room, name, inputs)
        np.testing.assert_array_equal(actual, sums.astype(np.float32) * room[2 * inputs])


@pytest.mark.parametrize("kind", ["DIGITS", "PAIRS"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_whole_numbers_of_what_is_no_number_are_none(value: float, kind: str) -> None:
    simd = load_kernels()
    work = np.zeros(96, np.float32)
    work[[3, 20]] = 1, value
    simd.quantize(getattr(simd, kind), work, 0, 32, 32)
    assert np.isnan(work[64])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_states_go_back_and_forth(
    make_model: MakeModel, assert_near: AssertNear, operation: str
) -> None:
    model = to_recurrent(make_model(*OPERATIONS[operation]))
    compiled = CompiledModel(model, "fp32")
    _, state, tokens = start(model, 2)
    for a, b in zip(state.tensors(), compiled.save(compiled.load(state)).tensors(), strict=True):
        assert a.dtype == b.dtype
        assert_near(b, a, 1e-6)
    memory = compiled.load(state)
    for token in tokens:
        compiled.step(token, memory)
        _, state = model.step(token, state)
        for a, b in zip(state.tensors(), compiled.save(memory).tensors(), strict=True):
            assert_near(b, a, 1e-5)
    expected, _ = model.step(tokens[0], state)
    logits, _ = model.step(tokens[0], compiled.save(memory))
    assert_near(logits, expected, 1e-5)


@pytest.mark.parametrize("weights", TOLERANCE)
@pytest.mark.parametrize("kind", ["isotropic", "pooled", "image"])
def test_a_row_does_not_depend_on_its_company(
    make_model: MakeModel, kind: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, in batches that use every tile, of large registers and small."""
    model = to_recurrent(make_model(kind, d_model=(40, 72, 136)[: 1 if kind == "isotropic" else 3]))
    compiled = CompiledModel(model, weights)
    _, state, tokens = start(model, 64)
    everyone = compiled.load(state)
    expected = [compiled.step(token, everyone) for token in tokens]
    simd = load_kernels()
    for abreast in (4, 2, 1):
        if compiled._kind in (simd.FP32, simd.BF16, simd.INT8):  # others have tiles of one size
            monkeypatch.setattr(simd, "panels_abreast", lambda kind, n=abreast: n)
        compiled = CompiledModel(model, weights)
        for batch in (1, 3, 17):
            memory = compiled.load(state.rows(torch.arange(batch)))
            for token, logits in zip(tokens, expected, strict=True):
                assert torch.equal(compiled.step(token[:batch], memory), logits[:batch])


@pytest.mark.parametrize("weights", TOLERANCE)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_team_of_threads_changes_no_bit(
    make_model: MakeModel, operation: str, weights: str
) -> None:
    """Widths of one panel, which only one thread has, to several; guided and in company."""
    kind, layer = OPERATIONS[operation]
    widths = (40, 72, 136)[: 1 if kind == "isotropic" else 3]
    compiled = CompiledModel(to_recurrent(make_model(kind, layer, d_model=widths)), weights)
    _, state, _ = start(compiled.model, 3)

    def together(threads: int) -> tuple[list[np.ndarray], list[Tensor]]:
        memories = [compiled.load(state.rows(torch.tensor(rows))) for rows in ([0], [1, 2])]
        draws = [
            Draws(
                memory,
                np.random.default_rng(7).random((1, 13)),
                SamplingConfig(repetition_penalty=1.2, top_p=0.9),
                np.zeros((1, compiled.config.n_outputs), np.bool_),
                guidance=1.5,
            )
            for memory in memories
        ]
        drawn = compiled.generate_together(draws, threads)
        tensors = [t for m in memories for t in compiled.save(m).tensors()]
        return [a for pair in drawn for a in pair], tensors

    arrays, tensors = together(1)
    for threads in (2, 3):
        others, states = together(threads)
        assert all(map(np.array_equal, others, arrays))
        assert all(map(torch.equal, states, tensors))


def test_a_team_that_is_called_off_ends(make_model: MakeModel) -> None:
    gate = np.zeros(16, np.int64)
    gate[8] = 1
    assert not load_kernels().meet(gate, 2)

    def run(member: int) -> None:
        if member == 0:
            raise KeyboardInterrupt
        gate[3] = load_kernels().meet(gate, 2)

    gate[:] = 0
    with pytest.raises(KeyboardInterrupt):
        _as_team(run, 2, gate)
    assert gate[3] == 0


@pytest.mark.parametrize("config", SETTINGS)
def test_draws_equal_the_eager_ones(make_model: MakeModel, config: SamplingConfig) -> None:
    model = to_recurrent(make_model("pooled"))
    eager = drawn(Generation(model, read(model, PROMPT), config, seed=7, indices=range(3)), 40)
    compiled = CompiledModel(model, "fp32")
    samples = drawn(
        CompiledGeneration(compiled, read(model, PROMPT), config, seed=7, indices=range(3)), 40
    )
    assert tokens_of(samples) == tokens_of(eager)
    for sample, expected in zip(samples, eager, strict=True):
        bits = [d.bits for d in sample]
        assert bits == pytest.approx([d.bits for d in expected], abs=1e-4)


@pytest.mark.parametrize("kind", ["isotropic", "pooled", "image"])
def test_scores_equal_those_of_the_convolution(make_model: MakeModel, kind: str) -> None:
    model = make_model(kind)
    compiled = CompiledModel(to_recurrent(model), "fp32")
    tokens = torch.randint(0, model.config.n_outputs, (3, SCORED + 40))
    expected = model.log_prob(tokens).detach().double() / -math.log(2)
    torch.testing.assert_close(compiled.score(tokens), expected, rtol=1e-4, atol=1e-4)
    assert compiled.score(tokens[:, :1]).shape == (3, 0)
    with pytest.raises(ValueError, match="have a probability"):
        compiled.score(torch.tensor([[0, model.config.n_outputs]]))


@pytest.mark.parametrize("told", [1, 2, 3])
def test_draws_guided_by_an_open_stream_equal_the_eager_ones(
    make_model: MakeModel, told: int
) -> None:
    """What is left of the opening is drawn, and the guide reads 20, "any", in its place."""
    model = to_recurrent(make_model("pooled"))
    own, guide = (read(model, torch.tensor(t[:told])) for t in ([21, 18, 3], [20, 20, 20]))
    guide = replace(guide, state=model.foretold(guide.state, 20))

    def guided(stepper: RecurrentModel | CompiledModel) -> list[list[Drawn]]:
        generation = begin(stepper, own, SamplingConfig(), seed=7, indices=range(3), guide=guide,
                           guidance=2.0)  # fmt: skip
        return drawn(generation, 30)

    eager, compiled = guided(model), guided(CompiledModel(model, "fp32"))
    assert tokens_of(compiled) == tokens_of(eager)
    for sample, expected in zip(compiled, eager, strict=True):
        assert [d.bits for d in sample] == pytest.approx([d.bits for d in expected], abs=1e-4)
    plain = read(model, guide.tokens)  # it reads what is drawn
    other = begin(model, own, SamplingConfig(), seed=7, indices=range(3), guide=plain, guidance=2.0)
    assert (tokens_of(drawn(other, 30)) == tokens_of(eager)) == (told == 3)


@pytest.mark.parametrize("told", [1, 2])
def test_steps_of_an_open_stream_equal_the_eager_ones(
    make_model: MakeModel, assert_near: AssertNear, told: int
) -> None:
    """What is foretold counts from its place on, and not before."""
    model = to_recurrent(make_model("pooled"))
    start = read(model, torch.tensor([20] * told))
    state, logits = model.foretold(start.state, 20), start.logits
    compiled = CompiledModel(model, "fp32")
    memory = compiled.load(state, logits)
    for token in (18, 3, 5, 7):
        expected, state = model.step(torch.tensor([token]), state)
        assert_near(compiled.step(torch.tensor([token]), memory), expected, TOLERANCE["fp32"])


@pytest.mark.parametrize("guidance", [-0.5, 0.0, 0.3, 1.7, 4.0])
@pytest.mark.parametrize("kind", ["isotropic", "pooled", "image"])
def test_guided_draws_equal_the_eager_ones(
    make_model: MakeModel, kind: str, guidance: float
) -> None:
    """Two streams in one batch, through every phase of the pools, with filters and penalty."""
    model = to_recurrent(make_model(kind))
    config = SamplingConfig(plausible=0.05, repetition_penalty=1.2, temperature=0.9, top_p=0.95)
    any_start = model.config.vocab_size - 2
    streams = [read(model, torch.tensor([first, 3, 1, 4])) for first in (any_start + 1, any_start)]
    assert not torch.equal(streams[0].logits, streams[1].logits)

    def guided(stepper: RecurrentModel | CompiledModel) -> list[list[Drawn]]:
        generation = begin(
            stepper, streams[0], config, seed=7, indices=range(3), guide=streams[1],
            guidance=guidance,
        )  # fmt: skip
        assert isinstance(generation, CompiledGeneration) == isinstance(stepper, CompiledModel)
        return drawn(generation, 30)

    eager, compiled = guided(model), guided(CompiledModel(model, "fp32"))
    assert tokens_of(compiled) == tokens_of(eager)
    for sample, expected in zip(compiled, eager, strict=True):
        bits = [d.bits for d in sample]
        assert bits == pytest.approx([d.bits for d in expected], abs=1e-3)


def test_filters_equal_the_eager_ones_on_a_large_vocabulary(make_model: MakeModel) -> None:
    """Thousands of tokens, many of them equally likely."""
    model = to_recurrent(make_model("isotropic", vocab_size=3000, n_outputs=2999))
    compiled = CompiledModel(model, "fp32")
    state = read(model, PROMPT).state
    logits = torch.randn(1, 2999, generator=torch.Generator().manual_seed(1)).mul(8).round() / 4
    uniforms = np.linspace(0, 1, 50, endpoint=False)
    for config in SETTINGS:
        p = probabilities(logits, config)
        cdf = p[0].cumsum(-1).numpy()
        for uniform in uniforms:
            memory, seen = compiled.load(state, logits), np.zeros((1, 2999), np.bool_)
            draws = Draws(memory, np.full((1, 1), uniform), config, seen)
            token = compiled.generate(draws)[0][0, 0]
            assert p[0, token] > 0
            reached = cdf[token] / cdf[-1]  # rounding may move a boundary between tokens a little
            assert uniform - 1e-5 <= reached <= uniform + float(p[0, token]) + 1e-5


@pytest.mark.parametrize("guidance", [0.3, 1.7, 4.0])
def test_guided_draws_follow_the_guided_probabilities(
    make_model: MakeModel, guidance: float
) -> None:
    """Of logits so far apart that most tokens are not plausible."""
    model = to_recurrent(make_model("isotropic", vocab_size=300, n_outputs=299))
    compiled = CompiledModel(model, "fp32")
    state = read(model, PROMPT).state.rows(torch.zeros(2, dtype=torch.int64))
    logits = 4 * torch.randn(2, 299, generator=torch.Generator().manual_seed(1))
    config = SamplingConfig(plausible=0.02)
    p = probabilities(guided(logits[:1], logits[1:], guidance, config.plausible), config)
    assert (0.5 < float((p == 0).float().mean()) < 0.99) == (guidance > 1)
    cdf = p[0].cumsum(-1).numpy()
    for uniform in np.linspace(0.01, 0.99, 50):  # at 0 sharp, what weighs e^-87 may be drawn
        seen = np.zeros((1, 299), np.bool_)
        memory = compiled.load(state, logits)
        draws = Draws(memory, np.full((1, 1), uniform), config, seen, guidance)
        token = compiled.generate(draws)[0][0, 0]
        assert p[0, token] > 0
        assert uniform - 1e-5 <= cdf[token] <= uniform + float(p[0, token]) + 1e-5


def test_draws_follow_the_probabilities(make_model: MakeModel) -> None:
    model = to_recurrent(make_model("isotropic"))
    compiled = CompiledModel(model, "fp32")
    config = SamplingConfig(temperature=1.2, top_k=15)
    start = read(model, PROMPT)
    logits, state = start.logits, start.state
    streams = [RandomStream(3, i) for i in range(64)]
    rows = torch.zeros(64, dtype=torch.int64)
    tokens: list[int] = []
    for _ in range(60):
        memory = compiled.load(state.rows(rows), logits[rows])
        uniforms = np.array([[stream.next()] for stream in streams])
        seen = np.zeros((64, logits.shape[-1]), np.bool_)
        tokens += compiled.generate(Draws(memory, uniforms, config, seen))[0][:, 0].tolist()
    p = probabilities(logits, config)[0].numpy()
    counts = np.bincount(tokens, minlength=len(p))
    assert counts[p == 0].sum() == 0
    assert scipy.stats.chisquare(counts[p > 0], p[p > 0] * len(tokens)).pvalue > 1e-3


def in_turns(monkeypatch: pytest.MonkeyPatch, *turns: Way) -> list[tuple[str, int]]:
    """Have blocks drawn in these ways by turns, in groups of two; returns the threads of each."""
    monkeypatch.setattr("genssm.pace.GROUP", 2)
    chosen = itertools.cycle(turns)
    monkeypatch.setattr(Pace, "choose", lambda *_: next(chosen))
    used: list[tuple[str, int]] = []

    def shared(function: Any, items: Any, threads: int) -> list[Any]:
        used.append(("parts", threads))
        return in_threads(function, items, threads)

    def run(function: Any, threads: int, gate: np.ndarray) -> None:
        used.append(("columns", threads))
        _as_team(function, threads, gate)

    monkeypatch.setattr("genssm.engine.in_threads", shared)
    monkeypatch.setattr("genssm.stepper._as_team", run)
    return used


TURNS: dict[str, tuple[int, list[Way], list[int], list[tuple[str, int]]]] = {
    "whole": (1, [Way.WHOLE], [1], []),
    "groups by one thread": (1, [Way.GROUPS], [3], [("parts", 1)]),
    "columns": (2, [Way.COLUMNS], [1], [("columns", 2)]),
    "shares": (2, [Way.SHARES], [2], [("parts", 2)]),
    "groups": (2, [Way.GROUPS], [4], [("parts", 2)]),
    "many threads": (3, [Way.SHARES], [3], [("parts", 3)]),
    "by turns": (
        2,
        [Way.SHARES, Way.WHOLE, Way.GROUPS, Way.COLUMNS],
        [2, 1, 4, 1],
        [("parts", 2), ("parts", 2), ("columns", 2)],
    ),
}


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("case", TURNS)
def test_samples_do_not_depend_on_their_company(
    make_model: MakeModel,
    assert_near: AssertNear,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    guidance: float,
) -> None:
    """Tokens and bits, to the last digit, whatever the blocks and threads and whoever leaves."""
    threads, turns, parts, expected_use = TURNS[case]
    compiled = CompiledModel(to_recurrent(make_model("pooled")))
    config = SamplingConfig(repetition_penalty=1.3)
    guide = read(compiled, torch.tensor([21, 3, 1, 4])) if guidance != 1 else None

    def sampled(first: int, last: int) -> CompiledGeneration:
        return CompiledGeneration(
            compiled, read(compiled, PROMPT), config, seed=1, indices=range(first, last),
            guide=guide, guidance=guidance, snapshots=True,
        )  # fmt: skip

    with torch_threads(1):
        expected = [drawn(sampled(i, i + 1), 50)[0] for i in range(5)]
    assert len(set(map(tuple, tokens_of(expected)))) == 5
    used = in_turns(monkeypatch, *turns)
    with torch_threads(threads):
        generation, seen = sampled(0, 5), []
        together: list[list[Drawn]] = [[] for _ in range(5)]
        for _ in range(50):
            for drawn_now in generation.step():
                together[drawn_now.sample].append(drawn_now)
            seen.append(len(generation._parts))
        assert [n for i, n in enumerate(seen) if i == 0 or n != seen[i - 1]][: len(parts)] == parts
        assert used[: len(expected_use)] == expected_use
        assert bool(used) == bool(expected_use)
        for sample, alone in zip(together, expected, strict=True):
            assert [(d.token, d.bits) for d in sample] == [(d.token, d.bits) for d in alone]
        generation = sampled(0, 5)
        first = drawn(generation, 9)
        generation.finish({1, 3})
        rest = drawn(generation, 41)
        assert generation.active == [0, 2, 4]
        assert [first[i] + after for i, after in zip((0, 2, 4), rest, strict=True)] == together[::2]
        snapshot = generation.snapshot()
        assert snapshot.samples == (0, 2, 4)
        begun = [*PROMPT.tolist(), *(d.token for d in together[2])]
        exact = read(compiled, torch.tensor(begun[: int(snapshot.state.position)]))
        assert_near(snapshot.reading(2, torch.tensor(begun)).logits, exact.logits, 5e-2)
        generation.finish({0, 2, 4})
        assert generation.step() == []


def test_parts_that_have_lost_samples_are_shared_out_anew(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that few have left stays where it is; many would leave a thread idle."""
    in_turns(monkeypatch, Way.SHARES)
    compiled = CompiledModel(to_recurrent(make_model("pooled")))
    with torch_threads(2):
        generation = begin(
            compiled, read(compiled, PROMPT), SamplingConfig(), seed=1, indices=range(10)
        )
        assert isinstance(generation, CompiledGeneration)

        def held(*leaving: int) -> list[list[int]]:
            generation.finish(set(leaving))
            generation.step()
            while generation.ahead:
                generation.step()
            return [part.held for part in generation._parts]

        assert held() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
        assert held(7) == [[0, 1, 2, 3, 4], [5, 6, 8, 9]]
        assert held(6, 9) == [[0, 1, 2, 3], [4, 5, 8]]
        assert held(0, 1, 2, 3) == [[4, 5], [8]]
        assert held(4, 8) == [[5]]


def test_a_generation_is_stepped_by_no_more_threads_than_are_allowed(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where others draw beside it, by one."""
    used = in_turns(monkeypatch, Way.SHARES)
    compiled = CompiledModel(to_recurrent(make_model("pooled")))
    with torch_threads(2):
        generation = begin(
            compiled, read(compiled, PROMPT), SamplingConfig(), seed=1, indices=range(5)
        )
        assert isinstance(generation, CompiledGeneration)
        draw_ahead([generation], 1)
        assert len(generation._parts) == 1
        drawn(generation, generation.ahead + 1)
        assert len(generation._parts) == 2
    assert used == [("parts", 1), ("parts", 2)]


def test_one_team_at_a_time(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds another one steps alone, and what that takes says nothing about a team."""
    used = in_turns(monkeypatch, Way.COLUMNS)
    timed: list[Way] = []
    monkeypatch.setattr(Pace, "took", lambda _, way, steps, seconds: timed.append(way))
    compiled = CompiledModel(to_recurrent(make_model("pooled")))
    with torch_threads(8):
        generation = begin(compiled, read(compiled, PROMPT), SamplingConfig(), seed=1, indices=[0])
        with team(8) as members:
            assert members == TEAM
            drawn(generation, 1)
        assert (used, timed) == ([], [])
        drawn(generation, 2)
        assert (used, timed) == ([("columns", TEAM)], [Way.COLUMNS])


def test_blocks_are_timed(make_model: MakeModel) -> None:
    """What the choice is made by: the blocks drawn, by the number of samples and of threads."""
    compiled = CompiledModel(to_recurrent(make_model("isotropic")))
    with torch_threads(2):
        for count in (1, 3):
            generation = begin(
                compiled, read(compiled, PROMPT), SamplingConfig(), seed=1, indices=range(count)
            )
            drawn(generation, 63 + 192)
            assert isinstance(generation, CompiledGeneration)
            assert generation.threads in (1, 2)
    ways = [(Way.WHOLE, Way.COLUMNS), (Way.WHOLE, Way.COLUMNS, Way.SHARES)]
    assert list(compiled.paces) == [(ways[0], 1, 1, 2), (ways[1], 2, 1, 2)]
    assert all(0 < pace._usual < 1 for pace in compiled.paces.values())  # seconds of a step


@pytest.mark.parametrize("name", ["wiki", "cifar10", "digits"])
def test_shipped_models_draw_the_same_tokens(name: str) -> None:
    pipe = genssm.load(name)
    start = read(pipe.recurrent, pipe.prompt_tokens())
    config = SamplingConfig(temperature=0.9, top_p=0.97)
    eager = drawn(Generation(pipe.recurrent, start, config, seed=2, indices=range(2)), 32)
    compiled = CompiledModel(pipe.recurrent, "fp32")
    samples = drawn(CompiledGeneration(compiled, start, config, seed=2, indices=range(2)), 32)
    assert tokens_of(samples) == tokens_of(eager)
    for sample, expected in zip(samples, eager, strict=True):
        assert [d.bits for d in sample] == pytest.approx([d.bits for d in expected], abs=1e-3)


@pytest.mark.parametrize(
    ("name", "prompt"), [("wiki", "The"), ("cifar10", "frog"), ("digits", "7")]
)
def test_shipped_models_draw_by_default_what_the_eager_ones_do(name: str, prompt: str) -> None:
    """As of ``genssm sample``: with guidance and an open length, where the modality has them."""
    asked: dict[str, Any] = {"seed": 3, "count": 3, "max_tokens": 60}
    eager = genssm.load(name, engine="eager").sample(prompt, **asked)
    compiled = genssm.load(name, weights="fp32").sample(prompt, **asked)
    assert [s.tokens for s in compiled] == [s.tokens for s in eager]
    for sample, expected in zip(compiled, eager, strict=True):
        assert sample.token_bits == pytest.approx(expected.token_bits, abs=1e-3)


@pytest.mark.parametrize("kind", ["isotropic", "pooled"])
def test_blocks_grow_from_one_token_and_then_end_with_the_period(
    make_model: MakeModel, kind: str
) -> None:
    model = to_recurrent(make_model(kind))
    generation = begin(
        CompiledModel(model), read(model, PROMPT), SamplingConfig(), seed=0, indices=[0]
    )
    assert isinstance(generation, CompiledGeneration)
    sizes = []
    for _ in range(8):
        assert generation.place[0] == (len(PROMPT) + sum(sizes)) % model.config.period
        sizes.append(generation.place[1])
        drawn(generation, sizes[-1])
        assert generation.ahead == 0
    period = {"isotropic": [1, 2, 4, 8, 16, 32, 32, 32], "pooled": [1, 2, 4, 7, 12, 30, 30, 30]}
    assert sizes == period[kind]


SHARING: dict[str, tuple[str, dict[str, Any]]] = {
    "no pools": ("isotropic", {}),
    "pools": ("pooled", {}),
    "pools of whole pixels": ("image", {}),
    "pools of parts of pixels": ("image", {"pools": (2, 2)}),
}


@pytest.mark.parametrize("case", SHARING)
def test_generations_that_share_a_block_draw_what_they_would_alone(
    make_model: MakeModel, case: str
) -> None:
    """Of other prompts, positions, settings, seeds, counts and with guides; they come and go."""
    kind, settings = SHARING[case]
    model = CompiledModel(to_recurrent(make_model(kind, **settings)))
    period = model.config.period
    prompts = [torch.randint(0, 20, (3 + i * period,)) for i in range(4)]
    label = model.config.vocab_size - 1
    for prompt in prompts:
        prompt[0] = label

    def start(i: int) -> CompiledGeneration:
        guide = read(model, torch.cat([torch.tensor([label - 1]), prompts[i][1:]]))
        generation = begin(
            model, read(model, prompts[i]), SETTINGS[i + 3], seed=i, indices=range(1 + i % 3),
            guide=guide if i == 2 else None, guidance=1.5 if i == 2 else 1.0,
        )  # fmt: skip
        assert isinstance(generation, CompiledGeneration)
        return generation

    expected = [drawn(start(i), 63) for i in range(4)]
    generations = [start(i) for i in range(4)]
    results: list[list[list[Drawn]]] = [[] for _ in generations]
    for block in range(5):  # the third leaves after two blocks, the last draws the third one alone
        company = [0, 1, 2, 3] if block < 2 else [0, 1] if block == 2 else [0, 1, 3]
        if block == 2:
            draw_ahead([generations[3]])
        draw_ahead([generations[i] for i in company])
        for i in {*company, 3}:
            results[i] += [generations[i].step() for _ in range(generations[i].ahead)]
    assert [len(steps) > 15 for steps in results] == [True, True, False, True]
    for i, steps in enumerate(results):
        for step, row in zip(steps, zip(*expected[i], strict=True), strict=False):
            assert step == list(row)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_packed_weights_are_those_that_were_given(kind: str) -> None:
    """Of seven panels four are side by side, and the other three."""
    weight = torch.randn(7 * 32, 5, generator=torch.Generator().manual_seed(0)).numpy()
    weight[3] = 0
    packed, (scale,) = pack(weight, kind, beside=4)
    if kind == "bf16":
        words = packed.view(np.uint32).reshape(-1, 16)
        lines = np.concatenate([words << 16, words & 0xFFFF0000], -1).view(np.float32)
        expected = torch.from_numpy(weight).bfloat16().float().numpy()
    else:
        lines = packed.view({"fp32": np.float32, "int8": np.int8}[kind]).reshape(-1, 32)
        expected = weight
    groups = lines[: 5 * 4].reshape(5, 4 * 32), lines[5 * 4 :].reshape(5, 3 * 32)
    unpacked = np.concatenate(groups, 1).T * scale[:, None]
    tolerance = np.abs(weight).max(1, keepdims=True) / 254 * 1.001 if kind == "int8" else 0
    assert (np.abs(unpacked - expected) <= tolerance).all()


def test_whole_numbers_meet_weights_with_four_inputs_together() -> None:
    weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).numpy()
    plain, (scale,) = pack(weight, "int8")
    packed, (same, offset) = pack(weight, "int8", fours=True)
    side_by_side, _ = pack(weight, "int8", beside=2, fours=True)
    whole = plain.view(np.int8).reshape(2, 8, 32)
    fours = packed.view(np.int8).reshape(2, 2, 32, 4)
    np.testing.assert_array_equal(fours.swapaxes(2, 3).reshape(2, 8, 32), whole)
    np.testing.assert_array_equal(
        side_by_side.view(np.int8).reshape(2, 2, 32, 4), fours.swapaxes(0, 1)
    )
    np.testing.assert_array_equal(same, scale)
    sums = whole.swapaxes(1, 2).reshape(64, 8).sum(1, dtype=np.int64)
    np.testing.assert_array_equal(offset.view(np.int32), -128 * sums)


def test_without_numba_the_model_steps_eagerly(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = to_recurrent(make_model("isotropic"))
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.warns(UserWarning, match="numba cannot be imported"):
        assert choose(model) is model


def test_where_numba_compiles_nothing_the_model_steps_eagerly(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = to_recurrent(make_model("isotropic"))
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    with pytest.warns(UserWarning, match="NUMBA_DISABLE_JIT"):
        assert choose(model) is model


def test_a_dense_transition_steps_eagerly(make_model: MakeModel) -> None:
    model = to_recurrent(make_model("isotropic", "lssl"))
    with pytest.warns(UserWarning, match=r"not the dense one .*LSSL"):
        assert choose(model, "cpu") is model
    assert isinstance(
        begin(model, read(model, PROMPT), SamplingConfig(), seed=0, indices=range(1)), Generation
    )


def test_double_precision_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(UnsupportedError, match="float32 models on the CPU"):
        CompiledModel(to_recurrent(make_model("isotropic").double()))


def test_the_choice_is_shown_and_checked(make_model: MakeModel) -> None:
    model = to_recurrent(make_model("isotropic"))
    assert describe(choose(model)) == "cpu bf16"
    assert describe(choose(model, "cpu", "int8")) == "cpu int8"
    assert describe(choose(model, "eager")) == "eager"
    with pytest.raises(ValueError, match="engine must be one of auto, eager, cpu, cuda; got 'gpu'"):
        check_choice("gpu", "bf16")
    with pytest.raises(ValueError, match="weights must be one of bf16, fp32, int8; got 'fp8'"):
        check_choice("cpu", "fp8")


def test_a_token_that_does_not_exist_is_refused(make_model: MakeModel) -> None:
    model = to_recurrent(make_model("isotropic"))
    compiled = CompiledModel(model)
    memory = compiled.load(model.initial_state(1))
    with pytest.raises(ValueError, match=r"0 … 22, got 23"):
        compiled.step(torch.tensor([23]), memory)


def test_rows_that_do_not_fit_are_refused(make_model: MakeModel) -> None:
    model = to_recurrent(make_model("isotropic"))
    compiled = CompiledModel(model)
    memory = compiled.load(model.initial_state(64))
    with pytest.raises(ValueError, match="each of 64 rows is needed, got 1"):
        compiled.step(torch.tensor([1]), memory)
    seen = np.zeros((64, compiled.config.n_outputs), np.bool_)
    with pytest.raises(ValueError, match="as many rows of uniforms"):
        compiled.generate(Draws(memory, np.zeros((1, 8)), SamplingConfig(), seen))


@pytest.mark.parametrize("offset", [1.0, 100.0, 3000.0])
@pytest.mark.parametrize("size", [8, 16, 24, 40, 64, 264])
def test_norms_of_any_width_and_mean_are_right(size: int, offset: float) -> None:
    """The padding has no part in the variance, however far the features are from zero."""
    width = -(-size // 32) * 32
    x = offset + torch.randn(size, generator=torch.Generator().manual_seed(0))
    work, constants = np.zeros(2 * width, np.float32), np.zeros(2 * width, np.float32)
    work[:size], constants[:size] = x.numpy(), 1
    load_kernels().norm(work, 0, width, width, size, constants, 0, 0, width)
    expected = torch.nn.functional.layer_norm(x.double(), (size,)).numpy()
    np.testing.assert_allclose(work[width : width + size], expected, atol=1e-6 * max(offset, 3))
    assert not work[width + size :].any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_forms_a_team_of_its_own() -> None:
    """Where it was forked, the threads of its parent's are gone."""
    code = (
        "import multiprocessing, numpy as np\n"
        "from genssm.pace import _lock\n"
        "from genssm.stepper import _as_team, _forming\n"
        "def meet():\n"
        "    met = []\n"
        "    with _lock.held, _forming.held: _as_team(met.append, 2, np.zeros(16, np.int64))\n"
        "    print(sorted(met), flush=True)\n"
        "meet()\n"
        "child = multiprocessing.get_context('fork').Process(target=meet)\n"
        "with _lock.held, _forming.held: child.start()\n"
        "child.join(20); child.kill()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stdout == "[0, 1]\n[0, 1]\n", run.stderr


def test_kernels_load_where_nothing_can_be_written(tmp_path: Path) -> None:
    """Files where the cache folders would be: the package's own and the user's."""
    source = Path(genssm.__file__).parent
    shutil.copytree(source, tmp_path / "genssm", ignore=lambda *_: ["__pycache__"])
    (tmp_path / "genssm" / "__pycache__").write_text("")
    (tmp_path / "home").write_text("")
    home = str(tmp_path / "home")
    code = (
        "import os, numba, genssm.stepper as s; s.load_kernels(); folder = numba.config.CACHE_DIR\n"
        "print(folder, os.path.isdir(folder), end='')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HOME": home, "XDG_CACHE_HOME": home},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    folder, _, found = result.stdout.rpartition(" ")
    assert found == "True", result.stderr
    assert not Path(folder).exists()  # gone with the process


def test_layers_of_several_outputs_step_eagerly(make_model: MakeModel) -> None:
    model = to_recurrent(make_model("isotropic", "s4d", layer_settings={"channels": 2}))
    with pytest.warns(UserWarning, match="layers of one output"):
        assert choose(model) is model


@pytest.mark.parametrize("expand", [1, 5])
def test_mixers_of_any_width_have_room(
    expand: int, make_model: MakeModel, assert_near: Callable[[Tensor, Tensor, float], None]
) -> None:
    model = to_recurrent(make_model("image", expand=expand))
    compiled = CompiledModel(model, "fp32")
    _, state = model.prefill(torch.randint(0, 256, (3, 7)))
    memory = compiled.load(state)
    for token in torch.randint(0, 256, (9, 3)):
        expected, state = model.step(token, state)
        assert_near(compiled.step(token, memory), expected, 1e-5)
