"""What is written to a terminal, a pipe or a file that may go away."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def note(text: str, quiet: bool = False) -> None:
    """Write a line to stderr, if it can be: what was asked for is worth more than a note on it."""
    if quiet:
        return
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except OSError:
        write_nowhere(sys.stderr)


def write_nowhere(stream: TextIO) -> None:
    """Lose what is written from now on or waits to be: the reader has gone, or the disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
