"""What the tabs are built of: live parts that scripts draw in the browser, downloads, seeds.

Functions that make components of Gradio, not subclasses: Gradio writes a stub file beside the
source of every subclass.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from genssm.interface.courtesy import alone, stopper
from genssm.interface.house import LARGEST_SEED, House, Visit

SCRIPTS = Path(__file__).with_name("browser")
MESSAGE = {"type": {}, "description": "what the page draws, as JSON; the last message holds all"}


def live(script: str, *, label: str, elem_id: str, value: Any = None) -> gr.HTML:
    """An element that a script in ``browser/`` draws from the messages in its value."""
    shared, own = ((SCRIPTS / f"{s}.js").read_text("utf-8") for s in ("shared", script))
    part = gr.HTML(
        value,
        label=label,
        elem_id=elem_id,
        html_template=f'<div class="live {script}" data-label="{html.escape(label)}"></div>',
        js_on_load=shared + own,
        apply_default_css=False,
    )
    part.api_info = lambda: MESSAGE  # what it gets is no string of HTML
    return part


def status_line(elem_id: str) -> gr.HTML:
    """One line of facts about what is being made."""
    line = live("status", label="Status", elem_id=elem_id, value="")
    line.api_info = lambda: {"type": "string"}
    return line


def seed_box(elem_id: str) -> gr.Number:
    """Where a seed is chosen."""
    return gr.Number(
        -1, label="Seed (−1: a new one)", step=1, minimum=-1, maximum=LARGEST_SEED,
        elem_id=elem_id, min_width=120,
    )  # fmt: skip


def seed_row(elem_id: str) -> tuple[gr.Number, gr.Button]:
    """The box for a seed and, beside it, the button that fills in the last one."""
    with gr.Row(elem_classes="seeds"):
        return seed_box(elem_id), gr.Button("Use last seed", size="sm", min_width=100)


PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# Of what a visitor begins: a second click is a second request, which ends the first; see ``alone``.
ON_PAGE: dict[str, Any] = {
    **PRIVATE,
    "concurrency_limit": None,
    "trigger_mode": "multiple",
}


class Made(Protocol):
    """What a visitor made last in a tab."""

    @property
    def visit(self) -> Visit: ...


def last_made() -> gr.State:
    """Holds ``Made``, or None; its request ends when the visitor leaves."""
    return gr.State(time_to_live=3600, delete_callback=_leave)


def _leave(made: Made | None) -> None:
    if made is not None:
        made.visit.stop()


def last_seed(made: Made | None) -> int:
    """What "Use last seed" fills in."""
    samples = [] if made is None else made.visit.samples()
    return samples[0].seed if samples else -1


def on_page(
    house: House, tab: str, begins: Sequence[Any], end: gr.Button,
    stream: Callable[..., Iterator[Any]], inputs: Sequence[Any], outputs: Sequence[Any],
) -> None:  # fmt: skip
    """What begins a tab's stream on the page, and the button that ends it."""
    gr.on(begins, alone(house, tab, stream), list(inputs), list(outputs), **ON_PAGE)
    end.click(stopper(house, tab), None, None, queue=False, api_visibility="private")


def for_programs(
    stream: Callable[..., Iterator[Any]], inputs: Sequence[Any], outputs: Sequence[Any], name: str
) -> None:
    """The endpoint of a stream: a program may have several requests under way."""
    gr.Button(visible=False).click(
        stream, list(inputs), list(outputs), api_name=name, show_progress="hidden",
        concurrency_limit=None,
    )  # fmt: skip


def kept(name: str, content: bytes) -> str:
    """A file to download, in Gradio's temporary folder, which is emptied now and then."""
    return save_bytes_to_cache(content, name, get_upload_folder())
