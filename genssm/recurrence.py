"""Recurrences: what a trained layer is converted to. State in, state out, one position or many."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from genssm import ssm


def to_column(b: Tensor) -> Tensor:
    """(…, n) complex b → the real column (…, 2n) of each number's real and imaginary part."""
    return torch.view_as_real(b.resolve_conj()).flatten(-2)


def to_row(c: Tensor) -> Tensor:
    """(…, n) complex c → the real row (…, 2n) with row · to_column(x) = 2 Re(c·x)."""
    return to_column(2 * c.conj())


def from_row(row: Tensor) -> Tensor:
    """The inverse of ``to_row``."""
    return torch.view_as_complex(row.unflatten(-1, (-1, 2)).contiguous()).conj() / 2


def dense_transition(a: Tensor, p: Tensor | None, q: Tensor | None) -> Tensor:
    """diag(a) - Σ_r p_r q_rᵀ acting on columns: a (H, n), p, q (H, rank, n) → (H, 2n, 2n)."""
    turns = torch.stack([to_column(a), to_column(1j * a)], -1)  # (H, 2n, 2)
    H, n = a.shape
    A = turns.new_zeros(H, n, 2, n, 2)
    torch.diagonal(A, dim1=1, dim2=3).copy_(rearrange(turns, "h (n i) j -> h i j n", i=2))
    A = A.view(H, 2 * n, 2 * n)
    if p is not None and q is not None:
        A = A - to_column(p).mT @ to_row(q)
    return A


class Tables(NamedTuple):
    """What reads a chunk of T positions at once; S real states and M outputs for each feature."""

    inputs: Tensor  # Krylov products Aⁱ b, the last first, (H, T, S)
    outputs: Tensor  # c Aⁱ⁺¹, (H, S, M·T)
    toeplitz: Tensor  # [j, (m, i)] = the kernel at i - j, (H, T, M·T)
    advance: Tensor  # A^T as the subclass applies it


