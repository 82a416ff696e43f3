"""Threads of our own, which are kept, and work that is shared out among them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@cache
def pool(purpose: str) -> ThreadPoolExecutor:
    """Threads that are kept for a purpose: as many as were ever needed at once, up to 256."""
    return ThreadPoolExecutor(256, thread_name_prefix=f"genssm {purpose}")


if hasattr(os, "register_at_fork"):  # a child has none of the threads of its parent
    os.register_at_fork(after_in_child=pool.cache_clear)


def in_threads(function: Callable[[T], R], items: Sequence[T], threads: int) -> list[R]:
    """``function`` of every item, so many at a time, this thread being one of those at work.

    After an error what has begun is ended, and nothing else is begun.
    """
    results: dict[int, R] = {}
    left = deque(enumerate(items))

    def work() -> None:
        while left:
            try:
                i, item = left.popleft()
            except IndexError:  # another was faster
                return
            try:
                results[i] = function(item)
            except BaseException:
                left.clear()
                raise

    helpers: list[Future[None]] = []
    try:
        for _ in range(min(threads, len(items)) - 1):
            helpers.append(pool("shares").submit(work))
        work()
    finally:
        left.clear()
        begun = [helper for helper in helpers if not helper.cancel()]
        wait(begun)
    for helper in begun:
        helper.result()
    return [results[i] for i in range(len(items))]
