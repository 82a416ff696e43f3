"""HiPPO: the published matrices, what they remember, and their normal-plus-low-rank form."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from genssm import hippo

measures = pytest.mark.parametrize("measure", hippo.MEASURES)


def both_of_each_pair(kept: Tensor) -> Tensor:
    return torch.cat([kept, kept.conj()], -1)


def dense_of_pairs(measure: str, N: int) -> tuple[Tensor, Tensor]:
    """diag(Λ) - Σ P_r P_rᴴ and B over both members of each pair: (N, N) and (N,) complex128."""
    Lambda, P, B = map(both_of_each_pair, hippo.normal_plus_low_rank(measure, N))
    return torch.diag(Lambda) - P.mT @ P.conj(), B


# The matrices


def test_legs_of_one_and_two_states_are_the_published_matrices():
    A, B = hippo.legs(1)
    assert A.tolist() == [[-1.0]]
    assert B.tolist() == [1.0]
    A, B = hippo.legs(2)
    torch.testing.assert_close(A, torch.tensor([[-1, 0], [-math.sqrt(3), -2]]).double())
    torch.testing.assert_close(B, torch.tensor([1, math.sqrt(3)]).double())


@pytest.mark.parametrize("N", [3, 8])
def test_legs_follows_theorem_2_entry_by_entry(N: int):
    A, B = hippo.legs(N)
    for n in range(N):
        assert float(B[n]) == pytest.approx(math.sqrt(2 * n + 1))
        for k in range(N):
            below = -math.sqrt((2 * n + 1) * (2 * k + 1))
            expected = below if n > k else -(n + 1) if n == k else 0
            assert float(A[n, k]) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("N", [1, 2, 5, 16])
def test_legs_has_eigenvalues_minus_one_to_minus_N(N: int):
    A, _ = hippo.legs(N)
    assert A.dtype == torch.float64
    assert torch.equal(A, A.tril())
    torch.testing.assert_close(A.diagonal(), -torch.arange(1, N + 1).double(), rtol=1e-14, atol=0)


def test_lagt_of_three_states_is_the_published_matrix():
    A, B = hippo.lagt(3)
    assert A.tolist() == [[-1, 0, 0], [-1, -1, 0], [-1, -1, -1]]
    assert B.tolist() == [1, 1, 1]


@measures
@pytest.mark.parametrize("N", [2, 16])
def test_every_measure_forgets(measure: str, N: int):
    """All eigenvalues lie to the left, but for the sine of frequency zero in the Fourier basis."""
    A, B = hippo.operator(measure, N)
    eigenvalues = torch.linalg.eigvals(A).real.sort().values
    assert (A.dtype, A.shape, B.shape) == (torch.float64, (N, N), (N,))
    kept = 1 if measure == "fourier" else 0
    assert float(eigenvalues[: N - kept].max()) < -1e-6
    assert float(eigenvalues.max()) < 1e-9


# What they remember


def signal(t: Tensor) -> Tensor:
    """Smooth, of period 1, with the first few harmonics."""
    return 0.4 + torch.sin(2 * torch.pi * t) + 0.5 * torch.cos(4 * torch.pi * t)


@pytest.mark.parametrize("measure", ["legs", "legt", "fourier"])
def test_memory_reconstructs_the_past(measure: str):
    """The whole history for LegS, the last window for the others."""
    steps = 1000
    dt = 1 / steps
    memory = hippo.Memory(measure, 32, None if measure == "legs" else dt)
    length = steps if measure == "legs" else 3 * steps
    u = signal(torch.arange(length).double() * dt)
    for value in u.tolist():
        memory.push(value)
    ages = torch.arange(50, 950, 10)
    error = memory.reconstruct(ages) - u[-1 - ages]
    assert float(error.abs().max()) < 0.05


@pytest.mark.parametrize(("measure", "dt"), [("legt", 0.01), ("fourier", 0.01), ("lagt", 0.05)])
def test_memory_has_its_steps_in_their_places(measure: str, dt: float):
    """One tone, slow beside the basis. Half a step beside its place it would be 0.03 off."""
    u = torch.sin(0.02 * math.pi * torch.arange(2000).double())
    memory = hippo.Memory(measure, 64, dt)
    for value in u.tolist():
        memory.push(value)
    ages = torch.arange(15, 85)
    assert float((memory.reconstruct(ages) - u[-1 - ages]).abs().max()) < 0.01


def test_laguerre_memory_reconstructs_the_recent_past_best():
    dt = 0.01
    memory = hippo.Memory("lagt", 64, dt)
    u = torch.sin(torch.arange(2000).double() * dt)
    for value in u.tolist():
        memory.push(value)
    ages = torch.arange(20, 400, 10)  # 0.2 to 4 in units of the decay
    assert float((memory.reconstruct(ages) - u[-1 - ages]).abs().max()) < 0.1


def test_legs_memory_has_the_coefficients_of_the_whole_history():
    """⟨u, P_n⟩ by numerical integration, the definition that the recurrence follows."""
    steps, N = 2000, 6
    u = signal((torch.arange(steps).double() + 0.5) / steps)
    memory = hippo.Memory("legs", N)
    for value in u.tolist():
        memory.push(value)
    position = 2 * (np.arange(steps) + 0.5) / steps - 1
    for n in range(N):
        basis = np.sqrt(2 * n + 1) * np.polynomial.legendre.Legendre.basis(n)(position)
        assert float(memory.x[n]) == pytest.approx(float((u.numpy() * basis).mean()), abs=0.01)


@pytest.mark.parametrize("N", [4, 16, 64])
def test_legs_reconstructs_polynomials_to_machine_precision(N: int):
    """For u = t^p the coefficients c t^p solve x' = (Ax + Bu)/t with c = (pI - A)⁻¹ B, exactly."""
    A, B = hippo.legs(N)
    history = torch.linspace(0, 1, 50, dtype=torch.float64)
    memory = hippo.Memory("legs", N)
    memory.steps = 50
    for p in range(min(N, 12)):
        memory.x = torch.linalg.solve(p * torch.eye(N, dtype=torch.float64) - A, B)
        ages = (1 - history) * 50 - 0.5  # the middle of a step is its position
        error = (memory.reconstruct(ages) - history**p).abs().max()
        assert float(error) < 1e-13 * N**2


