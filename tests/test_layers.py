"""The state space layers: one map, computed by convolution, step by step and in chunks."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from genssm import hippo, ssm
from genssm.layers import LAYERS, LSSL, S4, S4D, StateSpace, TrainedLayer, build_layer
from genssm.recurrence import Recurrence

Near = Callable[[Tensor, Tensor, float], None]
Reference = Callable[[np.ndarray, np.ndarray, float, str], tuple[np.ndarray, np.ndarray]]
L_MAX = 100
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


def make(name: str, dtype: torch.dtype = torch.float64, H: int = 4, N: int = 8) -> TrainedLayer:
    return build_layer(name, H, N, L_MAX, dt_min=1e-3, dt_max=1e-1).to(dtype)


def by_steps(layer: Recurrence, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    ys = []
    for t in range(u.shape[1]):
        y, x = layer.step(u[:, t], x)
        ys.append(y)
    return torch.stack(ys, 1), x


def assert_views_agree(layer: TrainedLayer, u: Tensor, expected: Tensor, assert_near: Near) -> None:
    """Stepping and reading give what the convolution gave, and end in one state."""
    recurrent, tolerance = layer.to_recurrent(), TOLERANCES[u.dtype]
    y, x = by_steps(recurrent, u, recurrent.initial_state(2))
    assert_near(y, expected, tolerance)
    y, prefilled = recurrent.prefill(u, recurrent.initial_state(2))
    assert_near(y, expected, tolerance)
    assert_near(prefilled, x, tolerance)


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
    assert_views_agree(layer, u, expected, assert_near)


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
        ("legs", hippo.normal_plus_low_rank("legs", 8).Lambda.imag.tolist()),
    ],
)
@pytest.mark.parametrize("decay", ["exp", "softplus"])
def test_s4d_starts_at_the_published_eigenvalues(init: str, frequencies: list[float], decay: str):
    Lambda = S4D(2, 8, init=init, decay=decay).Lambda().detach()
    for h in range(2):
        torch.testing.assert_close(Lambda[h].real, torch.full((4,), -0.5))
        torch.testing.assert_close(Lambda[h].imag, torch.tensor(frequencies))


@pytest.mark.parametrize("decay", ["exp", "softplus"])
def test_s4d_real_starts_and_stays_real(decay: str):
    layer = S4D(2, 8, init="real", decay=decay)
    expected = torch.tensor([-1.0, -2.0, -3.0, -4.0]) + 0j
    torch.testing.assert_close(layer.Lambda().detach(), expected.expand(2, 4))
    assert not layer.frequency.requires_grad


@torch.no_grad()
def test_intervals_start_within_their_range(name: str):
    dt = build_layer(name, 500, 2, 8, dt_min=0.01, dt_max=0.2).log_dt.exp()
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
    assert layer.to_recurrent().spectral_radius() < 1
    assert bool(layer.kernel(50).isfinite().all())


@torch.no_grad()
def test_long_run_stays_bounded(name: str, dtype: torch.dtype):
    recurrent = make(name, dtype, H=2, N=4).to_recurrent()
    noise = torch.rand(1, 20_000, 2, dtype=dtype) - 0.5
    y, x = recurrent.prefill(noise, recurrent.initial_state(1))
    assert float(y[:, 10_000:].abs().max()) < 2 * float(y[:, :10_000].abs().max())
    _, x_after = recurrent.prefill(torch.zeros_like(noise), x)
    assert float(x_after.abs().max()) < 1e-3 * float(x.abs().max())


@torch.no_grad()
def test_the_recurrence_is_not_rounded_by_autocast(name: str):
    recurrent = make(name, torch.float32).to_recurrent()
    u = torch.randn(2, 80, 4).bfloat16()
    x = recurrent.initial_state(2)
    expected = recurrent.prefill(u.float(), x)
    stepped = recurrent.step(u[:, 0].float(), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, recurrent.prefill(u, x), expected))
        assert all(map(torch.equal, recurrent.step(u[:, 0], x), stepped))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_of_half_the_precision_is_refused(name: str, dtype: torch.dtype):
    layer = make(name, dtype)
    for use in (lambda: layer(torch.zeros(1, 5, 4, dtype=dtype)), layer.to_recurrent):
        with pytest.raises(ValueError, match=f"need float32 or float64, got {dtype}; leave the"):
            use()


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
        (lambda: S4D(2, 4, init="legt"), "one of lin, inv, legs, real; got 'legt'"),
        (lambda: S4(0, 4), "d_model must be at least 1, got 0"),
        (lambda: S4(2, 3), "even, got 3"),
        (lambda: S4(2, 4, l_max=0), "l_max must be at least 1, got 0"),
        (lambda: S4(2, 4, measure="hermite"), "measure must be one of legs, .* got 'hermite'"),
        (lambda: S4(2, 0), "state size N must be an integer of at least 1, got 0"),
        (lambda: LSSL(2, 0), "state size N must be an integer of at least 1, got 0"),
        (lambda: LSSL(0, 4), "d_model must be at least 1, got 0"),
        (lambda: LSSL(2, 4, dt_min=-0.1), "0 < dt_min <= dt_max"),
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
    layer = build_layer(name, 3, 8, 40, dt_min=1e-2, dt_max=1e-1).double()
    u = torch.randn(2, 40, 3, dtype=torch.float64)
    recurrent = layer.to_recurrent(rate)
    prefilled, _ = recurrent.prefill(u, recurrent.initial_state(2))
    assert_near(layer(u, rate), prefilled, 1e-9)
    if not isinstance(layer, S4):  # which stores C for one interval
        scaled = copy.deepcopy(layer)
        with torch.no_grad():
            scaled.log_dt += math.log(rate)
        assert_near(scaled(u), prefilled, 1e-9)


@pytest.mark.parametrize("rate", [0.5, 3.0])
@torch.no_grad()
def test_a_recurrence_reads_and_steps_at_any_rate(name: str, rate: float, assert_near: Near):
    """As one that was converted at that rate, and as the convolution; from one of another rate."""
    layer = make(name)
    u = torch.randn(2, 80, 4, dtype=torch.float64)
    expected = layer(u, rate)
    for recurrent, factor in ((layer.to_recurrent(), rate), (layer.to_recurrent(4.0), rate / 4)):
        x = recurrent.initial_state(2)
        prefilled, _ = recurrent.prefill(u[:, :70], x, factor)
        assert_near(prefilled, expected[:, :70], 1e-9)
        for t in range(80):
            y, x = recurrent.step(u[:, t], x, factor)
            assert_near(y, expected[:, t], 1e-6)


@torch.no_grad()
def test_a_rate_is_converted_once_and_only_when_it_is_asked_for(name: str):
    layer = make(name)
    recurrent = layer.to_recurrent()
    u, x = torch.randn(1, 4, dtype=torch.float64), recurrent.initial_state(1)
    expected, _ = layer.to_recurrent(2.0).step(u, x)
    assert not recurrent._rates
    layer.log_dt.add_(1)  # which a converted layer does not follow, at no rate
    y, _ = recurrent.step(u, x, 2.0)
    torch.testing.assert_close(y, expected)
    assert recurrent.at(2.0) is recurrent.at(2.0)
    assert list(recurrent._rates) == [2.0]


@torch.no_grad()
def test_tables_are_made_when_a_prompt_is_read(name: str):
    recurrent = make(name).to_recurrent()
    x = recurrent.initial_state(2)
    u = torch.randn(2, 70, 4, dtype=torch.float64)
    recurrent.step(u[:, 0], x)
    recurrent.prefill(u[:, :1], x)
    recurrent.prefill(u[:, :0], x)
    assert recurrent._tables is None
    recurrent.prefill(u, x)
    assert recurrent.tables() is recurrent.tables()
    recurrent.to("cpu")  # or elsewhere
    assert recurrent._tables is None


@pytest.mark.parametrize("name", LAYERS)
def test_a_slow_signal_means_the_same_at_half_the_rate(name, assert_near):
    """A constant input drives the layer to the same output after the same time."""
    layer = build_layer(name, 3, 8, 64, dt_min=1e-2, dt_max=2e-2).double()
    ones = torch.ones(1, 64, 3, dtype=torch.float64)
    assert_near(layer(ones[:, :32], 2.0)[:, -1], layer(ones)[:, -1], 0.05)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_not_positive_is_refused(rate):
    layer = build_layer("s4d", 3, 8, 40)
    u, x = torch.zeros(1, 3), layer.to_recurrent().initial_state(1)
    for use in (
        lambda: layer.to_recurrent(rate),
        lambda: layer(u[None], rate),
        lambda: layer.to_recurrent().step(u, x, rate),
        lambda: layer.to_recurrent().prefill(u[None], x, rate),
    ):
        with pytest.raises(ValueError, match="the rate must be positive"):
            use()


# Settings: whatever they are, the views agree

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "s4 with shared copies": ("s4", {"n_ssm": 2}),
    "s4 with channels": ("s4", {"channels": 3}),
    "s4 of rank 2 with channels and one copy": ("s4-legt", {"channels": 2, "n_ssm": 1}),
    "s4 without truncation": ("s4", {"truncated": False}),
    "s4 with softplus": ("s4", {"decay": "softplus"}),
    "s4 with a frozen B": ("s4", {"train_B": False}),
    "s4d with shared copies": ("s4d", {"n_ssm": 1}),
    "s4d with channels": ("s4d-inv", {"channels": 3, "n_ssm": 2}),
    "s4d bilinear": ("s4d", {"discretization": "bilinear"}),
    "s4d real with softplus": ("s4d-real", {"decay": "softplus"}),
    "lssl with channels": ("lssl", {"channels": 3}),
    "lssl with a trained A": ("lssl", {"train_A": True}),
    "one range of dt per feature": ("s4d", {"dt_min": [1e-3, 1e-2, 0.1, 1.0], "dt_max": 1.0}),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, dtype: torch.dtype) -> TrainedLayer:
    kind, settings = VARIANTS[request.param]
    return build_layer(kind, 4, 8, L_MAX, **settings).to(dtype)


@torch.no_grad()
def test_views_of_every_variant_agree(variant: TrainedLayer, dtype: torch.dtype, assert_near: Near):
    u = torch.randn(2, 150, 4, dtype=dtype)
    expected = variant(u)
    assert expected.shape == (2, 150, 4 * variant.channels)
    assert_views_agree(variant, u, expected, assert_near)


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0])
@torch.no_grad()
def test_continuous_view_discretised_is_the_convolution(name: str, rate: float, assert_near: Near):
    layer = make(name)
    A, B, C, D = layer.to_continuous(rate)
    u = torch.randn(1, 50, 4, dtype=torch.float64)
    method = "zoh" if isinstance(layer, S4D) else "bilinear"
    times = torch.arange(1, 51, dtype=torch.float64)
    for h in range(4):
        y = ssm.simulate(A[h], B[h], C[h], D[h], u[0, :, h], times, method)
        assert_near(y[0], layer(u, rate)[0, :, h], 1e-6)


@torch.no_grad()
def test_rate_is_a_finer_grid_of_the_same_continuous_system(assert_near: Near):
    """Zero-order hold is exact, so half the interval and each input twice change nothing."""
    layer = make("s4d")
    u = torch.randn(1, 40, 4, dtype=torch.float64)
    fine = layer(u.repeat_interleave(2, 1), 0.5)
    assert_near(fine[:, 1::2], layer(u), 1e-9)


@torch.no_grad()
def test_kernel_of_a_truncated_layer_is_that_of_its_own_c(assert_near: Near):
    """Storing C̃ or C is the same layer: also beyond l_max, and at another rate."""
    truncated = S4(3, 8, l_max=20).double()
    endless = S4(3, 8, l_max=20, truncated=False).double()
    endless.load_state_dict(truncated.state_dict())
    endless.C.copy_(torch.view_as_real(truncated._solve_output().flatten(0, 1)))
    for length, rate in ((20, 1.0), (7, 1.0), (90, 1.0), (33, 0.5)):
        assert_near(truncated.kernel(length, rate), endless.kernel(length, rate), 1e-9)


def test_kernels_longer_than_l_max_leave_the_parameters_alone():
    layer = S4(2, 8, l_max=16)
    before = copy.deepcopy(layer.state_dict())
    layer.kernel(100)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_gradients_of_an_endless_kernel_are_those_of_differences():
    layer = S4(1, 4, l_max=6, truncated=False).double()

    def kernel(log_dt: Tensor, C: Tensor) -> Tensor:
        parameters = {"log_dt": log_dt, "C": C}
        return torch.func.functional_call(layer, parameters, torch.ones(1, 9, 1).double())

    inputs = tuple(p.detach().clone().requires_grad_() for p in (layer.log_dt, layer.C))
    assert torch.autograd.gradcheck(kernel, inputs)


@pytest.mark.parametrize(("length", "rate"), [(9, 1.0), (5, 2.0)])
def test_gradients_of_a_truncated_kernel_are_those_of_differences(length: int, rate: float):
    """Beyond l_max and at another rate, too, where C is solved for."""
    layer = S4(1, 4, l_max=6).double()

    def kernel(log_dt: Tensor, log_decay: Tensor, C: Tensor) -> Tensor:
        parameters = {"log_dt": log_dt, "log_decay": log_decay, "C": C}
        impulse = torch.ones(1, length, 1).double()
        return torch.func.functional_call(layer, parameters, (impulse, rate))

    inputs = tuple(
        p.detach().clone().requires_grad_() for p in (layer.log_dt, layer.log_decay, layer.C)
    )
    assert torch.autograd.gradcheck(kernel, inputs)


@pytest.mark.parametrize("kind", ["s4", "s4-legt"])
@torch.no_grad()
def test_an_output_is_brought_to_another_length(kind: str, assert_near: Near):
    before = build_layer(kind, 4, 8, 20, channels=2, n_ssm=2).double()
    u = torch.randn(1, 60, 4, dtype=torch.float64)
    for length, truncated in ((50, True), (7, True), (20, False)):
        after = build_layer(kind, 4, 8, length, channels=2, n_ssm=2, truncated=truncated).double()
        after.load_state_dict(before.state_dict())
        after.load_output(before)
        assert_near(after(u), before(u), 1e-9)


@torch.no_grad()
def test_shared_copies_share_their_dynamics():
    layer = S4D(6, 4, n_ssm=2)
    assert layer.log_decay.shape == (2, 2)
    layer.frequency[1] += 1
    Lambda = layer.Lambda()
    assert bool((Lambda[:3] == Lambda[0]).all())
    assert bool((Lambda[3:] == Lambda[5]).all())
    assert not bool((Lambda[0] == Lambda[5]).any())


@pytest.mark.parametrize("name", ["s4", "s4d", "lssl"])
@torch.no_grad()
def test_bidirectional_layers_read_both_ways(name: str, assert_near: Near):
    layer = build_layer(name, 3, 8, 40, bidirectional=True).double()
    forward, backward = layer.kernel(30).chunk(2, 1)
    u = torch.randn(2, 30, 3, dtype=torch.float64)
    expected = layer.D * u
    for t in range(30):
        for s in range(30):
            weight = forward[:, 0, t - s] if s <= t else backward[:, 0, s - t - 1]
            expected[:, t] += weight * u[:, s]
    assert_near(layer(u), expected, 1e-9)
    with pytest.raises(ValueError, match="reads the future"):
        layer.to_recurrent()


@torch.no_grad()
def test_kernels_are_kept_in_evaluation_until_a_parameter_changes(name: str, assert_near: Near):
    layer, calls = make(name), []
    kernel = layer.kernel

    def counted(length: int, rate: float = 1.0) -> Tensor:
        calls.append(length)
        return kernel(length, rate)

    layer.kernel = counted
    u = torch.randn(1, 30, 4, dtype=torch.float64)
    first = layer(u)
    assert torch.equal(layer(u), first)
    layer(u[:, :20])
    assert len(calls) == 1
    layer(u, 2.0)
    assert len(calls) == 2
    layer.C.mul_(2)
    changed = layer(u, 1.0)
    assert len(calls) == 3
    assert_near(changed - layer.D * u, 2 * (first - layer.D * u), 1e-9)
    with torch.enable_grad():
        trained = layer(u)
    assert_near(trained.detach(), changed, 1e-9)


def test_kernels_are_not_kept_over_steps_that_torch_does_not_count():
    """A fused optimizer changes parameters in place and leaves their versions as they were."""
    layer, u = make("s4d", torch.float32), torch.randn(1, 30, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        layer(u).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            evaluated = layer(u)
        assert torch.equal(evaluated, copy.deepcopy(layer)(u))


@torch.no_grad()
def test_kernels_follow_changes_that_torch_does_not_count():
    layer, u = make("s4d"), torch.randn(1, 30, 4, dtype=torch.float64)
    before = layer(u) - layer.D * u
    layer.C.data.mul_(2)
    torch.testing.assert_close(layer(u) - layer.D * u, 2 * before)
    layer.C.numpy()[:] *= 2
    torch.testing.assert_close(layer(u) - layer.D * u, 4 * before)
    assert layer.float()(u.float()).dtype == torch.float32


def test_copies_leave_the_kept_kernel_behind(name: str):
    layer, u = make(name), torch.randn(1, 2048, 4, dtype=torch.float64)
    recurrent = layer.to_recurrent()
    sizes = [len(pickle.dumps(made)) for made in (layer, recurrent)]
    with torch.no_grad():
        layer(u)
    assert [len(pickle.dumps(made)) for made in (layer, layer.to_recurrent())] == sizes


def test_a_recurrence_can_be_sent_to_another_process(name: str):
    recurrent, u = make(name).to_recurrent(), torch.randn(2, 4, dtype=torch.float64)
    copied = pickle.loads(pickle.dumps(recurrent))
    state = recurrent.initial_state(2)
    for rate in (1.0, 0.5):
        assert torch.equal(copied.step(u, state, rate)[0], recurrent.step(u, state, rate)[0])


@torch.no_grad()
def test_kernels_follow_buffers():
    layer, u = make("lssl"), torch.randn(1, 30, 4, dtype=torch.float64)
    before = layer(u) - layer.D * u
    layer.get_buffer("B").mul_(2)
    torch.testing.assert_close(layer(u) - layer.D * u, 2 * before)


def test_layers_made_in_inference_mode_convolve(name: str):
    u = torch.randn(1, 30, 4)
    with torch.inference_mode():
        layer = make(name, torch.float32)
        assert torch.equal(layer(u), copy.deepcopy(layer)(u))


# What float32 costs a gradient, of its norm. Modes that hardly decay cancel in S4's kernel.
@pytest.mark.parametrize("dt", [None, 1e-3])
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_of_float32_are_those_of_float64(name: str, seed: int, dt: float | None):
    torch.manual_seed(seed)
    interval = {} if dt is None else {"dt_min": dt, "dt_max": dt}
    layer = build_layer(name, 8, 32, 1024, **interval)
    u, weights = torch.randn(2, 1, 1024, 8)
    exact = copy.deepcopy(layer).double()
    (layer(u) * weights).sum().backward()
    (exact(u.double()) * weights.double()).sum().backward()
    for (which, p), q in zip(layer.named_parameters(), exact.parameters(), strict=True):
        if p.requires_grad:
            assert p.grad is not None, which
            assert q.grad is not None, which
            assert float((p.grad.double() - q.grad).norm() / q.grad.norm()) < 2e-4, which


@pytest.mark.parametrize("kind", ["s4d", "s4", "s4-fourier"])
@torch.no_grad()
def test_kernels_keep_the_phase_of_modes_that_last(kind: str):
    layer = build_layer(kind, 4, 64, 16_384)
    layer.get_parameter("log_decay").fill_(math.log(1e-4))
    kernel, exact = layer.kernel(16_384), copy.deepcopy(layer).double().kernel(16_384)
    assert float((kernel.double() - exact).abs().max() / exact.abs().max()) < 5e-6


@torch.no_grad()
def test_a_kernel_that_another_thread_replaces_is_not_taken_for_the_own():
    """The other one comes between the comparison of the keys, of which a rate is a part, and the
    use of the kernel."""
    layer = make("s4d")
    u = torch.randn(1, 30, 4, dtype=torch.float64)
    expected = layer(u)

    class Interrupting(float):
        def __eq__(self, other: object) -> bool:
            layer(u[:, :5], 2.0)
            return float(self) == other

        __hash__ = float.__hash__

    assert torch.equal(layer(u, Interrupting(1.0)), expected)


@pytest.mark.parametrize(
    ("u", "message"),
    [
        (torch.zeros(2, 5, 3), r"\(B, L, 4\) with B, L >= 1; got \(2, 5, 3\)"),
        (torch.zeros(5, 4), r"got \(5, 4\)"),
        (torch.zeros(2, 0, 4), r"got \(2, 0, 4\)"),
        (torch.zeros(0, 5, 4), r"got \(0, 5, 4\)"),
        (torch.zeros(2, 5, 4) + 0j, "complex64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(name: str, u: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        make(name, torch.float32)(u)


@pytest.mark.parametrize(
    ("u", "rows", "message"),
    [
        (torch.zeros(2, 3), 2, r"with H = 4; got \(2, 3\)"),
        (torch.zeros(2, 4) + 0j, 2, "must be real.*complex64"),
        (torch.zeros(2, 4), 3, r"state must be of shape \(2, 4, \d+\); got \(3, 4, "),
    ],
)
def test_recurrences_refuse_what_does_not_fit(name: str, u: Tensor, rows: int, message: str):
    recurrent = make(name, torch.float32).to_recurrent()
    x = recurrent.initial_state(rows)
    with pytest.raises(ValueError, match=message):
        recurrent.step(u, x)
    with pytest.raises(ValueError, match=message.replace(r"\(2, 3\)", r"\(2, 5, 3\)")):
        recurrent.prefill(u[:, None].repeat(1, 5, 1), x)
    with pytest.raises(ValueError, match="with H = 4"):
        recurrent.prefill(torch.zeros(2, 4), x)


@pytest.mark.parametrize("length", [0, -1])
def test_kernels_need_a_length(name: str, length: int):
    with pytest.raises(ValueError, match="must be at least 1, got"):
        make(name).kernel(length)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("s4", {"n_ssm": 3}, "n_ssm must divide d_model, got 3 for 4"),
        ("s4d", {"n_ssm": 0}, "n_ssm must divide"),
        ("s4", {"channels": 0}, "channels must be at least 1, got 0"),
        ("s4", {"n_ssm": "all"}, "n_ssm must be int | None, got 'all'"),
        ("s4d", {"dt_min": ["fast"] * 4}, "dt_min must be float"),
        ("s4d", {"decay": "relu"}, "decay must be one of exp, softplus; got 'relu'"),
        ("s4d", {"discretization": "euler"}, "zoh or bilinear; got 'euler'"),
        ("s4d", {"train_B": False}, "a layer 's4d' has no setting train_B; it has bidirectional"),
        ("s4", {"measure": "legt"}, "a layer 's4' has no setting measure"),
        ("s4d", {"dt_min": [0.1, 0.1]}, "one number, or one for each of 4 features"),
        ("s4d", {"dt_min": [0.1, 0.1, 0.1, -0.1]}, "0 < dt_min <= dt_max"),
        ("gru", {}, "layer must be one of lssl, s4, .*; got 'gru'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(kind: str, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build_layer(kind, 4, 8, 16, **settings)


def test_states_of_another_size_are_refused(name: str):
    recurrent = make(name, torch.float32, N=8).to_recurrent()
    x = recurrent.initial_state(2)[..., :1]
    with pytest.raises(ValueError, match=r"state must be of shape .*, 1\)"):
        recurrent.step(torch.zeros(2, 4), x)


@pytest.mark.parametrize("length", [1, 5, 70])
def test_no_sequences_have_no_outputs(name: str, length: int):
    recurrent = make(name, torch.float32).to_recurrent()
    y, x = recurrent.prefill(torch.zeros(0, length, 4), recurrent.initial_state(0))
    assert y.shape == (0, length, 4)
    assert x.shape == recurrent.initial_state(0).shape
