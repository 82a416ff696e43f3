"""A converted model as a flat program of vector operations for ``simd.run``.

Weights of linear maps are held in float32, bfloat16 or int8 (one scale a row); states, activations,
norms and embeddings stay in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genssm.blocks import (
    Linear,
    Mixer,
    PhasedLinear,
    RecurrentBlock,
    RecurrentPool,
    RecurrentStack,
)
from genssm.heads import Logistics, Softmax
from genssm.inputs import PARTS
from genssm.memory import Array, Group, Space, Table, whole_panels, zeros
from genssm.model import RecurrentModel
from genssm.pace import TEAM
from genssm.recurrence import RecurrentStateSpace
from genssm.stepping import UnsupportedError

MAX_MIXTURES = 10  # the kernel's room for the parameters of one mixture, a panel of 32


@dataclass(frozen=True)
class Program:
    """What ``simd.run`` is given of a model, and where it leaves what is asked for."""

    lines: Array  # (operations, 12) int64: see ``simd.advance``
    constants: Array  # float32
    matrices: Array  # bytes
    size: int  # floats of ``work`` that a row of the batch needs
    kept: list[tuple[int, int]]  # regions of it that outlast a step, and their widths
    slots: tuple[Space | Group, ...]  # where the states of the layers lie
    tables: list[Table]  # … and those of recall
    logits: int  # the region of the logits
    width: int  # of one row of them, with padding
    digits: int  # the region for ``simd.quantize``


def compile_model(model: RecurrentModel, simd: Any, kind: str, beside: int, fours: bool) -> Program:
    """The program of a model, its weights packed as ``kind``: see ``pack``.

    ``simd``: the module of that name. Raises UnsupportedError for what it has no operation for.
    """
    config, program = model.config, _Builder(simd, kind, beside, fours)
    widest = whole_panels(max(config.d_model))
    x = program.reserve(config.d_model[0])
    room = (
        program.reserve(widest),
        program.reserve(widest),
        program.reserve(widest * max(2, config.expand)),
    )
    prediction = _embed(program, model, x)
    slots = _stack(program, model.stack, x, room, 1)
    program.norm(model.norm, x, room[0])
    logits, width, tables = _head(program, model, room[0], prediction)
    digits = program.reserve(TEAM * (program.widest + simd.PANEL))
    return Program(
        np.array(program.lines, np.int64), _aligned(program.constants, np.float32),
        _aligned(program.matrices, np.uint8), program.size, program.kept, slots, tables, logits,
        width, digits,
    )  # fmt: skip


def _numpy(tensor: Tensor | None) -> Array:
    assert tensor is not None
    return tensor.detach().numpy()


def pad_parts(weight: Array, parts: tuple[int, int]) -> Array:
    """Pad a matrix (O, I) of parts[0] × parts[1] equal blocks, each up to multiples of 32."""
    outputs, inputs = (size // count for size, count in zip(weight.shape, parts, strict=True))
    blocks = weight.reshape(parts[0], outputs, parts[1], inputs)
    rows, columns = whole_panels(outputs), whole_panels(inputs)
    padded = np.pad(blocks, [(0, 0), (0, rows - outputs), (0, 0), (0, columns - inputs)])
    return padded.reshape(parts[0] * rows, parts[1] * columns)


def pack(
    weight: Array, kind: str, beside: int = 1, fours: bool = False
) -> tuple[Array, list[Array]]:
    """A matrix (O, I), O a multiple of 32 → panels of 32 outputs as bytes, and constants (O,).

    Of every ``beside`` panels the weights of an input lie side by side; of what remains, too.

    The constants are the scales of the rows. bf16: rounded to the nearest; word j holds outputs j
    (low half) and j + 16 of a panel. int8: each row over its scale, which is its largest magnitude
    over 127. ``fours`` is int8 for ``simd.quantize``: four inputs of an output lie together, and
    the second constant takes the 128 from the high digits again, where there are digits.
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
    groups = (panels[i : i + beside] for i in range(0, len(panels), beside))
    return np.concatenate([g.swapaxes(0, 1).reshape(-1) for g in groups]).view(np.uint8), constants


