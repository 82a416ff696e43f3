"""The state space layers: one map, computed by convolution, step by step and in chunks."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from genssm import hippo
from genssm.layers import LAYERS, LSSL, S4, S4D, StateSpace, TrainedLayer
from genssm.recurrence import Recurrence

Near = Callable[[Tensor, Tensor, float], None]
Reference = Callable[[np.ndarray, np.ndarray, float, str], tuple[np.ndarray, np.ndarray]]
L_MAX = 100
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


def make(name: str, dtype: torch.dtype = torch.float64, H: int = 4, N: int = 8) -> TrainedLayer:
    return LAYERS[name](H, N, L_MAX, dt_min=1e-3, dt_max=1e-1).to(dtype)


def by_steps(layer: Recurrence, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    ys = []
    for t in range(u.shape[1]):
        y, x = layer.step(u[:, t], x)
        ys.append(y)
    return torch.stack(ys, 1), x


@pytest.fixture(params=TOLERANCES, ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=LAYERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
@torch.no_grad()
def test_step_and_prefill_match_convolution(
    name: str, dtype: torch.dtype, length: int, assert_near: Near
):
    """300 is also longer than the length that S4 is parametrised for."""
    layer = make(name, dtype)
    u = torch.randn(2, length, 4, dtype=dtype)
    expected = layer(u)
    recurrent = layer.to_recurrent()
    y, x = by_steps(recurrent, u, recurrent.initial_state(2))
    assert_near(y, expected, TOLERANCES[dtype])
    y, prefilled = recurrent.prefill(u, recurrent.initial_state(2))
    assert_near(y, expected, TOLERANCES[dtype])
    assert_near(prefilled, x, TOLERANCES[dtype])


@pytest.mark.parametrize("cuts", [(1,), (63, 64), (64, 128), (10, 10, 75), (0, 149, 150)])
@torch.no_grad()
def test_prefill_in_pieces_matches_convolution(
    name: str, dtype: torch.dtype, cuts: tuple[int, ...], assert_near: Near
):
    layer = make(name, dtype)
    u = torch.randn(2, 150, 4, dtype=dtype)
    recurrent = layer.to_recurrent()
    x, ys = recurrent.initial_state(2), []
    for piece in u.tensor_split(cuts, 1):
        y, x = recurrent.prefill(piece, x)
        ys.append(y)
    assert_near(torch.cat(ys, 1), layer(u), TOLERANCES[dtype])


@pytest.mark.parametrize("length", [0, 1, 64, 70])
@torch.no_grad()
def test_prefill_from_any_state_matches_steps(
    name: str, dtype: torch.dtype, length: int, assert_near: Near
):
    recurrent = make(name, dtype).to_recurrent()
    x = torch.randn_like(recurrent.initial_state(2))
    u = torch.randn(2, length + 1, 4, dtype=dtype)
    expected, last = by_steps(recurrent, u, x)
    y, middle = recurrent.prefill(u[:, :length], x)
    assert_near(y, expected[:, :length], TOLERANCES[dtype])
    y, end = recurrent.step(u[:, length], middle)
    assert_near(y, expected[:, length], TOLERANCES[dtype])
    assert_near(end, last, TOLERANCES[dtype])


@torch.no_grad()
def test_rows_of_a_batch_do_not_mix(name: str):
    layer = make(name)
    recurrent = layer.to_recurrent()
    u = torch.randn(3, 70, 4, dtype=torch.float64)
    joint, _ = recurrent.prefill(u, recurrent.initial_state(3))
    for row in range(3):
        alone, _ = recurrent.prefill(u[row : row + 1], recurrent.initial_state(1))
        torch.testing.assert_close(joint[row], alone[0])
        torch.testing.assert_close(layer(u)[row], layer(u[row : row + 1])[0])


@torch.no_grad()
def test_layer_is_causal(name: str):
    layer = make(name)
    u = torch.randn(1, 40, 4, dtype=torch.float64)
    changed = u.clone()
    changed[:, 25:] += 1
    before, after = layer(u), layer(changed)
    torch.testing.assert_close(after[:, :25], before[:, :25])
    assert float((after[:, 25] - before[:, 25]).abs().min()) > 1e-3


@pytest.mark.parametrize(
    ("measure", "tolerance"),
    [
        ("legs", 3e-6),  # the parameters of the layer began as float32
        ("lagt", 3e-6),
        ("legt", 0.03),  # the normal part has no decay, so that of a layer is set to a small one
        ("fourier", 0.03),
    ],
)
@torch.no_grad()
def test_s4_discretises_hippo_as_scipy_does(measure: str, tolerance: float, by_scipy: Reference):
    """⟨Āⁱ B̄, Āʲ B̄⟩ does not depend on the basis, and fixes (Ā, B̄) up to a rotation."""
    N, steps = 16, 40
    layer = S4(3, N, measure=measure, l_max=L_MAX, dt_min=1e-3, dt_max=0.1).double()
    recurrent = layer.to_recurrent()
    A, B = hippo.operator(measure, N)
    impulse = torch.zeros(1, steps, 3, dtype=torch.float64)
    impulse[:, 0] = 1
    states, x = [], recurrent.initial_state(1)
    for t in range(steps):
        _, x = recurrent.step(impulse[:, t], x)
        states.append(x[0])
    krylov = torch.stack(states, 1)  # (H, steps, n)
    for h in range(3):
        dt = math.exp(float(layer.log_dt[h]))
        A_bar, B_bar = by_scipy(A.numpy(), B.numpy(), dt, "bilinear")
        dense = [B_bar]
        for _ in range(steps - 1):
            dense.append(A_bar @ dense[-1])
        gram = np.stack(dense) @ np.stack(dense).T
        pairs = 2 * (krylov[h] @ krylov[h].mH).real
        np.testing.assert_allclose(pairs.numpy(), gram, atol=tolerance * np.abs(gram).max())


@torch.no_grad()
def test_lssl_discretises_hippo_as_scipy_does(by_scipy: Reference):
    layer = LSSL(3, 8).double()
    recurrent = layer.to_recurrent()
    A, B = hippo.legs(8)
    for h in range(3):
        A_bar, B_bar = by_scipy(A.numpy(), B.numpy(), math.exp(float(layer.log_dt[h])), "bilinear")
        np.testing.assert_allclose(recurrent.A[h].numpy(), A_bar, atol=1e-6)
        np.testing.assert_allclose(recurrent.b[h].numpy(), B_bar, atol=1e-6)


@torch.no_grad()
def test_lssl_and_s4_are_the_same_map(assert_near: Near):
    """The dense and the structured form of HiPPO-LegS, with the C that fits the basis of each."""
    lssl, s4 = LSSL(3, 8).double(), S4(3, 8, l_max=L_MAX).double()
    for parameter, value in ((s4.log_dt, lssl.log_dt), (lssl.D, torch.zeros(3)), (s4.D, lssl.D)):
        parameter.copy_(value)
    impulse = torch.zeros(20, 1, 3, dtype=torch.float64)
    impulse[0] = 1
    recurrent, states = lssl.to_recurrent(), []
    x = recurrent.initial_state(1)
    for u in impulse:
        _, x = recurrent.step(u, x)
        states.append(x[0])
    kernel = s4(impulse.transpose(0, 1))[0].mT[..., None]  # (H, 20, 1)
    lssl.C.copy_(torch.linalg.lstsq(torch.stack(states, 1), kernel).solution[..., 0])
    u = torch.randn(2, 90, 3, dtype=torch.float64)
    assert_near(lssl(u), s4(u), 1e-3)  # the parameters of S4 began as float32


@pytest.mark.parametrize("init", ["lin", "inv"])
@torch.no_grad()
def test_s4d_discretises_by_zero_order_hold_as_scipy_does(init: str, by_scipy: Reference):
    layer = S4D(3, 8, init=init).double()
    recurrent = layer.to_recurrent()
    Lambda = layer.Lambda()
    for h in range(3):
        real_blocks = [np.array([[z.real, -z.imag], [z.imag, z.real]]) for z in Lambda[h].tolist()]
        A = np.asarray(scipy.linalg.block_diag(*real_blocks))
        B = np.tile([1.0, 0.0], 4)
        A_bar, B_bar = by_scipy(A, B, math.exp(float(layer.log_dt[h])), "zoh")
        diagonal = torch.view_as_real(recurrent.a[h])  # real and imaginary part of each mode
        np.testing.assert_allclose(diagonal.flatten().numpy(), A_bar[:, ::2].sum(1), rtol=1e-9)
        b = torch.view_as_real(recurrent.b[h]).flatten()
        np.testing.assert_allclose(b.numpy(), B_bar, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("init", "frequencies"),
    [
        ("lin", [math.pi * n for n in range(4)]),
        ("inv", [8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)]),
    ],
)
def test_s4d_starts_at_the_published_eigenvalues(init: str, frequencies: list[float]):
    Lambda = S4D(2, 8, init=init).Lambda().detach()
    for h in range(2):
        torch.testing.assert_close(Lambda[h].real, torch.full((4,), -0.5))
        torch.testing.assert_close(Lambda[h].imag, torch.tensor(frequencies))


@torch.no_grad()
def test_intervals_start_within_their_range(name: str):
    dt = LAYERS[name](500, 2, 8, dt_min=0.01, dt_max=0.2).log_dt.exp()
    assert float(dt.min()) >= 0.01 * (1 - 1e-6)
    assert float(dt.max()) <= 0.2 * (1 + 1e-6)
    assert float(dt.max() / dt.min()) > 15  # spread over the whole range


@pytest.mark.parametrize("value", [-1e3, -30.0, 30.0, 1e3])
@torch.no_grad()
def test_every_mode_decays_whatever_the_parameters(name: str, value: float):
    layer = make(name, torch.float32)
    for parameter in layer.parameters():
        parameter.fill_(value)
    if isinstance(layer, LSSL):
        assert float(torch.linalg.eigvals(layer.A().double()).real.max()) < 0
    else:
        assert isinstance(layer, StateSpace)
        assert bool((layer.Lambda().real < 0).all())


@torch.no_grad()
def test_recurrence_is_stable_for_wild_parameters(name: str):
    layer = make(name, H=64)
    for parameter in layer.parameters():
        parameter.copy_(3 * torch.randn_like(parameter))
    recurrent = layer.to_recurrent()
    assert float(torch.linalg.eigvals(recurrent.advance).abs().max()) < 1  # of Ā^64
    assert bool(layer.kernel(50).isfinite().all())


@torch.no_grad()
def test_long_run_stays_bounded(name: str, dtype: torch.dtype):
    recurrent = make(name, dtype, H=2, N=4).to_recurrent()
    noise = torch.rand(1, 20_000, 2, dtype=dtype) - 0.5
    y, x = recurrent.prefill(noise, recurrent.initial_state(1))
    assert float(y[:, 10_000:].abs().max()) < 2 * float(y[:, :10_000].abs().max())
    _, x_after = recurrent.prefill(torch.zeros_like(noise), x)
    assert float(x_after.abs().max()) < 1e-3 * float(x.abs().max())


def test_bfloat16_autocast_gives_finite_float32_and_gradients(name: str):
    layer = make(name, torch.float32)
    u = torch.randn(2, 80, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(u.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer(u.bfloat16().float()))
    y.square().mean().backward()
    for leaf in (u, *(p for p in layer.parameters() if p.requires_grad)):
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())
        assert float(leaf.grad.abs().max()) > 0


def test_dynamics_names_the_parameters_that_are_not_output_maps(name: str):
    layer = make(name)
    assert {name for name, _ in layer.named_parameters()} - set(layer.dynamics) == {"C", "D"}


def test_converted_layer_no_longer_follows_the_trained_one(name: str):
    layer = make(name)
    recurrent = layer.to_recurrent()
    u, x = torch.randn(1, 4, dtype=torch.float64), recurrent.initial_state(1)
    before, _ = recurrent.step(u, x)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    assert torch.equal(recurrent.step(u, x)[0], before)
    assert not before.requires_grad


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: S4D(0, 4), "d_model must be at least 1, got 0"),
        (lambda: S4D(2, 3), "d_state must be even and at least 2, got 3"),
        (lambda: S4D(2, 0), "d_state must be even and at least 2, got 0"),
        (lambda: S4D(2, 4, init="legs"), "one of lin, inv; got 'legs'"),
        (lambda: S4(0, 4), "d_model must be at least 1, got 0"),
        (lambda: S4(2, 3), "even, got 3"),
        (lambda: S4(2, 4, l_max=0), "l_max must be at least 1, got 0"),
        (lambda: S4(2, 4, measure="hermite"), "measure must be one of legs, .* got 'hermite'"),
        (lambda: S4(2, 4, dt_min=0.0), "0 < dt_min <= dt_max"),
        (lambda: S4D(2, 4, dt_min=0.2, dt_max=0.1), "0 < dt_min <= dt_max"),
    ],
)
def test_bad_settings_are_refused(build: Callable[[], TrainedLayer], message: str):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("rate", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", LAYERS)
def test_both_views_at_a_rate_are_those_of_the_scaled_interval(name, rate, assert_near):
    layer = LAYERS[name](3, 8, 40, dt_min=1e-2, dt_max=1e-1).double()
    u = torch.randn(2, 40, 3, dtype=torch.float64)
    recurrent = layer.to_recurrent(rate)
    prefilled, _ = recurrent.prefill(u, recurrent.initial_state(2))
    assert_near(layer(u, rate), prefilled, 1e-9)
    if name not in ("s4", "s4-fourier"):  # these store C for one interval
        scaled = copy.deepcopy(layer)
        with torch.no_grad():
            scaled.log_dt += math.log(rate)
        assert_near(scaled(u), prefilled, 1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_a_slow_signal_means_the_same_at_half_the_rate(name, assert_near):
    """A constant input drives the layer to the same output after the same time."""
    layer = LAYERS[name](3, 8, 64, dt_min=1e-2, dt_max=2e-2).double()
    ones = torch.ones(1, 64, 3, dtype=torch.float64)
    assert_near(layer(ones[:, :32], 2.0)[:, -1], layer(ones)[:, -1], 0.05)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_not_positive_is_refused(rate):
    with pytest.raises(ValueError, match="the rate must be positive"):
        LAYERS["s4d"](3, 8, 40).to_recurrent(rate)