def without_autocast(u: Tensor) -> AbstractContextManager[object]:
    """States are not rounded by a context around; entered only where there is one."""
    kind = u.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class Recurrence(nn.Module, ABC):
    """z_k = A z_{k-1} + b u_k, y_k = c z_k + D u_k, S real states and M outputs for each feature.

    Made of constants in float64, which are rounded once, to ``dtype``. How the state is held and
    stepped is the subclass's affair. Outputs are flattened, feature by feature: (…, H·M). A
    ``rate`` scales Δ: ``convert`` makes the recurrence of a scaled interval, which is then kept.
    """

    # Prompt positions per product in ``prefill``, a power of two: as many as pay for reading the
    # tables once more and for advancing the state, O(N²) where the transition is dense.
    chunk = 64

    D: Tensor  # (H·M,)

    def __init__(self, D: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("D", D.flatten().to(dtype, copy=True))
        self.convert: Callable[[float], Recurrence] | None = None
        self._exact_D = D.double()  # (H, M)
        self._rates: dict[float, Recurrence] = {}
        self._tables: Tables | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._rates, self._tables = {}, None  # which are made again where the buffers go
        return super()._apply(fn, recurse)

    def at(self, rate: float) -> "Recurrence":
        """The recurrence of the interval rate·Δ, on the same states."""
        if rate == 1:
            return self
        if not 0 < rate < math.inf:
            raise ValueError(f"the rate must be positive and finite, got {rate}")
        if rate not in self._rates:
            if self.convert is None:
                raise ValueError("a recurrence that no layer was converted to has one rate only")
            self._rates[rate] = self.convert(rate).to(self.D.device)
        return self._rates[rate]

    def step(self, u: Tensor, x: Tensor, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """One position: u (B, H), state → y (B, H·M), next state; whatever the autocast."""
        self._check("(B, H)", 2, u, x)
        with without_autocast(u):
            return self.at(rate)._step(u.to(self.D.dtype), x)

    def prefill(self, u: Tensor, x: Tensor, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """Many positions in parallel, from any state: u (B, L, H), x → y (B, L, H·M), last x."""
        self._check("(B, L, H)", 3, u, x)
        own, length = self.at(rate), u.shape[1]
        u = u.to(self.D.dtype)
        if not u.numel():
            return u.new_zeros(*u.shape[:2], len(self.D)), x
        with without_autocast(u):
            if length == 1:  # needs no tables
                y, x = own._step(u[:, 0], x)
                return y[:, None], x
            return own._read(u, x)

    def _check(self, shape: str, dims: int, u: Tensor, x: Tensor) -> None:
        H = len(self._exact_D)
        if u.dim() != dims or u.shape[-1] != H or u.is_complex():
            raise ValueError(
                f"u must be real, {shape} with H = {H}; got {tuple(u.shape)} {u.dtype}"
            )
        if x.shape != (wanted := (len(u), *self.initial_state(0).shape[1:])):
            raise ValueError(f"the state must be of shape {wanted}; got {tuple(x.shape)}")

    def tables(self) -> Tables:
        """What ``prefill`` multiplies by, made when it is first needed."""
        if self._tables is None:
            T, (inputs, outputs, advance), c = self.chunk, self._products(), self._exact_row()
            kernel = c @ inputs.mT  # (H, M, T)
            kernel[..., 0] += self._exact_D
            toeplitz = F.pad(kernel, (T - 1, 0)).unfold(-1, T, 1).flip(2)
            tables = Tables(
                inputs.flip(1),
                rearrange(outputs, "h m t s -> h s (m t)"),
                rearrange(toeplitz, "h m j i -> h j (m i)"),
                advance,
            )
            self._tables = Tables(*(self._rounded(table) for table in tables))
        return self._tables

    def _rounded(self, table: Tensor) -> Tensor:
        dtype = self.D.dtype
        kind = dtype.to_complex() if table.is_complex() else dtype
        return table.to(self.D.device, kind).contiguous()

    def _read(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``prefill`` in chunks of T positions.

        Inside a chunk a Toeplitz product; between chunks the state, which enters every output
        through c Aⁱ⁺¹ and advances by A^T and Krylov products. All chunks of all rows of the batch
        are the rows of one matrix for each feature. (An FFT for the Toeplitz part takes as long.)
        """
        tables, T, (batch, length, _) = self.tables(), self.chunk, u.shape
        chunks = -(-length // T)
        last = length - (chunks - 1) * T  # positions of the last chunk
        padded = F.pad(u, (0, 0, 0, chunks * T - length)) if last < T else u
        # A two-dimensional transpose, which torch does by blocks, faster than other permutations.
        blocks = padded.flatten(0, 1).T.contiguous().unflatten(1, (-1, T))  # (H, B·chunks, T)
        entered = (blocks @ tables.inputs).unflatten(1, (batch, chunks))  # (H, B, chunks, S)
        starts, z = torch.empty_like(entered), self._to_real(x)
        for k in range(chunks):
            starts[:, :, k] = z
            if k < chunks - 1:
                z = self._advance(z, tables.advance) + entered[:, :, k]
        y = (blocks @ tables.toeplitz).baddbmm_(starts.flatten(1, 2), tables.outputs)
        M = len(self.D) // u.shape[2]
        y = y.view(-1, batch * chunks, M, T).transpose(1, 2).reshape(-1, batch * chunks * T)
        y = y.T.contiguous().unflatten(0, (batch, -1))[:, :length]  # (B, L, H·M)
        ending = blocks.unflatten(1, (batch, chunks))[:, :, -1, :last]  # (H, B, last)
        z = self._coast(z, last) + ending @ tables.inputs[:, T - last :]
        return y.contiguous(), self._from_real(z)

    @abstractmethod
    def spectral_radius(self) -> float:
        """The largest absolute eigenvalue of A over all features; below 1 in a stable layer."""

    @abstractmethod
    def initial_state(self, batch: int) -> Tensor:
        """The zero state."""

    @abstractmethod
    def _step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``step`` at the own rate."""

    @abstractmethod
    def _products(self) -> tuple[Tensor, Tensor, Tensor]:
        """Aⁱ b (H, T, S) and c Aⁱ⁺¹ (H, M, T, S) for i < T = chunk, and A^T, from float64."""

    @abstractmethod
    def _exact_row(self) -> Tensor:
        """c in float64, (H, M, S)."""

    @abstractmethod
    def _to_real(self, x: Tensor) -> Tensor:
        """A state as z (H, B, S)."""

    @abstractmethod
    def _from_real(self, z: Tensor) -> Tensor:
        """The inverse of ``_to_real``."""

    @abstractmethod
    def _advance(self, z: Tensor, power: Tensor) -> Tensor:
        """A^T z, for the A^T of the tables."""

    @abstractmethod
    def _coast(self, z: Tensor, positions: int) -> Tensor:
        """The state z (H, B, S) after so many positions without input."""


def _dense_products(A: Tensor, b: Tensor, c: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """``Recurrence._products`` of a dense A (H, S, S); A^length as it applies to rows."""
    powers = ssm.repeated_squares(A, length)
    inputs = ssm.krylov_products(powers, b, length).mT
    transposed = [power.mT[:, None] for power in powers]
    outputs = ssm.krylov_products(transposed, c @ A, length).mT
    return inputs, outputs, (powers[-1] @ powers[-1]).mT


def _dense_radius(A: Tensor) -> float:
    """The spectral radius of A, from a power of it, where A is less far from normal."""
    power = torch.linalg.matrix_power(A, 64)
    return float(torch.linalg.eigvals(power).abs().max()) ** (1 / 64)


class RecurrentStateSpace(Recurrence):
    """x_k = (diag(a) - Σ_r p_r q_rᵀ) x_{k-1} + b u_k, y_k = c·x_k + D u_k; half of each pair kept.

    ``q_rᵀx`` and ``c·x`` run over both members of a pair: 2 Re(Σ q x). Without p and q: diagonal.
    ``a, b (H, n)``, ``c (H, M, n)`` and ``p, q (H, rank, n)`` complex128 and ``D (H, M)`` are
    rounded once, to ``dtype``. The state is ``(B, H, n)`` complex.
    """

    a: Tensor
    b: Tensor
    c: Tensor  # (H·M, n, 2)
    p: Tensor | None
    q: Tensor | None

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
        super().__init__(D, dtype)
        self._exact, self._exact_rank = (a, b, c), (p, q)
        if p is None:
            self.chunk = 32
        complex_dtype, keep = dtype.to_complex(), self.register_buffer
        keep("a", a.to(complex_dtype))
        keep("b", b.to(complex_dtype))
        # So that c·x is a real dot product.
        keep("c", torch.view_as_real(2 * c.conj()).to(dtype).flatten(0, 1))
        keep("p", None if p is None else p.to(complex_dtype))
        keep("q", None if q is None else torch.view_as_real(2 * q.conj()).to(dtype))

    def initial_state(self, batch: int) -> Tensor:
        """The zero state, (batch, H, n) complex."""
        return self.a.new_zeros(batch, *self.a.shape)

    def spectral_radius(self) -> float:
        a, _, _ = self._exact
        if self.p is None:
            return float(a.abs().max())
        return _dense_radius(dense_transition(a, *self._exact_rank))

    def _transition(self, x: Tensor) -> Tensor:
        if self.p is None or self.q is None:
            return self.a * x
        qx = (self.q * torch.view_as_real(x)[:, :, None]).sum((-2, -1))  # (B, H, rank)
        return self.a * x - (self.p * qx[..., None]).sum(2)

    def _step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.addcmul(self._transition(x), self.b, u[..., None])
        c, D = (t.unflatten(0, (u.shape[1], -1)) for t in (self.c, self.D))
        y = (c * torch.view_as_real(x)[:, :, None]).sum((-2, -1))  # (B, H, M)
        return torch.addcmul(y, D, u[..., None]).flatten(1), x

    def _products(self) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = self._exact
        if self.p is not None:
            A = dense_transition(a, *self._exact_rank)
            return _dense_products(A, to_column(b), to_row(c), self.chunk)
        powers = a[:, None].expand(-1, self.chunk, -1).cumprod(1)  # aⁱ⁺¹, (H, T, n)
        inputs = torch.cat([torch.ones_like(a)[:, None], powers[:, :-1]], 1) * b[:, None]
        return to_column(inputs), to_row(c[:, :, None] * powers[:, None]), powers[:, -1]

    def _exact_row(self) -> Tensor:
        return to_row(self._exact[2])

    def _to_real(self, x: Tensor) -> Tensor:
        return to_column(x).transpose(0, 1)

    def _from_real(self, z: Tensor) -> Tensor:
        return _complex(z).transpose(0, 1).contiguous()

    def _advance(self, z: Tensor, power: Tensor) -> Tensor:
        if self.p is not None:
            return z @ power
        return to_column(_complex(z) * power[:, None])

    def _coast(self, z: Tensor, positions: int) -> Tensor:
        if self.p is None:
            return self._advance(z, self._rounded(_power(self._exact[0], positions)))
        if positions == self.chunk:
            return self._advance(z, self.tables().advance)
        x = self._from_real(z)
        for _ in range(positions):
            x = self._transition(x)
        return self._to_real(x)


def _complex(z: Tensor) -> Tensor:
    """The inverse of ``to_column``."""
    return torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous())


def _power(a: Tensor, exponent: int) -> Tensor:
    """a^exponent by squaring, which is faster than the power of a complex number."""
    power = torch.ones_like(a)
    while exponent:
        if exponent % 2:
            power = power * a
        a, exponent = a * a, exponent // 2
    return power


class DenseRecurrence(Recurrence):
    """The recurrence of a dense transition, O(N²) per feature and step; the state is (B, H, N).

    ``A (H, N, N)``, ``b (H, N)``, ``c (H, M, N)`` and ``D (H, M)``, float64.
    """

    A: Tensor
    b: Tensor
    c: Tensor

    def __init__(self, A: Tensor, b: Tensor, c: Tensor, D: Tensor, *, dtype: torch.dtype) -> None:
        super().__init__(D, dtype)
        self._exact = A, b, c
        for name, value in {"A": A, "b": b, "c": c}.items():
            self.register_buffer(name, value.to(dtype, copy=True))

    def initial_state(self, batch: int) -> Tensor:
        """The zero state, (batch, H, N)."""
        return self.b.new_zeros(batch, *self.b.shape)

    def spectral_radius(self) -> float:
        return _dense_radius(self._exact[0])

    def _step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.addcmul((self.A * x[..., None, :]).sum(-1), self.b, u[..., None])
        y = (self.c * x[:, :, None]).sum(-1)  # (B, H, M)
        D = self.D.unflatten(0, y.shape[1:])
        return torch.addcmul(y, D, u[..., None]).flatten(1), x

    def _products(self) -> tuple[Tensor, Tensor, Tensor]:
        return _dense_products(*self._exact, self.chunk)

    def _exact_row(self) -> Tensor:
        return self._exact[2]

    def _to_real(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)

    def _from_real(self, z: Tensor) -> Tensor:
        return z.transpose(0, 1).contiguous()

    def _advance(self, z: Tensor, power: Tensor) -> Tensor:
        return z @ power

    def _coast(self, z: Tensor, positions: int) -> Tensor:
        for _ in range(positions):
            z = z @ self.A.mT
        return z
