"""The tab that draws: pictures row by row, and the completion of what a visitor brings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from genssm import files
from genssm.codec import ANY, Image
from genssm.interface import uploads
from genssm.interface.components import (
    PRIVATE,
    for_programs,
    kept,
    last_made,
    last_seed,
    live,
    on_page,
    seed_row,
    status_line,
)
from genssm.interface.courtesy import polite, polite_answer
from genssm.interface.growth import Growth, packed
from genssm.interface.house import House, Visit, updates, within
from genssm.pipeline import Pipeline
from genssm.request import DEFAULTS, GUIDANCE
from genssm.session import Sample

PICTURES = 16  # the most of one request
SETTINGS = DEFAULTS["image"]
SURPRISE = 24.0  # bits of a pixel that are the end of the scale

Update = tuple[str | None, dict[str, Any], str, "Drawn"]


@dataclass(frozen=True)
class Drawn:
    """What a visitor has on the page."""

    visit: Visit
    growth: Growth


class Drawer:
    """What the tab does, and the tab."""

    def __init__(self, house: House) -> None:
        self.house = house
        codec = house.pipe("image").codec
        assert isinstance(codec, Image)
        self.codec = codec

    def draw(
        self,
        label: str = ANY,
        count: float = 4,
        temperature: float = SETTINGS.temperature,
        guidance: float = GUIDANCE["image"],
        upload: str | None = None,
        keep_rows: float = 16,
        seed: float | None = -1,
    ) -> Iterator[Update]:
        """Draw pictures of a class, or complete a picture of which the upper rows are kept."""
        yield from self._draw(Visit(), label, count, temperature, guidance, upload, keep_rows, seed)

    @polite
    def _draw(
        self, visit: Visit, label: str, count: float, temperature: float, guidance: float,
        upload: str | None, keep_rows: float, seed: float | None,
    ) -> Iterator[Update]:  # fmt: skip
        height, width, channels = self.codec.shape
        settings: dict[str, Any] = {
            "count": int(within(count, 1, PICTURES, "the number of pictures")),
            "temperature": float(within(temperature, 0, 1.5, "temperature")),
            "guidance": float(within(guidance, 0, 8, "guidance")) if label != ANY else 1.0,
        }
        layout = {"count": settings["count"], "height": height, "width": width,
                  "channels": channels, "kept": 0, "original": None}  # fmt: skip
        prompt: Any = label
        if upload is not None:
            prompt = uploads.picture(upload, self.codec)
            keep = int(within(keep_rows, 0, height - 1, "the rows to keep"))
            settings |= {"keep_rows": keep, "label": label}
            layout |= {"kept": keep, "original": packed(prompt)}
        yield from self._drawn(visit, prompt, layout, seed=seed, **settings)

    def _drawn(
        self, visit: Visit, prompt: Any, layout: dict[str, Any], **settings: Any
    ) -> Iterator[Update]:
        growth = Growth([layout])
        drawn = Drawn(visit, growth)
        for told in self.house.begin(visit, "image", prompt, **settings):
            yield None, growth.message(), told, drawn
        yield None, growth.message(), self.house.status(visit, "image"), drawn
        rows = [layout["kept"]] * layout["count"]
        if visit.job is not None:
            for pieces in updates(visit.job):
                news = []
                for sample, row in pieces:
                    news.append([sample, rows[sample], packed(row)])
                    rows[sample] += 1
                yield None, growth.message(news), self.house.status(visit, "image"), drawn
        visit.end()
        content = picture_file(self.house.pipe("image"), visit.samples(), prompt)
        yield content, growth.whole(), self.house.status(visit, "image"), drawn

    @polite_answer
    def surprise(self, drawn: Drawn | None) -> dict[str, Any]:
        """The bits of every pixel of the pictures on the page, for the canvas."""
        samples = [] if drawn is None else drawn.visit.samples()
        if drawn is None or not samples:
            raise ValueError("there is no picture yet; draw one first")
        if not drawn.visit.over:
            raise ValueError("the pictures are not complete; wait for them, or stop them")
        maps = [packed(surprise_map(s, self.codec)) for s in samples]
        return drawn.growth.whole(surprise=maps)

    @polite_answer
    def preview(self, upload: str | None, keep_rows: float) -> dict[str, Any] | None:
        """An uploaded picture as the model will see it."""
        if upload is None:
            return None
        height, width, channels = self.codec.shape
        return {"picture": packed(uploads.picture(upload, self.codec)), "height": height,
                "width": width, "channels": channels, "keep": int(keep_rows)}  # fmt: skip

    def build(self) -> gr.State:
        """The tab; returns what it holds of the visitor's last pictures."""
        height = self.codec.shape[0]
        with gr.Row(elem_classes="studio"):
            with gr.Column(scale=2, min_width=300):
                labels = [ANY, *self.codec.classes]
                label = gr.Radio(labels, value=ANY, label="Class", elem_classes="chips",
                                 visible=len(labels) > 1, elem_id="draw-class")  # fmt: skip
                count = gr.Slider(1, PICTURES, 4, step=1, label="Pictures", elem_id="draw-count")
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", elem_id="draw-go")
                    end = gr.Button("Stop", elem_id="draw-stop", min_width=80)
                with gr.Accordion("Complete a picture of yours", open=False):
                    upload = gr.File(label="Picture (PNG or JPEG, up to 2 MiB)", height=165,
                                     elem_id="draw-upload")  # fmt: skip
                    rows = gr.Slider(0, height - 1, height // 2, step=1, label="Rows to keep",
                                     elem_id="draw-rows")  # fmt: skip
                    preview = live("preview", label="Preview", elem_id="draw-preview")
                with gr.Accordion("Settings", open=False):
                    heat = gr.Slider(0, 1.5, SETTINGS.temperature, step=0.01, label="Temperature")
                    guidance = gr.Slider(
                        0, 8, GUIDANCE["image"], step=0.1, label="Guidance (stresses the class)"
                    )
                    seed, reuse = seed_row("draw-seed")
            with gr.Column(scale=3, min_width=320):
                page = live("pictures", label="Rows of pixels", elem_id="draw-page")
                status = status_line("draw-status")
                with gr.Row():
                    save = gr.DownloadButton("Download PNG", elem_id="draw-save", size="sm")
                    bits = gr.Button("Surprise map", elem_id="draw-surprise", size="sm")
        drawn = last_made()
        inputs = [label, count, heat, guidance, upload, rows, seed]
        outputs = [save, page, status, drawn]
        on_page(self.house, "draw", [go.click], end, self._draw, inputs, outputs)
        for_programs(self.draw, inputs, outputs, "draw")
        bits.click(self.surprise, [drawn], [page], **PRIVATE)
        upload.change(self.preview, [upload, rows], [preview], **PRIVATE)
        rows.input(None, [rows, preview], [preview],
                   js="(keep, shown) => shown ? {...shown, keep} : shown", **PRIVATE)  # fmt: skip
        reuse.click(last_seed, [drawn], [seed], queue=False, **PRIVATE)
        return drawn


def picture_file(pipe: Pipeline, samples: Sequence[Sample], prompt: Any) -> str | None:
    """The pictures side by side as a PNG file with the recipe inside; None if there are none."""
    if not samples or not any(s.tokens for s in samples):
        return None
    recipe = pipe.recipe(samples, prompt if isinstance(prompt, str) else None)
    content = files.noted(files.png(files.grid([s.raw for s in samples])), recipe)
    return kept(f"{Path(pipe.name).name}-{samples[0].seed}.png", content)


def surprise_map(sample: Sample, codec: Image) -> np.ndarray:
    """Bits of every pixel as uint8 (H·W,), ``SURPRISE`` bits and more are 255.

    0 where a pixel was given or not drawn.
    """
    bits = np.zeros(codec.length)
    given = len(sample.plan.tokens) - 1
    bits[given : given + len(sample.token_bits)] = sample.token_bits
    pixels = bits.reshape(-1, codec.shape[2]).sum(1)
    return np.round(255 * np.clip(pixels / SURPRISE, 0, 1)).astype(np.uint8)
