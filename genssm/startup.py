"""How what is started answers soon."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Look for no garbage meanwhile, and never among what is there at the end of it.

    Modules that load make next to no garbage but hundreds of thousands of objects, which the
    collector would walk over again and again: a third of the time to a first token. It does not
    come back to them later, either, where it would hold up what is being drawn.
    """
    if not gc.isenabled():  # its user's choice
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
