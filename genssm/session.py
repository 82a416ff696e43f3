"""A batch of samples in the making, and what comes of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from genssm.codec import Codec, Decoder, Raw
from genssm.engine import Drawn, Reading, Snapshot, begin, read
from genssm.request import Plan
from genssm.stepper import Stepper


@dataclass(frozen=True, eq=False)
class Sample:
    """One finished (or interrupted) sample."""

    modality: str
    raw: Raw  # prompt and continuation: str, uint8 (H, W, C), or float32 (samples,)
    tokens: list[int]  # the drawn tokens, without the prompt; with the boundary if it ended
    token_bits: list[float]  # bits of each drawn token under the model, its weights as stepped
    seed: int
    index: int  # of this sample among those of the seed
    finish: str  # "end" (by the model), "stop" (a stop string), "length" or "interrupted"
    seconds: float  # wall time of the whole batch
    plan: Plan  # all that decided it and those beside it
    owner: tuple[str, float] | None = None  # content hash and rate of the model that drew it

    @property
    def bits(self) -> float:
        """Bits of all drawn tokens."""
        return sum(self.token_bits)

    @property
    def bits_per_token(self) -> float:
        """Exact bits per drawn token, 0 if none was drawn."""
        return self.bits / max(1, len(self.tokens))

    @property
    def tokens_per_second(self) -> float:
        """Of this sample alone; those beside it in the batch took the same time."""
        return len(self.tokens) / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        if self.modality == "text":
            return self.raw
        return f"{self.modality} sample of {len(self.tokens)} tokens, seed {self.seed}"

    def __repr__(self) -> str:
        """One line for a notebook; hundreds of tokens and their bits are in the fields."""
        text = f"{self.raw!r}, " if self.modality == "text" else ""
        return (
            f"<Sample: {text}{len(self.tokens)} {self.modality} tokens, "
            f"{self.bits_per_token:.2f} bits/token, seed {self.seed}, index {self.index}>"
        )


class _Ending(Decoder):
    """Text that ends before the first of some strings.

    What may be the beginning of one is held back until it is none.
    """

    def __init__(self, decoder: Decoder, stops: Sequence[str]) -> None:
        self._decoder, self._stops = decoder, stops
        self._longest = max(map(len, stops))
        self.text, self._told = "", 0
        self.stopped = False

    def push(self, token: int) -> str | None:
        piece = self._decoder.push(token)
        if piece is None:
            return None
        start = max(0, len(self.text) + 1 - self._longest)  # no stop string lies before
        self.text += piece
        found = [at for stop in self._stops if (at := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return self._tell(len(self.text) - (0 if found else self._held()))

    def flush(self) -> str | None:
        self.text += self._decoder.flush() or ""
        return self._tell(len(self.text))

    def _held(self) -> int:
        """Characters at the end with which a stop string begins."""
        begun = (
            size
            for stop in self._stops
            for size in range(1, len(stop))
            if self.text.endswith(stop[:size])
        )
        return max(begun, default=0)

    def _tell(self, end: int) -> str | None:
        piece, self._told = self.text[self._told : end], end
        return piece or None


class Session:
    """A batch of samples in the making. Iterate over it to draw; ``samples()`` gives what is there.

    Each iteration yields the raw pieces that became whole, as (sample, piece): text, rows of
    pixels, blocks of sound. Stopping the iteration at any time keeps what was drawn.
    ``generation`` is what draws, and knows which samples are not finished.
    """

    def __init__(
        self,
        model: Stepper,
        codec: Codec,
        plan: Plan,
        start: Reading,
        *,
        guide: Reading | None = None,
        snapshot_every: int = 0,
        owner: Callable[[], tuple[str, float]] | None = None,
    ) -> None:
        """``start``: the prompt, read; ``guide``: the prompt without its class, read.

        ``owner``: see ``Reading``.
        """
        if snapshot_every < 0:
            raise ValueError(f"snapshot_every must not be negative, got {snapshot_every}")
        self.codec, self.plan = codec, plan
        self._model, self._start, self._snapshot_every = model, start, snapshot_every
        self._owner = owner
        self._untold: deque[tuple[int, Raw]] = deque()  # pieces of a step that were not asked for
        self._snapshots: list[Snapshot] = []
        self.started = time.perf_counter()
        self.seconds = 0.0
        samples = range(len(plan.indices))
        self.tokens: list[list[int]] = [[] for _ in samples]
        self.token_bits: list[list[float]] = [[] for _ in samples]
        self.finish = ["interrupted"] * len(samples)
        decoders = [codec.decoder() for _ in samples]
        self._whole = codec.whole(plan.tokens)
        for decoder in decoders:
            for token in plan.tokens[self._whole :]:
                decoder.push(token)
        self._decoders = [_Ending(d, plan.stop) for d in decoders] if plan.stop else decoders
        self.generation = begin(
            model,
            start,
            plan.sampling,
            seed=plan.seed,
            indices=plan.indices,
            guide=guide,
            guidance=plan.guidance,
            limit=plan.max_tokens,
            snapshots=snapshot_every > 0,
        )
        if plan.max_tokens == 0:
            self._finish(dict.fromkeys(samples, "length"))

    @property
    def seed(self) -> int:
        return self.plan.seed

    def __iter__(self) -> Iterator[tuple[int, Raw]]:
        while self._untold or self.generation.active:
            if not self._untold:
                self._untold.extend(self._step())
            while self._untold:  # whoever stops in the middle of a step gets its rest later
                yield self._untold.popleft()

    def ready(self) -> list[tuple[int, Raw]]:
        """The pieces of the next step and of all that are drawn already."""
        pieces = [*self._untold, *self._step()]
        self._untold.clear()
        while self.generation.active and self.generation.ahead:
            pieces += self._step()
        return pieces

    def _step(self) -> list[tuple[int, Raw]]:
        """One step of all samples; returns the pieces that became whole."""
        every, read = self._snapshot_every, 0
        if every:
            read = max(map(len, self.tokens))  # drawn tokens that this step will have read
        done: dict[int, str] = {}
        pieces: list[tuple[int, Raw]] = []
        for drawn in self.generation.step():
            pieces += self._piece(drawn, done)
        if every and read and read % every == 0:
            self._snapshots.append(self.generation.snapshot())
        if done:
            self._finish(done)
        self.seconds = time.perf_counter() - self.started
        return pieces

    def _piece(self, drawn: Drawn, done: dict[int, str]) -> list[tuple[int, Raw]]:
        """What one drawn token makes whole; ``done`` takes the sample if it ends."""
        i = drawn.sample
        self.tokens[i].append(drawn.token)
        self.token_bits[i].append(drawn.bits)
        whole: list[Raw] = []
        if drawn.token == self.codec.boundary:
            done[i] = "end"
        else:
            piece = self._decoders[i].push(drawn.token)
            if piece is not None:
                whole.append(piece)
            if self._stopped(i) is not None:
                done[i] = "stop"
            if len(self.tokens[i]) >= self.plan.max_tokens:
                done.setdefault(i, "length")
        if i in done and done[i] != "stop":
            rest = self._decoders[i].flush()
            if rest is not None:
                whole.append(rest)
        return [(i, piece) for piece in whole]

    def _finish(self, done: dict[int, str]) -> None:
        for i, reason in done.items():
            self.finish[i] = reason
        self.generation.finish(set(done))

    def _stopped(self, i: int) -> str | None:
        """What a sample continued before a stop string, if it came to one."""
        decoder = self._decoders[i]
        return decoder.text if isinstance(decoder, _Ending) and decoder.stopped else None

    def _raw(self, i: int, tokens: list[int]) -> Raw:
        text = self._stopped(i)
        if text is not None:
            return self.codec.decode(self.plan.tokens[: self._whole]) + text
        return self.codec.decode([*self.plan.tokens, *tokens])

    def reading(self, sample: int = 0, position: int | None = None) -> Reading:
        """What the model remembers of a sample after its first ``position`` drawn tokens (all).

        Rewinding: ``pipe.start(state=session.reading(0, 100))`` goes on from there. Tokens since
        the nearest snapshot are read again, in parallel; with snapshots, none are after the last
        step of a compiled model, whose own state is handed out. A token that ends the sample does
        not count; those of a stop string do.
        """
        if not 0 <= sample < len(self.tokens):
            raise ValueError(f"the sample must lie in 0 … {len(self.tokens) - 1}, got {sample}")
        drawn = self.tokens[sample]
        if drawn and drawn[-1] == self.codec.boundary:
            drawn = drawn[:-1]
        if position is not None and not 0 <= position <= len(drawn):
            raise ValueError(f"the position must lie in 0 … {len(drawn)}, got {position}")
        tokens = torch.tensor([*self.plan.tokens, *drawn[:position]])
        nearest, snapshots = self._start, list(self._snapshots)
        if self._snapshot_every and (present := self.generation.present()) is not None:
            snapshots.append(present)
        for snapshot in snapshots:
            if sample in snapshot.samples and int(snapshot.state.position) <= len(tokens):
                nearest = snapshot.reading(sample, tokens)
        reading = read(self._model, tokens[len(nearest.tokens) :], nearest)
        return replace(reading, owner=self._owner() if self._owner else None)

    def run(self) -> list[Sample]:
        """Draw to the end."""
        for _ in self:
            pass
        return self.samples()

    def samples(self) -> list[Sample]:
        """What has been drawn so far."""
        return [self._sample(i, index) for i, index in enumerate(self.plan.indices)]

    def _sample(self, i: int, index: int) -> Sample:
        bits = list(self.token_bits[i])  # before the tokens: another thread may be drawing
        tokens = self.tokens[i][: len(bits)]
        return Sample(
            modality=self.codec.modality,
            raw=self._raw(i, tokens),
            tokens=tokens,
            token_bits=bits,
            seed=self.seed,
            index=index,
            finish=self.finish[i],
            seconds=self.seconds,
            plan=self.plan,
            owner=self._owner() if self._owner else None,
        )
