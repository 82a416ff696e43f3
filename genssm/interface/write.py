"""The tab that writes: text as it is drawn, tinted by surprise, continued from its state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from genssm.codec import Decoder
from genssm.interface.components import (
    ON_PAGE,
    PRIVATE,
    for_programs,
    last_made,
    last_seed,
    live,
    on_page,
    seed_row,
    status_line,
)
from genssm.interface.courtesy import alone, polite
from genssm.interface.growth import Growth
from genssm.interface.house import House, Visit, updates, within
from genssm.request import DEFAULTS

TOKENS = 600  # the most of one request
CHARACTERS = 4000  # of a prompt
SETTINGS = DEFAULTS["text"]
EXAMPLES = ("The history of the river", "The first bridge", "In 1912, the city", "The species is")

Update = tuple[str, dict[str, Any], str, "Written"]


@dataclass(frozen=True)
class Written:
    """What a visitor has on the page, to go on from."""

    visit: Visit
    pieces: list[list[Any]]  # [text, bits] as shown; bits None for the prompt
    begun: int  # how many of them were there before the visit


class Writer:
    """What the tab does, and the tab."""

    def __init__(self, house: House) -> None:
        self.house = house

    def write(
        self,
        prompt: str = EXAMPLES[0],
        tokens: float = 150,
        temperature: float = SETTINGS.temperature,
        top_p: float = SETTINGS.top_p,
        repetition_penalty: float = 1.0,
        seed: float | None = -1,
    ) -> Iterator[Update]:
        """Continue a text: the text, its pieces with their bits, a line of facts."""
        yield from self._write(
            Visit(), prompt, tokens, temperature, top_p, repetition_penalty, seed
        )

    @polite
    def _write(
        self, visit: Visit, prompt: str | None, tokens: float, temperature: float, top_p: float,
        repetition_penalty: float, seed: float | None,
    ) -> Iterator[Update]:  # fmt: skip
        prompt = prompt or ""  # programs may send null
        if len(prompt) > CHARACTERS:
            raise ValueError(
                f"a prompt may have {CHARACTERS} characters, this one has {len(prompt)}"
            )
        settings = _settings(tokens, temperature, top_p, repetition_penalty)
        pieces = [[prompt, None]] if prompt else []
        yield from self._drawn(visit, pieces, prompt or None, seed=seed, **settings)

    def go_on(
        self,
        before: Written | None,
        tokens: float = 150,
        temperature: float = SETTINGS.temperature,
        top_p: float = SETTINGS.top_p,
        repetition_penalty: float = 1.0,
        seed: float | None = -1,
    ) -> Iterator[Update]:
        """Continue the last text from the model's state; nothing is read again."""
        yield from self._go_on(
            Visit(), before, tokens, temperature, top_p, repetition_penalty, seed
        )

    @polite
    def _go_on(
        self, visit: Visit, before: Written | None, tokens: float, temperature: float,
        top_p: float, repetition_penalty: float, seed: float | None,
    ) -> Iterator[Update]:  # fmt: skip
        if before is None or before.visit.job is None or not before.visit.samples():
            raise ValueError("there is nothing to continue yet; generate a text first")
        settings = _settings(tokens, temperature, top_p, repetition_penalty)
        before.visit.stop()
        before.visit.job.run()  # to its end, which may be ahead of what was shown
        pieces = before.pieces[: before.begun] + self._reader(before.visit).news()
        state = before.visit.job.reading()
        yield from self._drawn(visit, pieces, None, state=state, seed=seed, **settings)

    def _reader(self, visit: Visit) -> PieceReader:
        return PieceReader(self.house.pipe("text").codec.decoder(), visit)

    def _drawn(
        self, visit: Visit, pieces: list[list[Any]], prompt: str | None, **settings: Any
    ) -> Iterator[Update]:
        growth, reader = Growth(pieces), self._reader(visit)
        written = Written(visit, growth.items, len(pieces))

        def update(news: list[list[Any]], status: str) -> Update:
            message = growth.message(news)
            return _joined(growth.items), message, status, written

        settings["snapshot_every"] = TOKENS  # so that what goes on reads nothing again
        for told in self.house.begin(visit, "text", prompt, **settings):
            yield update([], told)
        yield update([], self.house.status(visit, "text"))
        try:
            if visit.job is not None:
                for _ in updates(visit.job):
                    yield update(reader.news(), self.house.status(visit, "text"))
        finally:
            growth.message(reader.news())  # so that a Continue has all, whatever ended this
        yield _joined(growth.items), growth.whole(), self.house.status(visit, "text"), written

    def build(self) -> gr.State:
        """The tab; returns what it holds of the visitor's last text."""
        with gr.Row(elem_classes="studio"):
            with gr.Column(scale=2, min_width=300):
                prompt = gr.Textbox(
                    EXAMPLES[0], label="Prompt", lines=4, max_length=CHARACTERS, elem_id="prompt"
                )
                gr.Examples([[e] for e in EXAMPLES], [prompt], label="Try")
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="write-go", min_width=96)
                    end = gr.Button("Stop", elem_id="write-stop", min_width=70)
                    more = gr.Button("Continue", elem_id="write-more", min_width=96)
                with gr.Accordion("Settings", open=False):
                    tokens = gr.Slider(10, TOKENS, 200, step=10, label="Tokens")
                    heat = gr.Slider(0, 1.5, SETTINGS.temperature, step=0.05, label="Temperature")
                    top_p = gr.Slider(0.05, 1, SETTINGS.top_p, step=0.05, label="Top-p")
                    penalty = gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty")
                    seed, reuse = seed_row("write-seed")
            with gr.Column(scale=3, min_width=320):
                page = live("tokens", label="Pieces with bits", elem_id="write-page")
                text = gr.Textbox(label="Text", visible=False)
                status = status_line("write-status")
        written = last_made()
        settings = [tokens, heat, top_p, penalty, seed]
        outputs = [text, page, status, written]
        go_on = alone(self.house, "write", self._go_on)
        on_page(self.house, "write", [go.click, prompt.submit], end, self._write,
                [prompt, *settings], outputs)  # fmt: skip
        more.click(go_on, [written, *settings], outputs, **ON_PAGE)
        for_programs(self.write, [prompt, *settings], outputs, "write")
        for_programs(self.go_on, [written, *settings], outputs, "continue")
        reuse.click(last_seed, [written], [seed], queue=False, **PRIVATE)
        return written


