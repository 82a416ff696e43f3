"""Linear state space models as pure functions: discretisation, convolution kernels, convolution.

x' = Ax + Bu, y = Cx + Du becomes x_k = Ā x_{k-1} + B̄ u_k, y_k = C x_k + D u_k, which is the causal
convolution of u with K_k = C Ā^k B̄.  Here H is the number of independent models (features), N the
state size, n = N/2 the number of conjugate pairs kept, L the length.
"""

import math
from collections.abc import Callable

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
    A: Tensor, B: Tensor, dt: float | Tensor, method: str = "bilinear"
) -> tuple[Tensor, Tensor]:
    """Dense discretisation: ``A (…, N, N)``, ``B (…, N)``, ``dt (…)`` → ``(Ā, B̄)`` of those shapes.

    Source: LSSL (arXiv 2110.13985), Section 2; the layers below use closed forms of the same rules.
    """
    if method not in DISCRETIZATIONS:
        raise ValueError(f"method must be one of {', '.join(DISCRETIZATIONS)}; got {method!r}")
    if A.dim() < 2 or A.shape[-1] != A.shape[-2] or B.shape[-1:] != A.shape[-1:]:
        raise ValueError(
            f"A must be (…, N, N) and B (…, N); got {tuple(A.shape)} and {tuple(B.shape)}"
        )
    interval = torch.as_tensor(dt, dtype=A.real.dtype, device=A.device)
    if not bool((interval > 0).all()):
        raise ValueError(f"the interval dt must be positive, got {float(interval.min())}")
    lead = torch.broadcast_shapes(A.shape[:-2], B.shape[:-1], interval.shape)
    N = A.shape[-1]
    return DISCRETIZATIONS[method](A.expand(*lead, N, N), B.expand(*lead, N), interval.expand(lead))


def krylov_kernel(A_bar: Tensor, B_bar: Tensor, C: Tensor, length: int) -> Tensor:
    """K_k = C Āᵏ B̄ for k < length by repeated products: the slow, obvious definition.

    ``A_bar (…, N, N)``, ``B_bar (…, N)``, ``C (…, N)`` → ``(…, length)``.
    """
    x, kernel = B_bar, []
    for _ in range(length):
        kernel.append((C * x).sum(-1))
        x = (A_bar @ x[..., None])[..., 0]
    return torch.stack(kernel, -1) if kernel else B_bar.new_zeros(*B_bar.shape[:-1], 0)


def krylov_products(A_bar: Tensor, B_bar: Tensor, length: int) -> Tensor:
    """Āᵏ B̄ for k < length by doubling: ``(…, N, N)``, ``(…, N)`` → ``(…, N, length)``.

    O(N³ log L + N² L) time and O(N L) memory. Source: LSSL (arXiv 2110.13985), Section 3.2.
    """
    products, power = B_bar[..., None], A_bar
    while products.shape[-1] < length:
        products = torch.cat([products, power @ products], -1)
        power = power @ power
    return products[..., :length]


