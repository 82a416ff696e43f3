"""What is written to a terminal, a pipe or a file that may go away."""

from __future__ import annotations

import os
import sys
import unicodedata
from typing import TextIO


def harmless(text: str) -> str:
    """Text as a terminal may get it: a model, or a stranger's file, must not steer it.

    Control characters other than the ends of lines and tabs are shown by their numbers.
    """
    if not sys.stdout.isatty():
        return text
    steering = {c for c in text if unicodedata.category(c) == "Cc"} - {"\n", "\t"}
    return text.translate({ord(c): f"\\x{ord(c):02x}" for c in steering})


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