@pytest.mark.parametrize(
    ("measure", "N", "dt", "error"),
    [("legs", 64, None, 2e-4), ("legt", 32, 1 / 1000, 0.02), ("fourier", 64, 1 / 1000, 0.1)],
)
def test_memory_reconstructs_a_band_limited_signal(
    measure: str, N: int, dt: float | None, error: float
):
    """Ten random tones of up to five periods in 1000 steps, to the root mean square error stated.

    LegS keeps all 2000 steps, the others the last 1000. Fourier's basis is periodic, which costs
    it the ends of the window.
    """
    steps = 2000
    t = torch.arange(steps, dtype=torch.float64) / 1000
    frequency, phase = 5 * torch.rand(10, 1).double(), 7 * torch.rand(10, 1).double()
    u = torch.sin(2 * torch.pi * frequency * t + phase).mean(0)
    memory = hippo.Memory(measure, N, dt)
    for value in u.tolist():
        memory.push(value)
    ages = torch.arange(steps if dt is None else 1000)
    remembered = memory.reconstruct(ages)
    difference = (remembered - u.flip(0)[: len(ages)]).square().mean().sqrt()
    assert float(difference / u.square().mean().sqrt()) < error


def test_memory_is_linear_and_starts_empty():
    memory = hippo.Memory("legt", 8, 0.1)
    assert memory.x.tolist() == [0.0] * 8
    single = memory.push(1.0).clone()
    double = hippo.Memory("legt", 8, 0.1)
    torch.testing.assert_close(double.push(2.0), 2 * single)


# Normal plus low rank


