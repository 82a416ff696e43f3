"""The Python face: load a checkpoint by name, sample, stream and score raw data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genssm import checkpoint as checkpoints
from genssm.codec import Audio, Codec, Image, Raw
from genssm.conversion import to_recurrent
from genssm.data import Example
from genssm.engine import begin
from genssm.evaluate import Evaluation, evaluate, token_bits
from genssm.model import RecurrentModel, SequenceModel
from genssm.sampling import SamplingConfig, new_seed
from genssm.stepper import WEIGHTS, CompiledModel, choose

# Settings that make good samples; the likelihood itself is at temperature 1 without filters.
DEFAULTS = {
    "text": SamplingConfig(temperature=0.8, top_p=0.95),
    "image": SamplingConfig(temperature=0.98),
    "audio": SamplingConfig(temperature=0.95),
}
LARGEST_BATCH = 64  # samples stepped side by side


@dataclass(frozen=True)
class Sample:
    """One finished (or interrupted) sample."""

    modality: str
    raw: Raw  # prompt and continuation: str, uint8 (H, W, C), or float32 (samples,)
    tokens: list[int]  # the drawn tokens, without the prompt
    token_bits: list[float]  # bits of each drawn token under the model, its weights as stepped
    seed: int
    index: int  # of this sample among ``count``
    finish: str  # "end" (by the model), "stop" (a stop string), "length" or "interrupted"
    seconds: float  # wall time of the whole batch

    @property
    def bits(self) -> float:
        """Bits of all drawn tokens."""
        return sum(self.token_bits)

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        if self.modality == "text":
            return self.raw
        return f"{self.modality} sample of {len(self.tokens)} tokens, seed {self.seed}"


class Session:
    """A batch of samples in the making. Iterate over it to draw; ``samples()`` gives what is there.

    Each iteration yields the raw pieces that became whole, as (sample, piece): text, rows of
    pixels, blocks of sound. Stopping the iteration at any time keeps what was drawn.
    """

    def __init__(
        self,
        model: RecurrentModel | CompiledModel,
        codec: Codec,
        prompt: Tensor,
        config: SamplingConfig,
        *,
        seed: int,
        indices: range,
        max_tokens: int,
        stop: Sequence[str],
    ) -> None:
        self.codec, self.seed, self.indices = codec, seed, indices
        self.prompt, self.max_tokens, self.stop = prompt, max_tokens, tuple(stop)
        self.started = time.perf_counter()
        self.seconds = 0.0
        self.tokens: list[list[int]] = [[] for _ in indices]
        self.token_bits: list[list[float]] = [[] for _ in indices]
        self.finish = ["interrupted"] * len(indices)
        self._text = [""] * len(indices)  # continuation so far, for the stop strings
        self._decoders = [codec.decoder() for _ in indices]
        self._generation = begin(model, prompt, config, seed=seed, indices=indices)
        if max_tokens == 0:
            self._finish(dict.fromkeys(self._generation.active, "length"))

    def __iter__(self) -> Iterator[tuple[int, Raw]]:
        while self._generation.active:
            done: dict[int, str] = {}
            pieces: list[tuple[int, Raw]] = []
            for drawn in self._generation.step():
                i = drawn.sample
                self.tokens[i].append(drawn.token)
                self.token_bits[i].append(drawn.bits)
                if drawn.token == self.codec.boundary:
                    done[i] = "end"
                else:
                    piece = self._decoders[i].push(drawn.token)
                    if piece is not None:
                        pieces.append((i, piece))
                        if self._stopped(i, piece):
                            done[i] = "stop"
                    if len(self.tokens[i]) >= self.max_tokens:
                        done.setdefault(i, "length")
                if i in done and done[i] != "stop":
                    rest = self._decoders[i].flush()
                    if rest is not None:
                        pieces.append((i, rest))
            self._finish(done)
            self.seconds = time.perf_counter() - self.started
            yield from pieces

    def _finish(self, done: dict[int, str]) -> None:
        for i, reason in done.items():
            self.finish[i] = reason
        self._generation.finish(set(done))

    def _stopped(self, i: int, piece: Raw) -> bool:
        if not self.stop:
            return False
        self._text[i] += piece
        return any(s in self._text[i] for s in self.stop)

    def _raw(self, i: int) -> Raw:
        raw = self.codec.decode([*self.prompt.tolist(), *self.tokens[i]])
        if self.finish[i] == "stop":
            text = self._text[i]
            first = min(text.find(s) for s in self.stop if s in text)
            return self.codec.decode(self.prompt) + text[:first]
        return raw

    def run(self) -> list[Sample]:
        """Draw to the end."""
        for _ in self:
            pass
        return self.samples()

    def samples(self) -> list[Sample]:
        """What has been drawn so far."""
        return [
            Sample(
                modality=self.codec.modality,
                raw=self._raw(i),
                tokens=self.tokens[i],
                token_bits=self.token_bits[i],
                seed=self.seed,
                index=index,
                finish=self.finish[i],
                seconds=self.seconds,
            )
            for i, index in enumerate(self.indices)
        ]


class Pipeline:
    """A checkpoint ready for use.

    ``model`` (convolution), ``recurrent`` (the same map as a recurrence), ``codec``
    (raw ↔ tokens), ``config`` (the content of config.json), ``stepper`` (what draws samples:
    ``engine`` "eager", "cpu" (compiled) or "auto", the faster; for the compiled one ``weights``
    "bf16", "fp32" or "int8").
    """

    def __init__(
        self,
        name: str,
        checkpoint: checkpoints.Checkpoint,
        engine: str = "auto",
        weights: str = WEIGHTS[0],
    ) -> None:
        self.name, self.engine, self.weights = name, engine, weights
        self.model: SequenceModel = checkpoint.model
        self.codec: Codec = checkpoint.codec
        self.config: dict[str, Any] = checkpoint.to_config()

    @cached_property
    def recurrent(self) -> RecurrentModel:
        """The model as a recurrence, converted on first use."""
        return to_recurrent(self.model)

    @cached_property
    def stepper(self) -> RecurrentModel | CompiledModel:
        """What draws samples; see ``stepper.choose``."""
        return choose(self.recurrent, self.engine, self.weights)

    @property
    def modality(self) -> str:
        """ "text", "image" or "audio"."""
        return self.codec.modality

    def start(
        self,
        prompt: Raw = None,
        *,
        label: str | None = None,
        keep_rows: int | None = None,
        count: int = 1,
        first: int = 0,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> Session:
        """Read the prompt and return the samples in the making; see ``sample`` for the arguments.

        ``first`` is the index of the first sample: samples 4 … 7 of a seed are
        ``start(count=4, first=4, seed=seed)``.
        """
        if not 1 <= count <= LARGEST_BATCH:
            raise ValueError(f"one batch holds 1 … {LARGEST_BATCH} samples, got {count}")
        if stop and self.modality != "text":
            raise ValueError("stop strings end text; this model does not write text")
        if any(not s for s in stop):
            raise ValueError("a stop string must not be empty")
        config = DEFAULTS[self.modality].changed(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        tokens = self.prompt_tokens(prompt, label=label, keep_rows=keep_rows)
        return Session(
            self.stepper,
            self.codec,
            tokens,
            config,
            seed=new_seed() if seed is None else seed,
            indices=range(first, first + count),
            max_tokens=self._length(tokens, max_tokens),
            stop=stop,
        )

    def prompt_tokens(
        self, prompt: Raw = None, *, label: str | None = None, keep_rows: int | None = None
    ) -> Tensor:
        """The tokens that a prompt stands for, start token first, (L,) int64.

        A string is text for a text model and a class name for the others.
        """
        codec = self.codec
        if keep_rows is not None and not (isinstance(codec, Image) and prompt is not None):
            raise ValueError("keep_rows needs a picture as prompt")
        if self.modality != "text" and isinstance(prompt, str):
            if label is not None and label != prompt:
                raise ValueError(f"two classes given: {prompt!r} and {label!r}")
            prompt, label = None, prompt
        if prompt is None:
            return torch.tensor([codec.start(label)])
        tokens = codec.encode(prompt, label)
        if isinstance(codec, Image):
            rows = codec.shape[0] // 2 if keep_rows is None else keep_rows
            if not 0 <= rows <= codec.shape[0]:
                raise ValueError(f"keep_rows must lie in 0 … {codec.shape[0]}, got {rows}")
            tokens = tokens[: 1 + rows * codec.shape[1] * codec.shape[2]]
        return tokens

    def _length(self, prompt: Tensor, max_tokens: int | None) -> int:
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"max_tokens must not be negative, got {max_tokens}")
        if isinstance(self.codec, Image):
            left = self.codec.length + 1 - len(prompt)
            return left if max_tokens is None else min(left, max_tokens)
        if max_tokens is None:
            return 2 * self.codec.rate if isinstance(self.codec, Audio) else 256
        return max_tokens

    def sample(
        self,
        prompt: Raw = None,
        *,
        label: str | None = None,
        keep_rows: int | None = None,
        count: int = 1,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[Sample]:
        """Draw ``count`` samples that continue ``prompt``.

        ``prompt``: text; a picture uint8 (H, W, C), of which ``keep_rows`` rows are kept (half of
        them by default); sound float32 (samples,); or the name of a class. ``label`` adds a class
        to a picture or sound. ``max_tokens`` counts drawn tokens (default: 256 for text, the whole
        picture, two seconds of sound). Settings left at None are those of ``DEFAULTS``.
        The same ``seed`` gives the same samples, alone or in any batch.

        Raises ValueError for a prompt or setting that does not fit.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        seed = new_seed() if seed is None else seed
        samples: list[Sample] = []
        for first in range(0, count, LARGEST_BATCH):
            samples += self.start(
                prompt,
                label=label,
                keep_rows=keep_rows,
                count=min(LARGEST_BATCH, count - first),
                first=first,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                stop=stop,
                seed=seed,
            ).run()
        return samples

    def stream(self, prompt: Raw = None, **settings: Any) -> Iterator[Raw]:
        """Draw one sample and yield its pieces as they become whole.

        Text: characters; pictures: rows uint8 (1, W, C); sound: float32 (n,). Settings are those of
         ``sample`` without ``count``. The prompt itself is not repeated.
        """
        for _, piece in self.start(prompt, **settings):
            yield piece

    def score(self, raw: Raw, label: str | None = None) -> float:
        """Exact bits of ``raw`` under the model, by convolution, in the context of ``label``."""
        return float(token_bits(self.model, self.codec.encode(raw, label)[None]).double().sum())

    def evaluate(self, examples: Iterable[Example], limit: int | None = None) -> Evaluation:
        """Bits per byte, dimension or sample over ``examples``."""
        return evaluate(self.model, self.codec, examples, limit)


def load(name: str | Path, engine: str = "auto", weights: str = WEIGHTS[0]) -> Pipeline:
    """Load a model by shipped name, checkpoint folder or Hugging Face id.

    ``engine`` and ``weights`` choose what draws samples: see ``Pipeline``.

    Raises CheckpointError, a ValueError, that says what is wrong and what to do.
    """
    return Pipeline(str(name), checkpoints.load(name), engine, weights)
