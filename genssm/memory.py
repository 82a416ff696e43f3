"""What the compiled stepper remembers of a batch, and how a model's state goes in and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


def zeros(size: int, dtype: Any) -> Array:
    """Zeros that begin at a multiple of 64 bytes, a cache line and the widest vector."""
    n_bytes = size * np.dtype(dtype).itemsize
    room = np.zeros(n_bytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + n_bytes].view(dtype)


def whole_panels(size: int) -> int:
    """So many floats, up to a multiple of 32."""
    return -(-size // 32) * 32


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
class Space:
    """Where a state space layer's state lies. The stepper's state is the layer's over ``unit``."""

    offset: int
    shape: tuple[int, int]  # features, pairs
    unit: Array  # (H, n) complex

    def load(self, memory: Memory, state: Tensor) -> None:
        H, n = self.shape
        x = np.zeros((memory.batch, whole_panels(H), n), np.complex64)
        x[:, :H] = state.numpy() / self.unit
        lanes = x.reshape(memory.batch, -1, 16, n).swapaxes(2, 3)
        region(memory, self.offset, x[0].size * 2)[:] = np.stack(
            [lanes.real, lanes.imag], 3
        ).reshape(memory.batch, -1)

    def save(self, memory: Memory) -> Tensor:
        H, n = self.shape
        rows = region(memory, self.offset, whole_panels(H) * n * 2)
        lanes = rows.reshape(memory.batch, -1, n, 2, 16).swapaxes(2, 4)  # (B, chunks, 16, 2, n)
        x = (lanes[..., 0, :] + 1j * lanes[..., 1, :]).reshape(memory.batch, -1, n)
        return torch.from_numpy((x[:, :H] * self.unit).astype(np.complex64))


@dataclass(frozen=True)
class Table:
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
class Group:
    """Where a pool's state lies: the group being filled, the queue, the inner stack."""

    group: int
    queue: int
    shape: tuple[int, int]  # stride, features
    period: int  # tokens that one position of the pool's level stands for
    inner: tuple[Space | Group, ...]

    def load(self, memory: Memory, state: tuple) -> None:
        group, queue, inner = state
        stride, H = self.shape
        for offset, rows in ((self.group, group), (self.queue, queue)):
            padded = np.zeros((memory.batch, stride, whole_panels(H)), np.float32)
            padded[..., :H] = rows.numpy()
            region(memory, offset, padded[0].size)[:] = padded.reshape(memory.batch, -1)
        for slot, part in zip(self.inner, inner, strict=True):
            slot.load(memory, part)

    def save(self, memory: Memory) -> tuple:
        stride, H = self.shape
        group, queue = (
            torch.from_numpy(
                region(memory, offset, stride * whole_panels(H))
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
