"""Linear state space models as pure functions: discretisation, convolution kernels, convolution.

x' = Ax + Bu, y = Cx + Du becomes x_k = Ā x_{k-1} + B̄ u_k, y_k = C x_k + D u_k, which is the causal
convolution of u with K_k = C Ā^k B̄.  Here H is the number of independent models (features), M the
number of outputs of each, N the state size, n = N/2 the number of conjugate pairs kept, L the
length.
"""

import functools
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
    if not (A.is_floating_point() or A.is_complex()):
        raise ValueError(f"A must be real or complex numbers, not {A.dtype}")
    interval = torch.as_tensor(dt, dtype=A.real.dtype, device=A.device)
    if not bool(((interval > 0) & interval.isfinite()).all()):
        raise ValueError(
            "the interval dt must be positive and finite, got "
            f"{float(interval.min())} … {float(interval.max())}"
        )
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
    leading dimensions broadcast. O(N² L) after one discretisation per distinct interval, in the
    widest of the dtypes given.
    """
    if times.shape != u.shape[-1:] or u.is_complex():
        raise ValueError(
            f"u must be real (…, L) and times (L,); got {tuple(u.shape)} and {tuple(times.shape)}"
        )
    if C.shape[-1:] != B.shape[-1:] or D.shape[-1:] != C.shape[-2:-1]:
        raise ValueError(
            f"C must be (…, M, {B.shape[-1]}) and D (…, M); got {tuple(C.shape)}, {tuple(D.shape)}"
        )
    intervals = torch.diff(times, prepend=times.new_zeros(1))
    if not len(times) or not bool((intervals > 0).all()):
        raise ValueError(f"times must increase, beginning above 0; got {times.tolist()[:8]}")
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in (A, B, C, D, u)))
    A, B, C, D, u = (t.to(dtype) for t in (A, B, C, D, u))
    distinct, index = intervals.unique(return_inverse=True)
    rules = [discretize(A, B, dt, method) for dt in distinct]
    x, ys = u.new_zeros(*torch.broadcast_shapes(u.shape[:-1], B.shape[:-1]), A.shape[-1]), []
    for k, i in enumerate(index.tolist()):
        A_bar, B_bar = rules[i]
        x = (A_bar @ x[..., None])[..., 0] + B_bar * u[..., k, None]
        ys.append((C @ x[..., None])[..., 0] + D * u[..., k, None])
    return torch.stack(ys, -1)


def check_length(length: int) -> None:
    """Raise ValueError unless it is the length of a kernel."""
    if length < 1:
        raise ValueError(f"the length of a kernel must be at least 1, got {length}")


def krylov_kernel(A_bar: Tensor, B_bar: Tensor, C: Tensor, length: int) -> Tensor:
    """K_k = C Āᵏ B̄ for k < length by repeated products: the slow, obvious definition.

    ``A_bar (…, N, N)``, ``B_bar (…, N)``, ``C (…, N)`` → ``(…, length)``.
    """
    check_length(length)
    if A_bar.shape[-2:] != (*B_bar.shape[-1:], *C.shape[-1:]):
        raise ValueError(
            "A_bar must be (…, N, N), B_bar and C (…, N); got "
            f"{tuple(A_bar.shape)}, {tuple(B_bar.shape)}, {tuple(C.shape)}"
        )
    x, kernel = B_bar, []
    for _ in range(length):
        kernel.append((C * x).sum(-1))
        x = (A_bar @ x[..., None])[..., 0]
    return torch.stack(kernel, -1)


def repeated_squares(A: Tensor, length: int) -> list[Tensor]:
    """A, A², A⁴, …, A^(2^j) with 2^(j+1) >= length: all that ``krylov_products`` needs."""
    check_length(length)
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
    (H, n, L) tensor is never made: one batched product of two small real matrices, of O(n √L)
    powers per feature. They are made in the precision of ``log_a`` and rounded to that of ``c``:
    phases grow with k, and where modes hardly decay float32 would lose them.
    """
    check_length(length)
    if c.dim() != 3 or log_a.shape != (c.shape[0], c.shape[2]):
        raise ValueError(
            f"c must be (H, M, n) and log_a (H, n); got {tuple(c.shape)}, {tuple(log_a.shape)}"
        )
    if not (c.is_complex() and log_a.is_complex()):
        raise ValueError(f"c and log_a must be complex, got {c.dtype} and {log_a.dtype}")
    return _Vandermonde.apply(c, log_a, length)


