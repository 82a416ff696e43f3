"""HiPPO: the operators (A, B) that compress a signal's history into polynomial coefficients.

x' = Ax + Bu keeps in x (N,) the coefficients of u's past in an orthogonal basis of a measure:

- ``legs``: scaled Legendre, the whole history weighted equally (time-varying: x' = (Ax + Bu)/t);
- ``legt``: translated Legendre, a sliding window of length 1;
- ``lagt``: translated Laguerre, the past weighted by exp(-age);
- ``fourier``: truncated Fourier, a sliding window of length 1.

Sources: "HiPPO: Recurrent Memory with Optimal Polynomial Projections" (arXiv 2008.07669); "How to
Train Your HiPPO" (arXiv 2206.12037) for the Fourier measure; S4 (arXiv 2111.00396), Theorem 1 and
Appendix C.1, for the normal-plus-low-rank form.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genssm.ssm import discretize


def _indices(N: int) -> Tensor:
    if isinstance(N, bool) or not isinstance(N, int) or N < 1:
        raise ValueError(f"state size N must be an integer of at least 1, got {N!r}")
    return torch.arange(N, dtype=torch.float64)


def legs(N: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS: float64 ``A (N, N)``, lower triangular with eigenvalues -1 … -N, and ``B (N,)``.

    Source: HiPPO, Theorem 2, in the sign convention x' = Ax + Bu.
    """
    n = _indices(N)
    B = (2 * n + 1).sqrt()
    return torch.diag(n) - torch.tril(B[:, None] * B[None, :]), B


def legt(N: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegT on a window of length 1: float64 ``A (N, N)`` and ``B (N,)``.

    Orthonormal Legendre polynomials; the value that leaves the window is estimated from x.
    Source: HiPPO, Theorem 1.
    """
    n = _indices(N)
    B = (2 * n + 1).sqrt()
    alternating = (-1.0) ** (n[:, None] - n[None, :])
    upper = torch.triu(torch.ones(N, N, dtype=torch.float64), 1)
    return -B[:, None] * B[None, :] * torch.where(upper > 0, alternating, 1.0), B


def lagt(N: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LagT, the past weighted by exp(-age): float64 ``A (N, N)`` and ``B (N,)``.

    Source: HiPPO, Theorem 1 (Laguerre polynomials, α = 0, β = 1).
    """
    _indices(N)
    ones = torch.ones(N, N, dtype=torch.float64)
    return -torch.tril(ones), ones[0].clone()


def fourier(N: int) -> tuple[Tensor, Tensor]:
    """Truncated Fourier on a window of length 1, N even: float64 ``A (N, N)`` and ``B (N,)``.

    Coefficients 2k and 2k+1 belong to √2 cos 2πkt and √2 sin 2πkt; for k = 0 to 1 and to nothing,
    so that there are N/2 conjugate pairs. Source: "How to Train Your HiPPO", Theorem 7.
    """
    n = _indices(N)
    if N % 2:
        raise ValueError(f"the Fourier measure needs an even state size, got {N}")
    rotation = torch.zeros(N, N, dtype=torch.float64)
    for k in range(N // 2):
        rotation[2 * k, 2 * k + 1] = -2 * torch.pi * k
        rotation[2 * k + 1, 2 * k] = 2 * torch.pi * k
    edge = torch.where(n % 2 == 0, 2.0**0.5, 0.0).double()  # the basis at both ends of the window
    edge[0] = 1.0
    return rotation - 2 * edge[:, None] * edge[None, :], 2 * edge


MEASURES: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "legs": legs,
    "legt": legt,
    "lagt": lagt,
    "fourier": fourier,
}


def operator(measure: str, N: int) -> tuple[Tensor, Tensor]:
    """(A, B) of a measure by name."""
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}; got {measure!r}")
    return MEASURES[measure](N)


def _low_rank(measure: str, N: int) -> Tensor:
    """P (rank, N) such that A + Pᵀ P is a multiple of the identity plus a skew-symmetric matrix."""
    n = _indices(N)
    root = (2 * n + 1).sqrt()
    if measure == "legs":
        return root[None] * 0.5**0.5
    if measure == "legt":  # the symmetric part links indices of equal parity
        return torch.stack([root * (n % 2 == 0), root * (n % 2 == 1)])
    if measure == "lagt":
        return torch.full((1, N), 0.5**0.5, dtype=torch.float64)
    return fourier(N)[1][None] * 0.5**0.5


class NormalPlusLowRank(NamedTuple):
    """A = V (diag(Lambda) - P Pᴴ) Vᴴ and B in the same basis, one of each conjugate pair kept.

    complex128: ``Lambda (N/2,)``, ``P (rank, N/2)``, ``B (N/2,)``; the other half is conjugate.
    """

    Lambda: Tensor
    P: Tensor
    B: Tensor


def normal_plus_low_rank(measure: str, N: int) -> NormalPlusLowRank:
    """A measure's operator as a normal matrix minus rank 1 (LegT: 2), unitarily diagonalised.

    ``A + P Pᵀ`` is a real multiple of the identity plus a skew-symmetric matrix, whose unitary
    eigenbasis is perfectly conditioned. (A itself must not be diagonalised: for LegS the entries
    of its eigenvectors grow to 2^(4N/3).) Source: S4, Lemma 3.2, Theorem 1 and Appendix C.1.
    """
    return NormalPlusLowRank(*(part.clone() for part in _diagonalised(measure, N)))


