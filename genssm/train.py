"""Training: a resumable loop that keeps the best checkpoint by validation."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genssm import checkpoint as checkpoints
from genssm.codec import Audio, Codec, Image, Text
from genssm.data import (
    Batch,
    ClipBatches,
    Example,
    PictureBatches,
    TextBatches,
    find_split,
    open_picture_array,
    read_clips,
    read_documents,
    read_examples,
    read_pictures,
)
from genssm.evaluate import evaluate
from genssm.model import ModelConfig, SequenceModel
from genssm.optim import build_optimizers, has_fast_bfloat16, rate
from genssm.recipes import Recipe

_LN2 = math.log(2)
_STATE = "state.safetensors"
PROBE = 1024  # validation tokens stored in a checkpoint to compare its two views on


@dataclass(frozen=True)
class Progress:
    """What a training reports about every few seconds."""

    step: int
    minutes: float
    fraction: float  # of the budget, 0 … 1
    tokens: int
    loss: float  # bits per token, smoothed
    tokens_per_second: float
    validation: float | None  # in the unit of the codec, when it was just measured


@dataclass
class _Run:
    """The mutable part of a training, all of it in ``state.safetensors``."""

    model: SequenceModel
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best: float = math.inf
    before: dict[str, Any] | None = None  # training facts of the checkpoint it began with

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for k, optimizer in enumerate(self.optimizers):
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{k}.{i}.{name}": t for name, t in state.items()}
        return {name: t.detach().contiguous() for name, t in tensors.items()}

    def save(self, path: Path, recipe: Recipe) -> None:
        from safetensors.torch import save_file

        facts = {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "best": self.best,
            "before": self.before,
            "recipe": asdict(recipe),
        }
        checkpoints.replace_file(
            path, lambda file: save_file(self.tensors(), file, {"facts": json.dumps(facts)})
        )

    def restore(self, path: Path, recipe: Recipe) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is not a readable training state") from error
        wanted = json.loads(json.dumps(asdict(recipe)))
        wanted["length"] = wanted["train"]["length"]
        begun = facts["recipe"] | {"length": facts["recipe"]["train"]["length"]}
        for section in ("modality", "codec", "model", "length"):
            if begun[section] != wanted[section]:
                raise ValueError(
                    f"the training in {str(path.parent)!r} has another {section}: "
                    f"{begun[section]}; resume it with that, or use another folder"
                )
        prefix = "model."
        self.model.load_state_dict(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
        for k, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer.{k}."):
                    _, _, i, key = name.split(".")
                    state.setdefault(int(i), {})[key] = tensor
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.seconds, self.tokens, self.best, self.before = (
            facts[name] for name in ("step", "seconds", "tokens", "best", "before")
        )


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    minutes: float | None = None,
    resume: bool = False,
    start: str | None = None,
    save_minutes: float = 5.0,
    validate_minutes: float = 10.0,
    validation_limit: int | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Train ``recipe`` on the ``train`` split in ``data``; return the best checkpoint's folder.

    The budget is ``minutes`` of training, or ``recipe.train.steps``. ``out`` receives
    ``state.safetensors`` (from which ``resume`` goes on exactly), ``log.csv`` and ``checkpoint/``.
    ``start`` names a checkpoint of the same shape to begin with (its tokenizer included). SIGTERM
    and Ctrl-C save before they end the training. Raises ValueError for unusable data or
    settings, and FileExistsError for a folder with a training that is not to be resumed.
    """
    training = _Training(recipe, data, out, minutes, _begin(out, resume, start), validation_limit)
    timers = {"report": _Timer(10), "save": _Timer(60 * save_minutes)}
    timers["validate"] = _Timer(60 * validate_minutes)
    with _interruption() as interrupted, _log(out / "log.csv", resume) as log:
        while training.fraction() < 1 and not interrupted():
            training.advance()
            value = training.validate() if timers["validate"].due() else None
            if timers["save"].due():
                training.save()
            if timers["report"].due() or value is not None:
                report(progress := training.progress(value))
                log(progress)
        training.save()
        report(progress := training.progress(training.validate()))
        log(progress)
        training.save()
        if interrupted():
            raise KeyboardInterrupt
    return training.target


def _begin(out: Path, resume: bool, start: str | None) -> checkpoints.Checkpoint | None:
    """Check that ``out`` fits the intention and load the checkpoint to start from, if any."""
    begun = (out / _STATE).exists()
    if begun and not resume:
        raise FileExistsError(f"{str(out)!r} holds a training; resume it or use another folder")
    if resume and not begun:
        raise ValueError(f"{str(out)!r} holds no training to resume")
    if resume and start is not None:
        raise ValueError("a resumed training goes on from its own weights, not from a checkpoint")
    return None if start is None else checkpoints.load(start)


