"""How many threads torch may use, while several of our own ask for different numbers.

torch keeps a number for each thread, and gives a thread that is new to it the number that was set
last by any other. If one puts back what it found while another still has its own, the wrong one
stays. So what held before the first is kept here until the last is done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


class _Record:
    """Who has asked for a number: how many there are, and the innermost on this thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users, self.usual = 0, 1
        self.here = threading.local()


_RECORD = _Record()


def allowed_threads() -> int:
    """The number of the innermost ``torch_threads`` on this thread, or what holds without any."""
    own: int | None = getattr(_RECORD.here, "count", None)
    if own is not None:
        return own
    with _RECORD.lock:
        return _RECORD.usual if _RECORD.users else torch.get_num_threads()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads in what this thread does until it leaves again.

    Other threads may have numbers of their own at the same time. A generator must not yield inside:
    it may go on in another thread.
    """
    outer: int | None = getattr(_RECORD.here, "count", None)
    with _RECORD.lock:
        if _RECORD.users == 0:
            _RECORD.usual = torch.get_num_threads()
        _RECORD.users += 1
    _RECORD.here.count = count
    torch.set_num_threads(count)
    try:
        yield
    finally:
        _RECORD.here.count = outer
        with _RECORD.lock:
            _RECORD.users -= 1
            torch.set_num_threads(_RECORD.usual if outer is None else outer)


def one_thread() -> AbstractContextManager[None]:
    """Step on one thread: a step is too short to be worth waiting for a second core."""
    return torch_threads(1)