@lru_cache(maxsize=8)  # the layers of a model share it, and it takes seconds where N is 2,048
def _diagonalised(measure: str, N: int) -> NormalPlusLowRank:
    A, B = operator(measure, N)
    if N % 2:
        raise ValueError(f"state size N must be even, got {N}")
    P = _low_rank(measure, N)
    normal = A + P.mT @ P
    shift = normal.diagonal().mean()
    skew = normal - shift * torch.eye(N, dtype=torch.float64)
    frequency, V = torch.linalg.eigh(-1j * skew)  # skew-symmetric, so -i·skew is Hermitian
    # Eigenvalues come in ascending order and in pairs ±: the upper half has frequencies >= 0. Where
    # a pair is at zero (Fourier), its two real eigenvectors are joined into one complex pair.
    frequency, V = frequency[N // 2 :], V[:, N // 2 :]
    for i in torch.nonzero(frequency < 1e-9 * frequency.max().clamp(min=1.0)).flatten().tolist():
        real = torch.linalg.svd(normal)[2][-2:]  # an orthonormal basis of the null space
        V[:, i] = torch.complex(real[0], real[1]) * 0.5**0.5
    to_basis = V.mH.contiguous()
    return NormalPlusLowRank(
        Lambda=torch.complex(shift.expand(N // 2).clone(), frequency),
        P=(to_basis @ P.mT.to(V.dtype)).mT.contiguous(),
        B=to_basis @ B.to(V.dtype),
    )


class Memory:
    """Online memory: feed a signal value by value, reconstruct its past from N coefficients.

    For "legs" it is the time-varying x' = (Ax + Bu)/t, which needs no Δ and remembers everything
    since the beginning. In log t it is time-invariant, so that holding each value for one step is
    exact: zero-order hold over the interval log(k/(k-1)). (The backward Euler rule of HiPPO,
    Appendix B.3, is O(N²) instead of O(N³) a step, but 1,000 times less exact on a smooth signal.)
    For the others it is the bilinear rule with a fixed ``dt``, in units of the window ("legt",
    "fourier") or of the decay ("lagt"). All in float64.
    """

    def __init__(self, measure: str, N: int, dt: float | None = None) -> None:
        self.A, self.B = operator(measure, N)
        self.measure, self.dt = measure, dt
        if (measure == "legs") != (dt is None):
            raise ValueError(f"legs takes no dt, every other measure needs one; got dt={dt}")
        if dt is not None:
            self._A_bar, self._B_bar = discretize(self.A, self.B, dt, "bilinear")
        self.steps = 0
        self.x = torch.zeros(N, dtype=torch.float64)

    def push(self, value: float) -> Tensor:
        """Take the next value of the signal and return the coefficients (N,)."""
        if isinstance(value, complex):
            raise ValueError(
                f"the signal must be real, got {value}; push its parts to two memories"
            )
        self.steps += 1
        if self.dt is not None:
            self.x = self._A_bar @ self.x + self._B_bar * value
        elif self.steps == 1:  # the limit of an infinite interval in log t
            self.x = torch.linalg.solve(-self.A, self.B * value)
        else:
            interval = math.log(self.steps / (self.steps - 1))
            A_bar, B_bar = discretize(self.A, self.B, interval, "zoh")
            self.x = A_bar @ self.x + B_bar * value
        return self.x

    def reconstruct(self, ages: Tensor) -> Tensor:
        """The signal as remembered ``ages`` steps before the last value: (n,) → float64 (n,)."""
        return self.basis(ages) @ self.x

    def basis(self, ages: Tensor) -> Tensor:
        """The basis functions at ``ages`` steps before the last value: (n,) → float64 (n, N)."""
        N = len(self.x)
        ages = ages.double()
        if self.dt is None:  # Legendre on the whole history, 1 is now
            return _legendre(1 - 2 * (ages + 0.5) / max(self.steps, 1), N)
        # The bilinear rule holds a value for the step that ends with it: its middle is its place.
        age = ((ages + 0.5) * self.dt).numpy()
        if self.measure == "legt":
            return _legendre(1 - 2 * torch.from_numpy(age), N)
        if self.measure == "lagt":
            values = [np.polynomial.laguerre.Laguerre.basis(n)(age) for n in range(N)]
            return torch.from_numpy(np.stack(values, -1))
        values = [np.ones_like(age), np.zeros_like(age)]
        for k in range(1, N // 2):
            phase = 2 * np.pi * k * age
            values += [np.sqrt(2) * np.cos(phase), np.sqrt(2) * np.sin(phase)]
        return torch.from_numpy(np.stack(values, -1))


def _legendre(position: Tensor, N: int) -> Tensor:
    """Orthonormal Legendre polynomials on [-1, 1] under the uniform density: (n,) → (n, N)."""
    x = position.numpy()
    values = [np.sqrt(2 * n + 1) * np.polynomial.legendre.Legendre.basis(n)(x) for n in range(N)]
    return torch.from_numpy(np.stack(values, -1))
