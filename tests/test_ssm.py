"""Discretisation, kernels and convolution against SciPy and against the direct sums."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import scipy.integrate
import scipy.signal
import torch
from torch import Tensor

from genssm import hippo, ssm

Near = Callable[[Tensor, Tensor, float], None]
BY_SCIPY = {
    "forward_euler": "euler",
    "backward_euler": "backward_diff",
    "bilinear": "bilinear",
    "zoh": "zoh",
}
Reference = Callable[[np.ndarray, np.ndarray, float, str], tuple[np.ndarray, np.ndarray]]


def stable_system(N: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (N, N), B (N,), C (N,), float64, with A stable."""
    A = torch.randn(N, N, dtype=torch.float64)
    A -= (A.abs().sum() + 1) / N * torch.eye(N, dtype=torch.float64)
    return A, torch.randn(N, dtype=torch.float64), torch.randn(N, dtype=torch.float64)


@pytest.fixture(params=[1, 1 << 20], ids=["slices", "one slice"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features one by one, and all at once."""
    for function in (ssm._FFTConvolution, ssm._Vandermonde):
        monkeypatch.setattr(function, "size", request.param)


def test_every_discretization_is_compared():
    assert set(BY_SCIPY) == set(ssm.DISCRETIZATIONS)


@pytest.mark.parametrize("method", BY_SCIPY)
@pytest.mark.parametrize("N", [1, 2, 7, 16])
def test_discretize_matches_scipy(N: int, method: str, by_scipy: Reference):
    for A, B in [hippo.legs(N), stable_system(N)[:2]]:
        for dt in (1e-3, 0.1, 1.0):
            for actual, expected in zip(
                ssm.discretize(A, B, dt, method),
                by_scipy(A.numpy(), B.numpy(), dt, BY_SCIPY[method]),
                strict=True,
            ):
                np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_generalised_bilinear_rule_matches_scipy(alpha: float):
    A, B = (t.numpy() for t in hippo.legs(5))
    system = (A, B[:, None], np.eye(5), np.zeros((5, 1)))
    expected_A, expected_B, *_ = scipy.signal.cont2discrete(system, 0.1, "gbt", alpha=alpha)
    A_bar, B_bar = ssm.discretize(*hippo.legs(5), 0.1, alpha)
    np.testing.assert_allclose(A_bar.numpy(), expected_A, atol=1e-12)
    np.testing.assert_allclose(B_bar.numpy(), expected_B[:, 0], atol=1e-12)


@pytest.mark.parametrize("method", ssm.DISCRETIZATIONS)
def test_discretize_broadcasts_leading_dimensions(method: str):
    """A batch is its members one by one."""
    A, B = hippo.legs(4)
    dts = torch.tensor([[0.01], [0.1]], dtype=torch.float64)  # (2, 1)
    Bs = torch.stack([B, 2 * B, -B])  # (3, N)
    A_bar, B_bar = ssm.discretize(A, Bs, dts, method)
    assert A_bar.shape == (2, 3, 4, 4)
    assert B_bar.shape == (2, 3, 4)
    for i in range(2):
        for j in range(3):
            expected = ssm.discretize(A, Bs[j], dts[i, 0], method)
            torch.testing.assert_close((A_bar[i, j], B_bar[i, j]), expected)


def test_zero_order_hold_of_an_integrator_needs_no_inverse():
    A_bar, B_bar = ssm.discretize(torch.zeros(1, 1), torch.ones(1), 0.25, "zoh")
    assert (A_bar.item(), B_bar.item()) == (1.0, 0.25)


def test_discretize_refuses_unknown_methods():
    with pytest.raises(ValueError, match=r"one of .*bilinear.*; got 'euler'"):
        ssm.discretize(*hippo.legs(2), 0.1, "euler")


@pytest.mark.parametrize("dt", [0.0, -0.1, float("nan"), float("inf"), torch.tensor([0.1, -1.0])])
def test_discretize_refuses_intervals_that_are_not_positive(dt: float | Tensor):
    with pytest.raises(ValueError, match="dt must be positive"):
        ssm.discretize(*hippo.legs(2), dt)


def test_discretize_refuses_integers():
    with pytest.raises(ValueError, match=r"real or complex numbers, not torch\.int64"):
        ssm.discretize(torch.tensor([[-1]]), torch.tensor([1]), 0.1)


def test_simulations_take_the_widest_dtype():
    A, B = hippo.legs(4)
    C, D, times = torch.ones(1, 4), torch.zeros(1), torch.arange(1, 6)
    u = torch.randn(5)
    expected = ssm.simulate(A, B, C.double(), D.double(), u.double(), times)
    assert torch.equal(ssm.simulate(A, B, C, D, u, times), expected)
    rotated = ssm.simulate(A + 0j, B, C, D, u, times)
    torch.testing.assert_close(rotated, expected + 0j)


@pytest.mark.parametrize(("A", "B"), [((2, 3), (3,)), ((3, 3), (2,)), ((5, 3, 2), (5, 2))])
def test_discretize_refuses_shapes_that_do_not_fit(A: tuple[int, ...], B: tuple[int, ...]):
    with pytest.raises(ValueError, match="A must be"):
        ssm.discretize(torch.zeros(A), torch.zeros(B), 0.1)


@pytest.mark.parametrize("length", [1, 2, 33])
def test_krylov_kernel_convolved_by_fft_matches_a_simulation(length: int):
    """``dlsim`` lets an input act one step later than x_k = Ā x_{k-1} + B̄ u_k does."""
    A, B, C = stable_system(5)
    A_bar, B_bar = ssm.discretize(A, B, 0.1)
    u = torch.randn(2, length, 1, dtype=torch.float64)
    D = torch.tensor([0.7], dtype=torch.float64)
    y = ssm.fft_convolution(u, ssm.krylov_kernel(A_bar, B_bar, C, length)[None, None], D[None])
    CA, CB = C @ A_bar, C @ B_bar + D
    system = (A_bar.numpy(), B_bar[:, None].numpy(), CA[None].numpy(), CB[None].numpy(), 0.1)
    for row in range(2):
        expected = scipy.signal.dlsim(system, u[row, :, 0].numpy())[1][:, 0]
        np.testing.assert_allclose(y[row, :, 0].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_krylov_kernel_takes_leading_dimensions():
    A, B, C = (torch.stack([t, t / 2]) for t in stable_system(3))
    A_bar, B_bar = ssm.discretize(A, B, 0.1)
    kernel = ssm.krylov_kernel(A_bar, B_bar, C, 4)
    for i in range(2):
        expected = [C[i] @ torch.linalg.matrix_power(A_bar[i], k) @ B_bar[i] for k in range(4)]
        torch.testing.assert_close(kernel[i], torch.stack(expected))


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("length", [1, 2, 3, 37, 64, 1000])
@pytest.mark.parametrize("M", [1, 3])
def test_vandermonde_kernel_matches_the_direct_sum(M: int, length: int, assert_near: Near):
    c = torch.randn(3, M, 5, dtype=torch.complex128)
    log_a = torch.complex(-torch.rand(3, 5).double() / 50, 3 * torch.randn(3, 5).double())
    k = torch.arange(length, dtype=torch.float64)
    expected = (c @ torch.exp(log_a[..., None] * k)).real
    assert_near(ssm.vandermonde_kernel(c, log_a, length), expected, 1e-11)
    single = ssm.vandermonde_kernel(c.to(torch.complex64), log_a.to(torch.complex64), length)
    assert single.dtype == torch.float32
    assert_near(single, expected, 1e-3)  # phases of up to 10⁴ radians, rounded to float32


@pytest.mark.parametrize("length", [1, 2, 5, 16, 101, 256])
@pytest.mark.parametrize("N", [2, 4, 16])
@pytest.mark.parametrize("measure", ["legs", "legt"])  # of rank 1 and 2
def test_cauchy_kernel_matches_the_dense_bilinear_system(
    measure: str, N: int, length: int, assert_near: Near
):
    Lambda, P, B = hippo.normal_plus_low_rank(measure, N)
    n, H, M = N // 2, 2, 3
    dt = torch.tensor([0.01, 0.2], dtype=torch.float64)
    C = torch.randn(H, M, n, dtype=torch.complex128)

    def both(t: Tensor) -> Tensor:
        return torch.cat([t, t.conj()], -1)

    A = torch.diag(both(Lambda)) - both(P).mT @ both(P).conj()
    A_bar, B_bar = ssm.discretize(A, both(B), dt)
    expected = ssm.krylov_kernel(A_bar[:, None], B_bar[:, None], both(C), length)
    assert float(expected.imag.abs().max()) < 1e-9
    power = torch.linalg.matrix_power(A_bar, length)
    C_tilde = (both(C) - both(C) @ power)[..., :n]
    Lambda, P, B = (t.expand(H, *t.shape) for t in (Lambda, P, B))
    assert_near(ssm.cauchy_kernel(C_tilde, Lambda, P, B, dt, length), expected.real, 1e-9)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("length", [1, 9, 16, 33])
def test_fft_convolution_is_the_causal_sum(length: int):
    u, kernel, D = torch.randn(2, length, 3), torch.randn(3, 2, length), torch.randn(3, 2)
    expected = D * u[..., None]  # (B, L, H, M)
    for t in range(length):
        for k in range(t + 1):
            expected[:, t] += kernel[..., k] * u[:, t - k, :, None]
    torch.testing.assert_close(ssm.fft_convolution(u, kernel, D), expected.flatten(2))


@pytest.mark.parametrize(
    ("u", "kernel", "D"),
    [
        ((2, 9, 3), (3, 1, 8), (3, 1)),
        ((2, 9, 3), (4, 1, 9), (3, 1)),
        ((2, 9, 4), (3, 1, 9), (3, 1)),
        ((9, 3), (3, 1, 9), (3, 1)),
        ((2, 9, 3), (3, 9), (3,)),
        ((0, 9, 3), (3, 1, 9), (3, 1)),
        ((2, 0, 3), (3, 1, 0), (3, 1)),
    ],
)
def test_fft_convolution_refuses_shapes_that_do_not_fit(u, kernel, D):
    with pytest.raises(ValueError, match=r"must fit, .* be real; got \("):
        ssm.fft_convolution(torch.zeros(u), torch.zeros(kernel), torch.zeros(D))


def test_fft_convolution_refuses_complex_input():
    with pytest.raises(ValueError, match="complex64"):
        ssm.fft_convolution(torch.zeros(1, 4, 1) + 0j, torch.zeros(1, 1, 4), torch.zeros(1, 1))


def test_kernels_refuse_shapes_that_do_not_fit():
    c, log_a = torch.zeros(3, 1, 4) + 0j, torch.zeros(3, 4) - 1 + 0j
    P, dt = torch.zeros(3, 1, 4) + 0j, torch.ones(3)
    for bad in ((c[:2], log_a), (c[0], log_a), (c, log_a[:, :3])):
        with pytest.raises(ValueError, match=r"c must be \(H, M, n\)"):
            ssm.vandermonde_kernel(*bad, 5)
    with pytest.raises(ValueError, match="must be complex, got"):
        ssm.vandermonde_kernel(c.real, log_a, 5)
    for bad in ((c[0], log_a, P, log_a, dt), (c, log_a, P[0], log_a, dt), (c, log_a, P, dt, dt)):
        with pytest.raises(ValueError, match=r"C_tilde must be \(H, M, n\)"):
            ssm.cauchy_kernel(*bad, 5)
    A, B, C = stable_system(4)
    with pytest.raises(ValueError, match=r"A_bar must be \(…, N, N\)"):
        ssm.krylov_kernel(A, B, C[:3], 5)
    times = torch.tensor([1.0, 2.0])
    for C_bad, D in ((C[None, :3], B[:1]), (C[None], B[:2])):
        with pytest.raises(ValueError, match=r"C must be \(…, M, 4\)"):
            ssm.simulate(A, B, C_bad, D, torch.zeros(2), times)


@pytest.mark.parametrize("length", [0, -1])
def test_kernels_without_length_are_refused(length: int):
    A, B, C = stable_system(2)
    c, log_a = torch.ones(1, 1, 2) + 0j, -torch.ones(1, 2) + 0j
    P, dt = torch.ones(1, 1, 2) + 0j, torch.ones(1)
    for kernel in (
        lambda: ssm.krylov_kernel(A, B, C, length),
        lambda: ssm.krylov_products(ssm.repeated_squares(A, length), B, length),
        lambda: ssm.vandermonde_kernel(c, log_a, length),
        lambda: ssm.cauchy_kernel(c, log_a, P, log_a, dt, length),
    ):
        with pytest.raises(ValueError, match=f"at least 1, got {length}"):
            kernel()


@pytest.mark.parametrize("length", [1, 2, 3, 8, 21])
def test_krylov_products_match_repeated_products(length: int):
    A, B, _ = stable_system(4)
    A_bar, B_bar = ssm.discretize(A, B, 0.1)
    powers = ssm.repeated_squares(A_bar, length)
    assert len(powers) == max(1, (length - 1).bit_length())  # and no square that is not used
    products = ssm.krylov_products(powers, B_bar, length)
    expected = [torch.linalg.matrix_power(A_bar, k) @ B_bar for k in range(length)]
    torch.testing.assert_close(products, torch.stack(expected, -1))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_bilinear_exponent_is_precise_where_the_quotient_is_near_one(dtype: torch.dtype):
    size = torch.logspace(-7, 2, 40, dtype=torch.float64)
    z = torch.complex(-size, 3 * size)
    expected = 2 * torch.atanh(z / 2)
    # atanh has its cut on the real axis above 1; the argument is the same modulo 2π
    actual = ssm.bilinear_exponent(z.to(dtype)).to(torch.complex128)
    error = torch.exp(actual - expected) - 1
    tolerance = 1e-6 if dtype == torch.complex64 else 1e-14
    assert bool((error.abs() <= tolerance * size.clamp(max=1.0)).all())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_bilinear_exponent_is_finite_where_the_quotient_is_zero(dtype: torch.dtype):
    """A mode of ΔΛ = -2 is gone after one step; around it Ā has the precision of ΔΛ."""
    z = torch.tensor([-2.0, *(-2 + s * 10.0**-e for e in range(1, 8) for s in (1, -1))]).to(dtype)
    z.requires_grad_()
    log_a = ssm.bilinear_exponent(z)
    exact = (1 + z.detach().to(torch.complex128) / 2) / (1 - z.detach().to(torch.complex128) / 2)
    tolerance = 1e-6 if dtype == torch.complex64 else 1e-14
    assert bool((log_a.detach().exp() - exact).abs().le(tolerance * exact.abs() + 1e-14).all())
    kernel = ssm.vandermonde_kernel(torch.ones_like(z)[None, None], log_a[None], 4)
    kernel.sum().backward()
    assert bool(kernel.isfinite().all())
    assert z.grad is not None
    assert bool(torch.view_as_real(z.grad).isfinite().all())


# The continuous view


def by_ode(A, B, C, D, u, times) -> np.ndarray:
    """An adaptive ODE solver, interval by interval, with u held constant in each."""
    x, before, ys = np.zeros(len(A)), 0.0, []
    for value, t in zip(u, times, strict=True):
        solution = scipy.integrate.solve_ivp(
            lambda _, x, value=value: A @ x + B * value, (before, t), x, rtol=1e-10, atol=1e-12
        )
        x, before = solution.y[:, -1], t
        ys.append(C @ x + D * value)
    return np.stack(ys, -1)


def test_simulation_on_irregular_times_matches_an_ode_solver():
    A, B, _ = stable_system(4)
    C, D = torch.randn(2, 4).double(), torch.randn(2).double()
    u, times = torch.randn(12).double(), (torch.rand(12).double() + 0.05).cumsum(0)
    expected = by_ode(*(t.numpy() for t in (A, B, C, D, u, times)))
    np.testing.assert_allclose(ssm.simulate(A, B, C, D, u, times).numpy(), expected, atol=1e-7)


@pytest.mark.parametrize(("method", "order"), [("bilinear", 2), ("backward_euler", 1), (0.7, 1)])
def test_finer_times_approach_the_exact_simulation(method: str | float, order: int):
    A, B, _ = stable_system(3)
    C, D = torch.randn(1, 3).double(), torch.zeros(1).double()
    errors = []
    for refinement in (8, 16, 32):
        u = torch.ones(4 * refinement).double()
        times = torch.arange(1, 4 * refinement + 1).double() / (4 * refinement)
        exact = ssm.simulate(A, B, C, D, u, times)
        errors.append(float((ssm.simulate(A, B, C, D, u, times, method) - exact).abs().max()))
    for coarse, fine in itertools.pairwise(errors):
        assert fine < 0.75 * coarse * 2.0 ** (1 - order)


def test_simulation_on_regular_times_is_the_recurrence_of_the_kernel():
    A, B, C = stable_system(3)
    u, D = torch.randn(2, 1, 20).double(), torch.randn(1, 1).double()
    times = 0.3 * torch.arange(1, 21).double()
    A_bar, B_bar = ssm.discretize(A, B, 0.3, "zoh")
    kernel = ssm.krylov_kernel(A_bar, B_bar, C, 20)
    expected = ssm.fft_convolution(u.mT, kernel[None, None], D).mT
    actual = ssm.simulate(A, B, C[None], D[0], u[:, 0], times)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 1.0], [1.0, 0.5], [1.0, 2.0, 3.0]])
def test_simulation_refuses_times_that_do_not_fit(times: list[float]):
    A, B, C = stable_system(2)
    with pytest.raises(ValueError, match="times"):
        ssm.simulate(A, B, C[None], torch.zeros(1), torch.zeros(2), torch.tensor(times))
    with pytest.raises(ValueError, match="times must increase"):
        ssm.simulate(A, B, C[None], torch.zeros(1), torch.zeros(0), torch.zeros(0))


def doubles(*shape: int, complex_valued: bool = False) -> Tensor:
    dtype = torch.complex128 if complex_valued else torch.float64
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("length", [1, 6, 9])
def test_fft_convolution_has_the_right_gradients(length: int):
    inputs = (doubles(2, length, 3), doubles(3, 2, length), doubles(3, 2))
    assert torch.autograd.gradcheck(ssm.fft_convolution, inputs)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("length", [1, 7, 40])
def test_vandermonde_kernel_has_the_right_gradients(length: int):
    def kernel(c: Tensor, decay: Tensor, frequency: Tensor) -> Tensor:
        return ssm.vandermonde_kernel(c, torch.complex(-decay.exp(), frequency), length)

    inputs = (doubles(2, 2, 3, complex_valued=True), doubles(2, 3), doubles(2, 3))
    assert torch.autograd.gradcheck(kernel, inputs)


@pytest.mark.parametrize("length", [6, 7])
@pytest.mark.parametrize("rank", [1, 2])
def test_cauchy_kernel_has_the_right_gradients(rank: int, length: int):
    def kernel(C: Tensor, decay: Tensor, frequency: Tensor, P: Tensor, B: Tensor, dt: Tensor):
        Lambda = torch.complex(-decay.exp(), frequency)
        return ssm.cauchy_kernel(C, Lambda, P, B, dt.exp(), length)

    C, B = doubles(2, 2, 3, complex_valued=True), doubles(2, 3, complex_valued=True)
    P = doubles(2, rank, 3, complex_valued=True)
    inputs = (C, doubles(2, 3), doubles(2, 3), P, B, doubles(2))
    assert torch.autograd.gradcheck(kernel, inputs)


@pytest.mark.parametrize("dt", [1e-4, 1e-1, 10.0])
def test_kernels_in_float32_have_finite_gradients(dt: float):
    Lambda, P, B = (
        t.to(torch.complex64)[None].requires_grad_() for t in hippo.normal_plus_low_rank("legs", 16)
    )
    C = torch.randn(1, 1, 8, dtype=torch.complex64, requires_grad=True)
    interval = torch.tensor([dt], requires_grad=True)
    K = ssm.cauchy_kernel(C, Lambda, P, B, interval, 128)
    K = K + ssm.vandermonde_kernel(C, Lambda * interval[:, None], 128)
    K.square().sum().backward()
    for leaf in (C, Lambda, P, B, interval):
        assert leaf.grad is not None
        assert bool(torch.view_as_real(leaf.grad + 0j).isfinite().all())
