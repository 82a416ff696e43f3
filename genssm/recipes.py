"""Named experiments: codec, model and training settings that belong together."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

import torch

from genssm.codec import Codec, Image
from genssm.config import ModelConfig
from genssm.layers import build_layer
from genssm.optim import SCHEDULES
from genssm.settings import check_types
from genssm.sources import SC09

DIGITS = tuple("0123456789")
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
SPOKEN = (*DIGITS, *(f"{digit}_{speaker}" for digit in DIGITS for speaker in SPEAKERS))
CIFAR10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Rates are per step, before the schedule's factor."""

    batch_size: int = 8  # sequences a step, over all processes
    accumulate: int = 1  # parts that a process splits its sequences into, to save memory
    length: int = 1024  # longest training sequence, in tokens
    first_length: int = 0  # the length to begin with, doubled until it is ``length``; 0: no growth
    grow: float = 0.3  # first part of the training, in which the length grows
    steps: int = 20_000  # steps of a training without a limit in minutes
    lr: float = 3e-3  # AdamW
    matrix_lr: float = 0.02  # Muon
    weight_decay: float = 0.01  # on the matrices
    warmup: int = 50  # steps
    decay: float = 0.6  # last part of the training, in which the rates fall to zero
    schedule: str = "linear"  # how they fall
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.0  # keep this much of the averaged weights a step; 0: no averaging
    flip: bool = False  # mirror half of the pictures
    noise: float = 0.0  # sound is read with noise of up to so many steps of mu-law
    fade: float = 0.0  # a part of some clips is read quieter by up to so many dB
    cut_documents: bool = False  # a window of text ends where its document does
    on_corrupt: str = "stop"  # at a file that is not readable; or "skip" it
    compile: bool = False  # torch.compile what follows each layer
    shard: bool = False  # over several processes, a part of the weights on each
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("lr", "matrix_lr", "weight_decay", "decay", "grow", "noise", "fade"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")
        names = ("batch_size", "accumulate", "length", "steps", "lr", "matrix_lr", "decay", "clip",
                 "grow")  # fmt: skip
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup", "noise", "fade", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, most in (("decay", 1), ("grow", 1), ("length", 2**31), ("seed", 2**64 - 1)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in 0 … 1 (1 excluded), got {self.ema}")
        if not 0 <= self.first_length <= self.length:
            raise ValueError(
                f"first_length must lie in 0 … length ({self.length}), got {self.first_length}"
            )
        for name, choices in (("schedule", SCHEDULES), ("on_corrupt", ("stop", "skip"))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )

    def length_at(self, progress: float) -> int:
        """The longest sequence at a progress from 0 to 1: it doubles at equal intervals."""
        if not self.first_length or progress >= self.grow:
            return self.length
        doublings = math.ceil(math.log2(self.length / self.first_length))
        return min(self.length, self.first_length * 2 ** int(doublings * progress / self.grow))


_MOST_LAYERS = 1000
# Settings of a model that are numbers in a row: one a level, say.
_LISTED = {name for name, kind in get_type_hints(ModelConfig).items() if kind == tuple[int, ...]}
# Settings of a model that say which blocks it has.
_SHAPE = ("d_model", "n_layers", "pools", "layer", "layer_settings", "d_state", "expand")
# Settings of a model that follow from its codec and its training.
DERIVED = {"vocab_size", "n_outputs", "l_max", "opening", "durations"}


def _commas(values: Iterable[int]) -> str:
    return ",".join(map(str, values))


@dataclass(frozen=True)
class Recipe:
    """``codec`` are the settings of the modality's codec, ``model`` those of ``ModelConfig``
    other than those in ``DERIVED``, which follow from the codec and the training."""

    modality: str
    codec: dict[str, Any]
    model: dict[str, Any]
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        of = {"flip": "image", "cut_documents": "text", "noise": "audio", "fade": "audio"}
        for name, modality in of.items():
            if getattr(self.train, name) and self.modality != modality:
                raise ValueError(
                    f"{name} is for {modality}, the recipe is for {self.modality}; leave it out"
                )

    def model_config(self, codec: Codec) -> ModelConfig:
        """The settings of a model of this codec's tokens."""
        config = ModelConfig(
            vocab_size=codec.vocab_size,
            n_outputs=codec.n_outputs,
            opening=codec.opening,
            durations=codec.durations,
            l_max=self.train.length,
            **self.model,
        )
        if isinstance(codec, Image) and config.image_shape not in (None, codec.shape):
            raise ValueError(
                f"image_shape must be that of the pictures, {_commas(codec.shape)}; got "
                f"{_commas(config.image_shape or ())}"
            )
        self._check_lengths(config)
        return config

    def _check_lengths(self, config: ModelConfig) -> None:
        stride, opening = math.prod(config.pools), config.opening
        for name in ("length", "first_length"):
            value = getattr(self.train, name)
            if value and value < stride:  # the innermost layers would learn nothing
                raise ValueError(
                    f"{name} must be at least {stride}, the product of the pools; got {value}"
                )
            if value and value <= opening:
                raise ValueError(
                    f"{name} must be more than the {opening} tokens of an opening, got {value}"
                )

    def changed(self, settings: dict[str, Any]) -> Recipe:
        """A copy with settings of codec, model or training replaced by name.

        One number stands for a tuple of one: ``d_model=128`` of a model with one level. Raises
        ValueError for what no model or training can have, before any data is read.
        """
        codec, model, train = dict(self.codec), dict(self.model), {}
        model_names = {f.name for f in fields(ModelConfig)} - DERIVED
        train_names = {f.name for f in fields(TrainConfig)}
        for name, value in settings.items():
            if name in codec:
                codec[name] = value
            elif name in model_names:
                many = name in _LISTED and isinstance(value, int)
                model[name] = (value,) if many else value
            elif name in train_names:
                train[name] = value
            else:
                known = sorted({*codec, *model_names, *train_names})
                raise ValueError(f"unknown setting {name!r}; known: {', '.join(known)}")
        changed = replace(self, codec=codec, model=model, train=replace(self.train, **train))
        config = ModelConfig(vocab_size=2, n_outputs=2, l_max=changed.train.length, **model)
        changed._check_lengths(config)
        with torch.random.fork_rng(devices=()):
            for width in config.d_model:
                build_layer(config.layer, width, config.d_state, 1, **config.layer_settings)
        if sum(config.n_layers) > _MOST_LAYERS:
            raise ValueError(
                f"n_layers must be at most {_MOST_LAYERS} in all, got {sum(config.n_layers)}"
            )
        return changed

    def shaped_as(self, config: ModelConfig) -> Recipe:
        """A copy with the blocks and pools of another model."""
        return self.changed({name: getattr(config, name) for name in _SHAPE})


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """["d_state=64", "pools=3,4", "layer=s4"] → {"d_state": 64, "pools": (3, 4), "layer": "s4"}."""
    settings = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"a setting must read key=value, got {pair!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        settings[name.strip()] = value
    return settings


