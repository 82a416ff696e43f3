"""The compiled stepper: a converted model's ``Program``, run by ``simd.run`` on the CPU.

Prompts are still read by the converted model, in parallel.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genssm import cuda
from genssm.cuda import CapturedModel
from genssm.distributed import default_device
from genssm.memory import Array, Memory, Room, region, zeros
from genssm.model import RecurrentModel, State
from genssm.pace import TEAM, Pace, Way
from genssm.pool import Forkable, pool
from genssm.program import compile_model
from genssm.sampling import SamplingConfig
from genssm.stepping import EXACT, Draws, UnsupportedError

ENGINES = ("auto", "eager", "cpu", "cuda")
WEIGHTS = ("bf16", EXACT, "int8")  # the default first
# What int8 means, by the bits of the activations that they meet, whole numbers or floats: what is
# faster on a processor. The samples of one are not always those of the other, so recipes name it.
INT8 = ("int8-16", "int8-24")
SCORED = 256  # tokens scored by one call, whose end an interruption waits for
_forming = Forkable()  # by the team that is at work


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
        # How batches are stepped fastest, by ways, about how many samples, streams and threads.
        self.paces: dict[tuple[tuple[Way, ...], int, int, int], Pace] = {}
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
        fours = self._kind in (self._simd.DIGITS, self._simd.PAIRS)
        kind = self.weights.partition("-")[0]
        self._abreast = self._simd.panels_abreast(self._kind)
        self._beside = self._simd.side_by_side(self._kind, self._abreast)
        self._program = compile_model(model, self._simd, kind, self._beside, fours)
        self._taps = np.array(self.config.taps, np.int64)

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
        history = np.insert(state.history.numpy(), self.config.kept, -1, axis=1)
        work = zeros(self._program.size * batch, np.float32)
        positions = np.full(batch, int(state.position), np.int64)
        memory = Memory(positions, history, work, Room(self._program.width, TEAM))
        for slot, part in zip(self._program.slots, state.layers, strict=True):
            slot.load(memory, part)
        for table, part in zip(self._program.tables, state.recall.unbind(1), strict=True):
            table.load(memory, part)
        if logits is not None:
            rows = region(memory, self._program.logits, self._program.width)
            rows[:] = self._simd.NEVER
            rows[:, : logits.shape[1]] = logits.numpy()
        return memory

    def save(self, memory: Memory) -> State:
        """The state that a memory of rows of one position holds."""
        assert (memory.positions == memory.position).all()
        recall = self.model.recall.empty(memory.batch, torch.device("cpu"))
        for k, table in enumerate(self._program.tables):
            recall[:, k] = table.save(memory)
        return State(
            torch.tensor(memory.position),
            torch.from_numpy(np.delete(memory.history, self.config.kept, axis=1)),
            recall,
            tuple(slot.save(memory) for slot in self._program.slots),
        )

    def logits(self, memory: Memory) -> Tensor:
        """The logits of the next token, (B, V); a copy."""
        rows = region(memory, self._program.logits, self._program.width)
        return torch.from_numpy(rows[:, : self.config.n_outputs].copy())

    def rows(self, memories: Sequence[Memory], index: Sequence[int]) -> Memory:
        """A memory of the rows ``index`` of all memories one behind the other, to the last bit."""
        positions = np.concatenate([m.positions for m in memories])[index]
        history = np.concatenate([m.history for m in memories])[index]
        work = zeros(self._program.size * len(index), np.float32)
        result = Memory(positions, history, work, Room(self._program.width, TEAM))
        rows, begin = np.asarray(index), 0
        for memory in memories:
            places = np.flatnonzero((begin <= rows) & (rows < begin + memory.batch))
            for offset, width in self._program.kept if len(places) else ():
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
        needed = self._program.size * int(ends[-1])
        if len(getattr(self._thread, "work", ())) < needed:
            self._thread.work = zeros(needed, np.float32)
        whole = Memory(
            np.concatenate([m.positions for m in memories]),
            np.concatenate([m.history for m in memories]),
            self._thread.work[:needed],
            memories[0].room,
        )
        slices = [slice(end - m.batch, end) for end, m in zip(ends, memories, strict=True)]
        for offset, width in self._program.kept:
            rows = region(whole, offset, width)
            for memory, part in zip(memories, slices, strict=True):
                rows[part] = region(memory, offset, width)
        yield whole
        for offset, width in self._program.kept:
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

        Their n must be equal, and their positions modulo the model's period. So many ``threads``
        share the columns of every vector: more than one in a ``team``.
        """
        if any(len(d.uniforms) != len(d.seen) for d in draws):
            raise ValueError("draws need as many rows of uniforms as of seen tokens")
        seen = draws[0].seen if len(draws) == 1 else np.concatenate([d.seen for d in draws])
        tokens = np.zeros((len(seen), draws[0].uniforms.shape[1]), np.int64)
        with self._joined([d.memory for d in draws]) as memory:
            bits = self._run(memory, draws, tokens, seen=seen, threads=threads)
        result, end = [], 0
        for d in draws:
            part = slice(end, end := end + len(d.seen))
            d.seen[:] = seen[part]
            result.append((tokens[part], bits[part]))
        return result

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
        program = self._program
        arguments = (
            program.lines, self._abreast, self._beside, self._kind, program.matrices,
            program.constants, self._taps, memory.work, memory.work.view(np.int32), program.digits,
            memory.history, memory.positions, np.array(reads, np.int64), program.logits,
            self.config.n_outputs, program.width, tokens, bits, given, scored, uniforms, settings,
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


@contextmanager
def team(threads: int) -> Iterator[int]:
    """How many of so many threads may step one batch now: one, while there is another team.

    So no team waits for another's members.
    """
    threads = min(threads, TEAM)
    if threads == 1 or not _forming.held.acquire(blocking=False):
        yield 1
        return
    try:
        yield threads
    finally:
        _forming.held.release()


def _as_team(run: Callable[[int], None], threads: int, gate: Array) -> None:
    """``run`` of every member at once, the first in this thread; needs a ``team``."""
    others: list[Future[None]] = []
    try:
        for member in range(1, threads):
            others.append(pool("team").submit(partial(run, member)))
        run(0)
    except BaseException:
        gate[8] = 1  # an interruption, before all could meet
        raise
    finally:
        wait(others)