def vandermonde_kernel(c: Tensor, log_a: Tensor, length: int) -> Tensor:
    """K_k = Re Σ_n c_n exp(k log_a_n) for k < length: the kernel of a diagonal model.

    ``c, log_a (H, n)`` complex → ``(H, length)`` real. With k = factor·j + i the Vandermonde matrix
    is the outer product of exp(factor·j·log_a) and exp(i·log_a), so the (H, n, L) tensor is never
    made: one batched product of two small real matrices, with O(n √L) exponentials per feature.
    """
    factor = 1 << max(0, round(math.log2(max(1, length)) / 2))
    rows = -(-length // factor)
    fine = torch.arange(factor, device=c.device, dtype=c.real.dtype)
    coarse = factor * torch.arange(rows, device=c.device, dtype=c.real.dtype)
    left = c[:, None] * torch.exp(log_a[:, None] * coarse[:, None])  # (H, rows, n)
    right = torch.exp(log_a[:, None] * fine[:, None])  # (H, factor, n)
    left = torch.cat([left.real, -left.imag], -1)
    right = torch.cat([right.real, right.imag], -1)
    return (left @ right.mT).flatten(-2)[:, :length]


def cauchy_kernel(
    C_tilde: Tensor, Lambda: Tensor, P: Tensor, B: Tensor, dt: Tensor, length: int
) -> Tensor:
    """The kernel of x' = (Λ - Σ_r P_r P_rᴴ) x + B u under the bilinear rule, for k < length.

    ``C_tilde, Lambda, B (H, n)`` and ``P (H, rank, n)`` complex, one of each conjugate pair;
    ``dt (H,)``; → ``(H, length)`` real. ``C_tilde = C (I - Ā^length)`` makes the generating
    function exact on the roots of unity z, where Woodbury reduces it to Cauchy products.
    Source: S4, Algorithm 1.

    Departure from the paper: numerator and denominator are multiplied by (1 + z), which leaves no
    singular node at z = -1, and both members of a pair share one division.
    """
    real, rank = C_tilde.real.dtype, P.shape[1]
    z = torch.exp(
        -2j
        * math.pi
        * torch.arange(length // 2 + 1, dtype=torch.float64, device=dt.device)
        / length
    )
    alpha = (2 / dt)[:, None] * (1 - z).to(C_tilde.dtype)  # (H, F)
    beta = (1 + z).to(C_tilde.dtype)  # (F,)
    denominator = (
        (alpha * alpha)[:, None]
        - 2 * Lambda.real[..., None] * (alpha * beta)[:, None]
        + (Lambda.abs() ** 2)[..., None] * (beta * beta)
    )  # (H, n, F)
    inverse = torch.view_as_real(denominator.reciprocal()).flatten(-2)  # (H, n, 2F)
    rows = torch.cat([C_tilde[:, None], P.conj()], 1)  # (H, 1 + rank, n)
    columns = torch.cat([B[:, None], P], 1)
    v = rearrange(rows[:, :, None] * columns[:, None], "h i j n -> h (i j) n")
    weights = torch.cat([v.real, (v * Lambda.conj()[:, None]).real], 1)
    sums = torch.view_as_complex((weights @ inverse).unflatten(-1, (-1, 2)))
    straight, shifted = sums.chunk(2, 1)  # (H, (1 + rank)², F)
    s = 4 * (alpha[:, None] * straight - beta * shifted)
    s = rearrange(s, "h (i j) f -> h f i j", i=1 + rank)
    if rank == 1:
        correction = s[..., 1:, 0] / (2 + beta[:, None] * s[..., 1, 1:])
    else:
        eye = torch.eye(rank, dtype=s.dtype, device=s.device)
        correction = torch.linalg.solve(
            2 * eye + beta[:, None, None] * s[..., 1:, 1:], s[..., 1:, 0]
        )
    spectrum = s[..., 0, 0] - beta * (s[..., 0, 1:] * correction).sum(-1)
    return torch.fft.irfft(spectrum, n=length).to(real)


class _FFTConvolution(torch.autograd.Function):
    """Keeps the two transforms for the backward pass instead of recomputing or doubling them."""

    @staticmethod
    def forward(ctx, u: Tensor, kernel: Tensor, D: Tensor) -> Tensor:
        L = u.shape[-1]
        u_f = torch.fft.rfft(u, n=2 * L)
        k_f = torch.fft.rfft(kernel, n=2 * L) + D[:, None]
        ctx.save_for_backward(u_f, k_f)
        return torch.fft.irfft(u_f * k_f, n=2 * L)[..., :L]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        u_f, k_f = ctx.saved_tensors
        L = dy.shape[-1]
        dy_f = torch.fft.rfft(dy, n=2 * L)
        dkernel = torch.fft.irfft((dy_f * u_f.conj()).sum(0), n=2 * L)[..., :L]
        du = torch.fft.irfft(dy_f.mul_(k_f.conj()), n=2 * L)[..., :L]
        return du, dkernel, dkernel[:, 0]


def fft_convolution(u: Tensor, kernel: Tensor, D: Tensor) -> Tensor:
    """Causal convolution plus the direct term: y_t = Σ_k K_k u_{t-k} + D u_t.

    ``u (B, H, L)``, ``kernel (H, L)``, ``D (H,)`` real, one dtype → ``(B, H, L)``.
    """
    if u.shape[-1] == 0:
        return u
    return _FFTConvolution.apply(u, kernel, D)