_ABOVE = 96  # values in a row of a 32×32 RGB picture
CIFAR_TAPS = (
    *range(1, 16),  # up to five pixels to the left
    *range(_ABOVE - 12, _ABOVE + 10),  # the row above, from four pixels right to three left
    *range(2 * _ABOVE - 6, 2 * _ABOVE + 7),  # two rows above
)
_UP = 28  # values in a row of a 28×28 grey picture
MNIST_TAPS = (
    *range(1, 7),  # six to the left
    *range(_UP - 5, _UP + 5),  # the row above, from five to the right to four to the left
    *range(2 * _UP - 3, 2 * _UP + 4),
    3 * _UP,
)
LEVELS = tuple(range(-52, -6, 2))  # dB


def durations(shortest: float, longest: float, count: int, rate: int) -> tuple[int, ...]:
    """Numbers of samples at ``rate`` Hz, from ``shortest`` to ``longest`` seconds by one ratio."""
    ratio = longest / shortest
    return tuple(round(rate * shortest * ratio ** (i / (count - 1))) for i in range(count))


RECIPES: dict[str, Recipe] = {
    "wiki": Recipe(
        modality="text",
        codec={"vocab_size": 4096},
        model={
            "d_model": (256,),
            "n_layers": (6,),
            "d_state": 32,
            "dt_max": 1.0,
            "token_taps": (2, 3),
            "recall": (1, 2, 3),
        },
        train=TrainConfig(batch_size=2, length=2048),
    ),
    "cifar10": Recipe(
        modality="image",
        codec={"height": 32, "width": 32, "channels": 3, "labels": CIFAR10},
        model={
            "d_model": (64, 192, 320),
            "n_layers": (2, 4, 2),
            "pools": (3, 4),
            "d_state": 32,
            "head": "logistics",
            "taps": CIFAR_TAPS,
            "image_shape": (32, 32, 3),
            "conditioned": True,
        },
        train=TrainConfig(batch_size=8, length=3072, flip=True),
    ),
    "digits": Recipe(
        modality="audio",
        codec={
            "rate": 8000,
            "labels": SPOKEN,
            "durations": durations(0.125, 1.25, 41, 8000),
            "levels": LEVELS,
        },
        model={
            "d_model": (64, 128, 256),
            "n_layers": (4, 4, 4),
            "pools": (4, 4),
            "d_state": 32,
            "conditioned": True,
        },
        train=TrainConfig(batch_size=8, length=8192),
    ),
    "mnist": Recipe(
        modality="image",
        codec={"height": 28, "width": 28, "channels": 1, "labels": DIGITS},
        model={
            "d_model": (64, 128),
            "n_layers": (2, 4),
            "pools": (4,),
            "d_state": 32,
            "taps": MNIST_TAPS,
            "image_shape": (28, 28, 1),
            "conditioned": True,
        },
        train=TrainConfig(batch_size=8, length=784),
    ),
    "sc09": Recipe(
        modality="audio",
        codec={
            "rate": 16000,
            "labels": SC09,
            "durations": durations(0.1, 1.0, 41, 16000),
            "levels": LEVELS,
        },
        model={
            "d_model": (64, 128, 256),
            "n_layers": (4, 4, 4),
            "pools": (4, 4),
            "d_state": 64,
            "conditioned": True,
        },
        train=TrainConfig(batch_size=4, length=16384),
    ),
    "ljspeech": Recipe(  # recordings of any length, without classes
        modality="audio",
        codec={"rate": 22050, "labels": (), "durations": (), "levels": ()},
        model={
            "d_model": (64, 128, 256),
            "n_layers": (4, 4, 4),
            "pools": (4, 4),
            "d_state": 64,
        },
        train=TrainConfig(batch_size=4, length=16384),
    ),
}
