"""The compiled stepper: a converted model as a flat program for ``simd.run`` on the CPU.

Weights of linear maps are held in float32, bfloat16 or int8 (one scale a row); states, activations,
norms and embeddings stay in float32. Prompts are still read by the converted model, in parallel.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genssm import cuda
from genssm.blocks import Linear, Mixer, PhasedLinear, RecurrentBlock, RecurrentPool, RecurrentStack
from genssm.cuda import CapturedModel
from genssm.distributed import default_device
from genssm.heads import Logistics, Softmax
from genssm.inputs import PARTS
from genssm.model import RecurrentModel, State
from genssm.pace import Pace
from genssm.recurrence import RecurrentStateSpace
from genssm.sampling import SamplingConfig
from genssm.stepping import EXACT, Draws, UnsupportedError
from genssm.threads import pool

ENGINES = ("auto", "eager", "cpu", "cuda")
WEIGHTS = ("bf16", EXACT, "int8")  # the default first
# What int8 means, by the bits of the activations that they meet: what is faster on a processor. The
# samples of one are not always those of the other, so recipes name it.
INT8 = ("int8-24", "int8-16")
SCORED = 256  # tokens scored by one call, whose end an interruption waits for
MAX_MIXTURES = 10  # the kernel's room for the parameters of one mixture, a panel of 32

Array = np.ndarray[Any, Any]


def choose(model: RecurrentModel, kind: str = "auto", weights: str = WEIGHTS[0]) -> Stepper:
    """What steps a model: "cpu" is compiled, "eager" is the model itself, "auto" the faster.

    "cuda" is chosen only by name: CUDA graphs, made for batches. A model that an engine cannot run
    runs eagerly, with one warning that says why.
    """
    check_choice(kind, weights)
    if kind == "eager":
        return model
    try:
        if kind == "cuda":
            return CapturedModel(model, weights, default_device())
        return CompiledModel(model, weights)
    except UnsupportedError as error:
        warnings.warn(f"sampling runs eagerly, which is slower: {error}", stacklevel=2)
        return model


def describe(model: Stepper) -> str:
    """The name of what steps: "eager", "cpu bf16", "cuda fp32", …"""
    return "eager" if isinstance(model, RecurrentModel) else f"{model.engine} {model.weights}"


def check_choice(kind: str, weights: str) -> None:
    """Raise ValueError unless there is such an engine here and it has such weights."""
    choices = (("engine", kind, ENGINES, ()), ("weights", weights, WEIGHTS, INT8))
    for name, value, known, meant in choices:
        if value not in known + meant:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    if kind == "cuda":
        cuda.check_choice(weights)
    if kind == "eager" and weights.startswith("int8"):
        raise ValueError(
            "the eager engine steps with the model's own weights; for int8 take the engine cpu"
        )


def load_kernels() -> ModuleType:
    """The module ``simd``; its compiled code is kept beside it or in the user's cache folder."""
    try:
        import numba
    except ImportError as error:
        raise UnsupportedError(f"numba cannot be imported ({error}); pip install numba") from error
    settings: Any = numba
    config = settings.config
    if config.DISABLE_JIT:
        raise UnsupportedError("numba compiles nothing where NUMBA_DISABLE_JIT is set")
    try:
        from genssm import simd
    except RuntimeError:  # no folder for numba's cache: compile anew in this process
        config.CACHE_DIR = folder = tempfile.mkdtemp(prefix="genssm-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        from genssm import simd
    return simd


class Room:
    """Room for the intermediate results of a step by a team of threads, and of a draw."""

    def __init__(self, width: int, team: int) -> None:
        self.weights, self.changed = zeros(width, np.float32), zeros(width, np.float32)
        self.histogram, self.scratch = zeros(4096, np.float64), zeros(team * 64, np.float32)


@dataclass
class Memory:
    """All that a batch of sequences remembers, changed in place by every step."""

    positions: Array  # (B,) int64: tokens read, equal modulo the model's period
    history: Array  # (B, kept + reach + 1) int64: the first tokens, and the last, for the taps
    work: Array  # float32: states, activations and logits, in regions of B rows
    room: Room

    @property
    def batch(self) -> int:
        return len(self.history)

    @property
    def position(self) -> int:
        """Tokens read, of the first row."""
        return int(self.positions[0])


@dataclass(frozen=True)
class _Space:
    """Where a state space layer's state lies. The stepper's state is the layer's over ``unit``."""

    offset: int
    shape: tuple[int, int]  # features, pairs
    unit: Array  # (H, n) complex

    def load(self, memory: Memory, state: Tensor) -> None:
        H, n = self.shape
        x = np.zeros((memory.batch, _padded(H), n), np.complex64)
        x[:, :H] = state.numpy() / self.unit
        lanes = x.reshape(memory.batch, -1, 16, n).swapaxes(2, 3)
        region(memory, self.offset, x[0].size * 2)[:] = np.stack(
            [lanes.real, lanes.imag], 3
        ).reshape(memory.batch, -1)

    def save(self, memory: Memory) -> Tensor:
        H, n = self.shape
        rows = region(memory, self.offset, _padded(H) * n * 2)
        lanes = rows.reshape(memory.batch, -1, n, 2, 16).swapaxes(2, 4)  # (B, chunks, 16, 2, n)
        x = (lanes[..., 0, :] + 1j * lanes[..., 1, :]).reshape(memory.batch, -1, n)
        return torch.from_numpy((x[:, :H] * self.unit).astype(np.complex64))


@dataclass(frozen=True)
class _Table:
    """Where the table of one order of ``Recall`` lies, in bits of integers."""

    offset: int
    slots: int

    def load(self, memory: Memory, table: Tensor) -> None:
        """table (B, slots, 2) int32"""
        rows = np.ascontiguousarray(table.numpy()).view(np.float32)
        region(memory, self.offset, 2 * self.slots)[:] = rows.reshape(memory.batch, -1)

    def save(self, memory: Memory) -> Tensor:
        rows = region(memory, self.offset, 2 * self.slots).copy().view(np.int32)
        return torch.from_numpy(rows.reshape(memory.batch, self.slots, 2))


@dataclass(frozen=True)
class _Group:
    """Where a pool's state lies: the group being filled, the queue, the inner stack."""

    group: int
    queue: int
    shape: tuple[int, int]  # stride, features
    period: int  # tokens that one position of the pool's level stands for
    inner: tuple[_Space | _Group, ...]

    def load(self, memory: Memory, state: tuple) -> None:
        group, queue, inner = state
        stride, H = self.shape
        for offset, rows in ((self.group, group), (self.queue, queue)):
            padded = np.zeros((memory.batch, stride, _padded(H)), np.float32)
            padded[..., :H] = rows.numpy()
            region(memory, offset, padded[0].size)[:] = padded.reshape(memory.batch, -1)
        for slot, part in zip(self.inner, inner, strict=True):
            slot.load(memory, part)

    def save(self, memory: Memory) -> tuple:
        stride, H = self.shape
        group, queue = (
            torch.from_numpy(
                region(memory, offset, stride * _padded(H))
                .reshape(memory.batch, stride, -1)[..., :H]
                .copy()
            )
            for offset in (self.group, self.queue)
        )
        group[:, memory.position // self.period % stride :] = 0  # left from the group before
        return group, queue, tuple(slot.save(memory) for slot in self.inner)


def region(memory: Memory, offset: int, width: int) -> Array:
    """The rows (B, width) of a region, as a view."""
    start = offset * memory.batch
    return memory.work[start : start + width * memory.batch].reshape(memory.batch, width)


def _padded(size: int) -> int:
    return -(-size // 32) * 32


def _numpy(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().numpy()


def pad_parts(weight: Array, parts: tuple[int, int]) -> Array:
    """Pad a matrix (O, I) of parts[0] × parts[1] equal blocks, each up to multiples of 32."""
    outputs, inputs = (size // count for size, count in zip(weight.shape, parts, strict=True))
    blocks = weight.reshape(parts[0], outputs, parts[1], inputs)
    extra = [(0, 0), (0, _padded(outputs) - outputs), (0, 0), (0, _padded(inputs) - inputs)]
    padded = np.pad(blocks, extra)
    return padded.reshape(parts[0] * _padded(outputs), parts[1] * _padded(inputs))


def pack(weight: Array, kind: str, fours: bool = False) -> tuple[Array, list[Array]]:
    """A matrix (O, I), O a multiple of 32 → panels of 32 outputs as bytes, and constants (O,).

    The constants are the scales of the rows. bf16: rounded to the nearest; word j holds outputs j
    (low half) and j + 16 of a panel. int8: each row over its scale, which is its largest magnitude
    over 127. ``fours`` is int8 for ``simd.quantize``: four inputs of an output lie together, and
    the second constant takes the 128 from the highest digits again, where there are digits.
    """
    scale = np.ones(len(weight), np.float32)
    if kind == "int8":
        largest = np.abs(weight).max(1)
        scale = np.where(largest == 0, 1, largest / 127).astype(np.float32)
        with np.errstate(invalid="ignore"):  # the scale of a row with NaN is NaN
            weight = np.rint(weight / scale[:, None]).astype(np.int8)
    constants = [scale]
    panels = weight.reshape(-1, 32, weight.shape[1]).swapaxes(1, 2)  # (panels, I, 32)
    if fours:
        constants.append((-128 * weight.sum(1, dtype=np.int32)).view(np.float32))
        panels = panels.reshape(len(panels), -1, 4, 32).swapaxes(2, 3)
    if kind == "bf16":
        rounded = torch.from_numpy(np.ascontiguousarray(panels)).bfloat16()
        bits = rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
        panels = bits[..., 16:] << 16 | bits[..., :16]
    return np.ascontiguousarray(panels).reshape(-1).view(np.uint8), constants


@dataclass
class _Program:
    """A program in the making: operations, constants, matrices and regions of ``work``."""

    simd: Any
    kind: str
    fours: bool  # int8 weights meet whole numbers: see ``pack``
    size: int = 0  # floats a row of the batch needs
    lines: list[list[int]] = field(default_factory=list)
    constants: list[Array] = field(default_factory=list)
    matrices: list[Array] = field(default_factory=list)
    n_constants: int = 0
    n_bytes: int = 0
    widest: int = 0  # inputs of a linear map
    kept: list[tuple[int, int]] = field(default_factory=list)  # regions that outlast a step

    def reserve(self, width: int) -> int:
        """A region of so many floats a row."""
        self.size += _padded(width)
        return self.size - _padded(width)

    def keep(self, width: int) -> int:
        """A region, as ``reserve``, that holds a state."""
        self.kept.append((self.reserve(width), _padded(width)))
        return self.kept[-1][0]

    def constant(self, *arrays: Array) -> int:
        """Arrays one behind the other; returns the place of the first."""
        place = self.n_constants
        for array in arrays:
            self.constants.append(np.ascontiguousarray(array, np.float32).reshape(-1))
            self.n_constants += array.size
        return place

    def features(self, vector: Array) -> Array:
        """A vector with zeros up to a multiple of 32."""
        return np.pad(vector, (0, _padded(len(vector)) - len(vector)))

    def emit(
        self, code: int, source: int, target: int, width: int, table: int = 0, matrix: int = 0,
        size: int = 0, extra: int = 0, more: int = 0, last: int = 0, parts: int = 1,
    ) -> None:  # fmt: skip
        """One operation; the arguments are those of ``simd.advance``.

        ``parts``: blocks of the outputs whose columns belong together, as those of a gate do. The
        last column tells threads to wait for each other: before they read what others have written.
        """
        simd, before = self.simd, self.lines[-1][0] if self.lines else code
        reads_all = code in (simd.LINEAR, simd.NORM, simd.LOGISTICS)
        meet = reads_all or (code in simd.SERIAL) != (before in simd.SERIAL)
        self.lines.append(
            [code, source, target, width, table, matrix, size, extra, more, last, parts, int(meet)]
        )

    def linear(
        self, weights: list[Array], bias: Array, source: int, target: int,
        parts: tuple[int, int] = (1, 1), bias_padding: float = 0.0,
    ) -> int:  # fmt: skip
        """y = W x + bias, ``weights`` by phase of the position; returns the padded width of y."""
        n_bytes, n_constants = self.n_bytes, self.n_constants
        width, inputs = 0, 0
        for weight in weights:
            padded = pad_parts(weight, parts)
            width, inputs = padded.shape
            packed, constants = pack(padded, self.kind, self.fours)
            self.matrices.append(packed)
            self.n_bytes += packed.size
            blocks = bias.reshape(parts[0], -1)
            fill = [(0, 0), (0, width // parts[0] - blocks.shape[1])]
            self.constant(np.pad(blocks, fill, constant_values=bias_padding), *constants)
            self.widest = max(self.widest, inputs)
        phases = len(weights)
        self.emit(
            self.simd.LINEAR, source, target, width, n_constants, n_bytes, inputs,
            (self.n_bytes - n_bytes) // phases, (self.n_constants - n_constants) // phases, phases,
            parts[0],
        )  # fmt: skip
        return width

    def dense(
        self, layer: Linear, source: int, target: int, parts: tuple[int, int] = (1, 1),
        bias_padding: float = 0.0,
    ) -> int:  # fmt: skip
        """A ``Linear``; see ``linear``."""
        weight, bias = _numpy(layer.weight), _numpy(layer.bias)
        return self.linear([weight], bias, source, target, parts, bias_padding)

    def norm(self, layer: nn.LayerNorm, source: int, target: int) -> None:
        if layer.eps != 1e-5:
            raise UnsupportedError(f"layer norms need eps = 1e-5, got {layer.eps}")
        weight = self.features(_numpy(layer.weight))
        table = self.constant(weight, self.features(_numpy(layer.bias)))
        size = layer.normalized_shape[0]
        self.emit(self.simd.NORM, source, target, len(weight), table, size=size)


def _embed(program: _Program, model: RecurrentModel, x: int) -> int:
    """Token, taps and position into x; returns the region of the linear prediction."""
    simd, inputs = program.simd, model.inputs
    table = _numpy(inputs.embedding.weight)
    width = _padded(table.shape[1])
    padding = [(0, 0), (0, width - table.shape[1])]
    kept = model.config.kept
    program.emit(simd.EMBED, 0, x, width, program.constant(np.pad(table, padding)), size=kept)
    last = kept + inputs.reach + 1  # columns of the history
    columns = (last - k for k in model.config.token_taps)
    for column, table in zip(columns, inputs.token_taps, strict=True):
        place = program.constant(np.pad(_numpy(table), padding))
        program.emit(simd.TOKEN, 0, x, width, place, size=column)
    if inputs.condition is not None:
        place = program.constant(np.pad(_numpy(inputs.condition.weight), padding))
        for column in range(kept):
            program.emit(simd.TOKEN, 0, x, width, place, size=column, extra=column)
    if inputs.progress is not None:
        place = program.constant(np.pad(_numpy(inputs.progress.table), padding))
        pace = program.constant(program.features(_numpy(inputs.progress.pace(model.rate))))
        program.emit(
            simd.PROGRESS, model.config.opening, x, width, place, size=inputs.progress.first,
            extra=len(inputs.progress.durations), more=PARTS, last=pace,
        )  # fmt: skip
    prediction = program.reserve(32)
    if inputs.taps is not None:
        phases, _, n_taps = inputs.taps.weight.shape
        tapped, room = program.reserve(n_taps), program.reserve(width)
        predicting = -1
        if isinstance(inputs.prediction, PhasedLinear):
            weight = _numpy(inputs.prediction.weight)[:, 0]  # (phases, taps)
            extra = [(0, 0), (0, _padded(n_taps) - n_taps)]
            predicting = program.constant(np.pad(weight, extra))
        program.emit(
            simd.TAPS, prediction, tapped, _padded(n_taps), predicting,
            size=phases, extra=model.config.values - 1,
        )  # fmt: skip
        weights = list(_numpy(inputs.taps.weight))
        program.linear(weights, np.zeros(len(weights[0]), np.float32), tapped, room)
        program.emit(simd.ADD, room, x, width)
    if model.config.image_shape is not None:
        rows, columns, channels = model.config.image_shape
        tables = [np.pad(_numpy(p), padding) for p in inputs.positions]
        program.emit(
            simd.POSITION, 0, x, width, program.constant(*tables),
            size=rows, extra=columns, more=channels,
        )  # fmt: skip
    return prediction


def _complex(pairs: Tensor) -> Array:
    """The factors (…, 2) of real and imaginary parts, as complex numbers (…)."""
    return torch.view_as_complex(pairs).numpy()


def _by_lanes(*parts: Array) -> Array:
    """Complex (H, n) → (H / 16, n, 2 len(parts), 16), real and imaginary parts in turn."""
    stacked = np.stack([part for c in parts for part in (np.real(c), np.imag(c))], -1)
    return stacked.reshape(-1, 16, *stacked.shape[1:]).transpose(0, 2, 3, 1)


def _space(program: _Program, layer: Any, u: int, y: int) -> _Space:
    """y = silu(layer(u))."""
    if not isinstance(layer, RecurrentStateSpace):
        raise UnsupportedError(
            "the compiled stepper knows diagonal and low-rank transitions (S4D, S4), "
            f"not the dense one of {type(layer).__name__} (LSSL)"
        )
    if layer.a.dtype != torch.complex64:
        raise UnsupportedError(f"the compiled stepper is for float32 models, got {layer.D.dtype}")
    H, n = layer.a.shape
    if len(layer.c) != H:
        raise UnsupportedError("the compiled stepper knows layers of one output, channels=1")
    width = _padded(H)
    more = [(0, width - H), (0, 0)]
    a, b = (np.pad(_numpy(t), more) for t in (layer.a, layer.b))
    c = np.pad(_complex(layer.c), more)
    D = program.features(_numpy(layer.D))
    state = program.keep(2 * width * n)
    if layer.p is None or layer.q is None:
        scaled = c.conj().astype(np.complex128) * b
        table = program.constant(D, _by_lanes(a, scaled.conj()))
        program.emit(program.simd.DIAGONAL, u, y, width, table, size=n, extra=state)
        return _Space(state, (H, n), _numpy(layer.b))
    rank = layer.p.shape[1]
    wide = [(0, width - H), (0, 0), (0, 0)]
    p, q = np.pad(_numpy(layer.p), wide), np.pad(_complex(layer.q), wide)
    parts = [_by_lanes(a, b, c)]
    parts += [_by_lanes(p[:, r], q[:, r]) for r in range(rank)]
    chunks = np.concatenate([part.reshape(width // 16, -1) for part in parts], 1)
    table = program.constant(D, chunks)
    program.emit(program.simd.LOW_RANK, u, y, width, table, size=n, extra=state, more=rank)
    return _Space(state, (H, n), np.ones((H, n), np.complex64))


def _mixer(program: _Program, mixer: Mixer, x: int, y: int, u: int, wide: int) -> None:
    """``Mixer``: residual x and layer output y; u and ``wide`` are room."""
    simd = program.simd
    width = program.dense(mixer.gate, y, wide, (2, 1)) // 2
    program.emit(simd.GATE, wide, x, width)
    program.norm(mixer.norm, x, u)
    hidden = program.dense(mixer.up, u, wide)
    program.emit(simd.SILU, wide, wide, hidden)
    program.dense(mixer.down, wide, u)
    program.emit(simd.ADD, u, x, width)


def _stack(
    program: _Program, stack: RecurrentStack, x: int, room: tuple[int, int, int], period: int
) -> tuple[_Space | _Group, ...]:
    """Step x through a stack, in place; returns where the states lie."""
    u, y, wide = room
    slots: list[_Space | _Group] = []
    for layer in stack.layers:
        if isinstance(layer, RecurrentPool):
            slots.append(_pool(program, layer, x, room, period))
        elif isinstance(layer, RecurrentBlock) and isinstance(layer.mixer, Mixer):
            assert isinstance(layer.norm, nn.LayerNorm)
            program.norm(layer.norm, x, u)
            slots.append(_space(program, layer.ssm, u, y))
            _mixer(program, layer.mixer, x, y, u, wide)
        else:
            raise UnsupportedError(f"there is no operation for {type(layer).__name__}")
    return tuple(slots)


def _pool(
    program: _Program, pool: RecurrentPool, x: int, room: tuple[int, int, int], period: int
) -> _Group:
    stride, (d_inner, joined) = pool.stride, pool.down.weight.shape
    width = _padded(joined // stride)
    group, queue = program.keep(stride * width), program.keep(stride * width)
    inner = program.reserve(d_inner)
    entry = len(program.lines)
    program.emit(program.simd.POOL, group, x, width, size=stride, extra=queue, more=period)
    program.dense(pool.down, group, inner, (1, stride))
    slots = _stack(program, pool.inner, inner, room, period * stride)
    program.dense(pool.up, inner, queue, (stride, 1))
    program.lines[entry][9] = len(program.lines)  # where to go on until the group is full
    return _Group(group, queue, (stride, joined // stride), period, slots)


def _head(
    program: _Program, model: RecurrentModel, u: int, prediction: int
) -> tuple[int, int, list[_Table]]:
    """Features u to logits; returns their region, its padded width and the tables of recall."""
    head, size = model.head, model.config.n_outputs
    width = _padded(size)
    logits = program.keep(width)
    if not isinstance(head, Logistics):
        never = float(program.simd.NEVER)
        program.dense(head.linear, u, logits, bias_padding=never)
        return logits, width, _recall(program, model, head, u, logits)
    if head.mixtures > MAX_MIXTURES:
        raise UnsupportedError(f"at most {MAX_MIXTURES} mixtures fit, got {head.mixtures}")
    parameters = program.reserve(32)
    program.dense(head.linear, u, parameters)
    program.emit(
        program.simd.LOGISTICS, parameters, logits, width,
        size=size, extra=prediction, more=head.mixtures,
    )  # fmt: skip
    return logits, width, []


def _recall(
    program: _Program, model: RecurrentModel, head: Softmax, u: int, logits: int
) -> list[_Table]:
    """Strengthen the logits of the tokens that each order of ``Recall`` finds."""
    recall, tables = model.recall, []
    if head.recall is None:
        return tables
    if len(recall.orders) > program.simd.PANEL:
        raise UnsupportedError(
            f"at most {program.simd.PANEL} orders of recall fit, got {len(recall.orders)}"
        )
    strength = program.reserve(program.simd.PANEL)
    program.dense(head.recall, u, strength)
    for column, order in enumerate(recall.orders):
        tables.append(_Table(program.keep(2 * recall.slots), recall.slots))
        program.emit(
            program.simd.RECALL, strength, logits, _padded(recall.n_outputs), order,
            size=recall.n_outputs, extra=tables[-1].offset, more=recall.slots, last=column,
        )  # fmt: skip
    return tables


def _aligned(arrays: list[Array], dtype: Any) -> Array:
    """One array out of many that begins at a multiple of 64 bytes."""
    size = sum(a.size for a in arrays)
    result = zeros(size, dtype)
    np.concatenate([a.reshape(-1) for a in arrays], out=result)
    return result


def zeros(size: int, dtype: Any) -> Array:
    """Zeros that begin at a multiple of 64 bytes, a cache line and the widest vector."""
    n_bytes = size * np.dtype(dtype).itemsize
    room = np.zeros(n_bytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + n_bytes].view(dtype)


class CompiledModel:
    """A ``RecurrentModel`` whose steps and draws run in one compiled loop.

    ``read`` gives the model's own ``State``; ``load`` and ``save`` carry it into the loop's
    memory and back. A row's logits and tokens do not depend on its company, to the last bit.
    Raises UnsupportedError, which says why, when there is no such loop for the model.
    """

    engine = "cpu"

    def __init__(self, model: RecurrentModel, weights: str = WEIGHTS[0]) -> None:
        if model.norm.weight.device.type != "cpu" or model.norm.weight.dtype != torch.float32:
            raise UnsupportedError(
                "the compiled stepper is for float32 models on the CPU, got "
                f"{model.norm.weight.dtype} on {model.norm.weight.device}"
            )
        self.model = model
        self.config, self.inputs = model.config, model.inputs
        self._simd: Any = load_kernels()
        self._abreast = self._simd.panels_abreast()
        # How batches are stepped fastest, by about how many samples, streams and threads.
        self.paces: defaultdict[tuple[int, int, int], Pace] = defaultdict(Pace)
        self._thread = threading.local()  # room of each thread that steps
        int8 = {f"int8-{bits}": kind for bits, kind in self._simd.int8_kinds().items()}
        # The weights by the name that recipes have: see ``INT8``.
        usual = next(iter(int8))
        self.stepped_weights = usual if weights == "int8" else weights
        self.weights = "int8" if weights == usual else weights  # as they are asked for
        kinds = int8 | {"fp32": self._simd.FP32, "bf16": self._simd.BF16}
        if self.stepped_weights not in kinds:
            raise UnsupportedError(f"{weights} needs a processor with AVX2")
        self._kind = kinds[self.stepped_weights]
        self._build()

    def _build(self) -> None:
        simd, d_model = self._simd, self.config.d_model
        fours = self._kind in (simd.DIGITS, simd.PAIRS)
        program = _Program(simd, self.weights.partition("-")[0], fours)
        widest = _padded(max(d_model))
        x = program.reserve(d_model[0])
        room = (
            program.reserve(widest),
            program.reserve(widest),
            program.reserve(widest * max(2, self.config.expand)),
        )
        prediction = _embed(program, self.model, x)
        self._slots = _stack(program, self.model.stack, x, room, 1)
        program.norm(self.model.norm, x, room[0])
        self._logits, self._width, self._tables = _head(program, self.model, room[0], prediction)
        self._digits = program.reserve(simd.TEAM * (program.widest + simd.PANEL))
        self._size, self._kept = program.size, program.kept
        self._lines = np.array(program.lines, np.int64)
        self._constants = _aligned(program.constants, np.float32)
        self._matrices = _aligned(program.matrices, np.uint8)
        self._taps = np.array(self.config.taps, np.int64)
        self._kept_columns = self.config.kept

    def read(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``RecurrentModel.read``: tokens (B, L) → logits (B, V) of the next, the state after."""
        return self.model.read(tokens, state)

    def initial_state(self, batch: int = 1) -> State:
        """The state before any token."""
        return self.model.initial_state(batch)

    def load(self, state: State, logits: Tensor | None = None) -> Memory:
        """A memory that goes on from ``state``, ``logits`` (B, V) being those of the next token."""
        batch = len(state.history)
        # One column more than in a state: the token that is being read.
        history = np.insert(state.history.numpy(), self._kept_columns, -1, axis=1)
        work = zeros(self._size * batch, np.float32)
        positions = np.full(batch, int(state.position), np.int64)
        memory = Memory(positions, history, work, Room(self._width, self._simd.TEAM))
        for slot, part in zip(self._slots, state.layers, strict=True):
            slot.load(memory, part)
        for table, part in zip(self._tables, state.recall.unbind(1), strict=True):
            table.load(memory, part)
        if logits is not None:
            rows = region(memory, self._logits, self._width)
            rows[:] = self._simd.NEVER
            rows[:, : logits.shape[1]] = logits.numpy()
        return memory

    def save(self, memory: Memory) -> State:
        """The state that a memory of rows of one position holds."""
        assert (memory.positions == memory.position).all()
        recall = self.model.recall.empty(memory.batch, torch.device("cpu"))
        for k, table in enumerate(self._tables):
            recall[:, k] = table.save(memory)
        return State(
            torch.tensor(memory.position),
            torch.from_numpy(np.delete(memory.history, self._kept_columns, axis=1)),
            recall,
            tuple(slot.save(memory) for slot in self._slots),
        )

    def logits(self, memory: Memory) -> Tensor:
        """The logits of the next token, (B, V); a copy."""
        rows = region(memory, self._logits, self._width)
        return torch.from_numpy(rows[:, : self.config.n_outputs].copy())

    def rows(self, memories: Sequence[Memory], index: Sequence[int]) -> Memory:
        """A memory of the rows ``index`` of all memories one behind the other, to the last bit."""
        positions = np.concatenate([m.positions for m in memories])[index]
        history = np.concatenate([m.history for m in memories])[index]
        work = zeros(self._size * len(index), np.float32)
        result = Memory(positions, history, work, Room(self._width, self._simd.TEAM))
        rows, begin = np.asarray(index), 0
        for memory in memories:
            places = np.flatnonzero((begin <= rows) & (rows < begin + memory.batch))
            for offset, width in self._kept if len(places) else ():
                values = region(memory, offset, width)[rows[places] - begin]
                region(result, offset, width)[places] = values
            begin += memory.batch
        return result

    @contextmanager
    def _joined(self, memories: list[Memory]) -> Iterator[Memory]:
        """One memory of all rows, which go back to where they came from."""
        if len(memories) == 1:
            yield memories[0]
            return
        ends = np.cumsum([m.batch for m in memories])
        needed = self._size * int(ends[-1])
        if len(getattr(self._thread, "work", ())) < needed:
            self._thread.work = zeros(needed, np.float32)
        whole = Memory(
            np.concatenate([m.positions for m in memories]),
            np.concatenate([m.history for m in memories]),
            self._thread.work[:needed],
            memories[0].room,
        )
        slices = [slice(end - m.batch, end) for end, m in zip(ends, memories, strict=True)]
        for offset, width in self._kept:
            rows = region(whole, offset, width)
            for memory, part in zip(memories, slices, strict=True):
                rows[part] = region(memory, offset, width)
        yield whole
        for offset, width in self._kept:
            rows = region(whole, offset, width)
            for memory, part in zip(memories, slices, strict=True):
                region(memory, offset, width)[:] = rows[part]
        for memory, part in zip(memories, slices, strict=True):
            memory.positions[:], memory.history[:] = whole.positions[part], whole.history[part]

    def step(self, token: Tensor, memory: Memory) -> Tensor:
        """Read one token (B,) → logits (B, V) of the next."""
        self._given(memory, token.numpy()[:, None], scored=False)
        return self.logits(memory)

    def score(self, tokens: Tensor) -> Tensor:
        """Bits of tokens[:, 1:] given those before, by stepping: (B, L + 1) → (B, L) float64."""
        if tokens.shape[1] > 1 and int(tokens[:, 1:].max()) >= self.config.n_outputs:
            raise ValueError(f"tokens up to {self.config.n_outputs - 1} have a probability")
        memory = self.load(self.model.initial_state(len(tokens)))
        self.step(tokens[:, 0], memory)
        parts = [
            self._given(memory, part.numpy(), scored=True)
            for part in tokens[:, 1:].split(SCORED, 1)
        ]
        return torch.from_numpy(np.concatenate(parts, 1))

    def _given(self, memory: Memory, tokens: Array, scored: bool) -> Array:
        """Read tokens (B, n); returns their bits if ``scored``."""
        tokens = tokens.astype(np.int64)
        self._check(tokens)
        if len(tokens) != memory.batch:
            raise ValueError(
                f"a token for each of {memory.batch} rows is needed, got {len(tokens)}"
            )
        seen = np.zeros((memory.batch, self.config.n_outputs), np.bool_)
        draws = Draws(memory, np.zeros(tokens.shape), SamplingConfig(), seen)
        return self._run(memory, [draws], tokens, given=tokens.shape[1], seen=seen, scored=scored)

    def generate(self, draws: Draws[Memory]) -> tuple[Array, Array]:
        """Draw and read n tokens a sample: tokens (S, n) and their bits (S, n)."""
        return self.generate_together([draws])[0]

    def generate_together(
        self, draws: Sequence[Draws[Memory]], threads: int = 1
    ) -> list[tuple[Array, Array]]:
        """``generate`` for several, as one batch, to the same last bit.

        Their n must be equal, and their positions modulo the model's period. So many ``threads``,
        at most ``simd.TEAM``, share the columns of every vector, unless others do so just now.
        """
        if any(len(d.uniforms) != len(d.seen) for d in draws):
            raise ValueError("draws need as many rows of uniforms as of seen tokens")
        seen = draws[0].seen if len(draws) == 1 else np.concatenate([d.seen for d in draws])
        tokens = np.zeros((len(seen), draws[0].uniforms.shape[1]), np.int64)
        with self._joined([d.memory for d in draws]) as memory:
            bits = self._by_team(memory, draws, tokens, seen, threads)
        result, end = [], 0
        for d in draws:
            part = slice(end, end := end + len(d.seen))
            d.seen[:] = seen[part]
            result.append((tokens[part], bits[part]))
        return result

    def _by_team(
        self, memory: Memory, draws: Sequence[Draws[Memory]], tokens: Array, seen: Array, most: int
    ) -> Array:
        threads, forming = min(most, self._simd.TEAM), _Team.forming
        if threads == 1 or not forming.acquire(blocking=False):
            return self._run(memory, draws, tokens, seen=seen)
        try:
            return self._run(memory, draws, tokens, seen=seen, threads=threads)
        finally:
            forming.release()

    def _check(self, tokens: Array) -> None:
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
            raise ValueError(
                f"token ids must lie in 0 … {self.config.vocab_size - 1}, "
                f"got {tokens.min()} … {tokens.max()}"
            )

    def _run(
        self, memory: Memory, draws: Sequence[Draws[Memory]], tokens: Array, *, seen: Array,
        given: int = 0, scored: bool = False, threads: int = 1,
    ) -> Array:  # fmt: skip
        """``simd.run``; returns the bits of the tokens (S, n)."""
        room, bits = memory.room, np.zeros(tokens.shape)
        uniforms = np.concatenate([d.uniforms for d in draws])
        settings = np.array([d.settings for d in draws for _ in d.seen], np.float64)
        streams, reads = [], []  # rows of each sample; the sample of each row
        for d in draws:
            samples, rows, first = len(d.seen), d.memory.batch, len(reads)
            reads += [len(streams) + row % samples for row in range(rows)]
            streams += [(row, row + rows - samples) for row in range(first, first + samples)]
        gate = zeros(16, np.int64)
        arguments = (
            self._lines, self._abreast, self._kind, self._matrices, self._constants, self._taps,
            memory.work, memory.work.view(np.int32), self._digits, memory.history,
            memory.positions, np.array(reads, np.int64), self._logits, self.config.n_outputs,
            self._width, tokens, bits, given, scored, uniforms, settings,
            np.array(streams, np.int64), seen, room.weights, room.weights.view(np.int32),
            room.changed, room.histogram,
        )  # fmt: skip

        def run(member: int) -> None:
            self._simd.run(*arguments, room.scratch[64 * member :], member, threads, gate)

        if threads == 1:
            run(0)
        else:
            _as_team(run, threads, gate)
        memory.positions += tokens.shape[1]
        return bits


Stepper = RecurrentModel | CompiledModel | CapturedModel


class _Team:
    """Threads that step one batch: one team at a time, so that none waits for another's members."""

    forming = threading.Lock()


def _after_fork() -> None:
    """No team of the parent is under way in its child."""
    _Team.forming = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _as_team(run: Callable[[int], None], threads: int, gate: Array) -> None:
    """``run`` of every member at once, the first in this thread; needs ``_Team.forming``."""
    others: list[Future[None]] = []
    try:
        helpers = pool("team", threads - 1)
        others += [helpers.submit(run, member) for member in range(1, threads)]
        run(0)
    except BaseException:
        gate[8] = 1  # an interruption, before all could meet
        raise
    finally:
        wait(others)
