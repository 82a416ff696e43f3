"""The tab that speaks: sound that is heard and seen while it is made."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from genssm import files
from genssm.codec import ANY, Audio, Codec
from genssm.interface import uploads
from genssm.interface.components import (
    PRIVATE,
    for_programs,
    kept,
    last_made,
    live,
    on_page,
    seed_row,
    status_line,
)
from genssm.interface.courtesy import polite
from genssm.interface.growth import Growth, packed_sound
from genssm.interface.house import (
    LARGEST_SEED,
    House,
    Visit,
    chosen_seed,
    updates,
    within,
)
from genssm.pipeline import Pipeline
from genssm.request import DEFAULTS
from genssm.session import Sample

DIGITS = 6  # the most of one number
SECONDS = 4.0  # the most of one sound, and of a clip that is continued
PAUSE = 0.12  # seconds between two digits
SETTINGS = DEFAULTS["audio"]
RATES = {"× 0.5": 2.0, "× 1": 1.0, "× 2": 0.5}  # of the output, and what scales Δ
MARGIN = 1.15  # by which sampling must be faster than sound to be heard at once

Update = tuple[str | None, dict[str, Any], str, "Spoken"]


@dataclass
class Spoken:
    """What a visitor hears: a request, of one digit after another."""

    visit: Visit
    seed: int
    rate: float
    clip: bool  # whether it goes on from one
    made: list[Sample]  # the digits before the one under way


class Speaker:
    """What the tab does, and the tab."""

    def __init__(self, house: House) -> None:
        self.house = house
        classes = self.codec().classes
        self.numbers = bool(classes) and all(len(c) == 1 and c.isdigit() for c in classes)

    def codec(self, rate: float = 1.0) -> Audio:
        codec = self.house.pipe("audio", rate).codec
        assert isinstance(codec, Audio)
        return codec

    def speak(
        self,
        words: str = "407",
        speaker: str = ANY,
        seconds: float = 1.5,
        duration: float = 0,
        temperature: float = SETTINGS.temperature,
        output_rate: str = "× 1",
        upload: str | None = None,
        seed: float | None = -1,
    ) -> Iterator[Update]:
        """Say a number digit by digit, or continue a clip.

        ``duration``: seconds that each sound is to last; 0 leaves it to the model.
        """
        yield from self._speak(
            Visit(), words, speaker, seconds, duration, temperature, output_rate, upload, seed
        )

    @polite
    def _speak(
        self, visit: Visit, words: str | None, speaker: str, seconds: float, duration: float,
        temperature: float, output_rate: str, upload: str | None, seed: float | None,
    ) -> Iterator[Update]:  # fmt: skip
        if output_rate not in RATES:
            raise ValueError(f"the output rate must be one of {', '.join(RATES)}")
        rate = RATES[output_rate]
        codec = self.codec(rate)
        length = within(seconds, 0.1, SECONDS, "the length in seconds")
        settings: dict[str, Any] = {
            "temperature": float(within(temperature, 0, 1.5, "temperature")),
            "max_tokens": int(length * codec.rate),
        }
        if within(duration, 0, SECONDS, "the duration in seconds"):
            settings["duration"] = float(duration)
        if upload is not None:
            prompts: list[Any] = [heard(uploads.clip(upload, codec, SECONDS), codec)]
        else:
            prompts = self._labels(words or "", speaker)
        yield from self._spoken(visit, prompts, rate, chosen_seed(seed), settings)

    def _labels(self, words: str, speaker: str) -> list[str]:
        codec = self.codec()
        parts = [words]
        if self.numbers:
            parts = [c for c in words if c in codec.classes]
            if not 1 <= len(parts) <= DIGITS or len(parts) != len(words.strip()):
                raise ValueError(f"give a number of 1 to {DIGITS} digits, such as 407")
        elif words not in (*codec.classes, ANY):
            raise ValueError(f"the word must be one of {', '.join((ANY, *codec.classes))}")
        if speaker == ANY:
            return parts
        if speaker not in speakers(codec):
            raise ValueError(f"the speaker must be one of {', '.join((ANY, *speakers(codec)))}")
        return [f"{p}_{speaker}" if f"{p}_{speaker}" in codec.labels else p for p in parts]

    def _spoken(
        self, visit: Visit, prompts: list[Any], rate: float, seed: int, settings: dict[str, Any]
    ) -> Iterator[Update]:
        codec, pipe = self.codec(rate), self.house.pipe("audio", rate)
        clip = prompts[0] if isinstance(prompts[0], np.ndarray) else None
        layout = {
            "rate": codec.rate,
            "seam": 0 if clip is None else len(clip),
            "span": len(prompts) * 0.6 if clip is None else len(clip) / codec.rate + 0.5,
        }
        growth, pace = Growth([layout]), _Pace(codec.rate)
        if clip is not None:
            growth.message([packed_sound(clip)])
        spoken = Spoken(visit, seed, rate, clip is not None, [])
        for i, prompt in enumerate(prompts):
            if i and not visit.left:
                spoken.made += visit.samples()
                visit.job = None
                growth.message([packed_sound(np.zeros(round(PAUSE * codec.rate)))])
            if visit.left:
                break
            for told in self.house.begin(
                visit, "audio", prompt, rate=rate, seed=(seed + i) % (LARGEST_SEED + 1), **settings
            ):
                yield None, growth.message() | {"play": False}, told, spoken
            yield None, growth.message() | {"play": pace.live}, self._status(spoken), spoken
            if visit.job is None:
                break
            for pieces in updates(visit.job):
                blocks = [block for _, block in pieces]
                pace.drawn(sum(map(len, blocks)))
                news = [packed_sound(block) for block in blocks]
                message = growth.message(news) | {"play": pace.live}
                yield None, message, self._status(spoken), spoken
        visit.end()
        made = [*spoken.made, *visit.samples()]
        if made and not visit.left and not any(len(sample.raw) for sample in made):
            gr.Warning("The model ended at once, without a sound. Try another seed, or × 1.")
        whole = growth.whole(play=None if visit.left else pace.live)  # None: in silence
        content = sound_file(pipe, made, prompts) if made else None
        yield content, whole, self._status(spoken), spoken

    def _status(self, spoken: Spoken) -> str:
        samples, rate = spoken.visit.samples(), spoken.rate
        extra = ""
        if samples and samples[0].tokens:
            hertz = self.codec(rate).rate
            factor = len(samples[0].tokens) / max(samples[0].seconds, 1e-9) / hertz
            extra = f"{hertz / 1000:g} kHz, {factor:.1f} × real time"
            extra += ", goes on from your clip" if spoken.clip else ""
        return self.house.status(spoken.visit, "audio", rate, extra, spoken.seed, spoken.made)

    def build(self) -> gr.State:
        """The tab; returns what it holds of the visitor's last sound."""
        codec = self.codec()
        known = speakers(codec)
        with gr.Row(elem_classes="studio"):
            with gr.Column(scale=2, min_width=300):
                if self.numbers:
                    words: gr.Textbox | gr.Dropdown = gr.Textbox(
                        "407", label=f"Number, up to {DIGITS} digits", max_length=12,
                        elem_id="number",
                    )  # fmt: skip
                    gr.Examples([["7"], ["42"], ["407"], ["1984"]], [words], label="Try")
                else:
                    words = gr.Dropdown([ANY, *codec.classes], value=ANY, label="Word")
                speaker = gr.Radio([ANY, *known], value=ANY, label="Speaker", elem_classes="chips",
                                   visible=bool(known), elem_id="speaker")  # fmt: skip
                with gr.Row():
                    go = gr.Button("Speak", variant="primary", elem_id="speak-go")
                    end = gr.Button("Stop", elem_id="speak-stop", min_width=80)
                with gr.Accordion("Continue a clip of yours", open=False):
                    upload = gr.File(
                        label=f"Sound (WAV, FLAC or OGG, up to {uploads.SECONDS:g} s; the last "
                        f"{SECONDS:g} s are continued)",
                        height=165, elem_id="speak-upload",
                    )  # fmt: skip
                with gr.Accordion("Settings", open=False):
                    seconds = gr.Slider(0.1, SECONDS, 1.5, step=0.1, label="Longest, in seconds")
                    duration = gr.Slider(
                        0, 1, 0, step=0.05, visible=bool(codec.durations),
                        label="Duration of each, in seconds (0: the model chooses)",
                    )  # fmt: skip
                    heat = gr.Slider(0, 1.5, SETTINGS.temperature, step=0.01, label="Temperature")
                    rate = gr.Radio(
                        list(RATES),
                        value="× 1",
                        elem_classes="chips",
                        label=f"Output rate (model: {codec.rate / 1000:g} kHz, best at × 1)",
                    )
                    seed, reuse = seed_row("speak-seed")
            with gr.Column(scale=3, min_width=320):
                page = live("sound", label="Blocks of sound", elem_id="speak-page")
                status = status_line("speak-status")
                save = gr.DownloadButton("Download WAV", elem_id="speak-save", size="sm")
        spoken = last_made()
        inputs, outputs = (
            [words, speaker, seconds, duration, heat, rate, upload, seed],
            [save, page, status, spoken],
        )
        begins = [go.click, *([words.submit] if isinstance(words, gr.Textbox) else [])]
        on_page(self.house, "speak", begins, end, self._speak, inputs, outputs)
        for_programs(self.speak, inputs, outputs, "speak")
        end.click(None, js="() => document.querySelector('#speak-page .live')"
                           ".dispatchEvent(new Event('hush'))")  # fmt: skip
        reuse.click(lambda s: s.seed if s else -1, [spoken], [seed], queue=False, **PRIVATE)
        return spoken


