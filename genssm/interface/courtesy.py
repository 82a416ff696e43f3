"""Errors as sentences: what went wrong, what the rule is, and nothing of the server."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any, ParamSpec, TypeVar

import gradio as gr

from genssm.interface.house import House, RefusedError
from genssm.scheduler import BusyError

P = ParamSpec("P")
Y = TypeVar("Y")
T = TypeVar("T")


def sentence(error: Exception) -> str:
    """What a visitor is told about an error: the rule that it states, nothing of the server."""
    if isinstance(error, ValueError | BusyError):
        text = str(error)
        return f"{text[0].upper()}{text[1:]}." if text else "This cannot be done."
    return "Something went wrong on this side; what was made is kept. Please try again."


def polite(stream: Callable[P, Iterator[Y]]) -> Callable[P, Generator[Y, None, None]]:
    """Errors of a stream as a sentence; once something is shown, beside it instead of over it."""

    @functools.wraps(stream)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Generator[Y, None, None]:
        shown = False
        try:
            for update in stream(*args, **kwargs):
                yield update
                shown = True
        except gr.Error:
            raise
        except Exception as error:
            if not shown or isinstance(error, RefusedError):
                raise gr.Error(sentence(error), print_exception=_unexpected(error)) from None
            gr.Warning(sentence(error))

    return wrapped


def explain_refusals(page: gr.Blocks) -> None:
    """What the components of a page cannot take, sent by a program, is refused in a sentence."""
    for block in page.blocks.values():
        take = getattr(block, "preprocess", None)
        if take is not None:
            setattr(block, take.__name__, _explained(take, getattr(block, "label", None)))


def _explained(take: Callable[[Any], T], name: str | None) -> Callable[[Any], T]:
    @functools.wraps(take)
    def explained(payload: Any) -> T:
        try:
            return take(payload)
        except gr.Error as error:  # its message may hold all that was sent
            raise gr.Error(f"{error.message!s:.200}", print_exception=False) from None
        except Exception:
            message = f"{name or 'An argument'} cannot be {payload!r:.40}."
            raise gr.Error(message, print_exception=False) from None

    return explained


def alone(house: House, tab: str, stream: Callable[..., Iterator[Y]]) -> Callable[..., Iterator[Y]]:
    """A stream for the page: what a visitor begins in a tab ends what is under way there.

    The stream takes the visit first. Programs, which may have many requests, need no such thing.
    """

    def wrapped(request: gr.Request, *args: object) -> Iterator[Y]:
        visit = house.visit(str(request.session_hash), tab)
        for update in stream(visit, *args):
            if visit.replaced:
                break
            yield update

    return wrapped


def stopper(house: House, tab: str) -> Callable[[gr.Request], None]:
    """What the Stop of a tab does."""

    def stop(request: gr.Request) -> None:
        house.stop(str(request.session_hash), tab)

    return stop


def polite_answer(function: Callable[P, T]) -> Callable[P, T]:
    """``polite`` for what answers once."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error(sentence(error), print_exception=_unexpected(error)) from None

    return wrapped


def _unexpected(error: Exception) -> bool:
    return not isinstance(error, ValueError | BusyError)
