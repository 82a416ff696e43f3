"""The whole page, and how Gradio serves it."""

from __future__ import annotations

import os
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from genssm.interface import uploads
from genssm.interface.bodies import BoundedBodies
from genssm.interface.courtesy import explain_refusals
from genssm.interface.draw import Drawer
from genssm.interface.house import House
from genssm.interface.inside import Inspector
from genssm.interface.offline import LocalFiles, refuse_addresses
from genssm.interface.speak import Speaker
from genssm.interface.theme import STYLE, build_theme
from genssm.interface.write import Writer

HEADER = """
<header class="masthead">
<h1>gen<span>ssm</span></h1>
<p>State space models that write, draw and speak: trained by convolution, sampled by recurrence,
in constant time and memory per token.</p>
<p class="formula" aria-label="x k equals A x k minus 1 plus B u k, y k equals C x k plus D u k">
<i>x<sub>k</sub></i> = <b>Ā</b><i>x</i><sub><i>k</i>−1</sub> + <b>B̄</b><i>u<sub>k</sub></i>
&emsp; <i>y<sub>k</sub></i> = <b>C</b><i>x<sub>k</sub></i> + <b>D</b><i>u<sub>k</sub></i></p>
</header>
"""
KEPT = 3600  # seconds that files for download are kept


def build_page(house: House) -> gr.Blocks:
    """The page over the models of a house."""
    with gr.Blocks(title="genssm", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.HTML(HEADER, apply_default_css=False)
        with gr.Tab("Write", elem_id="tab-write"):
            written = Writer(house).build()
        with gr.Tab("Draw", elem_id="tab-draw"):
            drawn = Drawer(house).build()
        with gr.Tab("Speak", elem_id="tab-speak"):
            spoken = Speaker(house).build()
        with gr.Tab("Inside", elem_id="tab-inside") as inside:
            Inspector(house).build(inside, written, drawn, spoken)
    refuse_addresses(page)
    explain_refusals(page)
    return page.queue(max_size=128)


def launch(
    page: gr.Blocks, *, port: int | None = None, share: bool = False, **settings: Any
) -> None:
    """Serve a page; ``settings`` are further ones of ``gradio.Blocks.launch``."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    page.launch(
        server_port=port,
        share=share,
        theme=build_theme(),
        css=STYLE.read_text("utf-8"),
        show_error=False,
        max_file_size=uploads.BYTES,
        max_threads=128,  # those who wait in line hold one now and then
        state_session_capacity=500,
        footer_links=["api"],
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(BoundedBodies), Middleware(LocalFiles)]},
        **settings,
    )
