"""The stepper for GPUs: steps and draws in memory that stays in place, replayed as CUDA graphs.

A graph draws and reads several tokens of every row. What differs from replay to replay lies in
memory (states, positions, settings, uniform numbers); what the processor knows beforehand, the
phase in the model's pools, is a part of the graph. Nothing in it waits for the processor.
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genssm.blocks import Linear, map_nested
from genssm.model import RecurrentModel, State
from genssm.sampling import draw, guided, penalize, renormalized
from genssm.stepping import Draws, UnsupportedError

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the linear maps
TILE = 64  # rows of every matrix product
LONGEST = 32  # tokens of a row that one graph draws, at most
ROWS = 64, 1024  # of the largest batch: at least, at most
STATES = 2**30  # bytes of states that such a batch may have, and its memory is a few times as much

Array = np.ndarray[Any, Any]


def check_choice(weights: str) -> None:
    """Raise ValueError unless there is a GPU and it can step with such weights."""
    if weights not in WEIGHTS:
        raise ValueError(
            f"the engine cuda has weights {' and '.join(WEIGHTS)}, got {weights!r}; "
            "the engine cpu has them all"
        )
    if not torch.cuda.is_available():
        raise ValueError("the engine cuda needs a CUDA device, which torch does not find here")


class TiledLinear(nn.Module):
    """A ``Linear`` by products of ``TILE`` rows each, so that no row depends on its company.

    The kernel that multiplies, and with it the order of the sums, is chosen by the shape of the
    product, which is the same for every batch. With bfloat16 weights the input and the product are
    rounded to bfloat16; sums and bias are in float32.
    """

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (B, features), B a divisor or a multiple of TILE → (B, outputs) float32."""
        rows = len(x)
        x = x.to(self.weight.dtype)
        if rows < TILE:
            x = x.repeat(TILE // rows, 1)
        tiles = [F.linear(tile, self.weight) for tile in x.split(TILE)]
        y = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
        return y[:rows] + self.bias


@dataclass
class Memory:
    """All that a batch of sequences of one position remembers, on the device."""

    position: int  # tokens read
    tensors: list[Tensor]  # history, logits, recall, states depth first; a row a sequence

    @property
    def batch(self) -> int:
        return len(self.tensors[0])


@dataclass
class Board:
    """Memory for steps of N rows, always in the same place, and the steps that change it.

    The rows are those of several memories, one after the other; the rest is idle. Sample i is drawn
    from row ``own[i]``, guided by row ``guide[i]``, and row j reads sample ``reads[j]``.
    """

    positions: Tensor  # (N,) int64
    tensors: list[Tensor]  # as those of ``Memory``
    own: Tensor  # (N,) int64
    guide: Tensor  # (N,) int64
    reads: Tensor  # (N,) int64
    settings: Tensor  # (N, 7) float64, ``Draws.settings``
    seen: Tensor  # (N, V) bool
    uniforms: Tensor  # (N, LONGEST) float64
    tokens: Tensor  # (N, LONGEST) int64, drawn
    bits: Tensor  # (N, LONGEST) float64
    # By phase, number of tokens, and whether top_k or top_p filter any row.
    steps: dict[tuple[int, int, bool], Callable[[], None]] = field(default_factory=dict)


def probabilities(logits: Tensor, settings: Tensor, filtered: bool) -> Tensor:
    """``sampling.probabilities`` with settings (B, 7) of its own for every row.

    Without ``filtered``, top_k and top_p do nothing, which saves sorting.
    """
    *_, temperature, top_k, top_p, min_p = settings.split(1, 1)
    logits, greedy = logits.double(), temperature == 0
    below = logits - logits.amax(-1, True)
    p = torch.softmax(below / torch.where(greedy, 1.0, temperature), -1)
    likeliest = torch.zeros_like(p).scatter(-1, logits.argmax(-1, True), 1.0)
    if not filtered:
        p = renormalized(p, p >= min_p * p.amax(-1, True))
        return torch.where(greedy, likeliest, p)
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    size = p.shape[-1]
    k = torch.where((top_k > 0) & (top_k < size), top_k, size).long()
    ordered = renormalized(ordered, ordered >= ordered.gather(-1, k - 1))
    before = ordered.cumsum(-1) - ordered
    ordered = renormalized(ordered, (before < top_p) | (top_p >= 1))
    ordered = renormalized(ordered, ordered >= min_p * ordered[:, :1])
    return torch.where(greedy, likeliest, torch.zeros_like(p).scatter(-1, order, ordered))


class CapturedModel:
    """A ``RecurrentModel`` whose steps and draws are replayed as CUDA graphs.

    ``read`` gives the model's own ``State``, by the model itself, on the CPU; ``load`` and ``save``
    carry it to the device and back. States, norms, embeddings, taps and the head stay in float32.
    On a CPU the same steps run one by one, which is for comparing them.

    Raises UnsupportedError for a model that is not float32.
    """

    engine = "cuda"
    paces = None  # a batch is stepped as a whole, by the thread that replays

    def __init__(self, model: RecurrentModel, weights: str, device: torch.device) -> None:
        if model.norm.weight.dtype != torch.float32:
            raise UnsupportedError(
                f"the engine cuda is for float32 models, got {model.norm.weight.dtype}"
            )
        self.model, self.weights, self.device = model, weights, device
        self.config = model.config
        self._net = _on_device(model, WEIGHTS[weights], device)
        self._template = model.initial_state(0).layers  # how states are nested
        self._captures = device.type == "cuda"
        if self._captures:  # all graphs share their room: what one leaves in it, none reads
            self._stream = torch.cuda.Stream(device)
            self._pool: Any = torch.cuda.graph_pool_handle()
        self._boards: dict[int, Board] = {}  # by their rows
        self._lock = threading.Lock()
        # Steps of the long graph, which begins at phase 0: whole periods of the pools.
        self._whole = LONGEST // self.config.period * self.config.period

    def read(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``RecurrentModel.read``: tokens (B, L) → logits (B, V) of the next, the state after."""
        return self.model.read(tokens, state)

    def initial_state(self, batch: int = 1) -> State:
        """The state before any token."""
        return self.model.initial_state(batch)

    def load(self, state: State, logits: Tensor) -> Memory:
        """A memory that goes on from ``state``, ``logits`` (B, V) being those of the next token."""
        tensors = [state.history, logits, *state.tensors()[2:]]
        return Memory(int(state.position), [t.to(self.device, copy=True) for t in tensors])

    def save(self, memory: Memory) -> State:
        """The state that a memory holds."""
        history, _, recall, *states = [tensor.cpu() for tensor in memory.tensors]
        return State(torch.tensor(memory.position), history, recall, self._layers(states))

    def _layers(self, states: list[Tensor]) -> tuple:
        each = iter(states)
        return map_nested(lambda _: next(each), self._template)

    def logits(self, memory: Memory) -> Tensor:
        """The logits of the next token, (B, V); a copy."""
        return memory.tensors[1].to("cpu", copy=True)

    def rows(self, memories: Sequence[Memory], index: Sequence[int]) -> Memory:
        """A memory of the rows ``index`` of all memories one behind the other."""
        rows = torch.tensor(index, device=self.device)
        every = [m.tensors for m in memories]
        joined = every[0] if len(every) == 1 else map(torch.cat, zip(*every, strict=True))
        return Memory(memories[0].position, [tensor[rows] for tensor in joined])

    @property
    def largest_batch(self) -> int:
        """Samples that are stepped side by side, a power of two."""
        rows, most = ROWS
        while rows < most and 2 * rows * self.model.state_bytes() <= STATES:
            rows *= 2
        return rows

    def generate(self, draws: Draws[Memory]) -> tuple[Array, Array]:
        """Draw and read n tokens a sample: tokens (S, n) and their bits (S, n)."""
        return self.generate_together([draws])[0]

    @torch.no_grad()
    def generate_together(
        self, draws: Sequence[Draws[Memory]], threads: int = 1
    ) -> list[tuple[Array, Array]]:
        """``generate`` for several, as one batch.

        Their n must be equal, and their positions modulo the model's period. ``threads`` is what
        the compiled loop takes, and of no effect here.
        """
        phase, steps = draws[0].memory.position % self.config.period, draws[0].uniforms.shape[1]
        filtered = any(d.config.top_k > 0 or d.config.top_p < 1 for d in draws)
        rows = 1 << (sum(d.memory.batch for d in draws) - 1).bit_length()  # few sizes are captured
        plan = [(*piece, filtered) for piece in self._pieces(phase, steps)]
        with self._lock:
            try:
                tokens, bits = self._run(rows, draws, plan)
            except torch.cuda.OutOfMemoryError as error:
                self._boards.pop(rows, None)  # so that fewer rows have its place
                raise MemoryError(
                    f"the GPU has no memory for {rows} rows of this model; ask for fewer samples"
                ) from error
        ends = np.cumsum([len(d.seen) for d in draws])[:-1]
        return list(zip(np.split(tokens, ends), np.split(bits, ends), strict=True))

    def _run(
        self, rows: int, draws: Sequence[Draws[Memory]], plan: Sequence[tuple[int, int, bool]]
    ) -> tuple[Array, Array]:
        board = self._board(rows)
        for piece in plan:  # before memories take their places, for what is captured is run, too
            if piece not in board.steps:
                board.steps[piece] = self._captured(partial(self._advance, board, *piece))
        _seat(board, draws)
        uniforms = torch.from_numpy(np.concatenate([d.uniforms for d in draws]))
        drawn = self._replay(board, plan, uniforms.to(self.device))
        _unseat(board, draws)
        return drawn

    def _pieces(self, phase: int, steps: int) -> Iterator[tuple[int, int]]:
        """Phase and number of the steps of each graph that makes up so many steps."""
        while steps:
            count = self._whole if phase == 0 and 0 < self._whole <= steps else 1
            yield phase, count
            phase, steps = (phase + count) % self.config.period, steps - count

    def _board(self, rows: int) -> Board:
        if rows not in self._boards:
            zeros, size = partial(torch.zeros, device=self.device), self.config.n_outputs
            empty = self.load(self.model.initial_state(rows), torch.zeros(rows, size))
            places, drawn = (zeros(shape, dtype=torch.int64) for shape in (rows, (rows, LONGEST)))
            self._boards[rows] = Board(
                positions=places, tensors=empty.tensors, own=places.clone(),
                guide=places.clone(), reads=places.clone(),
                settings=zeros(rows, 7, dtype=torch.float64),
                seen=zeros(rows, size, dtype=torch.bool),
                uniforms=drawn.double(), tokens=drawn, bits=drawn.double(),
            )  # fmt: skip
        return self._boards[rows]

    def _captured(self, advance: Callable[[], None]) -> Callable[[], None]:
        """``advance`` as one replay of a CUDA graph, where there is CUDA and it can be captured."""
        if not self._captures:
            return advance
        try:
            graph = torch.cuda.CUDAGraph()
            mode = "thread_local"  # other threads may go on using the device
            with torch.cuda.device(self.device):
                outer = torch.cuda.current_stream()
                self._stream.wait_stream(outer)
                with torch.cuda.stream(self._stream):  # which a capture that fails does not leave
                    advance()  # loads and chooses the kernels
                    outer.wait_stream(self._stream)  # what follows is kept for later, not done
                    with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode):
                        advance()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._captures = False
            warnings.warn(
                f"steps are not captured as CUDA graphs, which is slower: {error}", stacklevel=2
            )
            return advance
        return graph.replay

    def _replay(
        self, board: Board, plan: Sequence[tuple[int, int, bool]], uniforms: Tensor
    ) -> tuple[Array, Array]:
        """Tokens (S, n) and their bits, drawn with uniforms (S, n)."""
        samples, done = len(uniforms), 0
        tokens, bits = [], []
        for piece in plan:
            count = piece[1]
            board.uniforms[:samples, :count] = uniforms[:, done : done + count]
            board.steps[piece]()
            tokens.append(board.tokens[:samples, :count].clone())
            bits.append(board.bits[:samples, :count].clone())
            done += count
        return torch.cat(tokens, 1).cpu().numpy(), torch.cat(bits, 1).cpu().numpy()

    def _advance(self, board: Board, phase: int, count: int, filtered: bool) -> None:
        """Draw and read ``count`` tokens in every row, in place; what a graph captures."""
        net, positions = self._net, board.positions
        history, logits, recall, *states = board.tensors
        layers = self._layers(states)
        for i in range(count):
            token, board.bits[:, i] = _drawn(board, logits, board.uniforms[:, i], filtered)
            board.tokens[:, i] = token
            x, known, history, recall = net.look(
                token[board.reads, None], history, recall, positions
            )
            x, layers = net.stack.step(x[:, 0], layers, phase + i)
            logits, positions = net.head.logits(net.norm(x), known[:, 0]), positions + 1
        after = State(positions, history, recall, layers).tensors()
        board.positions.copy_(after[0])
        for place, tensor in zip(board.tensors, [history, logits, *after[2:]], strict=True):
            if tensor is not place:
                place.copy_(tensor)


def _drawn(board: Board, logits: Tensor, uniform: Tensor, filtered: bool) -> tuple[Tensor, Tensor]:
    """A token for every sample and its bits, from logits (N, V) by row."""
    guidance, plausible, penalty, *_ = board.settings.float().split(1, 1)
    own = logits[board.own]
    changed = guided(own, logits[board.guide], guidance, plausible)
    p = probabilities(penalize(changed, board.seen, penalty), board.settings, filtered)
    token = draw(p, uniform)
    board.seen.scatter_(-1, token[:, None], True)
    chosen = own.gather(-1, token[:, None])[:, 0]
    return token, (own.logsumexp(-1) - chosen).double() / math.log(2)


def _seat(board: Board, draws: Sequence[Draws[Memory]]) -> None:
    """Rows, settings and indices of all draws to where the steps find them."""
    positions, own, guide, reads = [], [], [], []
    for d in draws:
        samples, rows = len(d.seen), d.memory.batch
        row, sample = len(positions), len(own)
        for place, tensor in zip(board.tensors, d.memory.tensors, strict=True):
            place[row : row + rows] = tensor
        positions += [d.memory.position] * rows
        own += range(row, row + samples)
        guide += range(row + rows - samples, row + rows)
        reads += list(range(sample, sample + samples)) * (rows // samples)
    settings = torch.tensor([d.settings for d in draws for _ in d.seen], dtype=torch.float64)
    seen = torch.from_numpy(np.concatenate([d.seen for d in draws]))
    pairs = [
        (board.positions, torch.tensor(positions)), (board.own, torch.tensor(own)),
        (board.guide, torch.tensor(guide)), (board.reads, torch.tensor(reads)),
        (board.settings, settings), (board.seen, seen),
    ]  # fmt: skip
    for place, values in pairs:
        place[: len(values)] = values.to(place.device)


def _unseat(board: Board, draws: Sequence[Draws[Memory]]) -> None:
    """Rows of all draws back to where they came from, so many tokens later."""
    seen, row, sample = board.seen.cpu().numpy(), 0, 0
    for d in draws:
        samples, rows = len(d.seen), d.memory.batch
        for place, tensor in zip(board.tensors, d.memory.tensors, strict=True):
            tensor.copy_(place[row : row + rows])
        d.seen[:] = seen[sample : sample + samples]
        d.memory.position += d.uniforms.shape[1]
        row, sample = row + rows, sample + samples


def _on_device(model: RecurrentModel, dtype: torch.dtype, device: torch.device) -> RecurrentModel:
    """A copy that steps on the device, by ``TiledLinear``."""
    net = copy.deepcopy(model).to(device)
    head: nn.Module = net.head
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, Linear):  # logits in bfloat16 would be off by percents
                setattr(
                    module, name, TiledLinear(child, torch.float32 if module is head else dtype)
                )
    return net
