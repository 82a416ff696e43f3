"""The benchmark measures what it says, against plain versions that compute the same."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from genssm import hippo, ssm
from genssm.benchmark import (
    FEATURES,
    TRAINED,
    Case,
    advantage,
    cost_cases,
    growth,
    marks,
    measure_costs,
    measure_difference,
    plain_cauchy,
    plain_vandermonde,
    reference_model,
    slope,
)
from genssm.cli import app
from genssm.layers import LAYERS

Near = Callable[[Tensor, Tensor, float], None]


@pytest.mark.parametrize("length", [1, 16, 37])
def test_plain_kernels_are_the_fast_ones(length: int, assert_near: Near):
    Lambda, P, B = (t.expand(2, *t.shape) for t in hippo.normal_plus_low_rank("legs", 16))
    C = torch.randn(2, 3, 8, dtype=torch.complex128)
    dt = torch.tensor([0.01, 0.2], dtype=torch.float64)
    fast = ssm.cauchy_kernel(C, Lambda, P, B, dt, length)
    assert_near(plain_cauchy(C, Lambda, P, B, dt, length), fast, 1e-5)
    log_a = Lambda * dt[:, None]
    fast = ssm.vandermonde_kernel(C, log_a, length)
    assert_near(plain_vandermonde(C, log_a, length), fast, 1e-9)


@pytest.mark.parametrize("kind", ["s4d", "s4"])
def test_plain_models_train_as_the_fast_ones(kind: str, assert_near: Near):
    tokens = torch.randint(0, 256, (2, 33))
    gradients = []
    for name in (kind, f"{kind}, plain"):
        model = reference_model(name, 32)
        model.log_prob(tokens).mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert {kind, f"{kind}, plain"} < set(TRAINED)
    for fast, plain in zip(*gradients, strict=True):
        assert_near(plain, fast, 1e-2)


def test_cost_of_a_layer_is_measured():
    [cost] = measure_costs([Case("s4d", 16, 4096, H=64)])
    assert cost.H == 64
    assert cost.seconds > 0
    output_and_gradient = 2 * 4 * 64 * 4096
    assert cost.bytes is None or cost.bytes > output_and_gradient


def test_slope_is_the_exponent():
    assert slope([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    rows = [
        {"kind": "x", "H": FEATURES, "N": N, "L": L, "seconds": float(N * N * L), "bytes": N * L}
        for N, L in ((1, 1), (1, 4), (2, 1), (2, 4), (4, 4), (2, 16))
    ]
    rows[0] |= {"seconds": 1e3, "bytes": 1e3}  # the constant cost of small sizes
    table = growth([*rows, {**rows[0], "H": 99, "N": 99}])
    assert table["x in N, L 4"] == pytest.approx({"time": 2.0, "memory": 1.0})
    assert table["x in L, N 2"] == pytest.approx({"time": 1.0, "memory": 1.0})


def test_advantage_is_that_of_equal_sizes():
    costs = [
        {"kind": kind, "H": 8, "N": N, "L": 4, "seconds": seconds, "bytes": size}
        for kind, N, seconds, size in (
            ("lssl", 2, 6.0, 100), ("s4", 2, 2.0, 50), ("s4d", 2, 1.0, 1), ("s4", 3, 1.0, 1),
            ("lssl", 4, 6.0, None), ("s4", 4, 1.0, None),
        )
    ]  # fmt: skip
    assert advantage(costs) == [
        {"H": 8, "N": 2, "L": 4, "time": 3.0, "memory": 2.0},
        {"H": 8, "N": 4, "L": 4, "time": 6.0, "memory": None},
    ]


def test_marks_are_ratios_of_one_shape():
    speeds = {"s4d": 10.0, "s4": 7.0, "s4d, plain": 2.0, "s4, plain": 1.0}
    rows = [
        {"layer": layer, "batch": 8, "length": 16, "tokens_per_second": speed}
        for layer, speed in speeds.items()
    ]
    assert marks(rows) == {"S4D over plain S4D, 8 × 16": 5.0, "S4 over S4D, 8 × 16": 0.7}


def test_costs_are_compared_where_the_published_ones_are():
    cases = cost_cases("cpu", small=False)
    assert {(c.kind, c.H, c.N) for c in cases if c.H == c.N} == {
        (kind, N, N) for kind in ("lssl", "s4", "s4d") for N in (128, 256, 512)
    }
    assert {(c.N, c.L) for c in cases if c.kind == "lssl" and c.H == FEATURES} == {
        (N, L) for N in (64, 128, 256) for L in (1024, 4096, 16384)
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("kind", LAYERS)
def test_views_agree_at_length_65536(kind: str, dtype: torch.dtype, tolerance: float):
    difference = measure_difference(kind, 16, dtype, 65536)
    assert max(difference.prefill, difference.step) < tolerance


@pytest.mark.slow
def test_benchmark_writes_all_figures(tmp_path: Path):
    out = tmp_path / "layers.json"
    result = CliRunner().invoke(app, ["benchmark", "layers", "--small", "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(out.read_text())
    assert {cost["kind"] for cost in facts["cost"]} == {"lssl", "s4", "s4d"}
    assert all(speed["tokens_per_second"] > 0 for speed in facts["reading"])
    assert facts["advantage"][0]["time"] > 0
    assert set(facts["marks"]) == {"S4D over plain S4D, 1 × 256", "S4 over S4D, 1 × 256"}
    assert all(speed["tokens_per_second"] > 0 for speed in facts["training"])
    assert all(d["step"] < 1e-3 for d in facts["agreement"])
    assert facts["machine"]["threads"] == torch.get_num_threads()
    again = CliRunner().invoke(app, ["benchmark", "layers", "--out", str(out)])
    assert again.exit_code == 2
    assert "exists" in again.stderr
