"""What is written to terminals and pipes."""

import io
import os
import sys

import pytest

from genssm.terminal import harmless, note


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_not_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "café \x1b]0;title\x07 one\r two\x9b31m\n\tthree 😀"
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert harmless(text) == text  # a file or a pipe gets what was drawn
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert harmless(text) == "café \\x1b]0;title\\x07 one\\x0d two\\x9b31m\n\tthree 😀"


def test_notes_need_no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        note("lost")
        note("lost, too")
