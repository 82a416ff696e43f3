"""The web app and the entry of the Space: write, draw and speak with the shipped models."""

import html
import os
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np
import torch
from gradio.themes import Default

import genssm
from genssm.codec import Codec
from genssm.conversion import certify
from genssm.engine import read
from genssm.files import grid, read_prompt, spectrogram
from genssm.pipeline import Sample, new_seed
from genssm.scheduler import BusyError, Job, Scheduler

UPDATES = 12  # of the page, a second
TOKENS, PICTURES, DIGITS, CHARACTERS = 400, 9, 6, 2000  # the most of one request
CLIP = 4  # seconds of an uploaded clip that are read, the last ones
SECONDS = 90.0  # after which a request ends with what it has
SCALE = 6  # screen pixels per pixel
TINT = 0.35  # opacity of the most surprising token

THEME = Default(primary_hue="orange", neutral_hue="slate", font=["system-ui"]).set(
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    block_title_text_color="*neutral_800",
    block_label_text_color="*neutral_700",
    body_text_color_subdued="*neutral_600",
    block_title_text_color_dark="*neutral_100",
    block_label_text_color_dark="*neutral_200",
    body_text_color_subdued_dark="*neutral_300",
)
CSS = """
.gradio-container { width: 100%; max-width: 1100px !important; margin: 0 auto; }
#text-out { min-height: 14em; padding: 1em; line-height: 1.7; font-size: 1.05em; }
#text-out .told { opacity: .75 }
#pictures img, #spectrum img { image-rendering: pixelated; }
"""

_loading = threading.Lock()


@cache
def _scheduler(name: str) -> Scheduler:
    return Scheduler(genssm.load(name), limit=16)


def scheduler(name: str) -> Scheduler:
    """One for each model, made on first use and shared by all visitors."""
    with _loading:
        return _scheduler(name)


def _seed(seed: float | None) -> int:
    """What the page's box means: none, or a negative number, is a new seed."""
    return new_seed() if seed is None or seed < 0 else int(seed)


def _submit(name: str, prompt: Any, seed: float | None, **settings: Any) -> Job:
    """Begin a request; whatever is wrong with it becomes one sentence on the page."""
    try:
        return scheduler(name).submit(prompt, seconds=SECONDS, seed=_seed(seed), **settings)
    except (ValueError, BusyError) as error:
        raise gr.Error(f"{str(error)[0].upper()}{str(error)[1:]}.", print_exception=False) from None


def _updates(job: Job) -> Iterator[None]:
    """When there is something new to show, at most ``UPDATES`` times a second; and at the end."""
    shown = time.perf_counter()
    for _ in job:
        if time.perf_counter() - shown > 1 / UPDATES:
            shown = time.perf_counter()
            yield
    yield


def _status(name: str, samples: list[Sample]) -> str:
    if not samples:
        return "Nothing was drawn."
    pipe = scheduler(name).pipe
    drawn = sum(len(s.tokens) for s in samples)
    speed = drawn / max(samples[0].seconds, 1e-9)
    return (
        f"seed {samples[0].seed} · {drawn:,} tokens · {speed:,.0f} tokens/s · "
        f"state {pipe.recurrent.state_bytes() / 1024:.0f} KiB, constant · "
        f"{pipe.engine_name}"
    )


def stop(job: Job | None) -> None:
    """End a request; what was drawn stays."""
    if job is not None:
        job.cancel()


# Write


def coloured(codec: Codec, sample: Sample) -> str:
    """What was drawn as HTML, each piece tinted by its surprise, with its bits as a tooltip."""
    decoder, spans, bits = codec.decoder(), [], 0.0
    for token, surprise in zip(sample.tokens, sample.token_bits, strict=True):
        bits += surprise
        piece = decoder.push(token)
        if piece is not None:
            tint = TINT * min(bits / 12, 1.0)
            spans.append(
                f'<span title="{bits:.1f} bits" style="background:rgba(234,88,12,{tint:.2f})">'
                f"{html.escape(piece)}</span>"
            )
            bits = 0.0
    return "".join(spans).replace("\n", "<br>")


