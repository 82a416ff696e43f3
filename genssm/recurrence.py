"""Recurrences: what a trained layer is converted to. State in, state out, one position or many."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from genssm import ssm


def to_row(c: Tensor) -> Tensor:
    """(…, n) complex c → the real row (…, 2n) with row · [Re x; Im x] = 2 Re(c·x)."""
    return 2 * torch.cat([c.real, -c.imag], -1)


def from_row(row: Tensor) -> Tensor:
    """The inverse of ``to_row``."""
    real, imag = row.chunk(2, -1)
    return torch.complex(real, -imag) / 2


def dense_transition(a: Tensor, p: Tensor | None, q: Tensor | None) -> Tensor:
    """diag(a) - Σ_r p_r q_rᵀ acting on [Re x; Im x]: a (H, n), p, q (H, rank, n) → (H, 2n, 2n)."""
    re, im = torch.diag_embed(a.real), torch.diag_embed(a.imag)
    A = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
    if p is not None and q is not None:
        A = A - torch.cat([p.real, p.imag], -1).mT @ to_row(q)
    return A


class Recurrence(nn.Module, ABC):
    """z_k = A z_{k-1} + b u_k, y_k = c z_k + D u_k, S real states and M outputs for each feature.

    ``A (H, S, S)``, ``b (H, S)``, ``c (H, M, S)`` and ``D (H, M)`` in float64 give the tables of
    ``prefill``, which are rounded once, to ``dtype``. How the state is held and stepped is the
    subclass's affair. Outputs are flattened, feature by feature: (…, H·M).
    """

    chunk = 64  # prompt positions per product in ``prefill``

    D: Tensor  # (H·M,)
    advance: Tensor  # A^chunk, (H, S, S)
    inputs: Tensor  # Krylov products Aⁱ b, the last first, (H, S, chunk)
    outputs: Tensor  # c Aⁱ⁺¹, (H, M·chunk, S)
    toeplitz: Tensor  # [j, (m, i)] = the kernel at i - j, (H, chunk, M·chunk)

    def __init__(self, A: Tensor, b: Tensor, c: Tensor, D: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        powers = ssm.repeated_squares(A, self.chunk)
        transposed = [power.mT[:, None] for power in powers]
        inputs = ssm.krylov_products(powers, b, self.chunk)
        outputs = ssm.krylov_products(transposed, c @ A, self.chunk).mT  # (H, M, chunk, S)
        kernel = c @ inputs  # (H, M, chunk)
        kernel[..., 0] += D
        toeplitz = F.pad(kernel, (self.chunk - 1, 0)).unfold(-1, self.chunk, 1).flip(2)
        self.register_buffer("D", D.flatten().to(dtype, copy=True))
        tables = {
            "advance": powers[-1],
            "inputs": inputs.flip(-1),
            "outputs": outputs.flatten(1, 2),
            "toeplitz": rearrange(toeplitz, "h m j i -> h j (m i)"),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(dtype).contiguous(), persistent=False)

    def spectral_radius(self) -> float:
        """The largest absolute eigenvalue of A over all features; below 1 in a stable layer."""
        return float(torch.linalg.eigvals(self.advance.double()).abs().max()) ** (1 / self.chunk)

    @abstractmethod
    def initial_state(self, batch: int) -> Tensor:
        """The zero state."""

    @abstractmethod
    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One position: u (B, H), state → y (B, H·M), next state."""

    @abstractmethod
    def prefill(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Many positions in parallel, from any state: u (B, L, H), x → y (B, L, H·M), last x."""

    @abstractmethod
    def _coast(self, z: Tensor, positions: int) -> Tensor:
        """The state z (H, B, S) after so many positions without input."""

    def _read(self, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """``prefill`` on real states z (H, B, S).

        Chunks of T positions: inside a chunk a Toeplitz product, between chunks the state, which
        enters every output through c Aⁱ⁺¹ and advances by A^T and Krylov products.
        """
        length, T = u.shape[1], self.chunk
        M = len(self.D) // u.shape[-1]
        if length == 0:
            return u.new_zeros(*u.shape[:2], len(self.D)), z
        chunks, rest = -(-length // T), length % T
        padded = F.pad(u, (0, 0, 0, chunks * T - length))
        blocks = rearrange(padded, "b (k t) h -> h k b t", t=T)
        increments = blocks @ self.inputs[:, None].mT  # (H, chunks, B, S)
        states = [z]
        for k in range(chunks - 1 if rest else chunks):
            z = z @ self.advance.mT + increments[:, k]
            states.append(z)
        starts = torch.stack(states[:chunks], 1)  # (H, chunks, B, S)
        y = blocks @ self.toeplitz[:, None] + starts @ self.outputs[:, None].mT
        y = rearrange(y, "h k b (m t) -> b (k t) (h m)", m=M)[:, :length]
        if rest:
            entered = blocks[:, -1, :, :rest] @ self.inputs[..., T - rest :].mT  # (H, B, S)
            z = self._coast(z, rest) + entered
        return y, z


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
        flat = torch.cat([b.real, b.imag], -1)
        super().__init__(dense_transition(a, p, q), flat, to_row(c), D.double(), dtype)
        complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        keep = self.register_buffer
        keep("a", a.to(complex_dtype))
        keep("b", b.to(complex_dtype))
        # So that c·x is a real dot product.
        keep("c", torch.view_as_real(2 * c.conj()).to(dtype).flatten(0, 1))
        keep("p", None if p is None else p.to(complex_dtype))
        keep("q", None if q is None else torch.view_as_real(2 * q.conj()).to(dtype))

    def initial_state(self, batch: int) -> Tensor:
        """The zero state, (batch, H, n) complex."""
        return self.a.new_zeros(batch, *self.a.shape)

    def _transition(self, x: Tensor) -> Tensor:
        if self.p is None or self.q is None:
            return self.a * x
        qx = (self.q * torch.view_as_real(x)[:, :, None]).sum((-2, -1))  # (B, H, rank)
        return self.a * x - (self.p * qx[..., None]).sum(2)

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One position, O(N) per feature: u (B, H), x (B, H, n) → y (B, H·M), next x."""
        x = torch.addcmul(self._transition(x), self.b, u[..., None])
        c, D = (t.unflatten(0, (u.shape[1], -1)) for t in (self.c, self.D))
        y = (c * torch.view_as_real(x)[:, :, None]).sum((-2, -1))  # (B, H, M)
        return torch.addcmul(y, D, u[..., None]).flatten(1), x

    def prefill(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Many positions in parallel, from any state: u (B, L, H), x → y (B, L, H·M), last x."""
        y, z = self._read(u, _stacked(x))
        return y, _paired(z)

    def _coast(self, z: Tensor, positions: int) -> Tensor:
        x = _paired(z)
        for _ in range(positions):
            x = self._transition(x)
        return _stacked(x)


def _stacked(x: Tensor) -> Tensor:
    return rearrange(torch.view_as_real(x), "b h n c -> h b (c n)")


def _paired(z: Tensor) -> Tensor:
    return torch.view_as_complex(rearrange(z, "h b (c n) -> b h n c", c=2).contiguous())


class DenseRecurrence(Recurrence):
    """The recurrence of a dense transition, O(N²) per feature and step; the state is (B, H, N)."""

    A: Tensor
    b: Tensor
    c: Tensor  # (H, M, N)

    def __init__(self, A: Tensor, b: Tensor, c: Tensor, D: Tensor, *, dtype: torch.dtype) -> None:
        super().__init__(A, b, c, D, dtype)
        for name, value in {"A": A, "b": b, "c": c}.items():
            self.register_buffer(name, value.detach().to(dtype, copy=True))

    def initial_state(self, batch: int) -> Tensor:
        """The zero state, (batch, H, N)."""
        return self.b.new_zeros(batch, *self.b.shape)

    def step(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """One position: u (B, H), x (B, H, N) → y (B, H·M), next x."""
        x = torch.addcmul((self.A * x[..., None, :]).sum(-1), self.b, u[..., None])
        y = (self.c * x[:, :, None]).sum(-1)  # (B, H, M)
        D = self.D.unflatten(0, y.shape[1:])
        return torch.addcmul(y, D, u[..., None]).flatten(1), x

    def prefill(self, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Many positions in parallel, from any state: u (B, L, H), x → y (B, L, H·M), last x."""
        y, z = self._read(u, x.transpose(0, 1))
        return y, z.transpose(0, 1).contiguous()

    def _coast(self, z: Tensor, positions: int) -> Tensor:
        for _ in range(positions):
            z = z @ self.A.mT
        return z
