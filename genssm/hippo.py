"""HiPPO: the operators (A, B) that compress a signal's history into polynomial coefficients.

Source: Gu et al., "HiPPO: Recurrent Memory with Optimal Polynomial Projections" (arXiv 2008.07669);
the normal-plus-low-rank form is S4 (arXiv 2111.00396), Theorem 1 and Appendix C.1.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def legs(N: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS: scaled Legendre polynomials, uniform weight over the whole history.

    Returns float64 ``A (N, N)`` (lower triangular, eigenvalues -1 … -N) and ``B (N,)``.
    Source: HiPPO, Theorem 2, in the sign convention x' = Ax + Bu.
    """
    if N < 1:
        raise ValueError(f"state size N must be at least 1, got {N}")
    n = torch.arange(N, dtype=torch.float64)
    B = (2 * n + 1).sqrt()
    A = -(torch.tril(B[:, None] * B[None, :]) - torch.diag(n))
    return A, B


class NormalPlusLowRank(NamedTuple):
    """A = V (diag(Lambda) - P Pᴴ) Vᴴ and B in the same basis, one of each conjugate pair kept.

    All fields are complex128 of shape (N/2,): the other half is the complex conjugate.
    """

    Lambda: Tensor
    P: Tensor
    B: Tensor


def legs_normal_plus_low_rank(N: int) -> NormalPlusLowRank:
    """HiPPO-LegS as a normal matrix minus rank one, diagonalised by a unitary matrix.

    ``A + P Pᵀ`` with P_n = sqrt(n + 1/2) is -1/2 I plus a skew-symmetric matrix, whose unitary
    eigenbasis is perfectly conditioned. (A itself must not be diagonalised: the condition number
    of its eigenvectors grows like 2^(4N/3).) Source: S4, Theorem 1.
    """
    if N < 2 or N % 2:
        raise ValueError(f"state size N must be even and at least 2, got {N}")
    A, B = legs(N)
    P = (torch.arange(N, dtype=torch.float64) + 0.5).sqrt()
    skew = A + P[:, None] * P[None, :] + 0.5 * torch.eye(N, dtype=torch.float64)
    frequency, V = torch.linalg.eigh(-1j * skew)  # skew-symmetric, so -i·skew is Hermitian
    upper = frequency > 0
    assert int(upper.sum()) == N // 2
    to_basis = V.mH.contiguous()
    return NormalPlusLowRank(
        Lambda=(-0.5 + 1j * frequency)[upper],
        P=(to_basis @ P.to(V.dtype))[upper],
        B=(to_basis @ B.to(V.dtype))[upper],
    )
