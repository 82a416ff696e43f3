"""The compiled sampling loop: a program of vector operations, run without the interpreter lock.

One function, ``run``, interprets the program that ``stepper`` makes of a converted model: every
architecture shares one compilation, which numba keeps on disk. Vectors of 16 floats are explicit;
LLVM maps them to AVX-512, AVX2, NEON or plain registers. Every sum has one order, whatever the
batch, so that a row's result does not depend on its company to the last bit.

All floats that depend on the batch lie in one array ``work``: region r of a program begins at
``r * batch`` and holds rows of a width that is a multiple of 32.
"""

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import models, register_model

from genssm.recall import FACTOR, MASK

LANES = 16  # floats in a vector
PANEL = 32  # outputs of a linear map that are computed together: two vectors

# Weights of a linear map, by kind: bytes of one input's weights in a panel. DIGITS and PAIRS hold
# those of INT8 for processors that sum products of whole numbers; see ``quantize``.
FP32, BF16, INT8, DIGITS, PAIRS = 0, 1, 2, 3, 4
PANEL_BYTES = (128, 64, 32, 32, 32)

# Operations. A line of a program is one of them and its arguments; see ``advance``.
EMBED, TOKEN, TAPS, LINEAR, POSITION, NORM, DIAGONAL, LOW_RANK = range(8)
SILU, GATE, ADD, POOL, LOGISTICS, RECALL, PROGRESS = range(8, 15)
# One thread does these, all share the others.
SERIAL = (EMBED, TOKEN, TAPS, POSITION, LOGISTICS, RECALL, PROGRESS)
NEVER = np.float32(-1e30)  # the logit of padding, which is no token

_OPTIONS: Any = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
# A large function with a single caller is compiled as a piece of that, not by itself as well.
_PIECE: Any = {"inline": "always", **_OPTIONS}
_ENTRY: Any = {"cache": True, **_OPTIONS}  # keeps all that it calls
intrinsic: Any = extending.intrinsic  # what it returns takes one argument less than it decorates
f32 = np.float32

_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_VECTOR, _WORDS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_BYTES, _ALL_BYTES = ir.VectorType(_I8, LANES), ir.VectorType(_I8, 4 * LANES)
_ZERO = ir.Constant(_VECTOR, [0.0] * LANES)


class Vector(types.Type):
    """16 floats in a register."""

    def __init__(self) -> None:
        super().__init__(name="float32x16")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """How numba holds a ``Vector``: as LLVM does."""

    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _VECTOR)


vector = Vector()


def compiles_for(feature: str) -> bool:
    """Whether code is compiled for processors that have a feature, by its name in LLVM.

    That is this processor, unless numba was told of another, or of less (NUMBA_CPU_FEATURES,
    NUMBA_ENABLE_AVX).
    """
    target: Any = cpu_target
    _, _, features = target.target_context.codegen().magic_tuple()
    return f"+{feature}" in features.split(",")


def multiplies_bytes() -> bool:
    """Whether the processor sums products of bytes in words (VNNI), in its largest vectors."""
    return compiles_for("avx512vnni" if compiles_for("avx512f") else "avxvnni")


def int8_kinds() -> dict[int, int]:
    """How int8 weights meet activations, by the bits of these, the fastest first.

    As whole numbers of 16 bits, whose sums are the same on every processor, or as floats.
    """
    if not compiles_for("avx2"):
        return {24: INT8}
    return {16: DIGITS if multiplies_bytes() else PAIRS, 24: INT8}


def panels_abreast(kind: int) -> int:
    """Panels whose sums fit the registers, with weights and a value: those of AVX-512 hold four.

    Those of AVX2 (16 of 8 floats) and NEON (32 of 4) hold two.
    """
    if kind == DIGITS:
        return DIGITS_ABREAST
    if kind == PAIRS:
        return PAIRS_ABREAST
    if compiles_for("avx512f"):
        return 4
    return 2 if compiles_for("avx2") or platform.machine() in ("arm64", "aarch64") else 1


def side_by_side(kind: int, abreast: int) -> int:
    """Panels that share a group: first the weights of an input in all of them, then of the next.

    So one sample reads the weights in a single sequence, which is faster than four. Those of FP32
    are two cache lines anyhow. Without AVX-512 tiles for two samples have one panel each, which
    would skip the lines of its neighbours.
    """
    return 4 if abreast == 4 and kind != FP32 else 1


# Vector operations: each intrinsic is one LLVM instruction or two.


def _words(value: int) -> ir.Constant:
    return ir.Constant(_WORDS, [value] * LANES)


def _call(builder: Any, name: str, result: Any, *arguments: Any, fastmath: Any = ()) -> Any:
    function_type = ir.FunctionType(result, [a.type for a in arguments])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, arguments, fastmath=fastmath)


def _data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def _load(builder: Any, pointer: Any, index: Any, kind: Any) -> Any:
    address = builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer())
    return builder.load(address, align=4 if kind is not _BYTES else 1)


def _splat(builder: Any, value: Any, lanes: int = LANES) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    mask = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(first, undefined, mask)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fmuladd.v16f32", _VECTOR, a, b, c)


def _chosen(builder: Any, order: str, a: Any, b: Any) -> Any:
    """a where it is larger (smaller), and b elsewhere: also where one of them is no number."""
    return builder.select(builder.fcmp_ordered(order, a, b), a, b)


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """array[index : index + 16]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _data(context, builder, signature.args[0], arguments[0])
        return _load(builder, pointer, arguments[1], _VECTOR)

    return vector(array, types.intp), generate


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index : index + 16] = value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _data(context, builder, signature.args[0], arguments[0])
        address = builder.gep(pointer, [arguments[1]])
        builder.store(arguments[2], builder.bitcast(address, _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """One float in all lanes."""
    return vector(types.float32), lambda context, builder, signature, a: _splat(builder, a[0])


@intrinsic
def ramp(typing: Any) -> Any:
    """0, 1, …, 15."""
    lanes = ir.Constant(_VECTOR, [float(i) for i in range(LANES)])
    return vector(), lambda context, builder, signature, a: lanes


def _elementwise(arity: int, emit: Any) -> Any:
    """An intrinsic of so many vectors that gives a vector; ``emit(builder, *values)``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit(builder, *arguments)

    signature = vector(*[vector] * arity)
    if arity == 1:
        return intrinsic(lambda typing, a: (signature, generate))
    if arity == 2:
        return intrinsic(lambda typing, a, b: (signature, generate))
    return intrinsic(lambda typing, a, b, c: (signature, generate))


def _power_of_two(builder: Any, n: Any) -> Any:
    exponent = builder.add(builder.fptosi(n, _WORDS), _words(127))
    return builder.bitcast(builder.shl(exponent, _words(23)), _VECTOR)


def _exponent(builder: Any, x: Any) -> Any:
    bits = builder.lshr(builder.bitcast(x, _WORDS), _words(23))
    return builder.sitofp(builder.sub(bits, _words(127)), _VECTOR)


