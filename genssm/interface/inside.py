"""The tab that looks inside: what only a state space model can show."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import torch

from genssm import anatomy
from genssm.codec import Text
from genssm.engine import Reading
from genssm.interface.components import live, seed_box, status_line
from genssm.interface.courtesy import polite, polite_answer
from genssm.interface.growth import Growth, packed
from genssm.interface.house import (
    UPDATES,
    House,
    Visit,
    chosen_seed,
    updates,
    within,
)
from genssm.interface.write import CHARACTERS, PieceReader
from genssm.request import Request
from genssm.scheduler import BusyError

MODELS = {"Text": "text", "Pictures": "image", "Sound": "audio"}
COMPARED = 256  # tokens on which the views are compared
TRACED = 160  # tokens whose states are shown
FORKED = 80  # tokens of each continuation
SHOWN = 4  # layers whose kernels and poles are drawn
EVERY = 8  # positions in one update
FRAME = 4  # tokens in one

SHARED: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_limit": 4,
    "concurrency_id": "inside",
}  # of all that runs here, so that it leaves room for those who sample

Chart = dict[str, Any]


class Inspector:
    """What the tab does, and the tab."""

    def __init__(self, house: House) -> None:
        self.house = house
        self._racing = threading.Lock()

    # The views

    @polite
    def compare(
        self, model: str = "Text", written: Any = None, drawn: Any = None, spoken: Any = None
    ) -> Iterator[tuple[Chart, str]]:
        """The largest difference of the logits, position by position, on what was just made."""
        modality = _modality(model)
        made = {"text": written, "image": drawn, "audio": spoken}[modality]
        pipe = self.house.pipe(modality, getattr(made, "rate", 1.0))
        tokens, source = torch.tensor(_last_tokens(made)), "what was just made"
        if len(tokens) < 2:
            if not pipe.config["probe"]:
                raise ValueError("this model came without data; make something to compare on first")
            tokens, source = anatomy.probe_of(pipe), "real data; make something to compare on that"
        tokens = tokens[:COMPARED]
        stepped, prefilled, largest = [], [], 0.0
        for found in anatomy.agreements(pipe, tokens):
            stepped.append([found.position + 1, max(found.step, 1e-8)])
            prefilled.append([found.position + 1, max(found.prefill, 1e-8)])
            largest = max(largest, found.step, found.prefill)
            if len(stepped) % EVERY == 0 or len(stepped) == len(tokens):
                chart = {
                    "title": f"{model}: difference from the convolution",
                    "x": {"label": "position", "range": [0, len(tokens)]},
                    "y": {"label": "difference of a logit", "log": True, "range": [1e-8, 1]},
                    "series": [
                        {"name": "stepping", "kind": "line", "points": stepped[:], "colour": 1},
                        {"name": "reading in parallel", "kind": "line", "points": prefilled[:],
                         "colour": 2},
                    ],
                }  # fmt: skip
                told = (
                    f"{len(stepped)} of {len(tokens)} tokens of {source}: the three views differ "
                    f"by at most {largest:.1e} where the largest logit is {found.scale:.0f}"
                )
                yield chart, told

    # The race

    @polite
    def race(self, model: str = "Text") -> Iterator[tuple[Chart, str]]:
        """Milliseconds of one more token at growing lengths, against convolution and GPT-2."""
        modality, laps = _modality(model), []
        if not self._racing.acquire(blocking=False):
            raise BusyError("another visitor holds a race; two would slow each other. Try again")
        try:
            yield _race_chart(model, laps), "getting ready …"
            pipe = self.house.scheduler(modality).pipe
            for lap in anatomy.race(pipe, anatomy.race_lengths(pipe)):
                laps.append(lap)
                yield _race_chart(model, laps), _lap_told(lap)
        finally:
            self._racing.release()

    # The layers

    @polite_answer
    def layers(self, model: str = "Text") -> tuple[Chart, Chart, Chart]:
        """Kernels, poles and half-lives of the layers of a model."""
        return self._layers(_modality(model))

    @functools.lru_cache(maxsize=3)  # noqa: B019 - a page has one inspector
    def _layers(self, modality: str) -> tuple[Chart, Chart, Chart]:
        found = anatomy.memories(self.house.pipe(modality))
        step = max(1, (len(found) - 1) // (SHOWN - 1))
        chosen = [(i, found[i]) for i in range(0, len(found), step)][:SHOWN]
        kernels = {
            "title": "Kernels: what is still heard of the past",
            "x": {"label": "positions back", "log": True},
            "y": {"label": "weight"},
            "series": [
                {"name": f"layer {i}", "kind": "line", "colour": c,
                 "points": [[k + 1, v] for k, v in enumerate(layer.kernel)]}
                for c, (i, layer) in enumerate(chosen, 1)
            ],
        }  # fmt: skip
        poles = {
            "title": "Poles exp(Δλ), upper half plane",
            "equal": True,
            "x": {"label": "real part", "range": [-1.05, 1.05], "ticks": [-1, -0.5, 0, 0.5, 1]},
            "y": {"label": "imaginary part", "range": [-0.05, 1.05], "ticks": [0, 0.5, 1]},
            "series": [
                {"name": f"layer {i}", "kind": "dots", "points": layer.poles, "colour": c}
                for c, (i, layer) in enumerate(chosen, 1)
            ],
        }
        lives = {
            "title": "Half-lives: shortest, median, longest",
            "x": {"label": "layer", "ticks": list(range(len(found)))},
            "y": {"label": "tokens", "log": True},
            "series": [
                {"name": "", "kind": "spans", "colour": 1,
                 "points": [[i, *layer.half_lives] for i, layer in enumerate(found)]}
            ],
        }  # fmt: skip
        return kernels, poles, lives

    # The state

    @polite
    def watch(
        self, model: str = "Text", prompt: str = "", seed: float | None = -1
    ) -> Iterator[tuple[dict[str, Any], str]]:
        """The state of every layer, token by token, while a sample is drawn."""
        modality = _modality(model)
        pipe = self.house.pipe(modality)
        start = self._read(modality, prompt)
        used = chosen_seed(seed)
        view = self._view(modality)
        growth = Growth([{"rows": view.rows, "span": TRACED,
                          "names": [f"layer {i}" for i in range(len(view.names))]}])  # fmt: skip
        decoder, columns = pipe.codec.decoder(), []
        config = Request().sampling(modality)
        size = pipe.recurrent.state_bytes() / 1024
        told = f"{model} · seed {used} · state: {size:.0f} KiB, constant · eager engine"
        for token, levels in anatomy.trace(pipe, view, start, config, used, TRACED):
            piece = decoder.push(token) if isinstance(pipe.codec, Text) else None
            columns.append([packed(levels), piece or ""])
            if len(columns) == FRAME:
                yield growth.message(columns), told
                columns = []
                time.sleep(1 / UPDATES)  # so that it can be watched
        growth.message(columns)
        yield growth.whole(), told

    @functools.lru_cache(maxsize=3)  # noqa: B019 - a page has one inspector
    def _view(self, modality: str) -> anatomy.StateView:
        return anatomy.StateView(self.house.pipe(modality))

    def _read(self, modality: str, prompt: str | None) -> Reading:
        prompt = prompt or ""  # programs may send null
        if len(prompt) > CHARACTERS:
            raise ValueError(f"a prompt may have {CHARACTERS} characters")
        text = prompt if modality == "text" and prompt else None
        return self.house.pipe(modality).read(text)

    # Two futures of one state

    @polite
    def fork(
        self, prompt: str = "The history of the river", temperature: float = 0.8,
        seed: float | None = -1,
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:  # fmt: skip
        """Read a prompt once; two samples go on from the one state, side by side."""
        heat = float(within(temperature, 0, 1.5, "temperature"))
        used = chosen_seed(seed)
        pipe = self.house.pipe("text")
        state = self._read("text", prompt)
        growths = [Growth([[prompt, None]] if prompt else []) for _ in range(2)]
        settings = {"state": state, "max_tokens": FORKED, "temperature": heat}
        visit = Visit()
        for told in self.house.begin(visit, "text", None, seed=used, count=2, **settings):
            yield growths[0].message(), growths[1].message(), told
        readers = [PieceReader(pipe.codec.decoder(), visit, i) for i in range(2)]
        size = pipe.recurrent.state_bytes() / 1024
        line = f"seed {used}, samples 0 and 1 · one state of {size:.0f} KiB, read once, forked"
        if visit.job is not None:
            for _ in updates(visit.job):
                pairs = zip(growths, readers, strict=True)
                first, second = (growth.message(reader.news()) for growth, reader in pairs)
                yield first, second, line
        yield growths[0].whole(), growths[1].whole(), line

    def build(self, tab: gr.Tab, written: gr.State, drawn: gr.State, spoken: gr.State) -> None:
        """The tab; the states are what the visitor made last in the others."""
        model = gr.Radio(list(MODELS), value="Text", label="Model", elem_classes="chips",
                         elem_id="inside-model")  # fmt: skip
        with gr.Row():
            with gr.Column(min_width=340):
                self._build_views(model, [written, drawn, spoken])
            with gr.Column(min_width=340):
                self._build_race(model)
        self._build_layers(tab, model)
        self._build_state(model)

    def _build_views(self, model: gr.Radio, made: list[gr.State]) -> None:
        _section(
            "One map, three views",
            "The model is a convolution when it trains, a recurrence when it samples, and reads "
            "prompts in chunks of both. How far apart are the three?",
        )
        look = gr.Button("Compare the views", variant="primary", elem_id="compare-go")
        views = live("chart", label="Differences", elem_id="compare-chart")
        facts = status_line("compare-status")
        look.click(self.compare, [model, *made], [views, facts], api_name="compare", **SHARED)

    def _build_race(self, model: gr.Radio) -> None:
        _section(
            "A race at growing length",
            "One more token, on one thread: a step of the recurrence, the convolution of "
            "everything again, and a GPT-2 of as many parameters that keeps its cache.",
        )
        run = gr.Button("Start the race", variant="primary", elem_id="race-go")
        times = live("chart", label="Milliseconds", elem_id="race-chart")
        lap = status_line("race-status")
        run.click(self.race, [model], [times, lap], api_name="race", **SHARED)

    def _build_layers(self, tab: gr.Tab, model: gr.Radio) -> None:
        _section(
            "What the layers remember",
            "Every layer is a bank of damped oscillators. Their kernels, poles and half-lives say "
            "how far back it listens.",
        )
        with gr.Row(elem_classes="abreast"):
            kernels = live("chart", label="Kernels", elem_id="kernels-chart")
            poles = live("chart", label="Poles", elem_id="poles-chart")
            lives = live("chart", label="Half-lives", elem_id="lives-chart")
        charts = [kernels, poles, lives]
        # Kept since the first look, so that nobody need wait for those who sample.
        quick: dict[str, Any] = {**SHARED, "concurrency_id": "layers"}
        tab.select(self.layers, [model], charts, api_name="layers", **quick)
        model.change(self.layers, [model], charts, api_visibility="private", **quick)

    def _build_state(self, model: gr.Radio) -> None:
        _section(
            "The state while it samples, and its fork",
            "Each band is a layer, each line in it a group of features, the longest memory on top; "
            "each column is one token. All that the model knows of the past is in one column. "
            "It can be copied: two samples go on from one state, and nothing is read again.",
        )
        with gr.Row():
            prompt = gr.Textbox("The history of the river", label="Prompt (of the text model)",
                                max_length=CHARACTERS, scale=3, elem_id="watch-prompt")  # fmt: skip
            seed = seed_box("inside-seed")
            temperature = gr.Slider(0, 1.5, 0.8, step=0.05, label="Fork temperature", scale=2)
        with gr.Row():
            look = gr.Button("Watch the state", variant="primary", elem_id="watch-go")
            split = gr.Button("Fork the text model", elem_id="fork-go")
        heat = live("heat", label="Levels of the state", elem_id="watch-map")
        facts = status_line("watch-status")
        with gr.Row(elem_classes=["fork", "abreast"]):
            first = live("tokens", label="First continuation", elem_id="fork-first")
            second = live("tokens", label="Second continuation", elem_id="fork-second")
        line = status_line("fork-status")
        look.click(self.watch, [model, prompt, seed], [heat, facts], api_name="state", **SHARED)
        split.click(self.fork, [prompt, temperature, seed], [first, second, line],
                    api_name="fork", **SHARED)  # fmt: skip


def _section(title: str, text: str) -> None:
    gr.Markdown(f"## {title}\n{text}", elem_classes="section")


def _modality(model: str) -> str:
    if model not in MODELS:
        raise ValueError(f"the model must be one of {', '.join(MODELS)}")
    return MODELS[model]


def _last_tokens(made: Any) -> list[int]:
    samples = made.visit.samples() if made is not None else []
    return [*samples[0].plan.tokens, *samples[0].tokens] if samples else []


def _race_chart(model: str, laps: list[anatomy.Lap]) -> Chart:
    runners: list[tuple[str, int, Callable[[anatomy.Lap], float | None]]] = [
        ("recurrence, one step", 1, lambda lap: lap.step),
        ("convolution of all", 2, lambda lap: lap.convolution),
        ("GPT-2 with cache", 3, lambda lap: lap.transformer),
    ]
    series = []
    for name, colour, time_of in runners:
        points = [[lap.length, value] for lap in laps if (value := time_of(lap)) is not None]
        if points:
            series.append({"name": name, "kind": "marks", "colour": colour, "points": points})
    return {
        "title": f"{model}: one more token, milliseconds",
        "x": {"label": "tokens before it", "log": True,
              "ticks": [lap.length for lap in laps]},
        "y": {"label": "ms", "log": True},
        "series": series,
    }  # fmt: skip


def _lap_told(lap: anatomy.Lap) -> str:
    told = (
        f"after {lap.length:,} tokens: step {lap.step:.3f} ms, convolution "
        f"{lap.convolution:.1f} ms ({lap.convolution / lap.step:,.0f} ×)"
    )
    if lap.transformer is None:
        return told + "; GPT-2 is not here (the extra benchmark brings it)"
    return f"{told}, GPT-2 {lap.transformer:.2f} ms ({lap.transformer / lap.step:,.0f} ×)"
