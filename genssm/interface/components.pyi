"""What the tabs are built of: live parts that scripts draw in the browser, downloads, seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData
from gradio.processing_utils import save_bytes_to_cache

from genssm.interface.house import LARGEST_SEED

SCRIPTS = Path(__file__).with_name("browser")

from gradio.events import Dependency

class Live(gr.HTML):
    """An element that a script in ``browser/`` draws from the messages in its value."""

    def __init__(self, script: str, *, label: str, elem_id: str, value: Any = None) -> None:
        shared, own = ((SCRIPTS / f"{s}.js").read_text("utf-8") for s in ("shared", script))
        super().__init__(
            value,
            label=label,
            elem_id=elem_id,
            html_template=f'<div class="live {script}"></div>',
            js_on_load=shared + own,
            apply_default_css=False,
        )

    def api_info(self) -> dict[str, Any]:
        return {"type": {}, "description": "what the page draws, as JSON; the last holds all"}

    def example_payload(self) -> Any:
        return None

    def example_value(self) -> Any:
        return None
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


class Download(gr.DownloadButton):
    """A button that hands out (name, bytes), kept in Gradio's temporary folder for a while."""

    def postprocess(self, value: tuple[str, bytes] | None) -> FileData | None:
        if value is None:
            return None
        name, content = value
        path = save_bytes_to_cache(content, name, self.GRADIO_CACHE)
        return FileData(path=path, orig_name=name, size=len(content))
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component


def seed_box(elem_id: str) -> gr.Number:
    """Where a seed is chosen; what was used comes back by ``reuse_button``."""
    return gr.Number(
        -1, label="Seed (−1: a new one)", precision=0, minimum=-1, maximum=LARGEST_SEED,
        elem_id=elem_id, min_width=120,
    )  # fmt: skip


def status_line(elem_id: str, text: str = "") -> Live:
    """One line of facts about what is being made."""
    return Live("status", label="Status", elem_id=elem_id, value=text)