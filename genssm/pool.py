"""Threads of our own, which are kept, and work that is shared out among them."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import cache, partial
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Pool:
    """Threads that are kept: as many as were ever needed at once.

    The end of the process waits for none of them. An executor's threads are waited for, for ever
    where an interruption came while one of them was started.
    """

    def __init__(self, purpose: str) -> None:
        self._purpose = purpose
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._idle = threading.Semaphore(0)

    def submit(self, function: Callable[[], R]) -> Future[R]:
        """Call it in another thread, at once."""
        future: Future[R] = Future()
        self._calls.put((future, function))
        if not self._idle.acquire(blocking=False):
            threading.Thread(target=self._work, name=f"genssm {self._purpose}", daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            tell = _outcome(*self._calls.get())
            self._idle.release()  # before its caller is told, who may come again at once
            tell()
            del tell


def _outcome(future: Future[R], function: Callable[[], R]) -> Callable[[], None]:
    """Call the function; gives what tells of it."""
    if not future.set_running_or_notify_cancel():
        return lambda: None
    try:
        return partial(future.set_result, function())
    except BaseException as error:
        return partial(future.set_exception, error)


@cache
def pool(purpose: str) -> Pool:
    """The threads for a purpose."""
    return Pool(purpose)


def _in_every_child(renew: Callable[[], None]) -> None:
    """A forked child has none of the threads of its parent, nor who held a lock."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)


_in_every_child(pool.cache_clear)


class Forkable:
    """A lock, ``held``, that is free in a forked child."""

    def __init__(self) -> None:
        self._renew()
        _in_every_child(self._renew)

    def _renew(self) -> None:
        self.held = threading.Lock()


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
