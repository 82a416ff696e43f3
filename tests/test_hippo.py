"""HiPPO-LegS, and its normal-plus-low-rank form against the dense one."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from genssm import hippo


def both_of_each_pair(kept: Tensor) -> Tensor:
    return torch.cat([kept, kept.conj()])


def dense_of_pairs(N: int) -> tuple[Tensor, Tensor]:
    """diag(Λ) - P Pᴴ and B over both members of each pair: (N, N) and (N,) complex128."""
    Lambda, P, B = map(both_of_each_pair, hippo.legs_normal_plus_low_rank(N))
    return torch.diag(Lambda) - P[:, None] * P[None, :].conj(), B


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


@pytest.mark.parametrize("N", [2, 4, 8])
def test_normal_plus_low_rank_form_has_the_eigenvalues_of_legs(N: int):
    dense, _ = dense_of_pairs(N)
    eigenvalues = np.sort(np.linalg.eigvals(dense.numpy()).real)
    np.testing.assert_allclose(eigenvalues, np.arange(-N, 0), rtol=1e-6)


@pytest.mark.parametrize("N", [2, 8, 64])
def test_normal_plus_low_rank_form_has_the_transfer_function_of_legs(N: int):
    """A unitary change of basis keeps Bᴴ (sI - A)⁻¹ B, the transfer function for C = Bᴴ."""
    A, B = hippo.legs(N)
    dense, B_pairs = dense_of_pairs(N)
    eye = torch.eye(N, dtype=torch.complex128)
    for s in (0.1, 1j, 3 + 10j, 100 - 50j):
        expected = B.to(eye.dtype) @ torch.linalg.solve(s * eye - A, B.to(eye.dtype))
        actual = B_pairs.conj() @ torch.linalg.solve(s * eye - dense, B_pairs)
        assert abs(complex(actual - expected)) <= 1e-9 * abs(complex(expected))


@pytest.mark.parametrize("N", [2, 8, 16])
def test_normal_plus_low_rank_form_has_the_markov_parameters_of_legs(N: int):
    """⟨Aⁱ B, Aʲ B⟩ does not depend on the basis, and fixes (A, B) up to a rotation."""
    A, B = hippo.legs(N)
    dense, B_pairs = dense_of_pairs(N)
    krylov, krylov_pairs = [B], [B_pairs]
    for _ in range(5):  # A is scaled so that its powers stay comparable
        krylov.append(A @ krylov[-1] / N**2)
        krylov_pairs.append(dense @ krylov_pairs[-1] / N**2)
    X, Y = torch.stack(krylov), torch.stack(krylov_pairs)
    torch.testing.assert_close((Y.conj() @ Y.mT).real, X @ X.mT, rtol=1e-9, atol=1e-9)


def test_normal_part_decays_at_one_half_and_keeps_one_of_each_pair():
    form = hippo.legs_normal_plus_low_rank(32)
    assert all(field.shape == (16,) and field.dtype == torch.complex128 for field in form)
    assert bool((form.Lambda.real == -0.5).all())
    assert bool((form.Lambda.imag > 0).all())


@pytest.mark.parametrize("N", [0, -3])
def test_legs_refuses_an_empty_state(N: int):
    with pytest.raises(ValueError, match=f"at least 1, got {N}"):
        hippo.legs(N)


@pytest.mark.parametrize("N", [0, 1, 7, -2])
def test_normal_plus_low_rank_form_refuses_odd_and_empty_states(N: int):
    with pytest.raises(ValueError, match=f"even and at least 2, got {N}"):
        hippo.legs_normal_plus_low_rank(N)
