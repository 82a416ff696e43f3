"""The Python face: load a checkpoint by name, sample, stream and score raw data."""

from __future__ import annotations

import math
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from genssm import checkpoint as checkpoints
from genssm import states
from genssm.codec import Audio, Codec, Image, Raw, check_rate
from genssm.conversion import to_recurrent
from genssm.cuda import CapturedModel
from genssm.data import Example
from genssm.engine import Reading, read, read_by_pieces, result_of
from genssm.evaluate import Evaluation, evaluate, token_bits
from genssm.model import RecurrentModel, SequenceModel
from genssm.provenance import MOST_TOKENS, Recipe, RecipeError
from genssm.request import GUIDANCE, Plan, Request, Settings
from genssm.sampling import new_seed
from genssm.session import Sample, Session
from genssm.stepper import WEIGHTS, CompiledModel, Stepper, check_choice, choose, describe
from genssm.stepping import EXACT

LARGEST_BATCH = 64  # samples stepped side by side on a CPU
TOGETHER = 16_384  # tokens convolved at once to classify: more do not fit the caches


class Pipeline:
    """A checkpoint ready for use.

    - ``model``: the map as a convolution; ``recurrent``: the same as a recurrence.
    - ``codec``: raw ↔ tokens; ``config``: the content of config.json.
    - ``stepper``: what draws samples, as ``engine`` and ``weights`` ask. What they led to is in
      ``engine_name`` and ``stepped_weights``.

    Engines: "eager", the recurrence itself; "cpu", compiled; "auto", the faster of these; "cuda",
    batches on a GPU. Weights: "bf16", "fp32" or, for "cpu" only, "int8", which is the faster of
    "int8-16" and "int8-24", by the bits of the activations. The eager engine has the model's own.
    """

    def __init__(
        self,
        name: str,
        checkpoint: checkpoints.Checkpoint,
        *,
        rate: float = 1.0,
        engine: str = "auto",
        weights: str = WEIGHTS[0],
    ) -> None:
        self.name, self.checkpoint, self.rate = name, checkpoint, rate
        self.engine, self.weights = engine, weights
        self.model: SequenceModel = checkpoint.model
        self.codec: Codec = checkpoint.codec
        if rate != 1:
            self.codec = _at_rate(checkpoint.codec, rate)
        self.config: dict[str, Any] = checkpoint.to_config()
        self._rates: dict[float, Pipeline] = {}  # this model at other rates
        self._origin: weakref.ref[Pipeline] | None = None  # the one that has this among those

    def __getstate__(self) -> dict[str, Any]:
        """What is made on first use is made again by a copy."""
        made = {"recurrent", "stepper"}
        return {k: v for k, v in self.__dict__.items() if k not in made} | {
            "_rates": {},
            "_origin": None,
        }

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        rate = "" if self.rate == 1 else f" at the rate {self.rate:g}"
        return f"<Pipeline {self.name!r}{rate}: {self.modality}, {parameters:,} parameters>"

    @cached_property
    def recurrent(self) -> RecurrentModel:
        """The model as a recurrence, converted on first use."""
        return to_recurrent(self.model, self.rate)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the checkpoint's architecture, codec and weights."""
        return checkpoints.content_hash(self.checkpoint)

    def at_rate(self, rate: float) -> Pipeline:
        """This model of sound at another sampling rate: 0.5 makes 16 kHz of 8 kHz, 2.0 4 kHz.

        Δ is scaled by ``rate`` in every layer, so that its dynamics keep their times in seconds.
        What counts tokens stays as it was trained: a pool still joins the same number of samples,
        now of another length, and each step still predicts the next sample from the last. So the
        sound gets worse with the distance from 1; ``evaluate`` measures it, in bits per sample of
        that rate.
        Converted once for each rate.
        """
        origin = self._origin() if self._origin is not None else self
        if origin is None:  # it is gone, and this was kept
            origin, self._origin = self, None
        for pipe in (self, origin):
            if rate == pipe.rate:
                return pipe
        if rate not in origin._rates:
            other = origin._with(rate=rate)
            other._origin = weakref.ref(origin)
            origin._rates[rate] = other
        return origin._rates[rate]

    def _with(
        self, *, rate: float | None = None, engine: str | None = None, weights: str | None = None
    ) -> Pipeline:
        return Pipeline(
            self.name,
            self.checkpoint,
            rate=self.rate if rate is None else rate,
            engine=engine or self.engine,
            weights=weights or self.weights,
        )

    @cached_property
    def stepper(self) -> Stepper:
        """What draws samples; see ``stepper.choose``."""
        return choose(self.recurrent, self.engine, self.weights)

    @property
    def stepped_weights(self) -> str:
        """The weights that samples are stepped with, and by what unless by the compiled loop.

        "cuda bf16" rounds activations, too; and the last digits of "eager fp32" or "cuda fp32"
        differ from those of "fp32", by which a token is another now and then.
        """
        if isinstance(self.stepper, RecurrentModel):
            return f"eager {EXACT}"
        if isinstance(self.stepper, CapturedModel):
            return self.engine_name
        return self.stepper.stepped_weights

    @property
    def side_by_side(self) -> int:
        """Samples that are stepped as one batch, at most."""
        stepper = self.stepper
        return stepper.largest_batch if isinstance(stepper, CapturedModel) else LARGEST_BATCH

    @property
    def engine_name(self) -> str:
        """What draws samples: "eager", "cpu bf16", …"""
        return describe(self.stepper)

    @property
    def modality(self) -> str:
        """ "text", "image" or "audio"."""
        return self.codec.modality

    def plan(
        self, prompt: Raw = None, request: Request | None = None, state: Reading | None = None
    ) -> Plan:
        """What a prompt or a state and a request mean for this model; see ``sample``.

        Raises ValueError for a prompt or setting that does not fit.
        """
        request = request or Request()
        self._check_owner(state)
        chosen = {name: getattr(request, name) for name in ("label", "keep_rows", "duration")}
        if state is None:
            tokens = self.prompt_tokens(prompt, **chosen)
        elif prompt is None and set(chosen.values()) == {None}:
            tokens = state.tokens
        else:
            raise ValueError("a state holds its prompt, class and duration; give the state alone")
        count = request.count * request.rank
        first = request.first * request.rank
        plan = Plan(
            tokens=tuple(tokens.tolist()),
            sampling=request.sampling(self.modality),
            max_tokens=self._length(len(tokens), request.max_tokens),
            stop=tuple(request.stop),
            seed=new_seed() if request.seed is None else request.seed,
            indices=tuple(range(first, first + count)),
            guidance=self._guidance(tokens, request, state),
            state=None if state is None else states.fingerprint(state),
        )
        self._check(plan)
        if request.rank_by == "class":
            self._class_of(plan)
        return plan

    def _guidance(self, tokens: Tensor, request: Request, state: Reading | None) -> float:
        if request.guidance is not None:
            return float(request.guidance)
        labelled = state is None and int(tokens[0]) != self.codec.boundary
        return GUIDANCE[self.modality] if labelled else 1.0

    def _class_of(self, plan: Plan) -> int:
        """The index among ``codec.classes`` of the class that a plan asks for, alone or a part."""
        label = self.codec.class_of(self.codec.label_of(plan.tokens[0]))
        if label is None:
            raise ValueError("to rank by class needs a class: give its name as prompt or label")
        return self.codec.classes.index(label)

    def _check(self, plan: Plan) -> None:
        """Raise ValueError unless the plan is one for this model."""
        if plan.guidance != 1:
            if not self.codec.labels:
                raise ValueError("guidance needs a model with classes; this one has none")
            if plan.tokens[0] == self.codec.boundary:
                raise ValueError("guidance needs a class: give its name as prompt or label")
            if plan.state is not None:
                raise ValueError("guidance needs the prompt itself, not a state")
        if plan.stop and self.modality != "text":
            raise ValueError("stop strings end text; this model does not write text")
        if max(plan.tokens) >= self.codec.vocab_size:
            raise ValueError(
                f"token ids must lie in 0 … {self.codec.vocab_size - 1}, got {max(plan.tokens)}"
            )
        if plan.max_tokens > self._length(len(plan.tokens), plan.max_tokens):
            whole = len(plan.tokens) + self._length(len(plan.tokens), None)
            raise ValueError(
                f"the samples would be longer than a picture, {whole} tokens with its start; got "
                f"{len(plan.tokens)} and {plan.max_tokens} more"
            )

    def read(
        self, prompt: Raw = None, *, label: str | None = None, keep_rows: int | None = None,
        duration: float | None = None,
    ) -> Reading:  # fmt: skip
        """Read a prompt once, in parallel; ``sample(state=…)`` goes on from there, often.

        Continuing a state equals having given the whole text, picture or sound as the prompt, with
        ``guidance=1``: what is guided reads without its class, too.
        """
        request = Request(label=label, keep_rows=keep_rows, duration=duration)
        tokens = self.prompt_tokens(
            prompt, label=request.label, keep_rows=request.keep_rows, duration=request.duration
        )
        return replace(read(self.recurrent, tokens), owner=self._owner())

    def _owner(self) -> tuple[str, float]:
        return self.content_hash, self.rate

    def _check_owner(self, state: Reading | None) -> None:
        if state is not None and not isinstance(state, Reading):
            raise ValueError(
                "a state is what read, load_state and Session.reading return, not "
                f"{type(state).__name__}"
            )
        if state is None or state.owner in (None, self._owner()):
            return
        rate = state.owner[1] if state.owner else 1.0
        made = "another model" if rate == self.rate else f"a model at the rate {rate:g}"
        raise states.StateError(
            f"the state is of {made}, not of {self.name!r} at {self.rate:g}; continue it there"
        )

    def save_state(self, state: Reading, path: str | Path) -> None:
        """Write a state file (safetensors), whole or not at all.

        Raises StateError, a ValueError, for a state of another model.
        """
        self._check_owner(state)
        states.save(state, Path(path), checkpoint=self.content_hash, rate=self.rate)

    def load_state(self, path: str | Path) -> Reading:
        """Read a state file of this checkpoint; raises StateError, a ValueError, for others."""
        hash, rate = self.content_hash, self.rate
        state = states.load(Path(path), self.recurrent, checkpoint=hash, rate=rate)
        if self._length(len(state.tokens), None) < 0:
            raise states.StateError(f"{str(path)!r} is damaged: it is longer than a picture")
        return replace(state, owner=self._owner())

    def start(
        self,
        prompt: Raw = None,
        *,
        state: Reading | None = None,
        snapshot_every: int = 0,
        **settings: Unpack[Settings],
    ) -> Session:
        """Read the prompt and return one batch of samples in the making; arguments as ``sample``.

        ``first`` is the index of the first sample: samples 4 … 7 of a seed are
        ``start(count=4, first=4, seed=seed)``. ``snapshot_every``: keep the state every so many
        tokens, so that ``Session.reading`` finds its way back faster. (Kept states are those that
        were stepped, with the stepper's weights; without, the tokens are read again by the model.)
        """
        request = Request.of(**settings)
        if request.count > LARGEST_BATCH:
            raise ValueError(f"one batch holds 1 … {LARGEST_BATCH} samples, got {request.count}")
        if request.rank > 1:
            raise ValueError("rank compares whole samples; use sample")
        plan = self.plan(prompt, request, state)
        return next(self.batches(plan, state, snapshot_every))

    def batches(
        self, plan: Plan, state: Reading | None = None, snapshot_every: int = 0
    ) -> Iterator[Session]:
        """The samples of a plan, at most ``side_by_side`` in a batch; the prompt is read once.

        ``state``: what to continue, if the plan says so and its tokens do not suffice.
        """
        return self._sessions(plan, *result_of(self._read_plan(plan, state)), snapshot_every)

    def beginning(
        self, plan: Plan, state: Reading | None = None, snapshot_every: int = 0
    ) -> Iterator[Session | None]:
        """The first of ``batches``; before it None, between the pieces of a long prompt."""
        begun = yield from self._read_plan(plan, state)
        yield next(self._sessions(plan, *begun, snapshot_every))

    def _read_plan(
        self, plan: Plan, state: Reading | None
    ) -> Generator[None, None, tuple[Reading, Reading | None]]:
        """What a plan's samples go on from, and what guides them, if anything."""
        start = state
        if start is None:
            start = yield from read_by_pieces(self.recurrent, torch.tensor(plan.tokens))
        elif plan.state is None:
            raise ValueError("these samples continue no state; leave the state out")
        if plan.state is not None and states.fingerprint(start) != plan.state:
            raise ValueError(
                "these samples continue a state file"
                + (" that is not this one" if state is not None else "")
                + "; give the one they were made from"
            )
        if plan.guidance == 1:
            return start, None
        return start, (yield from self._unconditional(plan.tokens))

    def _sessions(
        self, plan: Plan, start: Reading, guide: Reading | None, snapshot_every: int
    ) -> Iterator[Session]:
        size = self.side_by_side
        parts = (
            replace(plan, indices=plan.indices[i : i + size])
            for i in range(0, len(plan.indices), size)
        )
        return (
            Session(
                self.stepper,
                self.codec,
                part,
                start,
                guide=guide,
                snapshot_every=snapshot_every,
                owner=self._owner,
            )
            for part in parts
        )

    def _unconditional(self, tokens: Sequence[int]) -> Generator[None, None, Reading]:
        """A prompt, read without its class and with its opening open, also what is yet to come."""
        begin = 1 + self.codec.opening
        open_ = [self.codec.boundary] * len(tokens[:begin])
        told = torch.tensor([*open_, *tokens[begin:]])
        guide = yield from read_by_pieces(self.recurrent, told)
        return replace(guide, state=self.recurrent.foretold(guide.state, self.codec.boundary))

    def recipe(self, samples: Sequence[Sample], prompt: str | None = None) -> Recipe | None:
        """How to make these samples of one plan again; ``prompt`` is a note for people.

        None for samples that were interrupted at different lengths and for very long prompts.
        Raises ValueError for samples of several plans or of another model.
        """
        plan = samples[0].plan
        if any(replace(s.plan, indices=plan.indices) != plan for s in samples):
            raise ValueError("the samples are not of one call; give those of each by themselves")
        if any(s.owner not in (None, self._owner()) for s in samples):
            raise ValueError(
                f"the samples were drawn by another model than {self.name!r} at the rate "
                f"{self.rate:g}; give the one that drew them"
            )
        if len(plan.tokens) > MOST_TOKENS:
            return None
        cut = {len(s.tokens) for s in samples if s.finish == "interrupted"}
        if cut:
            longest = max(len(s.tokens) for s in samples)
            if cut != {longest}:
                return None
            plan = replace(plan, max_tokens=longest)
        plan = replace(plan, indices=tuple(s.index for s in samples))
        return Recipe(self.name, self.content_hash, self.rate, self.stepped_weights, prompt, plan)

    def recipe_of_row(
        self, samples: Sequence[Sample], pause: float, prompt: str | None = None
    ) -> Recipe | None:
        """How to make a sound again whose parts are these samples, each of a plan of its own.

        ``pause``: seconds between them; see ``files.sounds_in_a_row``. None for very long prompts.
        """
        parts = [self.recipe([sample], prompt) for sample in samples]
        found = [part for part in parts if part is not None]
        if not found or len(found) < len(parts):
            return None
        return replace(found[0], then=tuple(part.plan for part in found[1:]), pause=pause)

    def at_recipe(self, recipe: Recipe) -> Pipeline:
        """This model at the rate and with the weights of a recipe, whose plans then are for it.

        Raises RecipeError if another checkpoint made it or a plan does not fit.
        """
        if recipe.checkpoint != self.content_hash:
            raise RecipeError(
                f"the recipe was made by another checkpoint than {self.name!r}; give the model "
                "it came from"
            )
        try:
            pipe = self.at_rate(recipe.rate)
            for plan in recipe.plans:
                pipe._check(plan)
            if recipe.then and not isinstance(pipe.codec, Audio):
                raise ValueError("only sound has several parts")
        except ValueError as error:
            raise RecipeError(f"the recipe is damaged: {error}") from error
        if recipe.weights != pipe.stepped_weights:
            engine, _, weights = recipe.weights.rpartition(" ")
            try:
                check_choice(engine or "auto", weights)
            except ValueError as error:
                raise RecipeError(
                    f"the recipe says {recipe.weights!r:.40}: {error!s:.200}"
                ) from error
            pipe = pipe._with(engine=engine or "auto", weights=weights)
        if recipe.weights != pipe.stepped_weights:
            raise RecipeError(
                f"the recipe needs the compiled engine with {recipe.weights} weights, which is not "
                "to be had here; install numba (int8-16 needs a processor with AVX2, too)"
            )
        return pipe

    def repeat(self, recipe: Recipe, *, state: Reading | None = None) -> list[Sample]:
        """Make the samples of a recipe again, exactly; ``state``: what they continued."""
        pipe = self.at_recipe(recipe)
        sessions = chain(pipe.batches(recipe.plan, state), *map(pipe.batches, recipe.then))
        return [sample for session in sessions for sample in session.run()]

    def prompt_tokens(
        self, prompt: Raw = None, *, label: str | None = None, keep_rows: int | None = None,
        duration: float | None = None,
    ) -> Tensor:  # fmt: skip
        """The tokens that a prompt stands for, start token first, (L,) int64.

        A string is text for a text model and a class name for the others. Without ``duration``, in
        seconds, that of a sound alone is drawn by the model, and that of a continued one left open.
        """
        codec = self.codec
        if keep_rows is not None and not (isinstance(codec, Image) and prompt is not None):
            raise ValueError("keep_rows needs a picture as prompt")
        if self.modality != "text" and isinstance(prompt, str):
            if label is not None and label != prompt:
                raise ValueError(f"two classes given: {prompt!r} and {label!r}")
            prompt, label = None, prompt
        told = [] if duration is None else [self._duration_token(duration)]
        if prompt is None:
            return torch.tensor([codec.start(label), *told])
        tokens = codec.prompt(prompt, label)
        tokens[1 : 1 + len(told)] = torch.tensor(told)
        if isinstance(codec, Image):
            rows = codec.shape[0] // 2 if keep_rows is None else keep_rows
            if not 0 <= rows <= codec.shape[0]:
                raise ValueError(f"keep_rows must lie in 0 … {codec.shape[0]}, got {rows}")
            tokens = tokens[: 1 + rows * codec.shape[1] * codec.shape[2]]
        return tokens

    def _duration_token(self, seconds: float) -> int:
        codec = self.codec
        if not isinstance(codec, Audio) or not codec.durations:
            raise ValueError("this model knows no durations; leave the duration out")
        shortest, longest = (n / codec.rate for n in (codec.durations[0], codec.durations[-1]))
        if not shortest <= seconds <= longest:
            raise ValueError(
                f"the duration must lie in {shortest:g} … {longest:g} seconds, got {seconds:g}"
            )
        return codec.duration(seconds * codec.rate)

    def _length(self, read: int, max_tokens: int | None) -> int:
        if isinstance(self.codec, Image):
            left = self.codec.length + 1 - read
            return left if max_tokens is None else min(left, max_tokens)
        if max_tokens is None:
            return 2 * self.codec.rate if isinstance(self.codec, Audio) else 256
        return max_tokens

    def sample(
        self, prompt: Raw = None, *, state: Reading | None = None, **settings: Unpack[Settings]
    ) -> list[Sample]:
        """Draw ``count`` samples that continue ``prompt``, or a ``state`` from ``read``.

        ``prompt``: text; a picture uint8 (H, W, C), of which ``keep_rows`` rows are kept (half of
        them by default); sound float32 (samples,); or the name of a class. The settings are the
        fields of ``Request``: ``count``, ``label``, ``max_tokens``, ``temperature``, ``seed``, …
        The same ``seed`` gives the same samples, alone or in any batch.

        Raises ValueError for a prompt or setting that does not fit, TypeError for one that is
        unknown.
        """
        request = Request.of(**settings)
        plan = self.plan(prompt, request, state)
        samples = [sample for session in self.batches(plan, state) for sample in session.run()]
        return self.best(samples, request)

    def stream(
        self, prompt: Raw = None, *, state: Reading | None = None, **settings: Unpack[Settings]
    ) -> Iterator[Raw]:
        """Draw one sample and yield its pieces as they become whole.

        Text: characters; pictures: rows uint8 (1, W, C); sound: float32 (n,). Settings are those of
        ``sample`` without ``count``. The prompt itself is not repeated.
        """
        if (count := settings.get("count", 1)) != 1:
            raise ValueError(f"a stream is of one sample, got count={count}; iterate over start")
        for _, piece in self.start(prompt, state=state, **settings):
            yield piece

    def token_bits(self, raw: Raw, label: str | None = None) -> Tensor:
        """Exact bits of each token of ``raw``, (L,) float32, by convolution."""
        return token_bits(self.model, self.codec.encode(raw, label)[None], self.rate)[0]

    def score(self, raw: Raw, label: str | None = None) -> float:
        """Exact bits of ``raw`` under the model, by convolution, in the context of ``label``."""
        return float(self.token_bits(raw, label).double().sum())

    def classify(self, raw: Raw) -> dict[str, float]:
        """The probability of each class given ``raw``, by likelihood, classes equally likely.

        Raises ValueError for a model without classes.
        """
        if not self.codec.classes:
            raise ValueError("to classify needs a model with classes; this one has none")
        rows = self._of_every_class(self.codec.encode(raw)[1:])
        bits = self._convolved_bits(rows)
        p = torch.softmax(-bits * math.log(2), 0)
        return dict(zip(self.codec.classes, p.tolist(), strict=True))

    def _of_every_class(self, tokens: Tensor) -> Tensor:
        """tokens (L,) behind the start token of each class, (classes, 1 + L)."""
        starts = torch.tensor([self.codec.start(label) for label in self.codec.classes])
        return torch.cat([starts[:, None], tokens.expand(len(starts), -1)], 1)

    def _convolved_bits(self, rows: Tensor) -> Tensor:
        """Exact bits of rows (B, 1 + L) behind their start tokens, (B,) float64."""
        together = max(1, TOGETHER // rows.shape[1])
        parts = [token_bits(self.model, part, self.rate) for part in rows.split(together)]
        return torch.cat(parts).double().sum(1)

    def best(self, samples: Sequence[Sample], request: Request) -> list[Sample]:
        """Of every ``request.rank`` samples in a row, by index, the best by ``request.rank_by``.

        "bits": the fewest bits per token, after passing over the part ``request.trim`` of the
        likeliest, which are often empty of content, as SaShiMi does (arXiv 2202.09729). "class":
        the highest probability, given the whole sample, of the class that was asked for; of a label
        within a class, of that class. It is the model's own, as it steps (``classify`` is exact,
        but several times slower).
        """
        if request.rank == 1:
            return list(samples)
        kept = []
        for _, group in groupby(samples, lambda sample: sample.index // request.rank):
            if request.rank_by == "class":
                kept.append(max(group, key=self._class_odds))
            else:
                ordered = sorted(group, key=lambda sample: sample.bits_per_token)
                kept.append(ordered[int(request.trim * len(ordered))])
        return kept

    def _class_odds(self, sample: Sample) -> float:
        """log p / (1 - p), p the probability of the sample's class given all of its tokens."""
        own = self._class_of(sample.plan)
        tokens = torch.tensor([*sample.plan.tokens[1:], *sample.tokens], dtype=torch.int64)
        rows = self._of_every_class(tokens)
        if isinstance(self.stepper, CompiledModel):
            nats = self.stepper.score(rows).sum(1) * -math.log(2)
        else:
            nats = self._convolved_bits(rows) * -math.log(2)
        others = torch.cat([nats[:own], nats[own + 1 :]])
        return float(nats[own] - others.logsumexp(0))

    def evaluate(self, examples: Iterable[Example], limit: int | None = None) -> Evaluation:
        """Bits per byte, dimension or sample over ``examples``."""
        return evaluate(self.model, self.codec, examples, limit, self.rate)


def _at_rate(codec: Codec, rate: float) -> Audio:
    if not isinstance(codec, Audio):
        raise ValueError(
            f"the rate can be changed for sound only; this model makes {codec.modality}"
        )
    if not 1e-6 <= rate <= 1e6:
        raise ValueError(
            f"the rate must be a positive number, a millionth to a million, got {rate}"
        )
    wanted = round(codec.rate / rate)
    try:
        check_rate(wanted)
    except ValueError as error:
        raise ValueError(f"at the rate {rate:g}, of {codec.rate} Hz, {error}") from error
    durations = tuple(round(n / rate) for n in codec.durations)
    return Audio(wanted, codec.labels, durations, codec.levels)


def load(name: str | Path, engine: str = "auto", weights: str = WEIGHTS[0]) -> Pipeline:
    """Load a model by shipped name, checkpoint folder or Hugging Face id.

    ``engine`` and ``weights`` choose what draws samples: see ``Pipeline``.

    Raises CheckpointError, a ValueError, that says what is wrong and what to do.
    """
    check_choice(engine, weights)
    return Pipeline(str(name), checkpoints.load(name), engine=engine, weights=weights)
