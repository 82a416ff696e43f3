"""How what is started answers soon."""

from __future__ import annotations

import gc
from contextlib import ExitStack


def rest_collector(start: ExitStack) -> None:
    """Look for no garbage until ``start`` is closed, and never among what was there by then.

    Modules that load make next to no garbage but hundreds of thousands of objects, which the
    collector would walk over again and again: a third of the time to a first token. It does not
    come back to them later, either, where it would hold up what is being drawn.
    """
    if gc.isenabled():
        gc.disable()
        start.callback(gc.enable)
        start.callback(gc.freeze)
