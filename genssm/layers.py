"""State space layers: trained by convolution, converted once to an exact recurrence.

A trained layer has ``forward``; ``to_recurrent`` returns another object with ``initial_state``,
``prefill`` and ``step``. Both take a ``rate``, which scales Δ: a layer trained at one sampling rate
reads a signal of half that rate with ``rate=2``, and of twice that rate with ``rate=0.5``.
Sources: LSSL (arXiv 2110.13985), S4 (arXiv 2111.00396), S4D (arXiv 2206.11893).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from genssm import hippo, ssm
from genssm.recurrence import (
    DenseRecurrence,
    Recurrence,
    RecurrentStateSpace,
    dense_transition,
    from_row,
    to_row,
)

SLOWEST_DECAY = 1e-4  # Re Λ never rises above -SLOWEST_DECAY: every mode decays


class TrainedLayer(nn.Module, ABC):
    """What every layer shares: Δ and D per feature, convolution by FFT, groups of parameters."""

    # Parameters of the dynamics: trained at a lower rate and without weight decay.
    dynamics: tuple[str, ...] = ("log_dt",)

    def __init__(self, d_model: int, *, dt_min: float = 1e-3, dt_max: float = 1e-1) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model must be at least 1, got {d_model}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"the range of dt needs 0 < dt_min <= dt_max, got {dt_min}, {dt_max}")
        spread = torch.rand(d_model) * math.log(dt_max / dt_min)
        self.log_dt = nn.Parameter(spread + math.log(dt_min))
        self.D = nn.Parameter(torch.randn(d_model))

    @abstractmethod
    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        """The convolution kernel K_k = C Āᵏ B̄ for the interval rate·Δ, (H, length) real."""

    @abstractmethod
    def to_recurrent(self, rate: float = 1.0) -> Recurrence:
        """The same map as an exact recurrence; constants made in float64 and rounded once."""

    def dt(self, rate: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """The intervals rate·Δ, (H,) positive, computed in ``dtype`` (by default the layer's)."""
        if not 0 < rate < math.inf:
            raise ValueError(f"the rate must be positive and finite, got {rate}")
        return self.log_dt.to(dtype or self.log_dt.dtype).exp() * rate

    def forward(self, u: Tensor, rate: float = 1.0) -> Tensor:
        """u (B, L, H) → y (B, L, H), by convolution; at least float32 whatever the autocast."""
        with torch.autocast(u.device.type, enabled=False):
            x = rearrange(u.to(self.D.dtype), "b l h -> b h l").contiguous()
            y = ssm.fft_convolution(x, self.kernel(x.shape[-1], rate), self.D)
            return rearrange(y, "b h l -> b l h")


class StateSpace(TrainedLayer):
    """H independent single-input single-output models with N states, stored as n = N/2 pairs.

    ``Lambda = -max(exp(log_decay), SLOWEST_DECAY) + i·frequency`` has a negative real part whatever
    the parameters, and ``dt = exp(log_dt)`` is positive.
    """

    dynamics: tuple[str, ...] = (*TrainedLayer.dynamics, "log_decay", "frequency")

    def __init__(
        self, d_model: int, Lambda: Tensor, *, dt_min: float = 1e-3, dt_max: float = 1e-1
    ) -> None:
        super().__init__(d_model, dt_min=dt_min, dt_max=dt_max)
        decay = (-Lambda.real).clamp(min=10 * SLOWEST_DECAY)  # some measures start without decay
        self.log_decay = nn.Parameter(decay.log().float().repeat(d_model, 1))
        self.frequency = nn.Parameter(Lambda.imag.float().repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(d_model, Lambda.shape[0], 2) * math.sqrt(0.5))

    def Lambda(self) -> Tensor:
        """The eigenvalues of the normal part, (H, n) complex, Re Λ < 0."""
        return torch.complex(-self.log_decay.exp().clamp(min=SLOWEST_DECAY), self.frequency)

    def _double_dynamics(self, rate: float) -> tuple[Tensor, Tensor]:
        """Λ (H, n) complex128 and rate·Δ (H, 1) float64, for constants that are rounded once."""
        decay = self.log_decay.detach().double().exp().clamp(min=SLOWEST_DECAY)
        Lambda = torch.complex(-decay, self.frequency.detach().double())
        return Lambda, self.dt(rate, torch.float64).detach()[:, None]


class S4D(StateSpace):
    """Diagonal state space, zero-order hold: Ā = exp(ΔΛ), B̄ = (Ā - 1)/Λ, with B = 1 folded into C.

    ``init``: "lin" Λ_n = -1/2 + iπn (S4D-Lin) or "inv" Λ_n = -1/2 + i N/π (N/(2n+1) - 1) (S4D-Inv).
    Source: S4D, Sections 3.2 and 4.3.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: str = "lin",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state must be even and at least 2, got {d_state}")
        n = torch.arange(d_state // 2, dtype=torch.float64)
        frequencies = {
            "lin": math.pi * n,
            "inv": d_state / math.pi * (d_state / (2 * n + 1) - 1),
        }
        if init not in frequencies:
            raise ValueError(f"init must be one of {', '.join(frequencies)}; got {init!r}")
        super().__init__(d_model, -0.5 + 1j * frequencies[init], dt_min=dt_min, dt_max=dt_max)

    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        Lambda = self.Lambda()
        log_a = Lambda * self.dt(rate)[:, None]
        c = 2 * torch.view_as_complex(self.C) * torch.expm1(log_a) / Lambda
        return ssm.vandermonde_kernel(c, log_a, length)

    @torch.no_grad()
    def to_recurrent(self, rate: float = 1.0) -> RecurrentStateSpace:
        Lambda, dt = self._double_dynamics(rate)
        log_a = Lambda * dt
        C = torch.view_as_complex(self.C.detach().double())
        return RecurrentStateSpace(
            log_a.exp(), torch.expm1(log_a) / Lambda, C, self.D.detach(), dtype=self.D.dtype
        )


class S4(StateSpace):
    """A HiPPO operator in normal-plus-low-rank form, bilinear rule, Cauchy kernel.

    ``measure`` is a key of ``hippo.MEASURES``; "legs" is the S4 of the paper.

    ``C`` stores C̃ = C (I - Ā^l_max), which spares the kernel a matrix power per training step.
    Kernels up to ``l_max`` cost O(N + L) memory per feature; longer ones first solve for C.
    Source: S4, Theorems 1 and 3, Algorithm 1.
    """

    dynamics = (*StateSpace.dynamics, "P", "B")

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        measure: str = "legs",
        l_max: int = 1024,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        if l_max < 1:
            raise ValueError(f"l_max must be at least 1, got {l_max}")
        nplr = hippo.normal_plus_low_rank(measure, d_state)
        super().__init__(d_model, nplr.Lambda, dt_min=dt_min, dt_max=dt_max)
        self.l_max = l_max
        self.P = nn.Parameter(torch.view_as_real(nplr.P).float().repeat(d_model, 1, 1, 1))
        self.B = nn.Parameter(torch.view_as_real(nplr.B).float().repeat(d_model, 1, 1))

    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        P, B, C = (torch.view_as_complex(t) for t in (self.P, self.B, self.C))
        span = self.l_max
        if length > span or rate != 1:
            C, span = self._truncated(length, rate).to(C.dtype), max(1, length)
        return ssm.cauchy_kernel(C, self.Lambda(), P, B, self.dt(rate), span)[:, :length]

    @torch.no_grad()
    def _truncated(self, length: int, rate: float) -> Tensor:
        """C̃ for another length and rate: C (I - Ā^length), in float64; no gradient."""
        C = to_row(self._solve_output())
        a, _, p, q = self._discrete(rate)
        power = torch.linalg.matrix_power(dense_transition(a, p, q), length)
        return from_row(C - (C[:, None] @ power)[:, 0])

    def _discrete(self, rate: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ā = diag(a) - p qᵀ and B̄ = b under the bilinear rule, (H, n) complex128.

        With h = Δ/2, (I - hA)⁻¹ = E - E P (I/h + Pᴴ E P)⁻¹ Pᴴ E for E = (I - hΛ)⁻¹ (Woodbury), so
        Ā = 2 (I - hA)⁻¹ - I stays diagonal minus low rank: p, q (H, rank, n).
        Source: S4, Appendix C.2.
        """
        Lambda, dt = self._double_dynamics(rate)
        P, B = (torch.view_as_complex(t.detach().double()) for t in (self.P, self.B))
        h = dt / 2
        E = 1 / (1 - h * Lambda)
        EP, PE = E[:, None] * P, P.conj() * E[:, None]  # (H, rank, n)
        # Sums over n run over both members of a pair, hence twice the real part.
        PEP = 2 * (PE @ P.mT).real  # (H, rank, rank)
        eye = torch.eye(P.shape[1], dtype=PEP.dtype, device=PEP.device)
        p = (torch.linalg.inv(eye / h[..., None] + PEP).mT.to(EP.dtype) @ EP) * 2
        PEB = 2 * (PE @ B[..., None]).real  # (H, rank, 1)
        return 2 * E - 1, h * (2 * E * B - (p * PEB).sum(1)), p, PE

    def _solve_output(self) -> Tensor:
        """C from C̃ = C (I - Ā^l_max) at the trained rate, (H, n) complex128."""
        a, _, p, q = self._discrete(1.0)
        A = dense_transition(a, p, q)
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        lhs = (eye - torch.linalg.matrix_power(A, self.l_max)).mT
        C_tilde = torch.view_as_complex(self.C.detach().double())
        return from_row(torch.linalg.solve(lhs, to_row(C_tilde)))

    @torch.no_grad()
    def to_recurrent(self, rate: float = 1.0) -> RecurrentStateSpace:
        a, b, p, q = self._discrete(rate)
        c = self._solve_output()
        return RecurrentStateSpace(a, b, c, self.D.detach(), p, q, dtype=self.D.dtype)


class LSSL(TrainedLayer):
    """The linear state space layer with a dense A: HiPPO-LegS, or trained from there.

    One A (N, N) serves all features, each with its own Δ and C; B is fixed. The kernel is made of
    Krylov products, O(N² L) time and O(N L) memory per feature: the cost that S4 removes.
    A trained A is W - Wᵀ - Σ_r P_r P_rᵀ - I/2, which is stable for any W and P.
    Source: LSSL (arXiv 2110.13985), Section 3 and Definition 1.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        train_A: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__(d_model, dt_min=dt_min, dt_max=dt_max)
        A, B = hippo.legs(d_state)
        self.register_buffer("B", B.float())
        P = (B * math.sqrt(0.5))[None]
        skew = A + P.mT @ P + 0.5 * torch.eye(d_state, dtype=A.dtype)
        self.W = nn.Parameter((skew / 2).float(), requires_grad=train_A)
        self.P = nn.Parameter(P.float(), requires_grad=train_A)
        self.dynamics = (*TrainedLayer.dynamics, "W", "P")
        self.C = nn.Parameter(torch.randn(d_model, d_state))

    def A(self) -> Tensor:
        """The continuous operator, (N, N)."""
        eye = torch.eye(self.W.shape[0], dtype=self.W.dtype, device=self.W.device)
        return self.W - self.W.mT - self.P.mT @ self.P - eye / 2

    def _discrete(self, A: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        B = self.get_buffer("B").to(A.dtype)
        return ssm.discretize(A, B, self.dt(rate, A.dtype), "bilinear")

    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        A_bar, B_bar = self._discrete(self.A(), rate)
        return (self.C[:, None] @ ssm.krylov_products(A_bar, B_bar, length))[:, 0]

    @torch.no_grad()
    def to_recurrent(self, rate: float = 1.0) -> DenseRecurrence:
        A_bar, B_bar = self._discrete(self.A().double(), rate)
        return DenseRecurrence(A_bar, B_bar, self.C.double(), self.D.double(), dtype=self.D.dtype)


LAYERS: dict[str, Callable[..., TrainedLayer]] = {
    "lssl": lambda d_model, d_state, l_max, **dt: LSSL(d_model, d_state, **dt),
    "s4-fourier": lambda d_model, d_state, l_max, **dt: S4(
        d_model, d_state, measure="fourier", l_max=l_max, **dt
    ),
    "s4": lambda d_model, d_state, l_max, **dt: S4(d_model, d_state, l_max=l_max, **dt),
    "s4d": lambda d_model, d_state, l_max, **dt: S4D(d_model, d_state, init="lin", **dt),
    "s4d-inv": lambda d_model, d_state, l_max, **dt: S4D(d_model, d_state, init="inv", **dt),
}