def _told(text: str) -> str:
    escaped = html.escape(text).replace("\n", "<br>")
    return f'<span class="told">{escaped}</span>'


Written = tuple[str, str, str, Job]


def write(
    prompt: str, tokens: int = 150, temperature: float = 0.8, seed: float | None = -1
) -> Iterator[Written]:
    """Continue a text: yields HTML, the plain text, a status line and the request itself."""
    if len(prompt) > CHARACTERS:
        raise gr.Error(f"A prompt holds at most {CHARACTERS} characters.", print_exception=False)
    job = _submit(
        "wiki", prompt or None, seed, max_tokens=min(int(tokens), TOKENS), temperature=temperature
    )
    yield from _written(job, _told(prompt))


def write_on(
    before: Job | None, page: str, tokens: int = 150, temperature: float = 0.8
) -> Iterator[Written]:
    """Go on where the last text ended, from the model's state: nothing is read again."""
    if before is None or not before.samples():
        raise gr.Error("There is nothing to continue yet; write first.", print_exception=False)
    job = _submit(
        "wiki", None, None, state=before.reading(), max_tokens=min(int(tokens), TOKENS),
        temperature=temperature,
    )  # fmt: skip
    yield from _written(job, page)


def _written(job: Job, before: str) -> Iterator[Written]:
    codec = scheduler("wiki").pipe.codec
    for _ in _updates(job):
        samples = job.samples()
        text = samples[0].raw if samples else ""
        page = before + (coloured(codec, samples[0]) if samples else "")
        yield page, text, _status("wiki", samples), job


# Draw


def paint(
    label: str = "any",
    count: int = 4,
    temperature: float = 0.92,
    guidance: float = 1.0,
    upload: str | None = None,
    rows: int = 16,
    seed: float | None = -1,
) -> Iterator[tuple[np.ndarray | None, str, Job]]:
    """Draw pictures of a class, or complete a picture of which the upper rows are kept."""
    settings: dict[str, Any] = {}
    prompt: Any = label
    if upload is not None:
        prompt = _uploaded("cifar10", upload, "picture")
        settings = {"keep_rows": int(rows), "label": label}
    job = _submit(
        "cifar10", prompt, seed, count=min(int(count), PICTURES), temperature=temperature,
        guidance=guidance if label != "any" else 1.0, **settings,
    )  # fmt: skip
    for _ in _updates(job):
        pictures = [s.raw for s in job.samples()]
        if upload is not None:
            pictures.insert(0, prompt)
        page = np.kron(grid(pictures), np.ones((SCALE, SCALE, 1), np.uint8)) if pictures else None
        yield page, _status("cifar10", job.samples()), job


def _uploaded(name: str, path: str, kind: str) -> Any:
    try:
        return read_prompt(scheduler(name).pipe.codec, path, sys.stdin)
    except (ValueError, OSError):
        raise gr.Error(f"This file is no {kind} that can be read.", print_exception=False) from None


# Speak


