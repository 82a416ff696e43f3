"""Linear state space models as pure functions: discretisation, convolution kernels, convolution.

x' = Ax + Bu, y = Cx + Du becomes x_k = Ā x_{k-1} + B̄ u_k, y_k = C x_k + D u_k, which is the causal
convolution of u with K_k = C Ā^k B̄.  Here H is the number of independent models (features), M the
number of outputs of each, N the state size, n = N/2 the number of conjugate pairs kept, L the
length.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable


def generalized_bilinear(A: Tensor, B: Tensor, dt: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Ā = (I - αΔA)⁻¹ (I + (1-α)ΔA), B̄ = (I - αΔA)⁻¹ ΔB, for α in [0, 1].

    α = 0 is forward Euler, 1/2 the bilinear (Tustin) rule, 1 backward Euler.
    ``A (…, N, N)``, ``B (…, N)``, ``dt (…)``. Source: HiPPO (arXiv 2008.07669), Appendix B.3.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in 0 … 1, got {alpha}")
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    step = dt[..., None, None] * A
    both = torch.cat([eye + (1 - alpha) * step, (dt[..., None] * B)[..., None]], -1)
    if alpha > 0:
        both = torch.linalg.solve(eye - alpha * step, both)
    return both[..., :-1], both[..., -1]


def _zero_order_hold(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    # exp of [[A, B], [0, 0]]·dt holds (Ā, B̄) in its first rows, also for a singular A.
    N = A.shape[-1]
    block = F.pad(torch.cat([A, B[..., None]], -1), (0, 0, 0, 1)) * dt[..., None, None]
    exp = torch.linalg.matrix_exp(block)
    return exp[..., :N, :N], exp[..., :N, N]


DISCRETIZATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward_euler": lambda A, B, dt: generalized_bilinear(A, B, dt, 0.0),
    "backward_euler": lambda A, B, dt: generalized_bilinear(A, B, dt, 1.0),
    "bilinear": lambda A, B, dt: generalized_bilinear(A, B, dt, 0.5),
    "zoh": _zero_order_hold,
}


def discretize(
    A: Tensor, B: Tensor, dt: float | Tensor, method: str | float = "bilinear"
) -> tuple[Tensor, Tensor]:
    """Dense discretisation: ``A (…, N, N)``, ``B (…, N)``, ``dt (…)`` → ``(Ā, B̄)`` of those shapes.

    ``method`` is a key of ``DISCRETIZATIONS``, or the α of the generalised bilinear rule.
    Source: LSSL (arXiv 2110.13985), Section 2; the layers use closed forms of the same rules.
    """
    if isinstance(method, str) and method not in DISCRETIZATIONS:
        raise ValueError(
            f"method must be one of {', '.join(DISCRETIZATIONS)}, or a number; got {method!r}"
        )
    if A.dim() < 2 or A.shape[-1] != A.shape[-2] or B.shape[-1:] != A.shape[-1:]:
        raise ValueError(
            f"A must be (…, N, N) and B (…, N); got {tuple(A.shape)} and {tuple(B.shape)}"
        )
    interval = torch.as_tensor(dt, dtype=A.real.dtype, device=A.device)
    if not bool((interval > 0).all()):
        raise ValueError(f"the interval dt must be positive, got {float(interval.min())}")
    lead = torch.broadcast_shapes(A.shape[:-2], B.shape[:-1], interval.shape)
    N = A.shape[-1]
    A, B, interval = A.expand(*lead, N, N), B.expand(*lead, N), interval.expand(lead)
    if isinstance(method, str):
        return DISCRETIZATIONS[method](A, B, interval)
    return generalized_bilinear(A, B, interval, method)


def simulate(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    u: Tensor,
    times: Tensor,
    method: str | float = "zoh",
) -> Tensor:
    """The continuous view: x' = Ax + Bu, y = Cx + Du on any increasing grid of times.

    The state is zero at time 0, and ``u[…, k]`` acts from the time before up to ``times[k]``, so
    that "zoh" is exact for an input that is constant in between. ``A (…, N, N)``, ``B (…, N)``,
    ``C (…, M, N)``, ``D (…, M)``, ``u (…, L)``, ``times (L,)`` → ``y (…, M, L)``, with the
    leading dimensions broadcast. O(N² L) after one discretisation per distinct interval.
    """
    if times.shape != u.shape[-1:] or u.is_complex():
        raise ValueError(
            f"u must be real (…, L) and times (L,); got {tuple(u.shape)} and {tuple(times.shape)}"
        )
    intervals = torch.diff(times, prepend=times.new_zeros(1))
    if not bool((intervals > 0).all()):
        raise ValueError("times must increase, beginning above 0")
    distinct, index = intervals.unique(return_inverse=True)
    rules = [discretize(A, B, dt, method) for dt in distinct]
    x, ys = u.new_zeros(*torch.broadcast_shapes(u.shape[:-1], B.shape[:-1]), A.shape[-1]), []
    for k, i in enumerate(index.tolist()):
        A_bar, B_bar = rules[i]
        x = (A_bar @ x[..., None])[..., 0] + B_bar * u[..., k, None]
        ys.append((C @ x[..., None])[..., 0] + D * u[..., k, None])
    return torch.stack(ys, -1)


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"the length of a kernel must be at least 1, got {length}")


def krylov_kernel(A_bar: Tensor, B_bar: Tensor, C: Tensor, length: int) -> Tensor:
    """K_k = C Āᵏ B̄ for k < length by repeated products: the slow, obvious definition.

    ``A_bar (…, N, N)``, ``B_bar (…, N)``, ``C (…, N)`` → ``(…, length)``.
    """
    _check_length(length)
    x, kernel = B_bar, []
    for _ in range(length):
        kernel.append((C * x).sum(-1))
        x = (A_bar @ x[..., None])[..., 0]
    return torch.stack(kernel, -1)


def repeated_squares(A: Tensor, length: int) -> list[Tensor]:
    """A, A², A⁴, …, A^(2^j) with 2^(j+1) >= length: all that ``krylov_products`` needs."""
    _check_length(length)
    powers = [A]
    while 1 << len(powers) < length:
        powers.append(powers[-1] @ powers[-1])
    return powers


def krylov_products(powers: list[Tensor], b: Tensor, length: int) -> Tensor:
    """Aᵏ b for k < length by doubling, from the ``repeated_squares`` (…, N, N) of A.

    ``b (…, N)`` → ``(…, N, length)``. With the squares O(N³ log L + N² L) time and O(N L) memory.
    Source: LSSL (arXiv 2110.13985), Section 3.2.
    """
    products = b[..., None]
    for power in powers:
        if products.shape[-1] < length:
            products = torch.cat([products, power @ products], -1)
    return products[..., :length]


def vandermonde_kernel(c: Tensor, log_a: Tensor, length: int) -> Tensor:
    """K_k = Re Σ_n c_n exp(k log_a_n) for k < length: the kernels of a diagonal model.

    ``c (H, M, n)`` and ``log_a (H, n)`` complex → ``(H, M, length)`` real. With k = factor·j + i
    the Vandermonde matrix is the outer product of exp(factor·j·log_a) and exp(i·log_a), so the
    (H, n, L) tensor is never made: one batched product of two small real matrices, with O(n √L)
    exponentials per feature. They are made in the precision of ``log_a`` and rounded to that of
    ``c``: phases grow with k, and where modes hardly decay float32 would lose them.
    """
    _check_length(length)
    factor = 1 << max(0, round(math.log2(length * c.shape[1]) / 2))
    rows = -(-length // factor)
    fine = torch.arange(factor, device=c.device, dtype=log_a.real.dtype)
    coarse = factor * torch.arange(rows, device=c.device, dtype=log_a.real.dtype)
    re, im = (t[:, None] for t in _powers(log_a, coarse, c.real.dtype))  # (H, 1, rows, n)
    c_re, c_im = c.real[:, :, None], c.imag[:, :, None]  # (H, M, 1, n)
    left = torch.cat([c_re * re - c_im * im, -(c_re * im + c_im * re)], -1).flatten(1, 2)
    right = torch.cat(_powers(log_a, fine, c.real.dtype), -1)  # (H, factor, 2n)
    return (left @ right.mT).view(len(c), c.shape[1], -1)[..., :length]


def _powers(log_a: Tensor, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of exp(k log_a): (H, n), (K,) → (H, K, n). Real functions are
    vectorised on a CPU, the complex exponential is not."""
    size = torch.exp(log_a.real[:, None] * k[:, None])
    phase = log_a.imag[:, None] * k[:, None]
    return (size * phase.cos()).to(dtype), (size * phase.sin()).to(dtype)