class _Pace:
    """Whether sound is made faster than it is heard."""

    def __init__(self, rate: int) -> None:
        self.rate, self.samples, self.live = rate, 0, False
        self._began: float | None = None

    def drawn(self, samples: int) -> None:
        now = time.perf_counter()
        if self._began is None:  # what came before was waiting and reading
            self._began = now
            return
        self.samples += samples
        seconds = now - self._began
        if self.samples >= self.rate / 10:
            self.live = self.samples / self.rate >= MARGIN * seconds


def speakers(codec: Codec) -> list[str]:
    """The speakers that a model knows: what the labels within a class add to its name."""
    found = []
    for label in codec.labels:
        whole = codec.broader(label)
        if whole is not None and (name := label.removeprefix(f"{whole}_")) not in found:
            found.append(name)
    return found


def heard(wave: np.ndarray, codec: Audio) -> np.ndarray:
    """A clip as the model hears it, so that it is again the same when it is repeated."""
    return codec.decode(codec.encode(wave))


def sound_file(pipe: Pipeline, samples: Sequence[Sample], prompts: Sequence[Any]) -> str:
    """Samples in a row as a WAV file with the recipe inside."""
    prompt = " ".join(prompts) if isinstance(prompts[0], str) else None
    content = files.sounds_in_a_row(pipe, samples, PAUSE, prompt)
    return kept(f"{Path(pipe.name).name}-{samples[0].seed}.wav", content)
