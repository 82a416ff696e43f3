"""torch's number of threads: one's own while it lasts, and what it was when all are done."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from genssm.threads import allowed_threads, one_thread, torch_threads

USUAL = 3


@pytest.fixture(autouse=True)
def _usual() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(USUAL)
    yield
    torch.set_num_threads(before)


class Actor:
    """A thread of its own that does one thing after the other, when it is told."""

    def __init__(self) -> None:
        self._pool, self._entered = ThreadPoolExecutor(1), ExitStack()

    def counts(self) -> tuple[int, int]:
        """The numbers of torch and of ours in this thread."""
        return self._do(lambda: (torch.get_num_threads(), allowed_threads()))

    def enter(self, count: int) -> None:
        self._do(lambda: self._entered.enter_context(torch_threads(count)))

    def leave(self) -> None:
        self._do(self._entered.close)

    def _do(self, deed):
        return self._pool.submit(deed).result(timeout=20)


@pytest.mark.parametrize("first", [0, 1])
def test_overlapping_uses_leave_the_number_as_it_was(first: int):
    """Whoever leaves first, and also in a thread that is new to torch."""
    actors = Actor(), Actor()
    actors[0].enter(1)
    actors[1].enter(2)
    assert [a.counts() for a in actors] == [(1, 1), (2, 2)]
    late = Actor()
    assert late.counts()[1] == USUAL  # not that of another who is at it
    actors[first].leave()
    assert actors[first].counts() == (USUAL, USUAL)
    assert actors[1 - first].counts() == (2 - first,) * 2
    actors[1 - first].leave()
    assert [a.counts() for a in (*actors, Actor())] == [(USUAL, USUAL)] * 3
    assert torch.get_num_threads() == USUAL


def test_inner_uses_give_back_what_the_outer_one_has():
    with torch_threads(2):
        with one_thread():
            assert (torch.get_num_threads(), allowed_threads()) == (1, 1)
        assert (torch.get_num_threads(), allowed_threads()) == (2, 2)
    assert (torch.get_num_threads(), allowed_threads()) == (USUAL, USUAL)


def test_an_error_inside_leaves_the_number_as_it_was():
    with pytest.raises(ZeroDivisionError), torch_threads(1):
        raise ZeroDivisionError
    assert (torch.get_num_threads(), allowed_threads()) == (USUAL, USUAL)
