"""What all commands share: options, exit codes, errors as one sentence."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

from genssm.disk import replace_file
from genssm.folders import UnknownModelError
from genssm.terminal import note, write_nowhere

P = ParamSpec("P")

NO_MEMORY = "there is not enough memory; make model, batch or length smaller"
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class UsageError(ValueError):
    """The command was given something that it cannot take."""


def _fail(message: str, code: int) -> NoReturn:
    note(f"genssm: {message}")
    raise typer.Exit(code)


def told(error: Exception) -> str:
    """An error as a sentence; one of the operating system as its file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        if isinstance(error, FileExistsError):  # in the place of a folder
            return f"{os.fsdecode(error.filename)!r} is a file; give a folder"
        return f"{os.fsdecode(error.filename)!r}: {error.strerror}"
    return str(error) or type(error).__name__


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn what can go wrong into one sentence and an exit code."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has what it wanted
            write_nowhere(sys.stdout)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except UsageError as error:
            _fail(str(error), USAGE)
        except FileExistsError as error:
            _fail(told(error), USAGE)
        except MemoryError:
            _fail(NO_MEMORY, FAILED)
        except (ValueError, OSError) as error:
            _fail(told(error), USAGE if isinstance(error, UnknownModelError) else FAILED)
        except RuntimeError as error:
            if not any(words in str(error) for words in ("allocate memory", "out of memory")):
                raise
            _fail(NO_MEMORY, FAILED)

    return wrapped


def say(line: str) -> None:
    """A line of what was asked for, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


Model = Annotated[
    str, typer.Option("--model", "-m", help="Shipped name, checkpoint folder or Hub id.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes on stderr.")]


def write_facts(out: Path | None, facts: dict[str, Any]) -> None:
    """As JSON, where that is wanted."""
    if out is not None:
        text = json.dumps(facts, indent=1) + "\n"
        replace_file(out, lambda file: file.write_text(text))


def check_new(file: Path | None, force: bool) -> None:
    """Refuse a file that cannot be written, before the work that it is to hold."""
    from genssm.files import check_target

    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        check_target(file, force)
    except ValueError as error:
        raise UsageError(str(error)) from error


def require_gradio() -> None:
    """Refuse what needs the page where its package is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise UsageError('the page needs gradio; install it with: pip install "genssm[app]"')