class PieceReader:
    """The pieces of a sample that are new since the last look, each with its bits."""

    def __init__(self, decoder: Decoder, visit: Visit, sample: int = 0) -> None:
        self._decoder, self._visit, self._sample = decoder, visit, sample
        self._read, self._bits = 0, 0.0

    def news(self) -> list[list[Any]]:
        samples = self._visit.samples()
        if not samples:
            return []
        sample, pieces = samples[self._sample], []
        bits = sample.token_bits[self._read :]
        # Another thread is drawing: a token may be there before its bits are.
        for token, surprise in zip(sample.tokens[self._read :], bits, strict=False):
            self._read += 1
            self._bits += surprise
            piece = self._decoder.push(token)
            if piece is not None:
                pieces.append([piece, round(self._bits, 2)])
                self._bits = 0.0
        return pieces


def _settings(tokens: float, temperature: float, top_p: float, penalty: float) -> dict[str, Any]:
    return {
        "max_tokens": int(within(tokens, 1, TOKENS, "tokens")),
        "temperature": float(within(temperature, 0, 1.5, "temperature")),
        "top_p": float(within(top_p, 0.05, 1, "top-p")),
        "repetition_penalty": float(within(penalty, 1, 2, "repetition penalty")),
    }


def _joined(pieces: list[list[Any]]) -> str:
    return "".join(text for text, _ in pieces)
