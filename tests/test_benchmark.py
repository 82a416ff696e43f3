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
    TRAINED,
    Case,
    growth,
    measure_cost,
    measure_difference,
    plain_cauchy,
    plain_vandermonde,
    reference_model,
    slope,
)
from genssm.cli import app

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
    cost = measure_cost(Case("s4d", 16, 4096), repeats=1)
    assert cost.seconds > 0
    assert cost.bytes is None or cost.bytes >= 0


def test_slope_is_the_exponent():
    assert slope([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    rows = [
        {"kind": "x", "N": N, "L": L, "seconds": float(N * N * L), "bytes": N * L}
        for N in (1, 2)
        for L in (1, 4)
    ]
    table = growth(rows)
    assert table["x in N"] == pytest.approx({"time": 2.0, "memory": 1.0})
    assert table["x in L"] == pytest.approx({"time": 1.0, "memory": 1.0})


@pytest.mark.parametrize("kind", ["lssl", "s4", "s4d"])
def test_views_agree_at_length_65536(kind: str):
    difference = measure_difference(kind, 16, torch.float64, 65536)
    assert max(difference.prefill, difference.step) < 1e-9


@pytest.mark.slow
def test_benchmark_writes_all_figures(tmp_path: Path):
    out = tmp_path / "layers.json"
    result = CliRunner().invoke(app, ["benchmark", "layers", "--small", "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(out.read_text())
    assert {cost["kind"] for cost in facts["cost"]} == {"lssl", "s4", "s4d"}
    assert all(speed["tokens_per_second"] > 0 for speed in facts["training"])
    assert all(d["step"] < 1e-3 for d in facts["agreement"])
    assert facts["machine"]["threads"] == torch.get_num_threads()
    again = CliRunner().invoke(app, ["benchmark", "layers", "--out", str(out)])
    assert again.exit_code == 2
    assert "exists" in again.stderr