def _mantissa(builder: Any, x: Any) -> Any:
    bits = builder.and_(builder.bitcast(x, _WORDS), _words(0x7FFFFF))
    return builder.bitcast(builder.or_(bits, _words(0x3F800000)), _VECTOR)


add = _elementwise(2, lambda builder, a, b: builder.fadd(a, b))
sub = _elementwise(2, lambda builder, a, b: builder.fsub(a, b))
mul = _elementwise(2, lambda builder, a, b: builder.fmul(a, b))
div = _elementwise(2, lambda builder, a, b: builder.fdiv(a, b))
fma = _elementwise(3, _fma)  # a * b + c, rounded once where the processor can
larger = _elementwise(2, lambda builder, a, b: _chosen(builder, ">", a, b))
smaller = _elementwise(2, lambda builder, a, b: _chosen(builder, "<", a, b))
magnitude = _elementwise(1, lambda builder, a: _call(builder, "llvm.fabs.v16f32", _VECTOR, a))
nearest = _elementwise(1, lambda builder, a: _call(builder, "llvm.rint.v16f32", _VECTOR, a))
power_of_two = _elementwise(1, _power_of_two)  # 2^n of whole n
exponent = _elementwise(1, _exponent)  # e of x = m · 2^e, 1 <= m < 2, for normal x > 0
mantissa = _elementwise(1, _mantissa)  # m of the same


@intrinsic
def total(typing: Any, value: Any) -> Any:
    """The sum of the lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = "llvm.vector.reduce.fadd.v16f32"
        return _call(builder, name, _F32, _F32(0.0), arguments[0], fastmath=("reassoc",))

    return types.float32(vector), generate


@intrinsic
def largest(typing: Any, value: Any) -> Any:
    """The largest lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = "llvm.vector.reduce.fmax.v16f32"
        return _call(builder, name, _F32, arguments[0], fastmath=("nnan",))

    return types.float32(vector), generate


@intrinsic
def flush_denormals(typing: Any) -> Any:
    """Treat denormals as zero in this thread; returns the former control word (x86 only)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if platform.machine() not in ("x86_64", "AMD64"):
            return _I32(0)
        word = cgutils.alloca_once(builder, _I32)
        pointer = builder.bitcast(word, _I8.as_pointer())
        _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), pointer)
        before = builder.load(word)
        builder.store(builder.or_(before, _I32(0x8040)), word)  # flush to zero, denormals are zero
        _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), pointer)
        return before

    return types.int32(), generate


@intrinsic
def restore_denormals(typing: Any, word: Any) -> Any:
    """Undo ``flush_denormals``, given its result."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            place = cgutils.alloca_once_value(builder, arguments[0])
            pointer = builder.bitcast(place, _I8.as_pointer())
            _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), pointer)
        return context.get_dummy_value()

    return types.void(types.int32), generate


# Threads that step one batch together: each has its own columns of every region.


@intrinsic
def arrive(typing: Any, array: Any) -> Any:
    """Add one to array[0], atomically; returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _data(context, builder, signature.args[0], arguments[0])
        return builder.atomic_rmw("add", pointer, _I64(1), "seq_cst")

    return types.int64(array), generate


@intrinsic
def peek(typing: Any, array: Any, index: Any) -> Any:
    """array[index] as other threads left it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _data(context, builder, signature.args[0], arguments[0])
        return builder.load_atomic(builder.gep(pointer, [arguments[1]]), "seq_cst", 8)

    return types.int64(array, types.intp), generate


@intrinsic
def relax(typing: Any) -> Any:
    """Tell the processor that this thread waits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_way(typing: Any) -> Any:
    """Let another thread have the core (POSIX)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if platform.system() != "Windows":
            _call(builder, "sched_yield", _I32)
        return context.get_dummy_value()

    return types.void(), generate


