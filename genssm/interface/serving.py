"""How the page starts: what takes longest begins first."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from genssm.startup import collector_at_rest


def serve(models: Sequence[str] = (), *, port: int | None = None, share: bool = False) -> None:
    """Build and serve the page. ``models`` take the place of the shipped ones of their modality.

    Raises CheckpointError for a model that cannot be loaded, OSError for a port that is taken.
    """
    with collector_at_rest():
        from genssm.interface.house import House

        house = House(models)
        house.warm_up()  # compiles on a second core while Gradio is imported on the first
        from genssm.interface.page import build_page, launch

        _keep_private()
        page = build_page(house)
    try:
        launch(page, port=port, share=share)
    except OSError as error:
        if port is None or "empty port" not in str(error):
            raise
        raise OSError(f"the port {port} is taken; give another one") from error


def _keep_private() -> None:
    """Gradio keeps visitors' files in /tmp/gradio, for all users of a machine to read; so here they
    have a folder of their own, unless one is given, which ends with the process."""
    if os.environ.get("GRADIO_TEMP_DIR"):
        return
    folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="genssm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with suppress(ValueError):  # not the main thread: signals are its caller's business
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