def bilinear_exponent(z: Tensor) -> Tensor:
    """log((1 + z/2) / (1 - z/2)), the exponent of a mode's Ā under the bilinear rule, z = ΔΛ.

    Complex, Re z <= 0; of full relative precision for small z, where the quotient is near 1.
    """
    w = z / 2
    far = (1 - w.real) ** 2 + w.imag**2
    growth = 0.5 * torch.log1p(4 * w.real / far)
    return torch.complex(growth, torch.atan2(2 * w.imag, 1 - w.real**2 - w.imag**2))


class BilinearForm(NamedTuple):
    """Ā = diag(exp(log_a)) - Σ_r p_r q_rᵀ and B̄ = b; one of each conjugate pair.

    Complex: ``log_a, b (H, n)`` and ``p, q (H, rank, n)``. Products with q run over both members.
    """

    log_a: Tensor
    b: Tensor
    p: Tensor
    q: Tensor


def bilinear_normal_plus_low_rank(Lambda: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> BilinearForm:
    """The bilinear rule for x' = (Λ - Σ_r P_r P_rᴴ) x + B u keeps "diagonal minus low rank".

    With h = Δ/2, (I - hA)⁻¹ = E - E P (I/h + Pᴴ E P)⁻¹ Pᴴ E for E = (I - hΛ)⁻¹ (Woodbury), and
    Ā = 2 (I - hA)⁻¹ - I. ``Lambda, B (H, n)``, ``P (H, rank, n)`` complex, ``dt (H,)`` real.
    Source: S4 (arXiv 2111.00396), Appendix C.2.
    """
    h = dt[:, None] / 2
    E = 1 / (1 - h * Lambda)
    EP, PE = E[:, None] * P, P.conj() * E[:, None]  # (H, rank, n)
    # Sums over n run over both members of a pair, hence twice the real part.
    PEP = 2 * (PE @ P.mT).real  # (H, rank, rank)
    eye = torch.eye(P.shape[1], dtype=PEP.dtype, device=PEP.device)
    p = (torch.linalg.inv(eye / h[..., None] + PEP).mT.to(EP.dtype) @ EP) * 2
    PEB = 2 * (PE @ B[..., None]).real  # (H, rank, 1)
    b = h * (2 * E * B - (p * PEB).sum(1))
    return BilinearForm(bilinear_exponent(2 * h * Lambda), b, p, PE)


def cauchy_kernel(
    C_tilde: Tensor, Lambda: Tensor, P: Tensor, B: Tensor, dt: Tensor, length: int
) -> Tensor:
    """The kernels of x' = (Λ - Σ_r P_r P_rᴴ) x + B u under the bilinear rule, for k < length.

    ``C_tilde (H, M, n)``, ``Lambda, B (H, n)`` and ``P (H, rank, n)`` complex, one of each
    conjugate pair; ``dt (H,)``; → ``(H, M, length)`` real. ``C_tilde = C (I - Ā^length)`` makes the
    generating function exact on the roots of unity z, where Woodbury reduces it to Cauchy sums
    Σ_n v_n / (1 - z a_n), a the diagonal of Ā. Source: S4 (arXiv 2111.00396), Algorithm 1.

    Departure from the paper: on the roots of unity such a sum is the discrete Fourier transform
    of Σ_n v_n a_nᵏ / (1 - a_n^length), a Vandermonde kernel. All (M + rank)(1 + rank) sums come
    from one factored product and one FFT: O(n √L + L log L) memory, never (H, n, L).
    """
    _check_length(length)
    double = torch.complex128
    form = bilinear_normal_plus_low_rank(Lambda.to(double), P.to(double), B.to(double), dt.double())
    M, rank = C_tilde.shape[1], P.shape[1]
    rows = torch.cat([C_tilde, form.q], 1)  # (H, M + rank, n)
    columns = torch.cat([form.b[:, None], form.p], 1)  # (H, 1 + rank, n)
    wrapped = -2 / torch.expm1(length * form.log_a)  # both members of a pair, hence 2
    v = rearrange(rows[:, :, None] * columns[:, None], "h i j n -> h (i j) n")
    v = (v * wrapped[:, None]).to(C_tilde.dtype)
    sums = torch.fft.rfft(vandermonde_kernel(v, form.log_a, length))
    s = rearrange(sums, "h (i j) f -> h i j f", i=M + rank)
    roots = torch.arange(length // 2 + 1, dtype=torch.float64, device=dt.device)
    z = torch.exp(-2j * math.pi / length * roots).to(s.dtype)
    inner, right = z * s[:, M:, 1:], s[:, M:, 0]  # (H, rank, rank, F), (H, rank, F)
    if rank == 1:
        correction = right / (1 + inner[:, 0])
    else:
        eye = torch.eye(rank, dtype=s.dtype, device=s.device)
        lhs, rhs = (rearrange(t, "h ... f -> h f ...") for t in (inner, right))
        correction = torch.linalg.solve(eye + lhs, rhs).mT
    spectrum = s[:, :M, 0] - z * (s[:, :M, 1:] * correction[:, None]).sum(2)
    return torch.fft.irfft(spectrum, n=length)


class _FFTConvolution(torch.autograd.Function):
    """Keeps the two transforms for the backward pass instead of recomputing or doubling them."""

    @staticmethod
    def forward(ctx, u: Tensor, kernel: Tensor, D: Tensor) -> Tensor:
        L = u.shape[-1]
        u_f = torch.fft.rfft(u, n=2 * L)
        k_f = torch.fft.rfft(kernel, n=2 * L) + D[..., None]
        ctx.save_for_backward(u_f, k_f)
        return torch.fft.irfft(u_f[:, :, None] * k_f, n=2 * L)[..., :L].flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        u_f, k_f = ctx.saved_tensors
        L = dy.shape[-1]
        dy_f = torch.fft.rfft(dy, n=2 * L).unflatten(1, k_f.shape[:2])  # (B, H, M, F)
        dkernel = torch.fft.irfft((dy_f * u_f.conj()[:, :, None]).sum(0), n=2 * L)[..., :L]
        du = torch.fft.irfft(dy_f.mul_(k_f.conj()).sum(2), n=2 * L)[..., :L]
        return du, dkernel, dkernel[..., 0]


def fft_convolution(u: Tensor, kernel: Tensor, D: Tensor) -> Tensor:
    """Causal convolution plus the direct term: y_t = Σ_k K_k u_{t-k} + D u_t.

    ``u (B, H, L)``, ``kernel (H, M, L)``, ``D (H, M)`` real, one dtype → ``(B, H·M, L)``.
    """
    if u.is_complex() or u.dim() != 3 or kernel.shape != (*D.shape, u.shape[-1]):
        raise ValueError(
            "u (B, H, L), kernel (H, M, L) and D (H, M) must fit and be real; got "
            f"{tuple(u.shape)}, {tuple(kernel.shape)}, {tuple(D.shape)}, {u.dtype}"
        )
    return _FFTConvolution.apply(u, kernel, D)