def _powers(log_a: Tensor, stride: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of exp(stride·k·log_a) for k < count: (H, n) → (H, count, n).

    Again k = few·j + i, and products of the powers of both. In real arithmetic: a CPU has vectors
    for the real exponential, sine and cosine, but not for the complex exponential.
    """
    few = 1 << max(0, round(math.log2(count) / 2))

    def table(step: int, size: int) -> tuple[Tensor, Tensor]:
        k = step * torch.arange(size, device=log_a.device, dtype=log_a.real.dtype)[:, None]
        radius, phase = torch.exp(log_a.real[:, None] * k), log_a.imag[:, None] * k
        return radius * phase.cos(), radius * phase.sin()

    of_i = (t[:, None] for t in table(stride, few))
    of_j = (t[:, :, None] for t in table(stride * few, -(-count // few)))
    re, im = _product(*of_j, *of_i)  # (H, j, i, n)
    return re.flatten(1, 2)[:, :count].to(dtype), im.flatten(1, 2)[:, :count].to(dtype)


def _product(re: Tensor, im: Tensor, by_re: Tensor, by_im: Tensor) -> tuple[Tensor, Tensor]:
    """The complex product in real and imaginary parts."""
    return (
        torch.addcmul(re * by_re, im, by_im, value=-1),
        torch.addcmul(re * by_im, im, by_re),
    )


class _Vandermonde(torch.autograd.Function):
    """``vandermonde_kernel`` with the derivatives Σ_k g_k aᵏ by c and c Σ_k k g_k aᵏ by log a.

    In slices of features that stay in the cache. Keeps the powers, O(n √L) numbers a feature.
    """

    size = 1 << 18  # numbers in the two matrices of a slice

    @staticmethod
    def slices(c: Tensor, length: int) -> tuple[int, int, list[slice]]:
        """Columns i and rows j of the factored matrix, and slices of the features."""
        H, M, n = c.shape
        factor = 1 << max(0, round(math.log2(length * M) / 2))
        rows = -(-length // factor)
        count = max(1, _Vandermonde.size // (2 * n * (factor + M * rows)))
        return factor, rows, [slice(i, i + count) for i in range(0, H, count)]

    @staticmethod
    def forward(ctx, c: Tensor, log_a: Tensor, length: int) -> Tensor:
        dtype = c.real.dtype
        factor, rows, slices = _Vandermonde.slices(c, length)
        H, M, n = c.shape
        kernel, coarse, fine = (
            torch.empty(shape, dtype=dtype, device=c.device)
            for shape in ((H, M, length), (H, 1, rows, 2 * n), (H, factor, 2 * n))
        )
        for part in slices:
            re, im = (t[:, None] for t in _powers(log_a[part], factor, rows, dtype))
            coarse[part], right = torch.cat([re, im], -1), fine[part]
            c_re, c_im = (t.contiguous()[:, :, None] for t in (c[part].real, c[part].imag))
            # Re left, and Im left turned over, (H, M, j, 2n)
            left = torch.cat(_product(re, im.neg(), c_re, c_im.neg()), -1)
            torch.cat(_powers(log_a[part], 1, factor, dtype), -1, out=right)
            product = left.flatten(1, 2) @ right.mT
            kernel[part] = product.view(*left.shape[:2], -1)[..., :length]
        ctx.save_for_backward(c, coarse, fine)
        ctx.kind = log_a.dtype
        return kernel

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        c, coarse, fine = ctx.saved_tensors
        factor, rows, slices = _Vandermonde.slices(c, g.shape[-1])
        k = torch.arange(g.shape[-1], device=g.device, dtype=g.dtype)
        dc, dlog_a = torch.empty_like(c), torch.empty_like(c[:, 0])
        for part in slices:
            (re, im), right = coarse[part].chunk(2, -1), fine[part]
            both = F.pad(torch.cat([g[part], k * g[part]], 1), (0, rows * factor - len(k)))
            inner = both.view(len(right), -1, factor) @ right  # sums over i, (H, 2M·j, 2n)
            x, y = inner.view(len(right), -1, rows, right.shape[2]).chunk(2, -1)
            sums = torch.complex(*(t.sum(2) for t in _product(re, im, x, y)))
            by_c, by_log_a = sums.chunk(2, 1)
            dc[part], dlog_a[part] = by_c.conj(), (c[part] * by_log_a).sum(1).conj()
        return dc, dlog_a.to(ctx.kind), None


def bilinear_exponent(z: Tensor) -> Tensor:
    """log((1 + z/2) / (1 - z/2)), the exponent of a mode's Ā under the bilinear rule, z = ΔΛ.

    Complex, Re z <= 0; of full relative precision for small z, where the quotient is near 1, and
    finite at z = -2, where it is 0.
    """
    w = z / 2
    far = (1 - w.real) ** 2 + w.imag**2
    near = ((1 + w.real) ** 2 + w.imag**2).clamp(min=1e-30)
    lost = 4 * w.real / far  # |quotient|² - 1, of which little is left to add to 1 near -1
    slow = lost > -0.5
    growth = 0.5 * torch.where(slow, lost.clamp(min=-0.5).log1p(), (near / far).log())
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
    from one factored product and one FFT: O(n √L + L log L) memory, never (H, n, L). They have
    the precision of ``C_tilde``: where modes hardly decay over the length, they cancel in float32.
    """
    check_length(length)
    if (
        C_tilde.dim() != 3
        or P.dim() != 3
        or not (
            Lambda.shape == B.shape == P[:, 0].shape == C_tilde[:, 0].shape
            and dt.shape == (len(B),)
        )
    ):
        shapes = ", ".join(str(tuple(t.shape)) for t in (C_tilde, Lambda, P, B, dt))
        raise ValueError(
            "C_tilde must be (H, M, n), Lambda (H, n), P (H, rank, n), B (H, n) and dt (H,); "
            f"got {shapes}"
        )
    double = torch.complex128
    form = bilinear_normal_plus_low_rank(Lambda.to(double), P.to(double), B.to(double), dt.double())
    M, rank = C_tilde.shape[1], P.shape[1]
    rows = torch.cat([C_tilde, form.q], 1)  # (H, M + rank, n)
    columns = torch.cat([form.b[:, None], form.p], 1)  # (H, 1 + rank, n)
    wrapped = -2 / torch.expm1(length * form.log_a)  # both members of a pair, hence 2
    v = rearrange(rows[:, :, None] * columns[:, None], "h i j n -> h (i j) n")
    v = (v * wrapped[:, None]).to(C_tilde.dtype)
    sums = _RealFFT.apply(vandermonde_kernel(v, form.log_a, length))
    s = rearrange(sums, "h (i j) f -> h i j f", i=M + rank)
    roots = torch.arange(length // 2 + 1, dtype=torch.float64, device=dt.device)
    z = torch.exp(-2j * math.pi / length * roots).to(s.dtype)
    (direct, out), (into, inner) = (
        part.split([1, rank], 2) for part in s.split([M, rank], 1)
    )  # by the rows C̃ and q, and by the columns b and p
    if rank == 1:
        correction = into / (1 + z * inner)
    else:
        eye = torch.eye(rank, dtype=s.dtype, device=s.device)
        lhs, rhs = (rearrange(t, "h i j f -> h f i j") for t in (z * inner, into))
        correction = rearrange(torch.linalg.solve(eye + lhs, rhs), "h f i j -> h i j f")
    spectrum = direct[:, :, 0] - z * (out * correction.transpose(1, 2)).sum(2)
    return torch.fft.irfft(spectrum, n=length)


class _RealFFT(torch.autograd.Function):
    """``torch.fft.rfft`` whose derivative is a real transform too, not a complex one."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.length = x.shape[-1]
        return torch.fft.rfft(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        weights = g.real.new_ones(g.shape[-1])
        weights[1 : (ctx.length + 1) // 2] = 0.5  # frequencies that stand for two
        return torch.fft.irfft(g * weights, n=ctx.length, norm="forward")


def _by_feature(u: Tensor) -> Tensor:
    """(B, L, H) → (H, B, L), by a two-dimensional transpose: torch does those by blocks."""
    return u.flatten(0, 1).T.contiguous().unflatten(1, u.shape[:2])


def _by_position(y: Tensor) -> Tensor:
    """The inverse of ``_by_feature``."""
    return y.flatten(1).T.contiguous().unflatten(0, y.shape[1:])


def _fft_length(length: int) -> int:
    """Points of the FFTs that convolve ``length`` steps causally: at least 2 length - 1.

    8, 9, 10 or 12 times a power of two: an FFT of any length takes up to nine times as long.
    """
    shift = max(0, (2 * length - 2).bit_length() - 4)
    return next(m << shift for m in (8, 9, 10, 12, 16) if m << shift >= 2 * length - 1)


def _transform(x: Tensor, padded: Tensor) -> Tensor:
    """The FFT of x (…, L) followed by as many zeros, by way of a buffer with zeros there."""
    room = padded[: len(x)]
    room[..., : x.shape[-1]] = x
    return torch.fft.rfft(room)


class _FFTConvolution(torch.autograd.Function):
    """In slices of features that stay in the cache. The backward pass transforms the input again,
    which is as fast as keeping its transform, of twice the size."""

    size = 1 << 20  # bytes of the padded sequences of a slice

    @staticmethod
    def slices(u: Tensor) -> tuple[list[slice], Tensor]:
        """Slices of the features of u (H, B, L), and a zero buffer for a padded slice."""
        H, B, L = u.shape
        n = _fft_length(L)
        count = min(H, max(1, _FFTConvolution.size // (B * n * u.element_size())))
        return [slice(i, i + count) for i in range(0, H, count)], u.new_zeros(count, B, n)

    @staticmethod
    def forward(ctx, u: Tensor, kernel: Tensor, D: Tensor) -> Tensor:
        (B, L, H), M = u.shape, kernel.shape[1]
        x = _by_feature(u)
        slices, padded = _FFTConvolution.slices(x)
        n = padded.shape[-1]
        k_f = torch.fft.rfft(kernel, n=n) + D[..., None]
        y = x.new_empty(H, M, B, L)
        for part in slices:
            u_f = _transform(x[part], padded)
            for m in range(M):
                y[part, m] = torch.fft.irfft(u_f * k_f[part, m, None], n=n)[..., :L]
        ctx.save_for_backward(x, k_f)
        return _by_position(y.flatten(0, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, k_f = ctx.saved_tensors
        (H, M, _), L = k_f.shape, dy.shape[1]
        g = _by_feature(dy).unflatten(0, (H, M))
        du, dkernel = torch.empty_like(x), g.new_empty(H, M, L)
        k_f = k_f.conj().resolve_conj()
        slices, padded = _FFTConvolution.slices(x)
        n = padded.shape[-1]
        for part in slices:
            u_f = _transform(x[part], padded).conj_physical_()
            du_f = None
            for m in range(M):
                g_f = _transform(g[part, m], padded)
                k_m = k_f[part, m, None]
                du_f = g_f * k_m if du_f is None else du_f.addcmul_(g_f, k_m)
                dkernel[part, m] = torch.fft.irfft((g_f * u_f).sum(1), n=n)[..., :L]
            du[part] = torch.fft.irfft(du_f, n=n)[..., :L]
        return _by_position(du), dkernel, dkernel[..., 0]


def fft_convolution(u: Tensor, kernel: Tensor, D: Tensor) -> Tensor:
    """Causal convolution plus the direct term: y_t = Σ_k K_k u_{t-k} + D u_t.

    ``u (B, L, H)``, ``kernel (H, M, L)``, ``D (H, M)`` real, one dtype → ``(B, L, H·M)``.
    """
    fits = u.dim() == 3 and D.dim() == 2 and kernel.shape == (*D.shape, u.shape[1])
    if u.is_complex() or not fits or u.shape[2] != len(D) or not u.numel():
        raise ValueError(
            "u (B, L, H), kernel (H, M, L) and D (H, M) must fit, hold a number and be real; got "
            f"{tuple(u.shape)}, {tuple(kernel.shape)}, {tuple(D.shape)}, {u.dtype}"
        )
    return _FFTConvolution.apply(u, kernel, D)
