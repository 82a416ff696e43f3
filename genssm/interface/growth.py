"""What grows on the page, as messages that hold only the news."""

from __future__ import annotations

import base64
import itertools
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

_RUNS = itertools.count(1)


class Growth:
    """A list that the browser rebuilds from ``{"run", "at", "items", "done"}``.

    Each message repeats the items of the two before it, because a browser that is busy may pass
    over a message; the last one holds all.
    """

    def __init__(self, items: Iterable[Any] = ()) -> None:
        self.run = next(_RUNS)
        self.items = list(items)
        self._starts = deque([0, 0], maxlen=3)

    def message(self, news: Iterable[Any] = ()) -> dict[str, Any]:
        """Add the news, and say them."""
        self.items += news
        start = self._starts[0]
        self._starts.append(len(self.items))
        return {"run": self.run, "at": start, "items": self.items[start:], "done": False}

    def whole(self, **others: Any) -> dict[str, Any]:
        """All of it, for the end."""
        return {"run": self.run, "at": 0, "items": list(self.items), "done": True, **others}


def packed(array: np.ndarray) -> str:
    """The bytes of an array in base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def packed_sound(wave: np.ndarray) -> str:
    """float32 (samples,) on [-1, 1] as int16, little-endian, in base64."""
    whole = np.clip(np.round(wave * 32768), -32768, 32767)  # as it is divided in the browser
    return packed(whole.astype("<i2"))