@measures
@pytest.mark.parametrize("N", [2, 8, 64])
def test_normal_plus_low_rank_form_has_the_transfer_function(measure: str, N: int):
    """A unitary change of basis keeps Bᴴ (sI - A)⁻¹ B, the transfer function for C = Bᴴ."""
    A, B = (t.to(torch.complex128) for t in hippo.operator(measure, N))
    dense, B_pairs = dense_of_pairs(measure, N)
    eye = torch.eye(N, dtype=torch.complex128)
    for s in (0.1, 1j, 3 + 10j, 100 - 50j):
        expected = B @ torch.linalg.solve(s * eye - A, B)
        actual = B_pairs.conj() @ torch.linalg.solve(s * eye - dense, B_pairs)
        assert abs(complex(actual - expected)) <= 1e-9 * abs(complex(expected))


@measures
@pytest.mark.parametrize("N", [2, 8, 16])
def test_normal_plus_low_rank_form_has_the_markov_parameters(measure: str, N: int):
    """⟨Aⁱ B, Aʲ B⟩ does not depend on the basis, and fixes (A, B) up to a rotation."""
    A, B = hippo.operator(measure, N)
    dense, B_pairs = dense_of_pairs(measure, N)
    krylov, krylov_pairs = [B], [B_pairs]
    for _ in range(5):  # A is scaled so that its powers stay comparable
        krylov.append(A @ krylov[-1] / N**2)
        krylov_pairs.append(dense @ krylov_pairs[-1] / N**2)
    X, Y = torch.stack(krylov), torch.stack(krylov_pairs)
    torch.testing.assert_close((Y.conj() @ Y.mT).real, X @ X.mT, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("N", [2, 4, 8])
def test_normal_plus_low_rank_form_has_the_eigenvalues_of_legs(N: int):
    dense, _ = dense_of_pairs("legs", N)
    eigenvalues = np.sort(np.linalg.eigvals(dense.numpy()).real)
    np.testing.assert_allclose(eigenvalues, np.arange(-N, 0), rtol=1e-6)


@pytest.mark.parametrize(
    ("measure", "rank", "decay"),
    [("legs", 1, 0.5), ("legt", 2, 0.0), ("lagt", 1, 0.5), ("fourier", 1, 0.0)],
)
def test_normal_part_keeps_one_of_each_pair(measure: str, rank: int, decay: float):
    Lambda, P, B = hippo.normal_plus_low_rank(measure, 32)
    assert {field.dtype for field in (Lambda, P, B)} == {torch.complex128}
    assert (Lambda.shape, P.shape, B.shape) == ((16,), (rank, 16), (16,))
    torch.testing.assert_close(Lambda.real, torch.full((16,), -decay, dtype=torch.float64))
    assert bool((Lambda.imag > -1e-9).all())


# Refusals


@measures
@pytest.mark.parametrize("N", [0, -3])
def test_empty_states_are_refused(measure: str, N: int):
    with pytest.raises(ValueError, match=f"at least 1, got {N}"):
        hippo.operator(measure, N)


@measures
@pytest.mark.parametrize("N", [1, 7])
def test_normal_plus_low_rank_form_refuses_odd_states(measure: str, N: int):
    with pytest.raises(ValueError, match=f"even.*, got {N}"):
        hippo.normal_plus_low_rank(measure, N)


def test_unknown_measures_are_refused():
    for function in (hippo.operator, hippo.normal_plus_low_rank):
        with pytest.raises(ValueError, match="one of legs, legt, lagt, fourier; got 'hermite'"):
            function("hermite", 4)


@pytest.mark.parametrize(("measure", "dt"), [("legs", None), ("legt", 0.1)])
def test_memory_refuses_a_complex_signal(measure: str, dt: float | None):
    with pytest.raises(ValueError, match="must be real, got 1j"):
        hippo.Memory(measure, 4, dt).push(1j)  # type: ignore[arg-type]


@pytest.mark.parametrize(("measure", "dt"), [("legs", 0.1), ("legt", None), ("fourier", None)])
def test_memory_takes_a_dt_where_the_measure_has_one(measure: str, dt: float | None):
    with pytest.raises(ValueError, match="dt"):
        hippo.Memory(measure, 4, dt)
