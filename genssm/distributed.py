"""The processes of one training, and what they tell each other.

``torchrun`` starts them; alone, a process is a world of one and nothing is sent. NCCL on GPUs, gloo
on CPUs.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

# The others wait while rank 0 fetches and tokenises data, for which NCCL's ten minutes may be too
# few. A process that dies is noticed by torchrun, not by this.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """This process's place among ``size`` of them, and the device that is its own."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and reports."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all processes."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over all processes, so that all decide alike."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The body runs on rank 0, then, when its files are written, on the others."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()


def rank() -> int:
    """The rank that ``torchrun`` gave this process, 0 alone."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes ``torchrun`` started, 1 alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def default_device() -> torch.device:
    """The GPU that ``torchrun`` gave this process, the only one, or else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def joined() -> Iterator[World]:
    """The world that ``torchrun`` describes in the environment, left again at the end.

    Models that were spread over it should be gone by then.
    """
    device = default_device()
    if "RANK" not in os.environ or dist.is_initialized():
        size = dist.get_world_size() if dist.is_initialized() else 1
        yield World(dist.get_rank() if size > 1 else 0, size, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
        dist.barrier()
    finally:
        gc.collect()  # wrapped models hold the group, whose threads must end before the process
        dist.destroy_process_group()
