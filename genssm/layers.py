"""State space layers: trained by convolution, converted once to an exact recurrence.

A trained layer has ``forward``; ``to_recurrent`` returns another object with ``initial_state``,
``prefill`` and ``step``. Both take a ``rate``, which scales Δ: a layer trained at one sampling rate
reads a signal of half that rate with ``rate=2``, and of twice that rate with ``rate=0.5``.
Sources: LSSL (arXiv 2110.13985), S4 (arXiv 2111.00396), S4D (arXiv 2206.11893).
"""

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, Unpack, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genssm import hippo, ssm
from genssm.recurrence import (
    DenseRecurrence,
    Recurrence,
    RecurrentStateSpace,
    dense_transition,
    from_row,
    to_column,
    to_row,
)
from genssm.settings import check_type

SLOWEST_DECAY = 1e-4  # Re Λ never rises above -SLOWEST_DECAY: every mode decays


class System(NamedTuple):
    """x' = Ax + Bu, y = Cx + Du with dense real matrices and time in steps, one for each feature.

    float64: ``A (H, S, S)``, ``B (H, S)``, ``C (H, M, S)``, ``D (H, M)``.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor


class LayerSettings(TypedDict, total=False):
    """What every kind of layer can be given; defaults are those of ``TrainedLayer``."""

    channels: int  # outputs M of each feature
    bidirectional: bool  # a second kernel reads the future
    dt_min: float | Sequence[float]  # least initial Δ, in steps, of all features or of each
    dt_max: float | Sequence[float]  # largest


class StateSpaceSettings(LayerSettings, total=False):
    """What S4 and S4D can be given besides; defaults are those of ``StateSpace``."""

    n_ssm: int | None  # copies of Λ (and B, P), each shared by neighbouring features
    decay: str  # -Re Λ as a function of its parameter: "exp" or "softplus"


@dataclass(frozen=True)
class _KeptKernel:
    """A kernel, and copies of what it was made of: not every change of a tensor is counted."""

    span: int
    rate: float
    made_of: list[Tensor]
    kernel: Tensor

    def serves(self, span: int, rate: float, tensors: list[Tensor]) -> bool:
        if (self.span, self.rate) != (span, rate):
            return False
        pairs = list(zip(self.made_of, tensors, strict=True))
        if any((a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) for a, b in pairs):
            return False
        return bool(torch.stack([(a == b).all() for a, b in pairs]).all())  # a GPU is awaited once


@torch.no_grad()
def _converted(layer: "TrainedLayer", rate: float, factor: float) -> Recurrence:
    return layer._recurrence(rate * factor)


class TrainedLayer(nn.Module, ABC):
    """What every layer shares: Δ and D, convolution by FFT, groups of parameters.

    H features with ``channels`` outputs each, flattened feature by feature: (B, L, H·M). Δ starts
    log-uniform in ``dt_min`` … ``dt_max``, each a number or one number per feature. A
    ``bidirectional`` layer has a second kernel that reads the future (for classification).
    """

    # Parameters of the dynamics: trained at a lower rate and without weight decay.
    dynamics: tuple[str, ...] = ("log_dt",)

    def __init__(
        self,
        d_model: int,
        *,
        channels: int = 1,
        bidirectional: bool = False,
        dt_min: float | Sequence[float] = 1e-3,
        dt_max: float | Sequence[float] = 1e-1,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("channels", channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.d_model, self.channels, self.bidirectional = d_model, channels, bidirectional
        low, high = (_per_feature(dt, d_model) for dt in (dt_min, dt_max))
        if not bool(((low > 0) & (low <= high) & high.isfinite()).all()):
            raise ValueError(f"the range of dt needs 0 < dt_min <= dt_max, got {dt_min}, {dt_max}")
        self.log_dt = nn.Parameter(torch.rand(d_model) * (high / low).log() + low.log())
        self.D = nn.Parameter(torch.randn(d_model * channels))
        self._kept: _KeptKernel | None = None

    @property
    def rows(self) -> int:
        """Rows of C: kernels per feature, over both directions, times features."""
        return self.d_model * self.channels * (2 if self.bidirectional else 1)

    @abstractmethod
    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        """The convolution kernels K_k = C Āᵏ B̄ for the interval rate·Δ, (H, M, length) real.

        A bidirectional layer has 2 M of them: forward, then backward.
        """

    @abstractmethod
    def _recurrence(self, rate: float) -> Recurrence:
        """The same map as a recurrence; constants made in float64 and rounded once."""

    @abstractmethod
    def to_continuous(self, rate: float = 1.0) -> System:
        """The differential equation that is discretised, dense and in float64, time in steps."""

    def dt(self, rate: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """The intervals rate·Δ, (H,) positive, computed in ``dtype`` (by default the layer's)."""
        if not 0 < rate < math.inf:
            raise ValueError(f"the rate must be positive and finite, got {rate}")
        return self.log_dt.to(dtype or self.log_dt.dtype).exp() * rate

    def forward(self, u: Tensor, rate: float = 1.0) -> Tensor:
        """u (B, L, H) → y (B, L, H·M), by convolution; at least float32 whatever the autocast."""
        if u.dim() != 3 or u.shape[-1] != self.d_model or u.is_complex() or not u.numel():
            raise ValueError(
                f"u must be real, (B, L, {self.d_model}) with B, L >= 1; "
                f"got {tuple(u.shape)} {u.dtype}"
            )
        self._refuse_half()
        with torch.autocast(u.device.type, enabled=False):
            x = u.to(self.D.dtype)
            D = self.D.unflatten(0, (self.d_model, self.channels))
            kernel = self._kernel_of(x.shape[1], rate)
            y = ssm.fft_convolution(x, kernel[:, : self.channels], D)
            if self.bidirectional:  # the second kernel begins at the next position
                behind = ssm.fft_convolution(x.flip(1), kernel[:, self.channels :], 0 * D).flip(1)
                y = y + F.pad(behind[:, 1:], (0, 0, 0, 1))
            return y

    def _kernel_of(self, length: int, rate: float) -> Tensor:
        """``kernel``, kept between calls that need no gradient while nothing changes.

        A call with gradients lets go of it, for training needs the memory.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._kept = None
            return self.kernel(length, rate)
        span, kept = self._kept_length(length), self._kept  # read once: threads may replace it
        tensors = [*self.parameters(), *self.buffers()]
        if kept is None or not kept.serves(span, rate, tensors):
            made_of = [t.detach().clone() for t in tensors]
            self._kept = kept = _KeptKernel(span, rate, made_of, self.kernel(span, rate))
        return kept.kernel[..., :length]

    def _kept_length(self, length: int) -> int:
        """The length of the kernel that serves sequences of ``length``."""
        return 1 << (length - 1).bit_length()

    @torch.no_grad()
    def to_recurrent(self, rate: float = 1.0) -> Recurrence:
        """The same map as an exact recurrence, which no longer follows the layer.

        Its own ``prefill`` and ``step`` take a further rate, relative to this one.
        """
        self._refuse_future()
        self._refuse_half()
        frozen = copy.deepcopy(self).requires_grad_(False)
        recurrence = frozen._recurrence(rate)
        recurrence.convert = functools.partial(_converted, frozen, rate)
        return recurrence

    def __getstate__(self) -> dict[str, Any]:
        """Copies make their own kernels."""
        return self.__dict__ | {"_kept": None}

    def _refuse_future(self) -> None:
        if self.bidirectional:
            raise ValueError("a bidirectional layer reads the future, so it has no recurrence")

    def _refuse_half(self) -> None:
        if self.D.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the dynamics of a layer need float32 or float64, got {self.D.dtype}; leave the "
                "model in float32 and run it under torch.autocast"
            )

    def _double_D(self) -> Tensor:
        return self.D.detach().double().unflatten(0, (self.d_model, self.channels))


def _per_feature(dt: float | Sequence[float], d_model: int) -> Tensor:
    values = torch.as_tensor(dt, dtype=torch.float32)
    if values.shape not in ((), (d_model,)):
        raise ValueError(f"dt needs one number, or one for each of {d_model} features; got {dt}")
    return values.expand(d_model)


class StateSpace(TrainedLayer):
    """H independent models with N states, stored as n = N/2 conjugate pairs.

    ``Lambda = -max(decay, SLOWEST_DECAY) + i·frequency`` has a negative real part whatever the
    parameters; ``decay`` is the exponential of the parameter ``log_decay``, or its softplus.
    Λ (and what else belongs to A and B) has ``n_ssm`` copies, by default one for each feature;
    with fewer, H/n_ssm neighbouring features share one. C is the features' own.
    """

    dynamics: tuple[str, ...] = (*TrainedLayer.dynamics, "log_decay", "frequency")

    def __init__(
        self,
        d_model: int,
        Lambda: Tensor,
        *,
        n_ssm: int | None = None,
        decay: str = "exp",
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(d_model, **settings)
        self.n_ssm = d_model if n_ssm is None else n_ssm
        if self.n_ssm < 1 or d_model % self.n_ssm:
            raise ValueError(f"n_ssm must divide d_model, got {n_ssm} for {d_model}")
        if decay not in _DECAYS:
            raise ValueError(f"decay must be one of {', '.join(_DECAYS)}; got {decay!r}")
        self._decay, inverse = _DECAYS[decay]
        # Some measures start without decay.
        initial = inverse((-Lambda.real).clamp(min=10 * SLOWEST_DECAY))
        self.log_decay = nn.Parameter(initial.float().repeat(self.n_ssm, 1))
        self.frequency = nn.Parameter(Lambda.imag.float().repeat(self.n_ssm, 1))
        self.C = nn.Parameter(torch.randn(self.rows, Lambda.shape[0], 2) * math.sqrt(0.5))

    def Lambda(self, dtype: torch.dtype | None = None) -> Tensor:
        """The eigenvalues of the normal part, (H, n) complex, Re Λ < 0."""
        decay = self._decay(self.log_decay.to(dtype or self.log_decay.dtype))
        Lambda = torch.complex(-decay.clamp(min=SLOWEST_DECAY), self.frequency.to(decay.dtype))
        return self._shared(Lambda)

    def _shared(self, copies: Tensor) -> Tensor:
        """(n_ssm, …) → (H, …)."""
        return copies.repeat_interleave(self.d_model // self.n_ssm, 0)

    def _output(self, dtype: torch.dtype | None = None) -> Tensor:
        """The stored C, (H, M, n) complex."""
        C = torch.view_as_complex(self.C.to(dtype or self.C.dtype))
        return C.unflatten(0, (self.d_model, -1))


_DECAYS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "exp": (torch.exp, torch.log),
    "softplus": (F.softplus, lambda decay: decay + torch.log(-torch.expm1(-decay))),
}


def _s4d_spectrum(init: str, N: int) -> Tensor:
    """Λ (N/2,) of a diagonal initialisation. Source: S4D, Sections 3.2 and 4.3."""
    if N < 2 or N % 2:
        raise ValueError(f"d_state must be even and at least 2, got {N}")
    n = torch.arange(N // 2, dtype=torch.float64)
    spectra: dict[str, Callable[[], Tensor]] = {
        "lin": lambda: torch.complex(-0.5 + 0 * n, math.pi * n),
        "inv": lambda: torch.complex(-0.5 + 0 * n, N / math.pi * (N / (2 * n + 1) - 1)),
        "legs": lambda: hippo.normal_plus_low_rank("legs", N).Lambda,
        "real": lambda: torch.complex(-(n + 1), 0 * n),
    }
    if init not in spectra:
        raise ValueError(f"init must be one of {', '.join(spectra)}; got {init!r}")
    return spectra[init]()


class S4D(StateSpace):
    """Diagonal state space, with B = 1 folded into C.

    ``init``: "lin" Λ_n = -1/2 + iπn (S4D-Lin), "inv" Λ_n = -1/2 + i N/π (N/(2n+1) - 1) (S4D-Inv),
    "legs" the normal part of HiPPO-LegS (S4D-LegS) or "real" Λ_n = -(n+1), which stays real.
    ``discretization``: "zoh", Ā = exp(ΔΛ), B̄ = (Ā - 1)/Λ; or "bilinear".
    Source: S4D (arXiv 2206.11893).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        init: str = "lin",
        discretization: str = "zoh",
        **settings: Unpack[StateSpaceSettings],
    ) -> None:
        if discretization not in ("zoh", "bilinear"):
            raise ValueError(f"discretization must be zoh or bilinear; got {discretization!r}")
        super().__init__(d_model, _s4d_spectrum(init, d_state), **settings)
        self.discretization = discretization
        self.frequency.requires_grad_(init != "real")

    def _discrete(self, Lambda: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """log Ā and B̄, (H, n) complex."""
        z = Lambda * dt[:, None]
        if self.discretization == "zoh":
            return z, torch.expm1(z) / Lambda
        return ssm.bilinear_exponent(z), dt[:, None] / (1 - z / 2)

    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        # In float64: the phase of a mode that lasts is an angle times thousands of steps.
        log_a, b = self._discrete(self.Lambda(torch.float64), self.dt(rate, torch.float64))
        C = self._output()
        return ssm.vandermonde_kernel((2 * C * b[:, None]).to(C.dtype), log_a, length)

    def _recurrence(self, rate: float) -> RecurrentStateSpace:
        log_a, b = self._discrete(self.Lambda(torch.float64), self.dt(rate, torch.float64))
        return RecurrentStateSpace(
            log_a.exp(), b, self._output(torch.float64), self._double_D(), dtype=self.D.dtype
        )

    @torch.no_grad()
    def to_continuous(self, rate: float = 1.0) -> System:
        self._refuse_future()
        dt = self.dt(rate, torch.float64)
        Lambda = self.Lambda(torch.float64) * dt[:, None]
        return System(
            dense_transition(Lambda, None, None),
            to_column(dt[:, None] * torch.ones_like(Lambda)),
            to_row(self._output(torch.float64)),
            self._double_D(),
        )


class S4(StateSpace):
    """A HiPPO operator in normal-plus-low-rank form, bilinear rule, Cauchy kernel.

    ``measure`` is a key of ``hippo.MEASURES``; "legs" is the S4 of the paper. ``train_B=False``
    keeps the measure's B.

    A ``truncated`` layer stores C̃ = C (I - Ā^l_max), which spares the kernel a matrix power per
    training step: kernels up to ``l_max`` cost O(N + L) memory per feature, and longer ones, or
    those at another rate, first solve for C. Otherwise C itself is stored, for a kernel without
    end: every length costs O(N³ log L). Source: S4, Theorems 1 and 3, Algorithm 1.

    Modes that hardly decay over the kernel cancel in Woodbury's identity. Where a measure begins
    with such ("legt", "fourier"), and wherever no gradient is needed, kernels are computed in
    float64.
    """

    dynamics = (*StateSpace.dynamics, "P", "B")

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        measure: str = "legs",
        l_max: int = 1024,
        truncated: bool = True,
        train_B: bool = True,
        **settings: Unpack[StateSpaceSettings],
    ) -> None:
        if l_max < 1:
            raise ValueError(f"l_max must be at least 1, got {l_max}")
        nplr = hippo.normal_plus_low_rank(measure, d_state)
        super().__init__(d_model, nplr.Lambda, **settings)
        self.l_max, self.truncated = l_max, truncated
        self._lasting = bool((nplr.Lambda.real > -1e-6).any())  # modes that begin without decay
        P, B = (torch.view_as_real(t).float() for t in (nplr.P, nplr.B))
        self.P = nn.Parameter(P.repeat(self.n_ssm, 1, 1, 1))
        self.B = nn.Parameter(B.repeat(self.n_ssm, 1, 1), requires_grad=train_B)

    def _low_rank(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """P (H, rank, n) and B (H, n), complex."""
        P, B = (torch.view_as_complex(t.to(dtype or t.dtype)) for t in (self.P, self.B))
        return self._shared(P), self._shared(B)

    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        ssm.check_length(length)
        C, span = self._output(), self.l_max
        if not self.truncated or length > span or rate != 1:
            C, span = self._cut(self._solve_output(), length, rate).to(C.dtype), length
        P, B = self._low_rank()
        if self._lasting or not torch.is_grad_enabled():
            C = C.to(torch.complex128)
        kernel = ssm.cauchy_kernel(C, self.Lambda(), P, B, self.dt(rate), span)
        return kernel[..., :length].to(self.C.dtype)

    @torch.no_grad()
    def load_output(self, other: "S4") -> None:
        """Take C from a layer of the same A that stores it for another length, or as it is."""
        C = other._solve_output()
        if self.truncated:
            C = other._cut(C, self.l_max, 1.0)
        self.C.copy_(torch.view_as_real(C.flatten(0, 1)))

    def _kept_length(self, length: int) -> int:
        return self.l_max if length <= self.l_max else super()._kept_length(length)

    def _cut(self, C: Tensor, length: int, rate: float) -> Tensor:
        """C (H, M, n) → C̃ = C (I - Ā^length) at a rate, in float64."""
        power = torch.linalg.matrix_power(self._transition(rate), length)
        row = to_row(C)
        return from_row(row - row @ power)

    def _form(self, rate: float) -> ssm.BilinearForm:
        """The discrete system in float64."""
        P, B = self._low_rank(torch.float64)
        return ssm.bilinear_normal_plus_low_rank(
            self.Lambda(torch.float64), P, B, self.dt(rate, torch.float64)
        )

    def _transition(self, rate: float) -> Tensor:
        """Ā on real columns, (H, N, N) float64."""
        form = self._form(rate)
        return dense_transition(form.log_a.exp(), form.p, form.q)

    def _solve_output(self) -> Tensor:
        """C itself, (H, M, n) complex128; of a truncated layer from C̃ = C (I - Ā^l_max)."""
        C = self._output(torch.float64)
        if not self.truncated:
            return C
        return from_row(torch.linalg.solve(self._truncation(), to_row(C), left=False))

    def _truncation(self) -> Tensor:
        """I - Ā^l_max at the trained rate, (H, N, N) float64."""
        A = self._transition(1.0)
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        return eye - torch.linalg.matrix_power(A, self.l_max)

    @torch.no_grad()
    def condition(self) -> float:
        """The largest condition number of the equation that ``to_recurrent`` solves for C."""
        return float(torch.linalg.cond(self._truncation()).max()) if self.truncated else 1.0

    def _recurrence(self, rate: float) -> RecurrentStateSpace:
        form, C, D = self._form(rate), self._solve_output(), self._double_D()
        a = form.log_a.exp()
        return RecurrentStateSpace(a, form.b, C, D, form.p, form.q, dtype=self.D.dtype)

    @torch.no_grad()
    def to_continuous(self, rate: float = 1.0) -> System:
        self._refuse_future()
        dt = self.dt(rate, torch.float64)
        P, B = self._low_rank(torch.float64)
        A = dense_transition(self.Lambda(torch.float64), P, P.conj())
        return System(
            A * dt[:, None, None],
            to_column(B) * dt[:, None],
            to_row(self._solve_output()),
            self._double_D(),
        )


class LSSL(TrainedLayer):
    """The linear state space layer with a dense A: HiPPO-LegS, or trained from there.

    One A (N, N) serves all features, each with its own Δ and C; B is fixed. The kernel is made of
    Krylov products, O(N² L) time and O(N L) memory per feature: the cost that S4 removes.
    A trained A is W - Wᵀ - Σ_r P_r P_rᵀ - I/2, which is stable for any W and P.
    Source: LSSL (arXiv 2110.13985), Section 3 and Definition 1.
    """

    dynamics = (*TrainedLayer.dynamics, "W", "P")

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        train_A: bool = False,
        **settings: Unpack[LayerSettings],
    ) -> None:
        super().__init__(d_model, **settings)
        A, B = hippo.legs(d_state)
        self.register_buffer("B", B.float())
        P = (B * math.sqrt(0.5))[None]
        skew = A + P.mT @ P + 0.5 * torch.eye(d_state, dtype=A.dtype)
        self.W = nn.Parameter((skew / 2).float(), requires_grad=train_A)
        self.P = nn.Parameter(P.float(), requires_grad=train_A)
        self.C = nn.Parameter(torch.randn(self.rows, d_state))

    def A(self, dtype: torch.dtype | None = None) -> Tensor:
        """The continuous operator, (N, N)."""
        W, P = (t.to(dtype or t.dtype) for t in (self.W, self.P))
        return W - W.mT - P.mT @ P - torch.eye(W.shape[0], dtype=W.dtype, device=W.device) / 2

    def _discrete(self, rate: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        B = self.get_buffer("B").to(dtype)
        return ssm.discretize(self.A(dtype), B, self.dt(rate, dtype), "bilinear")

    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        A_bar, B_bar = self._discrete(rate, self.W.dtype)
        powers = ssm.repeated_squares(A_bar, length)
        C = self.C.unflatten(0, (self.d_model, -1))
        return C @ ssm.krylov_products(powers, B_bar, length)

    def _recurrence(self, rate: float) -> DenseRecurrence:
        A_bar, B_bar = self._discrete(rate, torch.float64)
        C = self.C.double().unflatten(0, (self.d_model, -1))
        return DenseRecurrence(A_bar, B_bar, C, self._double_D(), dtype=self.D.dtype)

    @torch.no_grad()
    def to_continuous(self, rate: float = 1.0) -> System:
        self._refuse_future()
        dt = self.dt(rate, torch.float64)
        return System(
            self.A(torch.float64) * dt[:, None, None],
            self.get_buffer("B").double() * dt[:, None],
            self.C.double().unflatten(0, (self.d_model, -1)),
            self._double_D(),
        )


# A kind of layer: its class and what of it is fixed.
LAYERS: dict[str, tuple[type[LSSL | S4 | S4D], dict[str, Any]]] = {
    "lssl": (LSSL, {}),
    "s4": (S4, {"measure": "legs"}),
    "s4-legt": (S4, {"measure": "legt"}),
    "s4-lagt": (S4, {"measure": "lagt"}),
    "s4-fourier": (S4, {"measure": "fourier"}),
    "s4d": (S4D, {"init": "lin"}),
    "s4d-inv": (S4D, {"init": "inv"}),
    "s4d-legs": (S4D, {"init": "legs"}),
    "s4d-real": (S4D, {"init": "real"}),
}


def build_layer(
    kind: str, d_model: int, d_state: int, l_max: int, **settings: Any
) -> LSSL | S4 | S4D:
    """A layer by the name of its kind. ``settings`` are those of its class, checked by name.

    Only S4 is parametrised for a length ``l_max``; the others leave it unused.
    """
    if kind not in LAYERS:
        raise ValueError(f"layer must be one of {', '.join(LAYERS)}; got {kind!r}")
    layer, fixed = LAYERS[kind]
    kinds = _setting_types(layer)
    if unknown := settings.keys() - (kinds.keys() - fixed.keys()):
        raise ValueError(
            f"a layer {kind!r} has no setting {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(kinds.keys() - fixed.keys()))}"
        )
    for name, value in settings.items():
        check_type(name, value, kinds[name])
    if layer is S4:
        settings["l_max"] = l_max
    return layer(d_model, d_state, **fixed, **settings)


def _setting_types(layer: type[LSSL | S4 | S4D]) -> dict[str, Any]:
    """Settings by name, with their types: those of the constructor and those it passes on."""
    kinds = get_type_hints(layer.__init__)
    (passed_on,) = get_args(kinds.pop("settings"))
    sizes = {"d_model", "d_state", "l_max", "return"}
    return {n: kind for n, kind in (kinds | get_type_hints(passed_on)).items() if n not in sizes}