@dataclass
class _Builder:
    """A program in the making: operations, constants, matrices and regions of ``work``."""

    simd: Any
    kind: str
    beside: int  # panels side by side, and
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
        self.size += whole_panels(width)
        return self.size - whole_panels(width)

    def keep(self, width: int) -> int:
        """A region, as ``reserve``, that holds a state."""
        self.kept.append((self.reserve(width), whole_panels(width)))
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
        return np.pad(vector, (0, whole_panels(len(vector)) - len(vector)))

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
            packed, constants = pack(padded, self.kind, self.beside, self.fours)
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


def _embed(program: _Builder, model: RecurrentModel, x: int) -> int:
    """Token, taps and position into x; returns the region of the linear prediction."""
    simd, inputs = program.simd, model.inputs
    table = _numpy(inputs.embedding.weight)
    width = whole_panels(table.shape[1])
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
            extra = [(0, 0), (0, whole_panels(n_taps) - n_taps)]
            predicting = program.constant(np.pad(weight, extra))
        program.emit(
            simd.TAPS, prediction, tapped, whole_panels(n_taps), predicting,
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


def _space(program: _Builder, layer: Any, u: int, y: int) -> Space:
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
    width = whole_panels(H)
    more = [(0, width - H), (0, 0)]
    a, b = (np.pad(_numpy(t), more) for t in (layer.a, layer.b))
    c = np.pad(_complex(layer.c), more)
    D = program.features(_numpy(layer.D))
    state = program.keep(2 * width * n)
    if layer.p is None or layer.q is None:
        scaled = c.conj().astype(np.complex128) * b
        table = program.constant(D, _by_lanes(a, scaled.conj()))
        program.emit(program.simd.DIAGONAL, u, y, width, table, size=n, extra=state)
        return Space(state, (H, n), _numpy(layer.b))
    rank = layer.p.shape[1]
    wide = [(0, width - H), (0, 0), (0, 0)]
    p, q = np.pad(_numpy(layer.p), wide), np.pad(_complex(layer.q), wide)
    parts = [_by_lanes(a, b, c)]
    parts += [_by_lanes(p[:, r], q[:, r]) for r in range(rank)]
    chunks = np.concatenate([part.reshape(width // 16, -1) for part in parts], 1)
    table = program.constant(D, chunks)
    program.emit(program.simd.LOW_RANK, u, y, width, table, size=n, extra=state, more=rank)
    return Space(state, (H, n), np.ones((H, n), np.complex64))


def _mixer(program: _Builder, mixer: Mixer, x: int, y: int, u: int, wide: int) -> None:
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
    program: _Builder, stack: RecurrentStack, x: int, room: tuple[int, int, int], period: int
) -> tuple[Space | Group, ...]:
    """Step x through a stack, in place; returns where the states lie."""
    u, y, wide = room
    slots: list[Space | Group] = []
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
    program: _Builder, pool: RecurrentPool, x: int, room: tuple[int, int, int], period: int
) -> Group:
    stride, (d_inner, joined) = pool.stride, pool.down.weight.shape
    width = whole_panels(joined // stride)
    group, queue = program.keep(stride * width), program.keep(stride * width)
    inner = program.reserve(d_inner)
    entry = len(program.lines)
    program.emit(program.simd.POOL, group, x, width, size=stride, extra=queue, more=period)
    program.dense(pool.down, group, inner, (1, stride))
    slots = _stack(program, pool.inner, inner, room, period * stride)
    program.dense(pool.up, inner, queue, (stride, 1))
    program.lines[entry][9] = len(program.lines)  # where to go on until the group is full
    return Group(group, queue, (stride, joined // stride), period, slots)


def _head(
    program: _Builder, model: RecurrentModel, u: int, prediction: int
) -> tuple[int, int, list[Table]]:
    """Features u to logits; returns their region, its padded width and the tables of recall."""
    head, size = model.head, model.config.n_outputs
    width = whole_panels(size)
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
    program: _Builder, model: RecurrentModel, head: Softmax, u: int, logits: int
) -> list[Table]:
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
        tables.append(Table(program.keep(2 * recall.slots), recall.slots))
        program.emit(
            program.simd.RECALL, strength, logits, whole_panels(recall.n_outputs), order,
            size=recall.n_outputs, extra=tables[-1].offset, more=recall.slots, last=column,
        )  # fmt: skip
    return tables


def _aligned(arrays: list[Array], dtype: Any) -> Array:
    """One array out of many that begins at a multiple of 64 bytes."""
    size = sum(a.size for a in arrays)
    result = zeros(size, dtype)
    np.concatenate([a.reshape(-1) for a in arrays], out=result)
    return result