@njit(**_OPTIONS)
def meet(gate, members):
    """Wait until all members of the team have come here; False if the team is called off.

    gate[0] counts arrivals, gate[8] (another cache line) is not zero when it is called off.
    """
    if members == 1:
        return True
    goal = (arrive(gate) // members + 1) * members
    waited = 0
    while peek(gate, 0) < goal:
        if peek(gate, 8) != 0:
            return False
        waited += 1
        if waited > 1000:  # the other thread has no core, perhaps
            give_way()
        else:
            relax()
    return True


@njit(**_OPTIONS)
def share(width, member, members):
    """The columns of a member of the team, from … to, in whole panels."""
    panels = width // PANEL
    return panels * member // members * PANEL, panels * (member + 1) // members * PANEL


# Linear maps: tiles of rows × panels whose sums stay in registers.


def _weights(builder: Any, kind: int, address: Any) -> tuple[Any, Any]:
    """The weights of one input in a panel, as two vectors."""
    if kind == FP32:
        return _load(builder, address, _I64(0), _VECTOR), _load(builder, address, _I64(64), _VECTOR)
    if kind == BF16:  # output j in the low half of word j, output j + 16 in the high half
        words = _load(builder, address, _I64(0), _WORDS)
        low, high = builder.shl(words, _words(16)), builder.and_(words, _words(0xFFFF0000))
        return builder.bitcast(low, _VECTOR), builder.bitcast(high, _VECTOR)
    halves = [_load(builder, address, _I64(i), _BYTES) for i in (0, LANES)]
    low, high = (builder.sitofp(builder.sext(half, _WORDS), _VECTOR) for half in halves)
    return low, high


def _loop(
    builder: Any, count: Any, start: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """``values = body(i, values)`` for i in 0 … count - 1, at least once; the last values."""
    before = builder.block
    loop = builder.append_basic_block("inputs")
    after = builder.append_basic_block("outputs")
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(_I64)
    i.add_incoming(_I64(0), before)
    values = [builder.phi(value.type) for value in start]
    result = body(i, values)
    for phi, first, value in zip(values, start, result, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(value, builder.block)
    following = builder.add(i, _I64(1))
    i.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return result


def _sums(
    builder: Any, kind: int, rows: int, panels: int, matrix: Any, apart: Any, across: Any, x: Any,
    stride: Any, inputs: Any,
) -> list[Any]:  # fmt: skip
    """Σ_i weight[panel, i] x[row, i] by panel, row and half; the loop over i, in this order."""

    def body(i: Any, sums: list[Any]) -> list[Any]:
        places = [builder.add(builder.mul(stride, _I64(row)), i) for row in range(rows)]
        values = [_splat(builder, builder.load(builder.gep(x, [place]))) for place in places]
        result = []
        for panel in range(panels):
            offset = builder.add(builder.mul(i, apart), builder.mul(across, _I64(panel)))
            pair = _weights(builder, kind, builder.gep(matrix, [offset]))
            for value in values:
                result += [_fma(builder, w, value, sums[len(result) + half])
                           for half, w in enumerate(pair)]  # fmt: skip
        return result

    return _loop(builder, inputs, [_ZERO] * (panels * rows * 2), body)


def _add_products(builder: Any, sums: Any, digits: Any, weights: Any) -> Any:
    """To each of 16 words, the products of four bytes without a sign and four with one."""
    if compiles_for("avx512vnni"):
        name = "llvm.x86.avx512.vpdpbusd.512"
        return _call(builder, name, _WORDS, sums, digits, weights)
    words, octets = ir.VectorType(_I32, LANES // 2), ir.VectorType(_I8, 2 * LANES)  # AVX-VNNI
    undefined, parts = ir.Constant(_WORDS, ir.Undefined), []
    for first in (0, LANES // 2):
        mask = ir.Constant(words, [first + i for i in range(LANES // 2)])
        total, *factors = (
            builder.shuffle_vector(builder.bitcast(x, _WORDS), undefined, mask)
            for x in (sums, digits, weights)
        )
        factors = [builder.bitcast(x, octets) for x in factors]
        parts.append(_call(builder, "llvm.x86.avx512.vpdpbusd.256", words, total, *factors))
    return builder.shuffle_vector(*parts, ir.Constant(_WORDS, list(range(LANES))))


def _in_units(
    builder: Any, sums: list[Any], rows: int, x: Any, stride: Any, inputs: Any
) -> list[Any]:
    """Whole sums by panel, row and half, times the unit that lies behind each row."""
    result = []
    for total in sums:
        row = len(result) // 2 % rows
        place = builder.add(builder.mul(stride, _I64(row)), inputs)
        unit = _splat(builder, builder.load(builder.gep(x, [place])))
        result.append(builder.fmul(builder.sitofp(total, _VECTOR), unit))
    return result


def _sums_of_digits(
    builder: Any, rows: int, panels: int, matrix: Any, apart: Any, across: Any, x: Any, stride: Any,
    inputs: Any, offsets: Any,
) -> list[Any]:  # fmt: skip
    """``_sums`` of the rows that ``quantize`` makes: whole numbers, summed exactly.

    Either digit of four inputs meets their weights in one instruction.
    """
    start = []
    for panel in range(panels):
        for _ in range(rows):
            for half in range(2):
                place = _I64(panel * PANEL + half * LANES)
                start.append(ir.Constant(_WORDS, [0] * LANES))
                start.append(_load(builder, offsets, place, _WORDS))

    def body(group: Any, sums: list[Any]) -> list[Any]:
        digits = []
        for row in range(rows):
            place = builder.add(builder.mul(stride, _I64(row)), builder.mul(group, _I64(2)))
            for digit in range(2):
                word = builder.load(builder.gep(x, [builder.add(place, _I64(digit))]))
                digits.append(builder.bitcast(_splat(builder, word), _ALL_BYTES))
        result = []
        for panel in range(panels):
            offset = builder.add(builder.mul(group, apart), builder.mul(across, _I64(panel)))
            address = builder.gep(matrix, [offset])
            parts = [_load(builder, address, _I64(half * 64), _ALL_BYTES) for half in range(2)]
            for row in range(rows):
                for weights in parts:
                    for factor in digits[2 * row : 2 * row + 2]:
                        before = sums[len(result)]
                        result.append(_add_products(builder, before, factor, weights))
        return result

    sums = iter(_loop(builder, builder.lshr(inputs, _I64(2)), start, body))
    whole = [
        builder.add(builder.shl(high, _words(8)), low) for low, high in zip(sums, sums, strict=True)
    ]
    return _in_units(builder, whole, rows, x, stride, inputs)


def _sums_of_pairs(
    builder: Any, rows: int, panels: int, matrix: Any, apart: Any, across: Any, x: Any, stride: Any,
    inputs: Any,
) -> list[Any]:  # fmt: skip
    """``_sums`` of the rows that ``quantize`` makes of 16-bit numbers, summed exactly.

    A word has the weights of four inputs of an output. The first and the third meet their inputs
    in one instruction, the second and the fourth in another.
    """
    words, pair = ir.VectorType(_I32, LANES // 2), ir.VectorType(ir.IntType(16), LANES)
    byte = ir.Constant(pair, [8] * LANES)

    def body(group: Any, sums: list[Any]) -> list[Any]:
        factors = []
        for row in range(rows):
            place = builder.add(builder.mul(stride, _I64(row)), builder.mul(group, _I64(2)))
            for which in range(2):
                word = builder.load(builder.gep(x, [builder.add(place, _I64(which))]))
                factors.append(builder.bitcast(_splat(builder, word, LANES // 2), pair))
        result = []
        for panel in range(panels):
            offset = builder.add(builder.mul(group, apart), builder.mul(across, _I64(panel)))
            address = builder.gep(matrix, [offset])
            parts = [_load(builder, address, _I64(32 * part), pair) for part in range(4)]
            weights = [
                (builder.ashr(builder.shl(part, byte), byte), builder.ashr(part, byte))
                for part in parts
            ]
            for row in range(rows):
                for halves in weights:
                    value = sums[len(result)]
                    for factor, half in zip(factors[2 * row : 2 * row + 2], halves, strict=True):
                        products = _call(builder, "llvm.x86.avx2.pmadd.wd", words, half, factor)
                        value = builder.add(value, products)
                    result.append(value)
        return result

    start = [ir.Constant(words, [0] * (LANES // 2))] * (panels * rows * 4)
    sums = iter(_loop(builder, builder.lshr(inputs, _I64(2)), start, body))
    order = ir.Constant(_WORDS, list(range(LANES)))
    whole = [
        builder.shuffle_vector(first, second, order)
        for first, second in zip(sums, sums, strict=True)
    ]
    return _in_units(builder, whole, rows, x, stride, inputs)


def _tile(builder: Any, kind: int, rows: int, panels: int, *places: Any) -> None:
    """y[row, output] = scale · Σ_i weight[output, i] x[row, i] + bias on rows × panels."""
    matrix, apart, across, x, stride, inputs, y, outputs, table = places
    own = PANEL_BYTES[kind] * (4 if kind in (DIGITS, PAIRS) else 1)
    if panels == 4 and kind != FP32:  # a group; loads at constant distances stay in order
        apart, across = _I64(4 * own), _I64(own)
    if kind == DIGITS:
        offsets = builder.gep(table, [builder.mul(outputs, _I64(2))])
        found = _sums_of_digits(
            builder, rows, panels, matrix, apart, across, x, stride, inputs, offsets
        )
    elif kind == PAIRS:
        found = _sums_of_pairs(builder, rows, panels, matrix, apart, across, x, stride, inputs)
    else:
        found = _sums(builder, kind, rows, panels, matrix, apart, across, x, stride, inputs)
    sums = iter(found)
    for panel in range(panels):
        for row in range(rows):
            for half in range(2):
                column = _I64(panel * PANEL + half * LANES)
                bias = _load(builder, table, column, _VECTOR)
                scale = _load(builder, table, builder.add(column, outputs), _VECTOR)
                place = builder.add(builder.mul(outputs, _I64(row)), column)
                address = builder.bitcast(builder.gep(y, [place]), _VECTOR.as_pointer())
                builder.store(_fma(builder, next(sums), scale, bias), address, align=4)


# Rows × panels computed together. Eight independent sums or more keep the multipliers busy;
# sixteen, with the weights and values, fill the 32 registers of AVX-512. Digits have two sums, so
# that one panel fits the 16 registers of AVX-VNNI, four AVX-512. Pairs have one sum each, so that
# two panels or two rows fit the 16 registers of AVX2.
TILES = ((8, 1), (4, 2), (4, 1), (2, 4), (2, 2), (2, 1), (1, 4), (1, 2), (1, 1))
DIGITS_ABREAST, PAIRS_ABREAST = 4 if compiles_for("avx512vnni") else 1, 2
KINDS = sorted({FP32, BF16, INT8, *int8_kinds().values()})


@intrinsic
def tile(
    typing, rows, panels, kind, matrices, matrix, apart, across, work, x, stride, inputs, y,
    outputs, constants, table,
):  # fmt: skip
    """One of TILES. ``matrix``, x, y, ``table``: where the first panel's weights, the values, the
    results and the biases begin; scales lie ``outputs`` behind the biases, the start of the high
    digits' sums another ``outputs`` behind. Weights of an input, or of four that lie together, are
    ``apart`` bytes from those of the next, and ``across`` bytes from those in the next panel. Rows
    of x begin ``stride`` apart, of y ``outputs``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (
            rows, panels, kind, matrices, matrix, apart, across, work, x, stride, inputs, y,
            outputs, constants, table,
        ) = arguments  # fmt: skip
        matrix = builder.gep(_data(context, builder, signature.args[3], matrices), [matrix])
        memory = _data(context, builder, signature.args[7], work)
        table = builder.gep(_data(context, builder, signature.args[13], constants), [table])
        x, y = builder.gep(memory, [x]), builder.gep(memory, [y])
        places = (matrix, apart, across, x, stride, inputs, y, outputs, table)
        shape = builder.add(builder.mul(rows, _I64(8)), panels)
        for size in TILES:
            with builder.if_then(builder.icmp_signed("==", shape, _I64(size[0] * 8 + size[1]))):
                for chosen in KINDS:
                    most = {DIGITS: DIGITS_ABREAST, PAIRS: PAIRS_ABREAST}.get(chosen, 8)
                    if size[0] * size[1] > most:
                        continue
                    with builder.if_then(builder.icmp_signed("==", kind, _I64(chosen))):
                        _tile(builder, chosen, *size, *places)
        return context.get_dummy_value()

    n = types.intp
    return types.void(n, n, n, matrices, n, n, n, work, n, n, n, n, n, constants, n), generate


@intrinsic
def store_digits(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """16 whole numbers in -2^15 … 2^15 - 1 as two digits to the base 256.

    Of every four the low digits make a word, the high ones plus 128 the next.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _data(context, builder, signature.args[0], arguments[0])
        address = builder.gep(pointer, [arguments[1]])
        words = builder.add(builder.fptosi(arguments[2], _WORDS), _words(1 << 15))
        octets = builder.bitcast(words, _ALL_BYTES)
        order = [16 * four + 4 * i + digit
                 for four in range(4) for digit in range(2) for i in range(4)]  # fmt: skip
        mask = ir.Constant(ir.VectorType(_I32, 2 * LANES), order)
        digits = builder.shuffle_vector(octets, ir.Constant(_ALL_BYTES, ir.Undefined), mask)
        builder.store(digits, builder.bitcast(address, digits.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def store_pairs(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """16 whole numbers in -2^15 … 2^15 - 1 in 16 bits each.

    Of every four the first and the third make a word, the second and the fourth the next.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _data(context, builder, signature.args[0], arguments[0])
        address = builder.gep(pointer, [arguments[1]])
        shorts = ir.VectorType(ir.IntType(16), LANES)
        numbers = builder.trunc(builder.fptosi(arguments[2], _WORDS), shorts)
        order = [4 * four + i for four in range(4) for i in (0, 2, 1, 3)]
        mask = ir.Constant(ir.VectorType(_I32, LANES), order)
        pairs = builder.shuffle_vector(numbers, ir.Constant(shorts, ir.Undefined), mask)
        builder.store(pairs, builder.bitcast(address, shorts.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@njit(**_OPTIONS)
def quantize(kind, work, source, size, target):
    """A row as whole multiples of its unit, a part of its largest magnitude; the unit lies behind.

    The sums of products with int8 weights have no rounding at all. Of 16 bits, or of as many as
    their sums have room for (a bit less for each time that the inputs are twice as many as 512),
    which is finer than int8 weights are by far. What is no number makes the unit none.
    """
    limit = min(2**15 - 1, (2**31 - 1) // (127 * size))
    peak, invalid = splat(f32(0.0)), splat(f32(0.0))
    for i in range(0, size, LANES):
        x = load(work, source + i)
        peak = larger(peak, magnitude(x))
        invalid = fma(x, splat(f32(0.0)), invalid)
    most = max(largest(peak), f32(1e-30))
    inverse = splat(f32(limit) / most)
    for i in range(0, size, LANES):
        x = nearest(mul(load(work, source + i), inverse))
        if kind == PAIRS:
            store_pairs(work, target + i // 2, x)
        else:
            store_digits(work, target + i // 2, x)
    work[target + size] = most * f32(1 / limit) + total(invalid)


@njit(**_OPTIONS)
def linear(
    kind, abreast, beside, matrices, matrix, work, x, inputs, y, outputs, constants, table, digits,
    batch, begin, finish,
):  # fmt: skip
    """y (batch, outputs) = W x + bias, for x (batch, inputs): both in ``work``.

    Of the outputs those from ``begin`` to ``finish``.

    ``abreast``, ``beside``: see ``panels_abreast``, ``side_by_side``. A sum runs over the inputs in
    order whatever the tile. Four panels stay in the cache while they meet all rows. ``digits``:
    room for ``quantize``.
    """
    own = PANEL_BYTES[kind]
    size = inputs * own
    most, stride = (8 if abreast == 4 else 2), inputs
    if kind in (DIGITS, PAIRS):
        own, stride, most = 4 * own, inputs + PANEL, abreast
        for row in range(batch):
            quantize(kind, work, x + row * inputs, inputs, digits + row * stride)
        x = digits
    first, end = begin // PANEL, finish // PANEL
    while first < end:
        last = min(first - first % 4 + 4, end)
        row = 0
        while row < batch:
            rows = most
            while rows > batch - row:
                rows //= 2
            # Panels that fit with so many rows; those that are not side by side are other streams.
            together = max(1, min(abreast, (most if beside > 1 else abreast) // rows))
            panel = first
            while panel < last:
                group = panel - panel % beside
                wide = min(beside, outputs // PANEL - group)
                panels, following = together, min(group + wide, last) if beside > 1 else last
                while panel + panels > following:
                    panels //= 2
                tile(rows, panels, kind, matrices, matrix + group * size + (panel - group) * own,
                     wide * own, own if beside > 1 else size, work, x + row * stride, stride,
                     inputs, y + row * outputs + panel * PANEL, outputs, constants,
                     table + panel * PANEL)  # fmt: skip
                panel += panels
            row += rows
        first = last


# Functions of vectors.


@njit(**_OPTIONS)
def exp(x):
    """e^x to about one unit in the last place, x clamped to [-87, 88] (Cephes expf); NaN of NaN."""
    x = larger(splat(f32(-87.0)), smaller(splat(f32(88.0)), x))
    n = nearest(mul(x, splat(f32(1.44269504))))
    r = fma(n, splat(f32(-0.693359375)), x)  # x - n log 2, in two parts
    r = fma(n, splat(f32(2.12194440e-4)), r)
    p = splat(f32(1.9875691500e-4))
    p = fma(p, r, splat(f32(1.3981999507e-3)))
    p = fma(p, r, splat(f32(8.3334519073e-3)))
    p = fma(p, r, splat(f32(4.1665795894e-2)))
    p = fma(p, r, splat(f32(1.6666665459e-1)))
    p = fma(p, r, splat(f32(0.5)))
    p = fma(p, mul(r, r), add(r, splat(f32(1.0))))
    return mul(p, power_of_two(n))


@njit(**_OPTIONS)
def log(x):
    """The natural logarithm of normal x > 0: 2 artanh((m - 1) / (m + 1)) + e log 2."""
    e, m = exponent(x), mantissa(x)  # m on [1, 2)
    s = div(sub(m, splat(f32(1.41421356))), add(m, splat(f32(1.41421356))))  # |s| < 0.172
    q = mul(s, s)
    p = splat(f32(2.0 / 9))
    p = fma(p, q, splat(f32(2.0 / 7)))
    p = fma(p, q, splat(f32(2.0 / 5)))
    p = fma(p, q, splat(f32(2.0 / 3)))
    p = fma(p, q, splat(f32(2.0)))
    return fma(add(e, splat(f32(0.5))), splat(f32(0.693147181)), mul(p, s))


@njit(**_OPTIONS)
def sigmoid(x):
    """1 / (1 + e^-x)."""
    one = splat(f32(1.0))
    return div(one, add(one, exp(sub(splat(f32(0.0)), x))))


# The operations of a program.


@njit(**_OPTIONS)
def norm(work, source, target, width, size, constants, table, begin, finish):
    """Layer norm of one row: ``size`` features, the others up to ``width`` are zero."""
    zero, one, sums = splat(f32(0.0)), splat(f32(1.0)), splat(f32(0.0))
    for i in range(0, width, LANES):
        sums = add(sums, load(work, source + i))
    centre, squares = splat(total(sums) / f32(size)), zero
    for i in range(0, width, LANES):
        d = sub(load(work, source + i), centre)
        if i + LANES > size:  # what is no padding counts
            d = mul(d, larger(zero, smaller(one, sub(splat(f32(size - i)), ramp()))))
        squares = fma(d, d, squares)
    scale = splat(f32(1.0) / np.sqrt(total(squares) / f32(size) + f32(1e-5)))
    for i in range(begin, finish, LANES):
        d = mul(sub(load(work, source + i), centre), scale)
        scaled = fma(d, load(constants, table + i), load(constants, table + width + i))
        store(work, target + i, scaled)


@njit(**_OPTIONS)
def diagonal(work, source, target, width, pairs, state, constants, table, batch, begin, finish):
    """z = a z + u, y = silu(Re c·z + D u) for 16 features at a time (S4D).

    ``table``: D (width,), then Re a, Im a, Re c, -Im c (pairs, 4, 16) of each 16 features. State:
    Re z, Im z (pairs, 2, 16) of each 16 features.
    """
    for feature in range(begin, finish, LANES):
        d = load(constants, table + feature)
        first = table + width + feature * pairs * 4
        for row in range(batch):
            u = load(work, source + row * width + feature)
            z = state + (row * width + feature) * pairs * 2
            real, imag = mul(d, u), splat(f32(0.0))
            for n in range(pairs):
                k, w = first + n * 64, z + n * 32
                ar, ai = load(constants, k), load(constants, k + 16)
                zr, zi = load(work, w), load(work, w + 16)
                xr = fma(ar, zr, sub(u, mul(ai, zi)))
                xi = fma(ar, zi, mul(ai, zr))
                store(work, w, xr)
                store(work, w + 16, xi)
                real = fma(load(constants, k + 32), xr, real)
                imag = fma(load(constants, k + 48), xi, imag)
            y = add(real, imag)
            store(work, target + row * width + feature, mul(y, sigmoid(y)))


@njit(**_OPTIONS)
def low_rank(
    work, source, target, width, pairs, rank, state, constants, table, batch, scratch, begin, finish
):  # fmt: skip
    """x = a x - Σ p_r (q_r·x) + b u, y = silu(c·x + D u) for 16 features at a time (S4).

    ``table``: D (width,), then for each 16 features a, b, c (pairs, 6, 16) and for each r p, q
    (pairs, 4, 16), real and imaginary parts in turn, those of c and q as in a real dot product.
    """
    per_feature = pairs * (6 + 4 * rank)
    zero = splat(f32(0.0))
    for feature in range(begin, finish, LANES):
        d = load(constants, table + feature)
        first = table + width + feature * per_feature
        low = first + pairs * 96
        for row in range(batch):
            u = load(work, source + row * width + feature)
            x = state + (row * width + feature) * pairs * 2
            for r in range(rank):
                real, imag = zero, zero
                for n in range(pairs):
                    k, w = low + (r * pairs + n) * 64, x + n * 32
                    real = fma(load(constants, k + 32), load(work, w), real)
                    imag = fma(load(constants, k + 48), load(work, w + 16), imag)
                store(scratch, r * LANES, sub(zero, add(real, imag)))
            real, imag = mul(d, u), zero
            for n in range(pairs):
                k, w = first + n * 96, x + n * 32
                ar, ai = load(constants, k), load(constants, k + 16)
                zr, zi = load(work, w), load(work, w + 16)
                xr = fma(load(constants, k + 32), u, sub(mul(ar, zr), mul(ai, zi)))
                xi = fma(load(constants, k + 48), u, fma(ar, zi, mul(ai, zr)))
                for r in range(rank):
                    j, qx = low + (r * pairs + n) * 64, load(scratch, r * LANES)
                    xr = fma(load(constants, j), qx, xr)
                    xi = fma(load(constants, j + 16), qx, xi)
                store(work, w, xr)
                store(work, w + 16, xi)
                real = fma(load(constants, k + 64), xr, real)
                imag = fma(load(constants, k + 80), xi, imag)
            y = add(real, imag)
            store(work, target + row * width + feature, mul(y, sigmoid(y)))


@njit(**_OPTIONS)
def pointwise(code, work, source, target, width, batch, begin, finish):
    """SILU: y = silu(y). ADD: y += x. GATE: y += x[:width] · sigmoid(x[width:])."""
    for row in range(batch):
        for i in range(row * width + begin, row * width + finish, LANES):
            y = load(work, target + i)
            if code == SILU:
                y = mul(y, sigmoid(y))
            elif code == ADD:
                y = add(y, load(work, source + i))
            else:
                x = source + row * width + i  # rows of x are twice as wide
                y = fma(load(work, x), sigmoid(load(work, x + width)), y)
            store(work, target + i, y)


@njit(**_OPTIONS)
def gather_taps(work, target, width, history, taps, prediction, constants, table, phase, top):
    """Earlier tokens, 0 … top as numbers on [-1, 1]; their linear prediction if ``table`` >= 0."""
    last = history.shape[1]
    for row in range(history.shape[0]):
        predicted = f32(0.0)
        for k in range(len(taps)):
            token = history[row, last - taps[k]]
            value = f32(0.0)
            if 0 <= token <= top:
                value = f32(token) * f32(2 / top) - f32(1.0)
            work[target + row * width + k] = value
            if table >= 0:
                predicted += value * constants[table + phase * width + k]
        for k in range(len(taps), width):
            work[target + row * width + k] = f32(0.0)
        if table >= 0:
            work[prediction + row * PANEL] = predicted


@njit(**_OPTIONS)
def mixture(work, source, prediction, mixtures, half, scratch):
    """The parameters of a mixture of logistics, made of the head's outputs; see model.Logistics.

    In ``scratch``, 16 places each: log-weights, means, inverse scales, and the log-weights plus
    that part of an inner bin's log-mass which is the same in all bins.
    """
    most, whole = -np.inf, 0.0
    for k in range(mixtures):
        most = max(most, work[source + k])
    for k in range(mixtures):
        whole += np.exp(work[source + k] - most)
    for k in range(mixtures):
        log_scale = min(max(work[source + 2 * mixtures + k] - 2.5, -7.0), 7.0)
        inverse = np.exp(-log_scale)
        scratch[k] = work[source + k] - most - np.log(whole)
        scratch[16 + k] = work[prediction] + 0.3 * work[source + mixtures + k]
        scratch[32 + k] = inverse
        scratch[48 + k] = scratch[k] + np.log(-np.expm1(-2 * half * inverse))


@njit(**_OPTIONS)
def inner_bins(value, half, mixtures, scratch):
    """Log-masses of the bins around 16 values.

    A bin's mass is sigmoid(p) sigmoid(q) (1 - exp(-2 half s)), s the inverse scale and p, q the
    distances of its edges from the mean times s.
    """
    zero, one, h = splat(f32(0.0)), splat(f32(1.0)), splat(f32(half))
    peak = splat(f32(-1e30))
    for k in range(mixtures):
        c, s = sub(value, splat(scratch[16 + k])), splat(scratch[32 + k])
        p, q = mul(add(c, h), s), mul(sub(h, c), s)
        level = add(add(smaller(p, zero), smaller(q, zero)), splat(scratch[48 + k]))
        peak = larger(peak, level)
    mass = zero
    for k in range(mixtures):
        c, s = sub(value, splat(scratch[16 + k])), splat(scratch[32 + k])
        p, q = mul(add(c, h), s), mul(sub(h, c), s)
        level = add(add(smaller(p, zero), smaller(q, zero)), splat(scratch[48 + k]))
        left = add(one, exp(sub(zero, magnitude(p))))
        right = add(one, exp(sub(zero, magnitude(q))))
        mass = add(mass, div(exp(sub(level, peak)), mul(left, right)))
    return add(peak, log(mass))


@njit(**_OPTIONS)
def outer_bin(sign, half, mixtures, scratch):
    """Log-mass of the first (sign 1) or last (-1) bin, which reaches to infinity."""
    peak, mass = -np.inf, 0.0
    for _ in range(2):  # find the peak, then sum relative to it
        mass = 0.0
        for k in range(mixtures):
            x = (half - 1.0 - sign * scratch[16 + k]) * scratch[32 + k]
            level = scratch[k] + min(x, 0.0) - np.log1p(np.exp(-abs(x)))
            peak = max(peak, level)
            mass += np.exp(level - peak)
    return peak + np.log(mass)


@njit(**_OPTIONS)
def logistics(work, source, target, prediction, size, width, mixtures, scratch):
    """Log-probabilities of ``size`` values under a mixture of logistics: see model.Logistics."""
    top = size - 1
    half = 1.0 / top
    mixture(work, source, prediction, mixtures, half, scratch)
    one, spacing = splat(f32(1.0)), splat(f32(2 * half))
    for v in range(0, width, LANES):
        value = sub(mul(add(ramp(), splat(f32(v))), spacing), one)
        store(work, target + v, inner_bins(value, half, mixtures, scratch))
    work[target] = outer_bin(1.0, half, mixtures, scratch)
    work[target + top] = outer_bin(-1.0, half, mixtures, scratch)
    for v in range(size, width):
        work[target + v] = NEVER


@njit(**_OPTIONS)
def embed(tokens, t, reads, history, kept, positions, work, target, width, constants, table):
    """The rows of the embedding; the token joins the history, the oldest leaves it.

    Row r reads the token of sample reads[r]. ``kept`` columns of the history before it hold the
    first tokens; one that is there already is read instead, see ``RecurrentModel.foretold``.
    """
    for row in range(history.shape[0]):
        for k in range(kept + 1, history.shape[1]):
            history[row, k - 1] = history[row, k]
        token, place = tokens[reads[row], t], positions[row] + t
        if place < kept:
            if history[row, place] >= 0:
                token = history[row, place]
            history[row, place] = token
        history[row, -1] = token
        for i in range(0, width, LANES):
            store(work, target + row * width + i, load(constants, table + token * width + i))


@njit(**_OPTIONS)
def add_entry(work, target, constants, entry, width):
    """Add a row of a table."""
    for i in range(0, width, LANES):
        x = load(work, target + i)
        store(work, target + i, add(x, load(constants, entry + i)))


@njit(**_OPTIONS)
def add_token(history, column, positions, t, first, work, target, width, constants, table):
    """Add an embedding of the token in a column of the history, if there is one yet.

    Before position ``first`` there is none: a token that is foretold counts once it is read.
    """
    for row in range(history.shape[0]):
        token = history[row, column]
        if token >= 0 and positions[row] + t >= first:
            add_entry(work, target + row * width, constants, table + token * width, width)


@njit(**_OPTIONS)
def add_progress(
    history, positions, t, opening, first, count, parts, work, target, width, constants, pace, table
):  # fmt: skip
    """Add the embedding of the part of its clip that a row has come to; see model.Progress.

    ``opening``: tokens between the first and the samples.
    ``pace``: parts a token for each of ``count`` durations, whose ids begin at ``first``.
    ``table``: ``parts`` embeddings, one for what comes after the clip, one for open durations.
    """
    for row in range(history.shape[0]):
        if history[row, 1] < 0 or positions[row] + t < 1:
            continue
        time = max(0, positions[row] + t - opening)
        which = history[row, 1] - first
        part = parts + 1
        if 0 <= which < count:
            part = min(parts, int(time * np.float64(constants[pace + which])))
        add_entry(work, target + row * width, constants, table + part * width, width)


@njit(**_OPTIONS)
def context_key(history, row, end, order):
    """The key of the tokens in ``order`` columns of the history before ``end``; see recall.Recall.

    -1 if some of them lie before the sequence.
    """
    if history[row, end - order] < 0:
        return -1
    key = 0
    for column in range(end - order, end):
        key = ((key ^ (history[row, column] + 1)) * FACTOR) & MASK
        key ^= key >> 15
    return key


@njit(**_OPTIONS)
def recall(history, order, words, table, slots, size, work, strength, logits, width):
    """Keep what followed the context before the last token; strengthen what followed this one.

    ``words`` is ``work`` as integers; rows of ``table``: ``slots`` keys, each beside its token.
    ``strength`` is a column of a panel. Tokens from ``size`` on are never drawn and not kept.
    """
    columns = history.shape[1]
    for row in range(history.shape[0]):
        first = table + 2 * slots * row
        key = context_key(history, row, columns - 1, order)
        if key >= 0:
            entry, token = first + 2 * (key % slots), history[row, -1]
            words[entry] = key
            words[entry + 1] = token if token < size else -1
        key = context_key(history, row, columns, order)
        if key >= 0:
            entry = first + 2 * (key % slots)
            if words[entry] == key and words[entry + 1] >= 0:
                work[logits + row * width + words[entry + 1]] += work[strength + row * PANEL]


@njit(**_OPTIONS)
def add_position(positions, t, rows, columns, channels, work, target, width, constants, table):
    """Add the embeddings of row, column and channel of a place in an image."""
    for b in range(len(positions)):
        position = positions[b] + t
        row = table + min(position // (columns * channels), rows - 1) * width
        column = table + (rows + position // channels % columns) * width
        channel = table + (rows + columns + position % channels) * width
        for i in range(0, width, LANES):
            x = add(load(work, target + b * width + i), load(constants, row + i))
            x = add(add(x, load(constants, column + i)), load(constants, channel + i))
            store(work, target + b * width + i, x)


@njit(**_OPTIONS)
def enter_pool(work, x, width, group, queue, stride, phase, batch, begin, finish):
    """Keep the inputs of the group being filled; add what the last full group gives this one."""
    for b in range(batch):
        place = (b * stride + phase) * width
        for i in range(begin, finish, LANES):
            u = load(work, x + b * width + i)
            store(work, group + place + i, u)
            store(work, x + b * width + i, add(u, load(work, queue + place + i)))


@njit(**_PIECE)
def serially(
    code, constants, table, taps, work, words, x, y, width, size, extra, more, last, history,
    tokens, t, reads, positions, scratch,
):  # fmt: skip
    """One of SERIAL."""
    batch = history.shape[0]
    if code == EMBED:  # size: columns of the history that hold the first tokens
        embed(tokens, t, reads, history, size, positions, work, y, width, constants, table)
    elif code == TOKEN:  # size: the column of the history; extra: the position it counts from
        add_token(history, size, positions, t, extra, work, y, width, constants, table)
    elif code == TAPS:  # source: the prediction; size: phases; extra: the highest value
        phase = (positions[0] + t) % size
        gather_taps(work, y, width, history, taps, x, constants, table, phase, extra)
    elif code == POSITION:  # size, extra, more: rows, columns, channels
        add_position(positions, t, size, extra, more, work, y, width, constants, table)
    elif code == PROGRESS:  # source: opening; size: the first duration; extra: all; more: parts
        add_progress(history, positions, t, x // batch, size, extra, more, work, y, width,
                     constants, last, table)  # fmt: skip
    elif code == RECALL:  # table: order; size: values; extra: region of the table; more: its slots
        recall(history, table, words, extra * batch, more, size, work, x + last, y, width)
    else:  # LOGISTICS; size: values; extra: the prediction; more: mixtures
        for b in range(batch):
            logistics(work, x + b * PANEL, y + b * width, extra * batch + b * PANEL, size, width,
                      more, scratch)  # fmt: skip


@njit(**_PIECE)
def advance(  # noqa: PLR0912
    program, abreast, beside, kind, matrices, constants, taps, work, words, digits, history, tokens,
    t, reads, positions, scratch, member, members, gate,
):  # fmt: skip
    """Read tokens[:, t]: one pass through the program, which leaves the logits in ``work``.

    Returns False if the team is called off.
    """
    batch = history.shape[0]
    position = positions[0] + t  # whose phase in the pools and channels is that of all rows
    line = 0
    while line < len(program):
        code, source, target = program[line, 0], program[line, 1], program[line, 2]
        width, table, matrix = program[line, 3], program[line, 4], program[line, 5]
        size, extra = program[line, 6], program[line, 7]
        more, last = program[line, 8], program[line, 9]
        parts, together = program[line, 10], program[line, 11]
        line += 1
        x, y = source * batch, target * batch
        if together and not meet(gate, members):
            return False
        begin, finish = share(width, member, members)
        if code in SERIAL:
            if member == 0:
                serially(code, constants, table, taps, work, words, x, y, width, size, extra, more,
                         last, history, tokens, t, reads, positions, scratch)  # fmt: skip
        elif code == LINEAR:  # size: inputs; a phase has ``extra`` bytes and ``more`` constants
            phase = position % last
            room = digits * batch + member * batch * (size + PANEL)
            apart = parts if members > 1 else 1
            begin, finish = share(width // apart, member, members)
            for part in range(apart):
                before = part * (width // apart)
                linear(kind, abreast, beside, matrices, matrix + phase * extra, work, x, size, y,
                       width, constants, table + phase * more, room, batch, before + begin,
                       before + finish)  # fmt: skip
        elif code == NORM:  # size: features that are no padding
            for b in range(batch):
                norm(work, x + b * width, y + b * width, width, size, constants, table, begin,
                     finish)  # fmt: skip
        elif code == DIAGONAL:  # size: pairs; extra: state
            diagonal(work, x, y, width, size, extra * batch, constants, table, batch, begin, finish)
        elif code == LOW_RANK:  # size: pairs; extra: state; more: rank
            low_rank(work, x, y, width, size, more, extra * batch, constants, table, batch,
                     scratch, begin, finish)  # fmt: skip
        elif code == POOL:  # source: group; extra: queue; size: stride; more: stride to here
            phase = position // more % size
            enter_pool(work, y, width, x, extra * batch, size, phase, batch, begin, finish)
            if phase < size - 1:
                line = last  # the inner stack steps when its group is full
        else:
            pointwise(code, work, x, y, width, batch, begin, finish)
    return True


# From logits to tokens: sampling.probabilities and sampling.draw, row by row.


@njit(**_OPTIONS)
def weigh(logits, first, width, inverse_temperature, weights):
    """weights = exp((logit - the largest) / temperature); returns the largest logit."""
    peak = load(logits, first)
    for i in range(LANES, width, LANES):
        peak = larger(peak, load(logits, first + i))
    most = largest(peak)
    centre, scale = splat(most), splat(f32(min(inverse_temperature, 3e38)))  # a finite float32
    for i in range(0, width, LANES):
        distance = sub(load(logits, first + i), centre)
        store(weights, i, exp(mul(distance, scale)))
    return most


@njit(**_OPTIONS)
def _summed(weights, size):
    a = b = c = d = 0.0  # four sums, because one would wait for each of its additions
    whole = size - size % 4
    for i in range(0, whole, 4):
        a += weights[i]
        b += weights[i + 1]
        c += weights[i + 2]
        d += weights[i + 3]
    for i in range(whole, size):
        a += weights[i]
    return (a + b) + (c + d)


@njit(**_OPTIONS)
def threshold(weights, keys, size, goal, counted, histogram):
    """The key of the weight at which the sum over the larger ones reaches ``goal``, and that sum.

    ``counted``: every weight counts as one. A radix search: weights lie on [0, 1], where floats are
    ordered as their bits (``keys``, a view of ``weights``), read in digits of 12, 9 and 9 bits.
    """
    above = 0.0
    prefix, known = 0, 30  # digits found so far; the bits below them
    for bits in (12, 9, 9):
        known -= bits
        histogram[: 1 << bits] = 0.0
        for i in range(size):
            if keys[i] >> (known + bits) == prefix:
                digit = (keys[i] >> known) & ((1 << bits) - 1)
                histogram[digit] += 1.0 if counted else weights[i]
        digit = (1 << bits) - 1
        while digit > 0 and above + histogram[digit] < goal:
            above += histogram[digit]
            digit -= 1
        prefix = (prefix << bits) | digit
    return prefix, above


@njit(**_OPTIONS)
def keep_top_k(weights, keys, size, k, histogram):
    """Set to zero what is less likely than the k-th likeliest."""
    least, _ = threshold(weights, keys, size, k, True, histogram)
    for i in range(size):
        if keys[i] < least:
            weights[i] = f32(0.0)


@njit(**_OPTIONS)
def keep_top_p(weights, keys, size, p, histogram):
    """Keep the fewest tokens that hold the share ``p``; the first of equals."""
    goal = p * _summed(weights, size)
    least, above = threshold(weights, keys, size, goal, False, histogram)
    for i in range(size):
        if keys[i] == least and above < goal:
            above += weights[i]
        elif keys[i] <= least:
            weights[i] = f32(0.0)


@njit(**_OPTIONS)
def pick(weights, size, uniform):
    """Inverse transform sampling."""
    goal = uniform * _summed(weights, size)
    reached, last = 0.0, 0
    for i in range(size):
        if weights[i] > 0:
            reached += weights[i]
            last = i
            if reached > goal:
                break
    return last


@njit(**_OPTIONS)
def penalize(logits, first, size, width, penalty, seen, penalized):
    """sampling.penalize: seen tokens become less likely. May be done in place."""
    for i in range(width):
        x = logits[first + i]
        if i < size and seen[i]:
            x = x / penalty if x > 0 else x * penalty
        penalized[i] = x


@njit(**_OPTIONS)
def guide(logits, own, other, size, width, guidance, plausible, weights, guided):
    """sampling.guided, interpolated from the end that is nearer, as torch.lerp.

    ``weights``: exp(own - its largest).
    """
    near, far = splat(f32(guidance)), splat(f32(1.0) - f32(guidance))
    for i in range(0, width, LANES):
        a, b = load(logits, own + i), load(logits, other + i)
        if abs(guidance) < 0.5:
            store(guided, i, fma(near, sub(a, b), b))
        else:
            store(guided, i, fma(far, sub(b, a), a))
    if guidance > 1 and plausible > 0:
        for i in range(size):
            if weights[i] < plausible:
                guided[i] = NEVER


@njit(**_OPTIONS)
def log_sum(logits, first, size, width, weights):
    """log Σ exp(logit), float64; leaves exp(logit - the largest) in ``weights``."""
    most = weigh(logits, first, width, 1.0, weights)
    return np.log(_summed(weights, size)) + most


@njit(**_PIECE)
def draw(
    logits, first, other, size, width, settings, seen, uniform, weights, keys, changed, histogram
):  # fmt: skip
    """One token and its bits, -log2 of its probability under the model itself.

    ``settings``: guidance, plausible, repetition penalty, temperature, top_k, top_p, min_p.
    ``other``: where the logits without the class begin; ``first`` if there are none.
    """
    whole = log_sum(logits, first, size, width, weights)
    penalty, temperature = f32(settings[2]), settings[3]
    source, place = logits, first
    if other != first:
        guide(logits, first, other, size, width, settings[0], settings[1], weights, changed)
        source, place = changed, 0
    if penalty != 1:
        penalize(source, place, size, width, penalty, seen, changed)
        source, place = changed, 0
    token = 0
    if temperature == 0:
        for i in range(size):
            if source[place + i] > source[place + token]:
                token = i
    else:
        if penalty != 1 or other != first or temperature != 1:
            weigh(source, place, width, 1.0 / temperature, weights)
        if 0 < settings[4] < size:
            keep_top_k(weights, keys, size, settings[4], histogram)
        if settings[5] < 1:
            keep_top_p(weights, keys, size, settings[5], histogram)
        if settings[6] > 0:
            for i in range(size):
                if weights[i] < settings[6]:  # the likeliest weighs one
                    weights[i] = f32(0.0)
        token = pick(weights, size, uniform)
    seen[token] = True
    return token, (whole - logits[first + token]) / np.log(2.0)


@njit(**_ENTRY)
def run(
    program, abreast, beside, kind, matrices, constants, taps, work, words, digits, history,
    positions, reads, logits, size, width, tokens, bits, given, scored, uniforms, settings, streams,
    seen, weights, keys, changed, histogram, scratch, member, members, gate,
):  # fmt: skip
    """Read tokens[:, :given], then draw and read the others; logits of the next stay in ``work``.

    Of S samples: tokens, bits, uniforms (S, n), seen (S, size) bool, settings (S, 7) as of
    ``draw``, streams (S, 2): the row that a sample is drawn from, and the row that guides it or the
    same again. Of the rows: history (B, kept + reach + 1), positions and reads (B,), the tokens
    read so far and the sample whose token comes next; all int64. Positions are equal modulo the
    model's period. ``bits`` takes those of drawn tokens, and of the given ones, too, if ``scored``.
    ``words`` is ``work`` as integers, ``logits`` a region of it with rows of ``width``, ``digits``
    one for ``quantize``. The other arrays are room for intermediate results. ``members`` threads
    may run this at once, with equal arguments but for ``member``, from 0, ``scratch``, and ``gate``
    for ``meet``.
    """
    before = flush_denormals()
    batch = history.shape[0]
    for t in range(tokens.shape[1]):
        if not meet(gate, members):
            break
        for s in range(len(tokens) if member == 0 else 0):
            own = logits * batch + streams[s, 0] * width
            if t >= given:
                token, cost = draw(
                    work, own, logits * batch + streams[s, 1] * width, size, width, settings[s],
                    seen[s], uniforms[s, t], weights, keys, changed, histogram,
                )  # fmt: skip
                tokens[s, t] = token
                bits[s, t] = cost
            elif scored:
                whole = log_sum(work, own, size, width, weights)
                bits[s, t] = (whole - work[own + tokens[s, t]]) / np.log(2.0)
        if not advance(
            program, abreast, beside, kind, matrices, constants, taps, work, words, digits, history,
            tokens, t, reads, positions, scratch, member, members, gate,
        ):  # fmt: skip
            break
    restore_denormals(before)