def spectrum_page(wave: np.ndarray) -> np.ndarray:
    """The spectrogram of a clip as wide as the page, uint8 (height, width, 3)."""
    picture = spectrogram(np.pad(wave, (0, max(0, 512 - len(wave)))), max(32, len(wave) // 800))
    return np.repeat(np.array(picture.resize((880, 200)))[..., None], 3, 2)


def speak(
    number: str = "407",
    temperature: float = 0.95,
    upload: str | None = None,
    seed: float | None = -1,
) -> Iterator[tuple[tuple[int, np.ndarray] | None, np.ndarray | None, str, Job | None]]:
    """Say a number digit by digit, or continue a clip: sound at the end, its spectrogram live."""
    digits = [c for c in number if c.isdigit()]
    if upload is None and not 1 <= len(digits) <= DIGITS:
        raise gr.Error(f"Give a number of 1 to {DIGITS} digits.", print_exception=False)
    first = _seed(seed)
    hertz = scheduler("digits").pipe.config["codec"]["rate"]
    prompts: list[Any] = digits
    if upload is not None:
        prompts = [_uploaded("digits", upload, "sound")[-CLIP * hertz :]]
    said: list[np.ndarray] = []
    samples: list[Sample] = []
    job = None
    for i, digit in enumerate(prompts):
        job = _submit("digits", digit, first + i, temperature=temperature)
        for _ in _updates(job):
            samples = job.samples()
            if samples:
                wave = np.concatenate([*said, samples[0].raw])
                yield None, spectrum_page(wave), _status("digits", samples), job
        if samples:
            said += [samples[0].raw, np.zeros(hertz // 8, np.float32)]
            if samples[0].finish == "interrupted":
                break
    if said:
        wave = np.concatenate(said)
        sound = np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16)
        yield (hertz, sound), spectrum_page(wave), _status("digits", samples), job


# Inside


def look_inside(name: str) -> tuple[str, list[list[Any]]]:
    """How exactly the views of a model agree on real data, and what each layer remembers."""
    pipe = scheduler(name).pipe
    report = certify(pipe.model, pipe.recurrent, torch.tensor(pipe.config["probe"])[:256])
    facts = (
        f"Over {report.tokens} real tokens, the logits of convolution and recurrence differ by at "
        f"most {report.step:.1e} when stepping and {report.prefill:.1e} when reading in parallel; "
        f"the predictions differ by {abs(report.divergence):.0e} bits per token."
    )
    rows: list[list[Any]] = [
        [i, f"{r.difference:.1e}", f"{r.spectral_radius:.5f}", *(f"{t:,.0f}" for t in r.half_lives)]
        for i, r in enumerate(report.layers)
    ]
    return facts, rows


@torch.no_grad()
def race(name: str) -> Iterator[list[list[Any]]]:
    """Milliseconds of one more token after L tokens: one step against convolving all again."""
    pipe, rows = scheduler(name).pipe, []
    for length in (256, 512, 1024, 2048):
        tokens = torch.tensor(pipe.config["probe"]).repeat(2)[None, :length]
        started = time.perf_counter()
        pipe.model(tokens)
        convolved = 1000 * (time.perf_counter() - started)
        state = read(pipe.recurrent, tokens[0])
        sample = pipe.start(state=state, max_tokens=64, seed=1).run()[0]
        stepped = 1000 * sample.seconds / max(1, len(sample.tokens))
        rows.append([length, f"{stepped:.2f}", f"{convolved:.1f}", f"{convolved / stepped:,.0f}×"])
        yield rows


# The page


def build() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="genssm", analytics_enabled=False) as page:
        gr.Markdown(
            "# genssm\nState space models that write, draw and speak: trained by convolution, "
            "sampled by recurrence, in constant time and memory per token."
        )
        with gr.Tab("Write"):
            _write_tab()
        with gr.Tab("Draw"):
            _draw_tab()
        with gr.Tab("Speak"):
            _speak_tab()
        with gr.Tab("Inside"):
            _inside_tab()
    return page.queue(max_size=32, default_concurrency_limit=8)


def _seed_box() -> gr.Number:
    return gr.Number(-1, label="Seed (-1: a new one)", precision=0)


def _status_box() -> gr.Textbox:
    return gr.Textbox(label="Status", interactive=False)


def _write_tab() -> None:
    prompt = gr.Textbox("The history of the river", label="Prompt", lines=2, elem_id="prompt")
    gr.Examples([["The first bridge"], ["In 1912, the city"], ["The species was"]], [prompt])
    with gr.Row():
        tokens = gr.Slider(10, TOKENS, 150, step=10, label="Tokens")
        heat = gr.Slider(0, 1.5, 0.8, step=0.05, label="Temperature")
        seed = _seed_box()
    with gr.Row():
        go = gr.Button("Write", variant="primary", elem_id="write")
        more, end = gr.Button("Continue", elem_id="continue"), gr.Button("Stop", elem_id="stop")
    page = gr.HTML(elem_id="text-out", label="Text, tinted by surprise")
    text = gr.Textbox(label="Text", visible=False)
    status, job = _status_box(), gr.State()
    outputs = [page, text, status, job]
    go.click(write, [prompt, tokens, heat, seed], outputs, api_name="write",
             show_progress="hidden", concurrency_id="sample")  # fmt: skip
    more.click(write_on, [job, page, tokens, heat], outputs, api_visibility="private",
               show_progress="hidden", concurrency_id="sample")  # fmt: skip
    end.click(stop, [job], None, api_visibility="private", queue=False)


def _draw_tab() -> None:
    labels = [*scheduler("cifar10").pipe.codec.labels, "any"]
    label = gr.Radio(labels, value="any", label="Class")
    with gr.Row():
        count = gr.Slider(1, PICTURES, 4, step=1, label="Pictures")
        heat = gr.Slider(0.5, 1.2, 0.92, step=0.01, label="Temperature")
        guidance = gr.Slider(1, 4, 1, step=0.1, label="Guidance (stresses the class)")
        seed = _seed_box()
    with gr.Row():
        upload = gr.File(label="Picture to complete (optional)", file_types=["image"])
        rows = gr.Slider(1, 31, 16, step=1, label="Rows of it to keep")
    with gr.Row():
        go = gr.Button("Draw", variant="primary", elem_id="draw")
        end = gr.Button("Stop")
    pictures = gr.Image(label="Pictures", format="png", elem_id="pictures", height=420)
    status, job = _status_box(), gr.State()
    go.click(paint, [label, count, heat, guidance, upload, rows, seed], [pictures, status, job],
             api_name="draw", show_progress="hidden", concurrency_id="sample")  # fmt: skip
    end.click(stop, [job], None, api_visibility="private", queue=False)


def _speak_tab() -> None:
    with gr.Row():
        number = gr.Textbox("407", label=f"Number, up to {DIGITS} digits", max_length=20)
        heat = gr.Slider(0.5, 1.2, 0.95, step=0.01, label="Temperature")
        seed = _seed_box()
    upload = gr.File(label="Clip to continue (optional)", file_types=[".wav", ".flac", ".ogg"])
    with gr.Row():
        go = gr.Button("Speak", variant="primary", elem_id="speak")
        end = gr.Button("Stop")
    clip = gr.Audio(label="Sound", interactive=False)
    spectrum = gr.Image(label="Spectrogram, 0 to 4 kHz", elem_id="spectrum", height=240)
    status, job = _status_box(), gr.State()
    go.click(speak, [number, heat, upload, seed], [clip, spectrum, status, job],
             api_name="speak", show_progress="hidden", concurrency_id="sample")  # fmt: skip
    end.click(stop, [job], None, api_visibility="private", queue=False)


def _inside_tab() -> None:
    name = gr.Radio(["wiki", "cifar10", "digits"], value="wiki", label="Model")
    with gr.Row():
        look = gr.Button("Compare the views", variant="primary", elem_id="inside")
        run = gr.Button("Race: one step against convolving all again", elem_id="race")
    facts = gr.Markdown()
    memory = ["half-life: shortest", "median", "longest (tokens)"]
    layers = gr.Dataframe(
        headers=["layer", "difference", "spectral radius", *memory], interactive=False,
        label="Layers",
    )  # fmt: skip
    times = gr.Dataframe(
        headers=["tokens before", "step, ms", "convolution, ms", "ratio"], interactive=False,
        label="One more token",
    )  # fmt: skip
    look.click(look_inside, [name], [facts, layers], api_name="inspect", concurrency_limit=1)
    run.click(race, [name], [times], api_name="race", concurrency_limit=1,
              show_progress="hidden")  # fmt: skip


if __name__ == "__main__":
    build().launch(theme=THEME, css=CSS, show_error=False, max_file_size="2mb")
