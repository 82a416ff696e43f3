"""Training: a resumable loop that keeps the best checkpoint by validation."""

from __future__ import annotations

import copy
import math
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from filelock import FileLock, Timeout

from genssm import checkpoint as checkpoints
from genssm import disk, training_state
from genssm.batches import Batch
from genssm.distributed import World, joined
from genssm.evaluate import evaluate
from genssm.finite import NotFiniteError
from genssm.folders import check_replaceable
from genssm.model import SequenceModel
from genssm.optim import build_optimizers, rate, scale_rates
from genssm.preparation import TOKENIZER, build_codec, kept_tokenizer, load_weights, prepare
from genssm.recipes import Recipe
from genssm.sheets import Sheet, draw_sheet, write_sheet
from genssm.training_log import LOG, Log, Progress, open_log
from genssm.training_state import STATE, TrainingState
from genssm.update import check_parts, compile_pointwise, spread, train_step

PROBE = 1024  # validation tokens stored in a checkpoint to compare its two views on
_CHECKPOINT = "checkpoint"
_NAMES = "|".join(map(re.escape, (_CHECKPOINT, STATE, LOG, TOKENIZER)))
_WRITTEN = re.compile(rf"{_NAMES}|tokens-.*\.(bin|json)")
_LOST = 100  # steps in a row without a finite gradient after which a training is given up


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    minutes: float | None = None,
    resume: bool = False,
    start: checkpoints.Checkpoint | str | None = None,
    save_minutes: float = 5.0,
    validate_minutes: float = 10.0,
    sheet_minutes: float | None = None,
    tensorboard: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Train ``recipe`` on the ``train`` split in ``data``; return the best checkpoint's folder.

    The budget is ``minutes`` of training, or ``recipe.train.steps``. ``out`` receives the state
    from which ``resume`` goes on exactly (``state.safetensors``), ``log.csv``, ``checkpoint/`` and,
    every ``sheet_minutes``, ``samples/``. ``start`` is or names a checkpoint to begin with (its
    tokenizer included), whose parts the recipe has all; others are added. SIGTERM and Ctrl-C save
    before they end the training. Under ``torchrun`` all its processes train one model.

    Raises ValueError for unusable data or settings and for a training that diverged,
    FileExistsError for a folder with a training that is not to be resumed or is under way, or a
    checkpoint without one, OSError when the disk is full: the last save is then still whole.
    """
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes must be at least 0, got {minutes}")
    begun = _begin(recipe, out, resume, start)
    with joined() as world, _alone(out, world), _Interruption() as interruption:
        check_parts(recipe.train.batch_size, recipe.train.accumulate, world)
        _holds_training(out, resume)  # another may have come and gone meanwhile
        training = _Training(recipe, data, out, minutes, begun, world)
        minutes_of = (save_minutes, validate_minutes, sheet_minutes)
        step = training.state.counters.step
        with open_log(out, step, tensorboard) if world.leads else nullcontext() as log:
            interruption.waits = True
            stopped = _loop(training, minutes_of, lambda: interruption.came, log, report)
        target, best = training.target, training.state.counters.best
        del training  # before the processes part
    if stopped:
        raise KeyboardInterrupt
    if not math.isfinite(best):
        raise ValueError(
            "the training has diverged: no validation gave a finite number, so there is no "
            "checkpoint; train anew with lower rates (lr, matrix_lr) or a longer warmup"
        )
    return target


def _loop(
    training: _Training,
    minutes: tuple[float, float, float | None],
    interrupted: Callable[[], bool],
    log: Log | None,
    report: Callable[[Progress], None],
) -> bool:
    """Train to the end of the budget; whether it was interrupted. Saved in either case.

    ``minutes``: between saves, validations and sheets. Rank 0 alone has clocks and a log.
    """
    world = training.world
    timers = [
        _Timer(60 * each if each is not None and world.leads else math.inf) for each in minutes
    ]
    reports = _Timer(10 if world.leads else math.inf)

    def tell(value: float | None) -> None:
        progress = training.progress(value)
        if log is not None:
            report(progress)
            log.write(progress)

    def draw() -> None:
        sheet = training.draw()
        if log is not None and sheet is not None:
            log.show(sheet)

    stop = False
    while training.fraction() < 1:
        due = [interrupted(), *(timer.due() for timer in timers)]
        stop, save, validate, sheet = map(bool, world.largest(due))
        if stop:
            break
        training.advance()
        best = training.state.counters.best
        value = training.validate() if validate else None
        if sheet:
            draw()
        if save or training.state.counters.best < best:  # or a worse one may follow after a kill
            training.save()
        if reports.due() or value is not None:
            tell(value)
    training.save()
    tell(training.validate())
    if minutes[2] is not None:
        draw()
    training.save()
    return stop or interrupted()


def _begin(
    recipe: Recipe, out: Path, resume: bool, start: checkpoints.Checkpoint | str | None
) -> checkpoints.Checkpoint | None:
    """Check that ``out`` fits the intention and load the checkpoint to start from, if any."""
    begun = _holds_training(out, resume)
    if not begun and not resume and (out / _CHECKPOINT).exists():
        raise FileExistsError(
            f"{str(out)!r} holds a checkpoint, which the training would replace; use another folder"
        )
    if resume and not begun:
        raise ValueError(f"{str(out)!r} holds no training to resume")
    if resume and start is not None:
        raise ValueError("a resumed training goes on from its own weights, not from a checkpoint")
    check_replaceable(out / _CHECKPOINT)
    if resume:  # before anything in ``out``, such as the tokenizer, is made anew
        training_state.check(out, recipe)
    return checkpoints.load(start) if isinstance(start, str) else start


def _holds_training(out: Path, resume: bool) -> bool:
    begun = training_state.exists(out)
    if begun and not resume:
        raise FileExistsError(f"{str(out)!r} holds a training; resume it or use another folder")
    return begun


@contextmanager
def _alone(out: Path, world: World) -> Iterator[None]:
    """Keeps other trainings out of ``out``, as long as the body runs."""
    if not world.leads:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise FileExistsError(
            f"{str(out)!r} is where another process trains; wait for its end or use another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()  # the file stays: who removed it would let two in


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
    """One training: its data, its model and what can be done with them.

    Over several processes every method must be called by all of them.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Path,
        out: Path,
        minutes: float | None,
        start: checkpoints.Checkpoint | None,
        world: World,
    ) -> None:
        self.recipe, self.out, self.minutes, self.world = recipe, out, minutes, world
        self.target = out / _CHECKPOINT
        settings = recipe.train
        out.mkdir(parents=True, exist_ok=True)
        if world.leads:
            disk.remove_leftovers(out, _WRITTEN.fullmatch)
        if recipe.modality != "text":  # before the data, which may take long
            recipe.model_config(build_codec(recipe))
        resumed = training_state.exists(out)
        given = kept_tokenizer(recipe, out) if resumed else start.codec if start else None
        with world.leader_first(), warnings.catch_warnings():
            if not world.leads:  # what rank 0 has told
                warnings.simplefilter("ignore")
            self.data = prepare(recipe, data, out, given)
        torch.manual_seed(settings.seed)
        model = SequenceModel(recipe.model_config(self.data.codec))
        if start is not None and not resumed:
            load_weights(start, model, self.data.codec)
        model.to(world.device)
        if settings.compile:
            compile_pointwise(model)
        self.objective = spread(model, world, settings.shard)
        optimizers = build_optimizers(model, settings.lr, settings.matrix_lr, settings.weight_decay)
        self.state = TrainingState(model, optimizers, recipe, world)
        if resumed:
            self.state.restore(out)
        elif start is not None:
            self.state.counters.before = start.training
        self.lost = 0  # steps in a row without a finite gradient
        self.reported = (time.monotonic(), self.state.counters.tokens)

    def fraction(self) -> float:
        """The part of the budget that is spent."""
        counters = self.state.counters
        if self.minutes is None:
            return counters.step / self.recipe.train.steps
        return counters.seconds / (60 * self.minutes) if self.minutes else 1.0

    def advance(self) -> None:
        """One step."""
        started, settings, counters = time.monotonic(), self.recipe.train, self.state.counters
        fraction, optimizers = self.fraction(), self.state.optimizers
        factor = rate(counters.step, fraction, settings.warmup, settings.decay, settings.schedule)
        scale_rates(optimizers, factor)
        batch = self.data.batch(counters.step).cut(settings.length_at(fraction))
        step = train_step(
            self.objective,
            optimizers,
            batch,
            settings.clip,
            (settings.seed, counters.step),
            accumulate=settings.accumulate,
            world=self.world,
        )
        self._count(step.bits, step.finite, batch)
        seconds = counters.seconds + time.monotonic() - started
        counters.seconds = self.world.largest([seconds])[0]

    def _count(self, bits: float, finite: bool, batch: Batch) -> None:
        counters = self.state.counters
        self.lost = 0 if finite else self.lost + 1
        if self.lost >= _LOST:
            raise ValueError(
                f"{_LOST} steps in a row had no finite gradient; begin again with a lower lr and "
                "matrix_lr, or resume with them what was saved before"
            )
        if finite:
            self.state.average()
            before = bits if counters.loss is None else counters.loss
            counters.loss = 0.98 * before + 0.02 * bits
        else:
            counters.skipped += 1
        counters.step += 1
        counters.tokens += batch.tokens[:, 1:].numel()

    def validate(self) -> float:
        """Measure, and keep the checkpoint when it is the best so far."""
        world, examples, counters = self.world, self.data.validation, self.state.counters
        model = self.state.exported()
        mine = examples[world.rank :: world.size]
        own = [0.0, 0.0]  # bits, units
        try:
            if mine:
                found = evaluate(model, self.data.codec, mine)
                own = [found.bits, found.units]
        except NotFiniteError:  # no process may wait for another that has stopped
            own = [math.nan, 1.0]
        bits, units = world.sums(own)
        value = bits / units
        if value < counters.best:
            counters.best = value
            if world.leads:
                checkpoints.save(self._checkpoint(model, value), self.target)
        return value

    def _checkpoint(self, model: SequenceModel, value: float) -> checkpoints.Checkpoint:
        counters, codec, example = self.state.counters, self.data.codec, self.data.validation[0]
        facts = {
            "recipe": asdict(self.recipe),
            "steps": counters.step,
            "skipped": counters.skipped,
            "tokens": counters.tokens,
            "minutes": round(counters.seconds / 60, 1),
            "processes": self.world.size,
            "device": self.world.device.type,
            "threads": torch.get_num_threads(),
            "before": counters.before,
        }
        metrics = {"validation subset": {"value": value, "unit": codec.unit}}
        probe = codec.encode(example.raw, example.label)[:PROBE].tolist()
        return checkpoints.Checkpoint(model, codec, facts, metrics, tuple(probe))

    def draw(self) -> Sheet | None:
        """Draw a sample sheet and write it; rank 0 has it."""
        model, sheet = self.state.exported(), None
        if self.world.leads:
            if self.world.device.type != "cpu":  # samples are stepped on the CPU
                model = copy.deepcopy(model).cpu()
            whole = checkpoints.Checkpoint(model, self.data.codec)
            sheet = draw_sheet(whole, self.state.counters.step)
            write_sheet(sheet, self.out / "samples")
        self.world.wait()
        return sheet

    def save(self) -> None:
        """Write everything that ``resume`` needs."""
        self.state.save(self.out)

    def progress(self, validation: float | None) -> Progress:
        """Where the training stands, with the speed since the last call."""
        now, counters = time.monotonic(), self.state.counters
        speed = (counters.tokens - self.reported[1]) / max(1e-9, now - self.reported[0])
        self.reported = (now, counters.tokens)
        return Progress(
            counters.step,
            counters.seconds / 60,
            self.fraction(),
            counters.tokens,
            math.nan if counters.loss is None else counters.loss,
            speed,
            validation,
            counters.skipped,
            self.recipe.train.length_at(self.fraction()),
        )


class _Interruption:
    """Turns SIGINT and SIGTERM into KeyboardInterrupt, and back when it is left.

    While it ``waits``, the first one is a question that the loop can ask: whether it ``came``.
    """

    def __init__(self) -> None:
        self.came, self.waits = False, False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread: signals are its caller's business
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.came or not self.waits:
            raise KeyboardInterrupt
        self.came = True
