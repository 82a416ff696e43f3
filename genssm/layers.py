"""State space layers: trained by convolution, converted once to an exact recurrence.

A trained layer has ``forward``; ``to_recurrent`` returns another object with ``initial_state``,
``prefill`` and ``step``. Sources: S4 (arXiv 2111.00396), S4D (arXiv 2206.11893).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from genssm import hippo, ssm

SLOWEST_DECAY = 1e-4  # Re Λ never rises above -SLOWEST_DECAY: every mode decays


class StateSpace(nn.Module, ABC):
    """H independent single-input single-output models with N states, stored as n = N/2 pairs.

    ``Lambda = -max(exp(log_decay), SLOWEST_DECAY) + i·frequency`` has a negative real part whatever
    the parameters, and ``dt = exp(log_dt)`` is positive.
    """

    # Parameters of the dynamics: trained at a lower rate and without weight decay.
    dynamics: tuple[str, ...] = ("log_dt", "log_decay", "frequency")

    def __init__(
        self, d_model: int, Lambda: Tensor, *, dt_min: float = 1e-3, dt_max: float = 1e-1
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model must be at least 1, got {d_model}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"the range of dt needs 0 < dt_min <= dt_max, got {dt_min}, {dt_max}")
        n = Lambda.shape[0]
        spread = torch.rand(d_model) * math.log(dt_max / dt_min)
        self.log_dt = nn.Parameter(spread + math.log(dt_min))
        decay = (-Lambda.real).clamp(min=10 * SLOWEST_DECAY)  # some measures start without decay
        self.log_decay = nn.Parameter(decay.log().float().repeat(d_model, 1))
        self.frequency = nn.Parameter(Lambda.imag.float().repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(d_model, n, 2) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(d_model))

    def Lambda(self) -> Tensor:
        """The eigenvalues of the normal part, (H, n) complex, Re Λ < 0."""
        return torch.complex(-self.log_decay.exp().clamp(min=SLOWEST_DECAY), self.frequency)

    def _double_dynamics(self) -> tuple[Tensor, Tensor]:
        """Λ (H, n) complex128 and Δ (H, 1) float64, for constants that are rounded once."""
        decay = self.log_decay.detach().double().exp().clamp(min=SLOWEST_DECAY)
        Lambda = torch.complex(-decay, self.frequency.detach().double())
        return Lambda, self.log_dt.detach().double().exp()[:, None]

    @abstractmethod
    def kernel(self, length: int) -> Tensor:
        """The convolution kernel K_k = C Āᵏ B̄, (H, length) real."""

    @abstractmethod
    def to_recurrent(self) -> "RecurrentStateSpace":
        """The same map as an exact recurrence; constants made in float64 and rounded once."""

    def forward(self, u: Tensor) -> Tensor:
        """u (B, L, H) → y (B, L, H), by convolution; at least float32 whatever the autocast."""
        with torch.autocast(u.device.type, enabled=False):
            x = rearrange(u.to(self.D.dtype), "b l h -> b h l").contiguous()
            y = ssm.fft_convolution(x, self.kernel(x.shape[-1]), self.D)
            return rearrange(y, "b h l -> b l h")


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

    def kernel(self, length: int) -> Tensor:
        Lambda = self.Lambda()
        log_a = Lambda * self.log_dt.exp()[:, None]
        c = 2 * torch.view_as_complex(self.C) * torch.expm1(log_a) / Lambda
        return ssm.vandermonde_kernel(c, log_a, length)

    @torch.no_grad()
    def to_recurrent(self) -> "RecurrentStateSpace":
        Lambda, dt = self._double_dynamics()
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

    def kernel(self, length: int) -> Tensor:
        P, B, C = (torch.view_as_complex(t) for t in (self.P, self.B, self.C))
        span = self.l_max
        if length > span:
            C, span = self._lengthened(length).to(C.dtype), length
        return ssm.cauchy_kernel(C, self.Lambda(), P, B, self.log_dt.exp(), span)[:, :length]

    @torch.no_grad()
    def _lengthened(self, length: int) -> Tensor:
        """C̃ for another length: C (I - Ā^length), in float64."""
        a, _, p, q = self._discrete()
        C = _to_row(self._solve_output(a, p, q))
        power = torch.linalg.matrix_power(dense_transition(a, p, q), length)
        return _from_row(C - (C[:, None] @ power)[:, 0])

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ā = diag(a) - p qᵀ and B̄ = b under the bilinear rule, (H, n) complex128.

        With h = Δ/2, (I - hA)⁻¹ = E - E P (I/h + Pᴴ E P)⁻¹ Pᴴ E for E = (I - hΛ)⁻¹ (Woodbury), so
        Ā = 2 (I - hA)⁻¹ - I stays diagonal minus low rank: p, q (H, rank, n).
        Source: S4, Appendix C.2.
        """
        Lambda, dt = self._double_dynamics()
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

    def _solve_output(self, a: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """C from C̃ = C (I - Ā^l_max), (H, n) complex128."""
        A = dense_transition(a, p, q)
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        lhs = (eye - torch.linalg.matrix_power(A, self.l_max)).mT
        C_tilde = torch.view_as_complex(self.C.detach().double())
        return _from_row(torch.linalg.solve(lhs, _to_row(C_tilde)))

    @torch.no_grad()
    def to_recurrent(self) -> "RecurrentStateSpace":
        a, b, p, q = self._discrete()
        c = self._solve_output(a, p, q)
        return RecurrentStateSpace(a, b, c, self.D.detach(), p, q, dtype=self.D.dtype)


LAYERS: dict[str, Callable[..., StateSpace]] = {
    "s4-fourier": lambda d_model, d_state, l_max, **dt: S4(
        d_model, d_state, measure="fourier", l_max=l_max, **dt
    ),
    "s4": lambda d_model, d_state, l_max, **dt: S4(d_model, d_state, l_max=l_max, **dt),
    "s4d": lambda d_model, d_state, l_max, **dt: S4D(d_model, d_state, init="lin", **dt),
    "s4d-inv": lambda d_model, d_state, l_max, **dt: S4D(d_model, d_state, init="inv", **dt),
}


def _to_row(c: Tensor) -> Tensor:
    """(…, n) complex c → the real row (…, 2n) with row · [Re x; Im x] = 2 Re(c·x)."""
    return 2 * torch.cat([c.real, -c.imag], -1)


def _from_row(row: Tensor) -> Tensor:
    """The inverse of ``_to_row``."""
    real, imag = row.chunk(2, -1)
    return torch.complex(real, -imag) / 2


def dense_transition(a: Tensor, p: Tensor | None, q: Tensor | None) -> Tensor:
    """diag(a) - Σ_r p_r q_rᵀ acting on [Re x; Im x]: a (H, n), p, q (H, rank, n) → (H, 2n, 2n)."""
    re, im = torch.diag_embed(a.real), torch.diag_embed(a.imag)
    A = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
    if p is not None and q is not None:
        A = A - torch.cat([p.real, p.imag], -1).mT @ _to_row(q)
    return A


class RecurrentStateSpace(nn.Module):
    """x_k = (diag(a) - Σ_r p_r q_rᵀ) x_{k-1} + b u_k, y_k = c·x_k + D u_k; half of each pair kept.

    ``q_rᵀx`` and ``c·x`` run over both members of a pair: 2 Re(Σ q x). Without p and q: diagonal.
    ``a, b, c (H, n)`` and ``p, q (H, rank, n)`` complex128 and ``D (H,)`` are rounded once, to
    ``dtype``, as are the tables of ``prefill``. The state is ``(B, H, n)`` complex.
    """

    chunk = 64  # prompt positions per product in ``prefill``

    a: Tensor
    b: Tensor
    c: Tensor
    D: Tensor
    p: Tensor | None
    q: Tensor | None
    advance: Tensor  # Ā^chunk on [Re x; Im x], (H, 2n, 2n)
    inputs: Tensor  # Krylov products Āⁱ b, the last first, (H, 2n, chunk)
    outputs: Tensor  # c Āⁱ⁺¹, (H, chunk, 2n)
    toeplitz: Tensor  # [j, i] = the kernel at i - j, (H, chunk, chunk)

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        D: Tensor,
        p: Tensor | None = None,
        q: Tensor | None = None,
        *,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        keep = self.register_buffer
        keep("a", a.to(complex_dtype))
        keep("b", b.to(complex_dtype))
        keep("c", torch.view_as_real(2 * c.conj()).to(dtype))  # so that c·x is a real dot product
        keep("D", D.to(dtype, copy=True))
        keep("p", None if p is None else p.to(complex_dtype))
        keep("q", None if q is None else torch.view_as_real(2 * q.conj()).to(dtype))

        # Krylov products by doubling: inputs[i] = Āⁱ b and outputs[i] = c Āⁱ⁺¹ for i < chunk.
        power = dense_transition(a, p, q)  # (H, 2n, 2n)
        inputs = torch.cat([b.real, b.imag], -1)[..., None]  # (H, 2n, 1)
        outputs = (_to_row(c)[:, None] @ power).contiguous()  # (H, 1, 2n)
        while inputs.shape[-1] < self.chunk:
            inputs = torch.cat([inputs, power @ inputs], -1)
            outputs = torch.cat([outputs, outputs @ power], -2)
            power = power @ power
        kernel = (_to_row(c)[:, None] @ inputs)[:, 0]  # (H, chunk)
        kernel[:, 0] += D
        # Toeplitz: within a chunk, output i takes kernel[i - j] from input j.
        toeplitz = F.pad(kernel, (self.chunk - 1, 0)).unfold(-1, self.chunk, 1).flip(1)
        keep("advance", power.to(dtype), persistent=False)
        keep("inputs", inputs.flip(-1).to(dtype).contiguous(), persistent=False)
        keep("outputs", outputs.to(dtype).contiguous(), persistent=False)
        keep("toeplitz", toeplitz.to(dtype).contiguous(), persistent=False)

    def initial_state(self, batch: int) -> Tensor:
        """The zero state, (batch, H, n) complex."""
        return self.a.new_zeros(batch, *self.a.shape)

    def _transition(self, x: Tensor) -> Tensor:
        if self.p is None or self.q is None:
            return self.a * x
        qx = (self.q * torch.view_as_real(x)[:, :, None]).sum((-2, -1))  # (B, H, rank)
        return self.a * x - (self.p * qx[..., None]).sum(2)

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One position, O(N) per feature: u (B, H), x (B, H, n) → y (B, H), next x."""
        x = torch.addcmul(self._transition(x), self.b, u[..., None])
        return torch.addcmul((self.c * torch.view_as_real(x)).sum((-2, -1)), self.D, u), x

    def prefill(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Many positions in parallel, from any state: u (B, L, H), x → y (B, L, H), last x.

        Chunks of T positions: inside a chunk a Toeplitz product, between chunks the state, which
        enters every output through c Āⁱ⁺¹ and advances by Ā^T and Krylov products.
        """
        length = u.shape[1]
        if length == 0:
            return u, x
        T = self.chunk
        chunks, rest = -(-length // T), length % T
        padded = F.pad(u, (0, 0, 0, chunks * T - length))
        blocks = rearrange(padded, "b (m t) h -> h m b t", t=T)
        state = rearrange(torch.view_as_real(x), "b h n c -> h b (c n)")
        increments = blocks @ self.inputs[:, None].mT  # (H, M, B, 2n)
        states = [state]
        for m in range(chunks - 1 if rest else chunks):
            state = state @ self.advance.mT + increments[:, m]
            states.append(state)
        starts = torch.stack(states[:chunks], 1)  # (H, M, B, 2n)
        y = blocks @ self.toeplitz[:, None] + starts @ self.outputs[:, None].mT  # (H, M, B, T)
        y = rearrange(y, "h m b t -> b (m t) h")[:, :length]
        n = self.a.shape[-1]
        x = torch.complex(state[..., :n], state[..., n:]).transpose(0, 1)
        if rest:
            last = blocks[:, -1, :, :rest] @ self.inputs[..., T - rest :].mT  # (H, B, 2n)
            for _ in range(rest):
                x = self._transition(x)
            x = x + torch.complex(last[..., :n], last[..., n:]).transpose(0, 1)
        return y, x.contiguous()
