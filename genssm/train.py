"""Training: a resumable loop that keeps the best checkpoint by validation."""

from __future__ import annotations

import csv
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
from genssm.optim import build_optimizers, rate
from genssm.recipes import Recipe

_LN2 = math.log(2)
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
        for section in ("modality", "codec", "model"):
            if facts["recipe"][section] != wanted[section]:
                raise ValueError(
                    f"the training in {str(path.parent)!r} has other {section} settings: "
                    f"{facts['recipe'][section]}; resume it with those, or use another folder"
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
        self.step, self.seconds, self.tokens, self.best = (
            facts[name] for name in ("step", "seconds", "tokens", "best")
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
    """Train ``recipe`` on the ``train`` split in ``data`` and return the folder of the best checkpoint.

    The budget is ``minutes`` of training, or ``recipe.train.steps``. ``out`` receives
    ``state.safetensors`` (from which ``resume`` goes on exactly), ``log.csv`` and ``checkpoint/``.
    ``start`` names a checkpoint of the same shape to begin with (its tokenizer included). SIGTERM
    and Ctrl-C save before they end the training. Raises ValueError for unusable data or
    settings, and FileExistsError for a folder with a training that is not to be resumed.
    """
    state_file, target = out / "state.safetensors", out / "checkpoint"
    if state_file.exists() and not resume:
        raise FileExistsError(f"{str(out)!r} holds a training; resume it or use another folder")
    if resume and not state_file.exists():
        raise ValueError(f"{str(out)!r} holds no training to resume")
    if resume and start is not None:
        raise ValueError("a resumed training goes on from its own weights, not from a checkpoint")
    source = None if start is None else checkpoints.load(start)
    settings = recipe.train
    out.mkdir(parents=True, exist_ok=True)
    codec, batches = _prepare(recipe, data, out, source)
    validation = list(_validation_examples(recipe, codec, data, validation_limit))
    torch.manual_seed(settings.seed)
    config = ModelConfig(
        vocab_size=codec.vocab_size,
        n_outputs=codec.n_outputs,
        l_max=settings.length,
        **recipe.model,
    )
    model = SequenceModel(config)
    optimizers = build_optimizers(model, settings.lr, settings.matrix_lr, settings.weight_decay)
    run = _Run(model, optimizers)
    if source is not None:
        if source.model.config.vocab_size != config.vocab_size or not _same_shapes(
            source.model, model
        ):
            raise ValueError(f"the model {start!r} has another shape than the recipe's")
        model.load_state_dict(source.model.state_dict())
    if resume:
        run.restore(state_file, recipe)

    base_rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    smooth = math.nan
    last_report = last_save = last_validation = time.monotonic()
    reported_tokens = run.tokens
    with _interruption() as interrupted, _log(out / "log.csv", resume) as log:
        while True:
            fraction = _fraction(run, settings.steps, minutes)
            if fraction >= 1 or interrupted():
                break
            started = time.monotonic()
            factor = rate(run.step, fraction, settings.warmup, settings.decay)
            for optimizer, rates in zip(optimizers, base_rates, strict=True):
                for group, base in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = base * factor
            batch = batches(run.step)
            loss = _step(model, optimizers, batch, settings.clip, settings.seed + run.step)
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
            run.step += 1
            run.tokens += batch.tokens[:, 1:].numel()
            now = time.monotonic()
            run.seconds += now - started
            value = None
            if now - last_validation > 60 * validate_minutes:
                value = _validate(run, recipe, codec, validation, target)
                last_validation = time.monotonic()
            if now - last_save > 60 * save_minutes:
                run.save(state_file, recipe)
                last_save = time.monotonic()
            if now - last_report > 10 or value is not None:
                speed = (run.tokens - reported_tokens) / (now - last_report)
                progress = Progress(
                    run.step, run.seconds / 60, fraction, run.tokens, smooth, speed, value
                )
                report(progress)
                log(progress, factor)
                last_report, reported_tokens = time.monotonic(), run.tokens
        run.save(state_file, recipe)
        value = _validate(run, recipe, codec, validation, target)
        fraction = _fraction(run, settings.steps, minutes)
        final = Progress(run.step, run.seconds / 60, fraction, run.tokens, smooth, 0.0, value)
        report(final)
        log(final, 0.0)
        run.save(state_file, recipe)
        if interrupted():
            raise KeyboardInterrupt
    return target


def _same_shapes(a: nn.Module, b: nn.Module) -> bool:
    return {k: t.shape for k, t in a.state_dict().items()} == {
        k: t.shape for k, t in b.state_dict().items()
    }


def _fraction(run: _Run, steps: int, minutes: float | None) -> float:
    return run.step / steps if minutes is None else run.seconds / (60 * minutes)


def _step(
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
        torch.autocast(device.type, torch.bfloat16, _has_bfloat16(device)),
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


def _has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 on this device."""
    if device.type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return True


def _prepare(
    recipe: Recipe, data: Path, out: Path, start: checkpoints.Checkpoint | None
) -> tuple[Codec, Callable[[int], Batch]]:
    """The codec (a tokenizer is trained once) and the function from a step to its batch."""
    settings = recipe.train
    source = find_split(data, "train", recipe.modality)
    if recipe.modality == "text":
        if start is not None and isinstance(start.codec, Text):
            tokenizer = start.codec.tokenizer
            checkpoints.replace_file(
                out / "tokenizer.model", lambda file: file.write_bytes(tokenizer)
            )
        text, stream = _tokenize(source, out, recipe.codec["vocab_size"])
        return text, TextBatches(stream, settings.batch_size, settings.length, settings.seed).batch
    if recipe.modality == "image":
        image = Image(**recipe.codec)
        if source.suffix == ".npy":
            pictures, labels = open_picture_array(source)
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


def _tokenize(source: Path, out: Path, vocab_size: int) -> tuple[Text, np.ndarray]:
    """Tokenizer and token stream of a text, made once and kept in ``out``."""
    tokenizer, stream = out / "tokenizer.model", out / "tokens.npy"
    if not tokenizer.exists():
        documents = list(read_documents(source))
        budget = 20_000_000 // max(1, len(documents))  # characters that the tokenizer learns from
        learned = Text.train([text[: max(2000, budget)] for text in documents], vocab_size)
        checkpoints.replace_file(tokenizer, lambda file: file.write_bytes(learned.tokenizer))
    if not stream.exists():
        codec = Text(tokenizer.read_bytes())
        documents = read_documents(source)
        encoded = [codec.encode(text).numpy().astype(np.uint16) for text in documents]
        checkpoints.replace_file(stream, lambda file: np.save(file, np.concatenate(encoded)))
    return Text(tokenizer.read_bytes()), np.load(stream, mmap_mode="r")


def _validation_examples(
    recipe: Recipe, codec: Codec, data: Path, limit: int | None
) -> Iterator[Example]:
    """A validation set small enough to be measured every few minutes."""
    most = limit or {"text": 12, "image": 64, "audio": 60}[recipe.modality]
    examples = list(read_examples(find_split(data, "validation", recipe.modality), codec))
    every = max(1, len(examples) // most)
    for example in examples[::every][:most]:
        raw = example.raw[:60_000] if recipe.modality == "text" else example.raw
        yield Example(raw, example.label)


def _validate(
    run: _Run, recipe: Recipe, codec: Codec, examples: list[Example], target: Path
) -> float:
    """Measure, and keep the checkpoint when it is the best so far."""
    run.model.eval()
    measured = evaluate(run.model, codec, examples)
    if measured.value < run.best:
        run.best = measured.value
        training = {
            "recipe": asdict(recipe),
            "steps": run.step,
            "tokens": run.tokens,
            "minutes": round(run.seconds / 60, 1),
            "threads": torch.get_num_threads(),
        }
        metrics = {"validation subset": {"value": measured.value, "unit": measured.unit}}
        probe = codec.encode(examples[0].raw, examples[0].label)[:PROBE].tolist()
        checkpoints.save(
            checkpoints.Checkpoint(run.model, codec, training, metrics, tuple(probe)), target
        )
    return measured.value


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
def _log(path: Path, append: bool) -> Iterator[Callable[[Progress, float], None]]:
    with path.open("a" if append else "w", newline="") as file:
        writer = csv.writer(file)
        if not append:
            writer.writerow([*Progress.__dataclass_fields__, "rate"])

        def log(progress: Progress, factor: float) -> None:
            row = [f"{v:.6g}" if isinstance(v, float) else v for v in asdict(progress).values()]
            writer.writerow([*row, f"{factor:.4g}"])
            file.flush()

        yield log
