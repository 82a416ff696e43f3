"""Work that is shared out among threads."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from queue import SimpleQueue

import pytest

from genssm.pool import Pool, in_threads


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_results_are_in_the_order_of_the_items(threads: int) -> None:
    def slow(item: int) -> int:
        time.sleep(0.002 * (7 - item))
        return item * item

    assert in_threads(slow, range(7), threads) == [0, 1, 4, 9, 16, 25, 36]
    assert in_threads(slow, [], threads) == []


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_so_many_work_at_once_the_caller_among_them(threads: int) -> None:
    together = threading.Barrier(threads, timeout=20)

    def meet(_: int) -> int:
        together.wait()
        return threading.get_ident()

    assert threading.get_ident() in (workers := in_threads(meet, range(threads), threads))
    assert len(set(workers)) == threads


def test_several_callers_wait_for_none_of_the_others() -> None:
    """Two of two threads each, all four of which have to meet."""
    together, results = threading.Barrier(4, timeout=20), []

    def call() -> None:
        results.append(in_threads(lambda item: (together.wait(), item)[1], [1, 2], 2))

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [[1, 2], [1, 2]]


def test_work_may_share_out_work() -> None:
    def outer(item: int) -> list[int]:
        return in_threads(lambda inner: 10 * item + inner, range(3), 3)

    assert in_threads(outer, range(4), 4) == [[10 * i, 10 * i + 1, 10 * i + 2] for i in range(4)]


def test_threads_are_kept_and_no_more_than_were_needed() -> None:
    in_threads(lambda _: time.sleep(0.01), range(8), 8)
    before = threading.active_count()
    for threads in (8, 7, 6, 5, 4, 3, 2):
        in_threads(lambda _: time.sleep(0.001), range(8), threads)
    assert threading.active_count() == before


def test_who_comes_again_at_once_finds_the_same_thread() -> None:
    pool, go, again = Pool("test"), threading.Event(), SimpleQueue()
    first = pool.submit(lambda: (go.wait(20), threading.get_ident())[1])
    first.add_done_callback(lambda _: again.put(pool.submit(threading.get_ident)))
    go.set()
    assert first.result(20) == again.get(timeout=20).result(20)


@pytest.mark.parametrize("wrong", [0, 1])
def test_an_error_ends_what_has_begun_and_begins_no_more(wrong: int) -> None:
    """Whichever thread it is in."""
    together, begun, ended = threading.Barrier(2, timeout=20), [], []

    def work(item: int) -> None:
        begun.append(item)
        if item < 2:
            together.wait()
        if item == wrong:
            raise ValueError(f"item {item}")
        time.sleep(0.05)
        ended.append(item)

    with pytest.raises(ValueError, match=f"item {wrong}"):
        in_threads(work, range(10), 2)
    assert sorted(begun)[:2] == [0, 1]
    assert sorted(ended) == sorted(set(begun) - {wrong})
    assert len(begun) < 10


def test_an_interruption_while_a_thread_starts_keeps_no_process_from_its_end() -> None:
    program = """
import threading
from genssm.pool import in_threads

start = threading.Thread.start

def interrupted(thread):
    start(thread)
    raise KeyboardInterrupt

threading.Thread.start = interrupted
try:
    in_threads(abs, [-1, -2], 2)
except KeyboardInterrupt:
    print("interrupted")
threading.Thread.start = start
print(in_threads(abs, [-3, -4, -5], 2))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stdout == "interrupted\n[3, 4, 5]\n"


def test_what_has_been_done_is_not_kept() -> None:
    class Large:
        pass

    large = Large()
    gone = weakref.ref(large)
    assert in_threads(lambda item: item is not None, [large] * 4, 2) == [True] * 4
    del large
    gc.collect()
    assert gone() is None