class _Timer:
    """``due`` is true once every ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


class _Training:
    """One training: its data, its model and what can be done with them."""

    def __init__(
        self,
        recipe: Recipe,
        data: Path,
        out: Path,
        minutes: float | None,
        start: checkpoints.Checkpoint | None,
        validation_limit: int | None,
    ) -> None:
        self.recipe, self.minutes = recipe, minutes
        self.state_file, self.target = out / _STATE, out / "checkpoint"
        settings = recipe.train
        out.mkdir(parents=True, exist_ok=True)
        find_split(data, "validation", recipe.modality)
        self.codec, self.batch = _prepare(recipe, data, out, start)
        self._validation = _validation_examples(recipe, self.codec, data, validation_limit)
        torch.manual_seed(settings.seed)
        config = ModelConfig(
            vocab_size=self.codec.vocab_size,
            n_outputs=self.codec.n_outputs,
            l_max=settings.length,
            **recipe.model,
        )
        model = SequenceModel(config)
        optimizers = build_optimizers(model, settings.lr, settings.matrix_lr, settings.weight_decay)
        self.base_rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
        self.run = _Run(model, optimizers)
        if self.state_file.exists():
            self.run.restore(self.state_file, recipe)
        elif start is not None:
            _load_from(start, model, self.codec)
            self.run.before = start.training
        self.smooth = math.nan
        self.reported = (time.monotonic(), self.run.tokens)

    def fraction(self) -> float:
        """The part of the budget that is spent."""
        if self.minutes is None:
            return self.run.step / self.recipe.train.steps
        return self.run.seconds / (60 * self.minutes) if self.minutes else 1.0

    def advance(self) -> None:
        """One step."""
        started, settings, run = time.monotonic(), self.recipe.train, self.run
        factor = rate(run.step, self.fraction(), settings.warmup, settings.decay)
        for optimizer, rates in zip(run.optimizers, self.base_rates, strict=True):
            for group, base in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base * factor
        batch = self.batch(run.step)
        loss = train_step(run.model, run.optimizers, batch, settings.clip, settings.seed + run.step)
        if math.isfinite(loss):
            self.smooth = loss if math.isnan(self.smooth) else 0.98 * self.smooth + 0.02 * loss
        run.step += 1
        run.tokens += batch.tokens[:, 1:].numel()
        run.seconds += time.monotonic() - started

    def validate(self) -> float:
        """Measure, and keep the checkpoint when it is the best so far."""
        examples, run = self._validation, self.run
        run.model.eval()
        measured = evaluate(run.model, self.codec, examples)
        if measured.value < run.best:
            run.best = measured.value
            facts = {
                "recipe": asdict(self.recipe),
                "steps": run.step,
                "tokens": run.tokens,
                "minutes": round(run.seconds / 60, 1),
                "threads": torch.get_num_threads(),
                "before": run.before,
            }
            metrics = {"validation subset": {"value": measured.value, "unit": measured.unit}}
            probe = self.codec.encode(examples[0].raw, examples[0].label)[:PROBE].tolist()
            checkpoints.save(
                checkpoints.Checkpoint(run.model, self.codec, facts, metrics, tuple(probe)),
                self.target,
            )
        return measured.value

    def save(self) -> None:
        """Write everything that ``resume`` needs."""
        self.run.save(self.state_file, self.recipe)

    def progress(self, validation: float | None) -> Progress:
        """Where the training stands, with the speed since the last call."""
        now, run = time.monotonic(), self.run
        speed = (run.tokens - self.reported[1]) / max(1e-9, now - self.reported[0])
        self.reported = (now, run.tokens)
        return Progress(
            run.step, run.seconds / 60, self.fraction(), run.tokens, self.smooth, speed, validation
        )


def _load_from(start: checkpoints.Checkpoint, model: SequenceModel, codec: Codec) -> None:
    """Load the weights of ``start`` into a model of its shape.

    Labels that it does not know begin as the class they are a part of, or else as "any"; a class
    that is to be added at every position, where it was not, begins with nothing.
    """
    weights, own = dict(start.model.state_dict()), model.state_dict()
    condition = "inputs.condition.weight"
    if condition in own and condition not in weights:
        weights[condition] = torch.zeros_like(weights["inputs.embedding.weight"])
    if codec.n_outputs == start.codec.n_outputs and codec.labels != start.codec.labels:
        ids = [
            *range(codec.vocab_size - len(codec.labels)),
            *map(
                start.codec.start,
                (
                    next(
                        (
                            name
                            for name in (label, codec.broader(label))
                            if name in start.codec.labels
                        ),
                        None,
                    )
                    for label in codec.labels
                ),
            ),
        ]
        for name in {"inputs.embedding.weight", condition} & weights.keys():
            weights[name] = weights[name][ids]
    if {k: t.shape for k, t in weights.items()} != {k: t.shape for k, t in own.items()}:
        raise ValueError("the model to start from has another shape than the recipe's")
    model.load_state_dict(weights)


def train_step(
    model: SequenceModel,
    optimizers: list[torch.optim.Optimizer],
    batch: Batch,
    clip: float,
    seed: int,
) -> float:
    """One update; returns the loss in bits per token. A step that is not finite is left out."""
    model.train()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    device = model.norm.weight.device
    with (
        torch.random.fork_rng(),
        torch.autocast(device.type, torch.bfloat16, has_fast_bfloat16(device)),
    ):
        torch.manual_seed(seed)  # dropout
        nats = -model.log_prob(batch.tokens.to(device))
    if batch.weights is None:
        loss = nats.mean()
    else:
        weights = batch.weights.to(device)
        loss = (nats * weights).sum() / weights.sum()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    if bool(norm.isfinite()):
        for optimizer in optimizers:
            optimizer.step()
    return float(loss.detach()) / _LN2


def _prepare(
    recipe: Recipe, data: Path, out: Path, start: checkpoints.Checkpoint | None
) -> tuple[Codec, Callable[[int], Batch]]:
    """The codec (a tokenizer is trained once) and the function from a step to its batch."""
    settings = recipe.train
    source = find_split(data, "train", recipe.modality)
    if recipe.modality == "text":
        given = start.codec if start is not None and isinstance(start.codec, Text) else None
        text, stream = _tokenize(source, out, recipe.codec["vocab_size"], given)
        return text, TextBatches(stream, settings.batch_size, settings.length, settings.seed).batch
    if recipe.modality == "image":
        image = Image(**recipe.codec)
        if source.suffix == ".npy":
            pictures, labels = open_picture_array(source, image)
        else:
            pictures, labels = _stack_pictures(read_pictures(source, image), image)
        return image, PictureBatches(
            pictures, labels, image, settings.batch_size, settings.seed, settings.flip
        ).batch
    audio = Audio(**recipe.codec)
    return audio, ClipBatches(
        read_clips(source, audio), audio, settings.batch_size, settings.length, settings.seed
    ).batch


def _stack_pictures(
    examples: Iterator[Example], codec: Image
) -> tuple[np.ndarray, np.ndarray | None]:
    pictures, labels = [], []
    for example in examples:
        pictures.append(example.raw)
        labels.append(-1 if example.label is None else codec.labels.index(example.label))
    return np.stack(pictures), np.array(labels) if min(labels) >= 0 else None


def _tokenize(
    source: Path, out: Path, vocab_size: int, given: Text | None
) -> tuple[Text, np.ndarray]:
    """Tokenizer and token stream of a text, made once and kept in ``out``."""
    tokenizer, codec = out / "tokenizer.model", given
    if codec is None and tokenizer.exists():
        codec = Text(tokenizer.read_bytes())
    if codec is None or (given is None and codec.vocab_size != vocab_size):
        documents = list(read_documents(source))
        budget = 20_000_000 // max(1, len(documents))  # characters that the tokenizer learns from
        codec = Text.train([text[: max(2000, budget)] for text in documents], vocab_size)
    learned = codec.tokenizer
    checkpoints.replace_file(tokenizer, lambda file: file.write_bytes(learned))
    stream = out / f"tokens-{_fingerprint(source, learned)}.npy"
    if not stream.exists():
        kind = np.uint16 if codec.vocab_size <= 2**16 else np.uint32
        encoded = [codec.encode(text).numpy().astype(kind) for text in read_documents(source)]
        checkpoints.replace_file(stream, lambda file: np.save(file, np.concatenate(encoded)))
    return codec, np.load(stream, mmap_mode="r")


def _fingerprint(source: Path, tokenizer: bytes) -> str:
    """Changes with the tokenizer and with the name, size or date of any source file."""
    digest = hashlib.sha256(tokenizer)
    for file in sorted(p for p in (source, *source.rglob("*")) if p.is_file()):
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _validation_examples(
    recipe: Recipe, codec: Codec, data: Path, limit: int | None
) -> list[Example]:
    """A validation set small enough to be measured every few minutes, spread over the whole."""
    most = limit or {"text": 12, "image": 64, "audio": 60}[recipe.modality]
    examples = list(read_examples(find_split(data, "validation", recipe.modality), codec))
    chosen = examples[:: max(1, len(examples) // most)][:most]
    if recipe.modality == "text":
        return [Example(example.raw[:60_000]) for example in chosen]
    return chosen


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a question the loop can ask; a second one ends at once."""
    caught: list[int] = []

    def handle(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are its caller's business
        previous = {}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _log(path: Path, append: bool) -> Iterator[Callable[[Progress], None]]:
    with path.open("a" if append else "w", newline="") as file:
        writer = csv.writer(file)
        if not append:
            writer.writerow(list(Progress.__dataclass_fields__))

        def log(progress: Progress) -> None:
            row = [f"{v:.6g}" if isinstance(v, float) else v for v in asdict(progress).values()]
            writer.writerow(row)
            file.flush()

        yield log
