"""The web app and the entry of the Space: write, draw and speak with the shipped models."""

import os
import threading
import time
from collections.abc import Iterator
from functools import cache

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np

import genssm
from genssm.files import grid
from genssm.pipeline import Pipeline, new_seed

UPDATE = 1 / 15  # seconds between updates of the page
LIMITS = {"tokens": 400, "pictures": 9, "characters": 2000}

_loading = threading.Lock()


@cache
def _load(name: str) -> Pipeline:
    return genssm.load(name)


def load(name: str) -> Pipeline:
    """One pipeline per model, loaded on first use and shared by all visitors."""
    with _loading:
        return _load(name)


def _seed(seed: float | None) -> int:
    return new_seed() if seed is None or seed < 0 else int(seed)


def _status(session, started: float) -> str:
    drawn = sum(len(s.tokens) for s in session.samples())
    seconds = time.perf_counter() - started
    return f"seed {session.seed} · {drawn} tokens · {drawn / max(seconds, 1e-9):.0f} tokens/s"


def write(prompt: str, tokens: int, temperature: float, seed: float) -> Iterator[tuple[str, str]]:
    """Continue a text; yields the text so far and a status line."""
    if len(prompt) > LIMITS["characters"]:
        raise gr.Error(f"A prompt holds at most {LIMITS['characters']} characters.")
    pipe = load("wiki")
    started = updated = time.perf_counter()
    session = pipe.start(
        prompt or None,
        max_tokens=min(int(tokens), LIMITS["tokens"]),
        temperature=temperature,
        seed=_seed(seed),
    )
    text = prompt
    for _, piece in session:
        text += piece
        if time.perf_counter() - updated > UPDATE:
            updated = time.perf_counter()
            yield text, _status(session, started)
    yield text, _status(session, started)


def paint(
    label: str, count: int, temperature: float, seed: float
) -> Iterator[tuple[np.ndarray, str]]:
    """Draw pictures of a class; yields the grid so far, enlarged, and a status line."""
    pipe = load("cifar10")
    started = updated = time.perf_counter()
    session = pipe.start(
        label,
        count=min(int(count), LIMITS["pictures"]),
        temperature=temperature,
        seed=_seed(seed),
    )

    def page() -> np.ndarray:
        return np.kron(grid([s.raw for s in session.samples()]), np.ones((6, 6, 1), np.uint8))

    for _ in session:
        if time.perf_counter() - updated > 0.3:
            updated = time.perf_counter()
            yield page(), _status(session, started)
    yield page(), _status(session, started)


def speak(digit: str, temperature: float, seed: float) -> tuple[tuple[int, np.ndarray], str]:
    """Say a digit; returns (rate, int16 samples) and a status line."""
    pipe = load("digits")
    started = time.perf_counter()
    session = pipe.start(digit, temperature=temperature, seed=_seed(seed))
    wave = session.run()[0].raw
    rate = pipe.config["codec"]["rate"]
    return (rate, np.round(wave * 32767).astype(np.int16)), _status(session, started)


def build() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="genssm", analytics_enabled=False) as page:
        gr.Markdown(
            "# genssm\nState space models that write, draw and speak: trained by convolution, "
            "sampled by recurrence, constant memory per token."
        )
        with gr.Tab("Write"):
            prompt = gr.Textbox("The history of the river", label="Prompt", lines=2)
            tokens = gr.Slider(10, LIMITS["tokens"], 150, step=10, label="Tokens")
            heat = gr.Slider(0, 1.5, 0.8, step=0.05, label="Temperature")
            seed = gr.Number(-1, label="Seed (-1: a new one)", precision=0)
            go, stop = gr.Button("Write", variant="primary"), gr.Button("Stop")
            text = gr.Textbox(label="Text", lines=8)
            status = gr.Textbox(label="Status", interactive=False)
            event = go.click(write, [prompt, tokens, heat, seed], [text, status], api_name="write",
                             show_progress="hidden")  # fmt: skip
            stop.click(None, cancels=[event])
        with gr.Tab("Draw"):
            labels = [*load("cifar10").codec.labels, "any"]
            label = gr.Radio(labels, value="any", label="Class")
            count = gr.Slider(1, LIMITS["pictures"], 4, step=1, label="Pictures")
            heat = gr.Slider(0.5, 1.2, 0.98, step=0.01, label="Temperature")
            seed = gr.Number(-1, label="Seed (-1: a new one)", precision=0)
            go, stop = gr.Button("Draw", variant="primary"), gr.Button("Stop")
            pictures = gr.Image(label="Pictures", format="png")
            status = gr.Textbox(label="Status", interactive=False)
            event = go.click(paint, [label, count, heat, seed], [pictures, status],
                             api_name="draw", show_progress="hidden")  # fmt: skip
            stop.click(None, cancels=[event])
        with gr.Tab("Speak"):
            digit = gr.Radio(list("0123456789"), value="7", label="Digit")
            heat = gr.Slider(0.5, 1.2, 0.95, step=0.01, label="Temperature")
            seed = gr.Number(-1, label="Seed (-1: a new one)", precision=0)
            go = gr.Button("Speak", variant="primary")
            clip = gr.Audio(label="Sound")
            status = gr.Textbox(label="Status", interactive=False)
            go.click(speak, [digit, heat, seed], [clip, status], api_name="speak")
    return page.queue(max_size=32, default_concurrency_limit=2)


if __name__ == "__main__":
    build().launch(show_error=False)
