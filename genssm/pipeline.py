"""The Python face: load a checkpoint by name, sample, stream and score raw data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from genssm import checkpoint as checkpoints
from genssm.codec import Audio, Codec, Image, Raw
from genssm.data import Example
from genssm.engine import Generation
from genssm.evaluate import Evaluation, evaluate, token_bits
from genssm.model import RecurrentModel, SequenceModel, to_recurrent
from genssm.request import Plan, Request, Settings
from genssm.sampling import new_seed

LARGEST_BATCH = 64  # samples stepped side by side


@dataclass(frozen=True)
class Sample:
    """One finished (or interrupted) sample."""

    modality: str
    raw: Raw  # prompt and continuation: str, uint8 (H, W, C), or float32 (samples,)
    tokens: list[int]  # the drawn tokens, without the prompt
    token_bits: list[float]  # exact bits of each drawn token under the model
    seed: int
    index: int  # of this sample among ``count``
    finish: str  # "end" (by the model), "stop" (a stop string), "length" or "interrupted"
    seconds: float  # wall time of the whole batch

    @property
    def bits(self) -> float:
        """Exact bits of all drawn tokens."""
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

    def __init__(self, model: RecurrentModel, codec: Codec, plan: Plan) -> None:
        self.codec, self.plan = codec, plan
        self.started = time.perf_counter()
        self.seconds = 0.0
        samples = range(len(plan.indices))
        self.tokens: list[list[int]] = [[] for _ in samples]
        self.token_bits: list[list[float]] = [[] for _ in samples]
        self.finish = ["interrupted"] * len(samples)
        self._text = [""] * len(samples)  # continuation so far, for the stop strings
        self._decoders = [codec.decoder() for _ in samples]
        self._generation = Generation(
            model, torch.tensor(plan.tokens), plan.sampling, seed=plan.seed, indices=plan.indices
        )
        if plan.max_tokens == 0:
            self._finish(dict.fromkeys(samples, "length"))

    @property
    def seed(self) -> int:
        return self.plan.seed

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
                    if len(self.tokens[i]) >= self.plan.max_tokens:
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
        if not self.plan.stop:
            return False
        self._text[i] += piece
        return any(s in self._text[i] for s in self.plan.stop)

    def _raw(self, i: int) -> Raw:
        raw = self.codec.decode([*self.plan.tokens, *self.tokens[i]])
        if self.finish[i] == "stop":
            text = self._text[i]
            first = min(text.find(s) for s in self.plan.stop if s in text)
            return self.codec.decode(self.plan.tokens) + text[:first]
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
            for i, index in enumerate(self.plan.indices)
        ]


class Pipeline:
    """A checkpoint ready for use.

    ``model`` (convolution), ``recurrent`` (the same map as a recurrence), ``codec``
    (raw ↔ tokens), ``config`` (the content of config.json).
    """

    def __init__(self, name: str, checkpoint: checkpoints.Checkpoint) -> None:
        self.name = name
        self.model: SequenceModel = checkpoint.model
        self.codec: Codec = checkpoint.codec
        self.config: dict[str, Any] = checkpoint.to_config()

    @cached_property
    def recurrent(self) -> RecurrentModel:
        """The model as a recurrence, converted on first use."""
        return to_recurrent(self.model)

    @property
    def modality(self) -> str:
        """ "text", "image" or "audio"."""
        return self.codec.modality

    def plan(self, prompt: Raw = None, request: Request | None = None) -> Plan:
        """What a prompt and a request mean for this model; see ``sample``.

        Raises ValueError for a prompt or setting that does not fit.
        """
        request = request or Request()
        if request.stop and self.modality != "text":
            raise ValueError("stop strings end text; this model does not write text")
        tokens = self.prompt_tokens(prompt, label=request.label, keep_rows=request.keep_rows)
        return Plan(
            tokens=tuple(tokens.tolist()),
            sampling=request.sampling(self.modality),
            max_tokens=self._length(len(tokens), request.max_tokens),
            stop=request.stop,
            seed=new_seed() if request.seed is None else request.seed,
            indices=tuple(range(request.first, request.first + request.count)),
        )

    def start(self, prompt: Raw = None, **settings: Unpack[Settings]) -> Session:
        """Read the prompt and return one batch of samples in the making; arguments as ``sample``.

        ``first`` is the index of the first sample: samples 4 … 7 of a seed are
        ``start(count=4, first=4, seed=seed)``.
        """
        plan = self.plan(prompt, Request(**settings))  # type: ignore[arg-type]
        if len(plan.indices) > LARGEST_BATCH:
            raise ValueError(
                f"one batch holds 1 … {LARGEST_BATCH} samples, got {len(plan.indices)}"
            )
        return Session(self.recurrent, self.codec, plan)

    def batches(self, plan: Plan) -> Iterator[Session]:
        """The samples of a plan, at most ``LARGEST_BATCH`` side by side."""
        for i in range(0, len(plan.indices), LARGEST_BATCH):
            indices = plan.indices[i : i + LARGEST_BATCH]
            yield Session(self.recurrent, self.codec, replace(plan, indices=indices))

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

    def _length(self, read: int, max_tokens: int | None) -> int:
        if isinstance(self.codec, Image):
            left = self.codec.length + 1 - read
            return left if max_tokens is None else min(left, max_tokens)
        if max_tokens is None:
            return 2 * self.codec.rate if isinstance(self.codec, Audio) else 256
        return max_tokens

    def sample(self, prompt: Raw = None, **settings: Unpack[Settings]) -> list[Sample]:
        """Draw ``count`` samples that continue ``prompt``.

        ``prompt``: text; a picture uint8 (H, W, C), of which ``keep_rows`` rows are kept (half of
        them by default); sound float32 (samples,); or the name of a class. The settings are the
        fields of ``Request``: ``count``, ``label``, ``max_tokens``, ``temperature``, ``seed``, …
        The same ``seed`` gives the same samples, alone or in any batch.

        Raises ValueError for a prompt or setting that does not fit.
        """
        plan = self.plan(prompt, Request(**settings))  # type: ignore[arg-type]
        return [sample for session in self.batches(plan) for sample in session.run()]

    def stream(self, prompt: Raw = None, **settings: Unpack[Settings]) -> Iterator[Raw]:
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


def load(name: str | Path) -> Pipeline:
    """Load a model by shipped name, checkpoint folder or Hugging Face id.

    Raises CheckpointError, a ValueError, that says what is wrong and what to do.
    """
    return Pipeline(str(name), checkpoints.load(name))
