"""What a training starts with: the codec, the batches, the validation set, the first weights."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genssm.batches import Batch, ClipBatches, PictureBatches, TextBatches
from genssm.blocks import Block
from genssm.checkpoint import Checkpoint
from genssm.codec import Audio, Codec, Image, Text, codec_from_config
from genssm.config import ModelConfig
from genssm.data import Example, open_picture_array
from genssm.disk import replace_file
from genssm.layers import S4
from genssm.model import SequenceModel
from genssm.recipes import Recipe
from genssm.sources import Split, open_split
from genssm.token_cache import fingerprint, open_tokens

TOKENIZER = "tokenizer.model"
_LEARNED_FROM = 20_000_000  # characters that a tokenizer learns from
_LONGEST = {"text": 60_000, "audio": 65_536}  # characters or samples of a validation example
_SAMPLES = 2**20  # of a validation, at most


@dataclass(frozen=True)
class Prepared:
    """Data as a training uses it; ``batch`` is a function of the step alone."""

    codec: Codec
    batch: Callable[[int], Batch]
    validation: list[Example]


def prepare(
    recipe: Recipe,
    data: Path,
    out: Path,
    given: Codec | None,
    *,
    validation_limit: int | None = None,
) -> Prepared:
    """Find the splits of ``data``; learn a tokenizer and fill the token cache in ``out`` once.

    The tokenizer of a codec that is ``given`` is taken instead.
    """
    train, validation = (open_split(data, s, recipe.modality) for s in ("train", "validation"))
    codec, batch = _batches(recipe, train, out, given)
    return Prepared(codec, batch, _validation_examples(recipe, codec, validation, validation_limit))


def kept_tokenizer(recipe: Recipe, out: Path) -> Text | None:
    """The tokenizer of the training in ``out``, None for other data than text."""
    if recipe.modality != "text":
        return None
    try:
        return Text((out / TOKENIZER).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(out / TOKENIZER)!r} is not a readable tokenizer, and the training knows no "
            f"other tokens; bring it back, from {str(out / 'checkpoint')!r} if it is there"
        ) from error


def build_codec(recipe: Recipe) -> Image | Audio:
    """The codec of a recipe of pictures or sound. Raises ValueError for text, which must learn."""
    if recipe.modality == "text":
        raise ValueError("the codec of text is learned from it; this needs pictures or sound")
    codec = codec_from_config({"kind": recipe.modality, **recipe.codec})
    assert isinstance(codec, Image | Audio)
    return codec


def _batches(
    recipe: Recipe, source: Split, out: Path, given: Codec | None
) -> tuple[Codec, Callable[[int], Batch]]:
    settings = recipe.train
    skip = settings.on_corrupt == "skip"
    if recipe.modality == "text":
        known = given if isinstance(given, Text) else None
        text = _tokenizer(source, out, recipe.codec["vocab_size"], known, skip)
        stream = _open_stream(
            out / _stream_name(source, text.tokenizer, skip),
            lambda: map(text.encode, source.documents(skip)),
            text,
        )
        boundary = text.boundary if settings.cut_documents else None
        return text, TextBatches(
            stream, settings.batch_size, settings.length, settings.seed, boundary
        ).batch
    codec = build_codec(recipe)
    if isinstance(codec, Image):
        if source.path is not None and source.path.suffix == ".npy":
            pictures, labels = open_picture_array(source.path, codec)
            if labels is None:
                _tell_unknown(len(pictures), len(pictures), codec)
        else:
            pictures, labels = _stack_pictures(_told(source, codec, skip), codec)
        return codec, PictureBatches(
            pictures, labels, codec, settings.batch_size, settings.seed, settings.flip
        ).batch
    stream = _open_stream(
        out / _stream_name(source, json.dumps(codec.to_config()).encode(), skip),
        lambda: (codec.encode(e.raw, e.label) for e in _told(source, codec, skip)),
        codec,
    )
    batches = ClipBatches(
        stream, codec, settings.batch_size, settings.length, settings.seed, settings.noise,
        settings.fade, context=(settings.first_length or settings.length) // 8,
        least=math.prod(recipe.model.get("pools", ())),  # of fewer an inner level reads nothing
    )  # fmt: skip
    if batches.too_long and codec.durations:
        warnings.warn(
            f"{batches.too_long} of {len(batches.begins)} clips are longer than length, "
            f"{settings.length} tokens, and only their beginnings are trained, since the model is "
            "told durations; set a greater length, or durations=() to train all of them",
            stacklevel=2,
        )
    return codec, batches.batch


def _open_stream(path: Path, documents: Callable[[], Iterable[Tensor]], codec: Codec) -> np.ndarray:
    """The token cache at ``path``, the only one of its folder; a warning tells of another."""
    others = [f for f in path.parent.glob("tokens-*.json") if f.stem != path.name]
    if others:
        warnings.warn(
            f"{str(path.parent)!r} holds the tokens of other data or of another codec, or of these "
            "data before they were changed or moved; they are made again",
            stacklevel=2,
        )
    stream = open_tokens(path, documents, codec.vocab_size)
    for facts in others:
        for file in (facts.with_suffix(".bin"), facts):
            file.unlink(missing_ok=True)
    return stream


def _stream_name(source: Split, tokenizer: bytes, skip: bool) -> str:
    """Of the token cache; ``skip`` may have left out a part of the source."""
    return f"tokens-{fingerprint(source.fingerprint() + b'skip' * skip, tokenizer)}"


def _told(source: Split, codec: Codec, skip: bool) -> Iterator[Example]:
    """The examples; at their end a warning tells how many have no class that the codec knows."""
    count, unknown = 0, 0
    for count, example in enumerate(source.examples(codec, skip), 1):  # noqa: B007
        unknown += example.label is None
        yield example
    _tell_unknown(unknown, count, codec)


def _tell_unknown(unknown: int, count: int, codec: Codec) -> None:
    if codec.labels and unknown:
        warnings.warn(
            f"{unknown} of {count} examples are of no class that the model knows and are trained "
            f"as any; its classes are the names of folders, files or labels: {_some(codec.labels)}",
            stacklevel=2,
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", …" if len(names) > 10 else "")


def _stack_pictures(examples: Iterator[Example], codec: Image) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, and the numbers of their labels, -1 where there is none."""
    pictures, labels = [np.empty((0, *codec.shape), np.uint8)], []
    for example in examples:
        pictures.append(example.raw[None])
        labels.append(-1 if example.label is None else codec.labels.index(example.label))
    return np.concatenate(pictures), np.array(labels)


def _tokenizer(source: Split, out: Path, vocab_size: int, given: Text | None, skip: bool) -> Text:
    """The given tokenizer, that of ``out`` if it tokenised these data, or one learned from them."""
    file, codec = out / TOKENIZER, given
    if codec is None and file.exists():
        kept = Text(file.read_bytes())
        belongs = (out / f"{_stream_name(source, kept.tokenizer, skip)}.json").exists()
        codec = kept if belongs and kept.vocab_size == vocab_size else None
    if codec is None:
        documents = list(source.documents(skip))
        budget = _LEARNED_FROM // max(1, len(documents))
        codec = Text.train([text[: max(2000, budget)] for text in documents], vocab_size)
    learned = codec.tokenizer
    replace_file(file, lambda target: target.write_bytes(learned))
    return codec


def _validation_examples(
    recipe: Recipe, codec: Codec, source: Split, limit: int | None
) -> list[Example]:
    """A validation set small enough to be measured every few minutes, spread over the whole."""
    most = limit or {"text": 12, "image": 64, "audio": 60}[recipe.modality]
    found = source.examples(codec, recipe.train.on_corrupt == "skip")
    examples = [example for example in found if codec.units(example.raw)]
    if not examples:
        raise ValueError("the validation split is empty; put some of the data aside for it")
    longest = _LONGEST.get(recipe.modality, 0)
    if recipe.modality == "audio" and not codec.durations:  # all of a recording
        examples = [Example(raw, e.label) for e in examples for raw in _pieces(e.raw, longest)]
        most = min(most, _SAMPLES // max(len(e.raw) for e in examples))
    count = min(len(examples), most)
    chosen = [examples[i * len(examples) // count] for i in range(count)]
    if recipe.modality == "text":
        return [Example(e.raw[:longest]) for e in chosen]
    if recipe.modality == "audio":
        return [Example(e.raw[:longest].copy(), e.label) for e in chosen]  # lets go of the rest
    return chosen


def _pieces(wave: np.ndarray, longest: int) -> list[np.ndarray]:
    return [wave[i : i + longest] for i in range(0, len(wave), longest)]


def _check_meaning(before: ModelConfig, now: ModelConfig) -> None:
    """Refuse settings under which weights of the same shapes would be another model."""
    names = ("taps", "token_taps", "recall")
    pairs = {name: (getattr(before, name), getattr(now, name)) for name in names}
    for name, default in {"decay": "exp", "discretization": "zoh"}.items():
        pairs[name] = tuple(config.layer_settings.get(name, default) for config in (before, now))
    for name, (then, wanted) in pairs.items():
        if then and then != wanted:  # what it did not have is added
            raise ValueError(
                f"the model to start from has {name}={then}, the recipe {wanted}; set that of the "
                "model, or begin without it"
            )


_ADDED = (
    "inputs.condition.", "inputs.progress.", "inputs.token_taps.", "inputs.taps.", "head.recall.",
)  # fmt: skip


def load_weights(start: Checkpoint, model: SequenceModel, codec: Codec) -> None:
    """Load the weights of ``start`` into a model that has all of its parts.

    Labels that it does not know begin as the class they are a part of, or else as "any", and so do
    durations and levels. Inputs that it does not have begin with nothing: a class that is added at
    every position, taps, recall. Blocks that it does not have, at the end of a level, begin as the
    identity. S4 stores C for the length that it was trained on, and C is brought to the model's.
    """
    known = dict(start.model.named_modules())
    weights, own = dict(start.model.state_dict()), model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Block) and name not in known:
            module.make_identity()
            weights |= {f"{name}.{key}": own[f"{name}.{key}"] for key in module.state_dict()}
    weights |= {
        name: torch.zeros_like(parameter)
        for name, parameter in own.items()
        if name.startswith(_ADDED) and name not in weights
    }
    if codec.modality == start.codec.modality != "text":
        ids = _counterparts(codec, start.codec)
        for name in {"inputs.embedding.weight", "inputs.condition.weight"} & weights.keys():
            weights[name] = weights[name][ids]
        if start.model.config.head == model.config.head == "softmax":
            for name in ("head.linear.weight", "head.linear.bias"):
                weights[name] = weights[name][ids[: codec.n_outputs]]
    for name in sorted(weights.keys() | own.keys()):
        before, now = (tuple(w[name].shape) if name in w else None for w in (weights, own))
        if before != now:
            raise ValueError(
                f"the model to start from has another shape than the recipe's, first {name}: "
                f"{before} and {now}; blocks, taps, recall and labels may be added, nothing else "
                "may differ"
            )
    _check_meaning(start.model.config, model.config)
    model.load_state_dict(weights)
    for name, layer in model.named_modules():
        before = known.get(name)
        if isinstance(layer, S4) and before is not None:
            assert isinstance(before, S4)
            if (layer.l_max, layer.truncated) != (before.l_max, before.truncated):
                layer.load_output(before)


def _counterparts(codec: Codec, known: Codec) -> list[int]:
    """For each id of a codec, the id that is most like it among those of another of its kind."""
    told: list[int] = []
    pairs = ((codec.levels, known.levels), (codec.durations, known.durations))
    first = known.n_outputs - sum(len(values) for _, values in pairs)
    for values, others in pairs:
        told += [first + others.index(n) if n in others else known.boundary for n in values]
        first += len(others)
    starts = [known.start(_nearest(label, codec, known)) for label in codec.labels]
    return [*range(codec.vocab_size - len(told) - len(starts)), *told, *starts]


def _nearest(label: str, codec: Codec, known: Codec) -> str | None:
    return next((n for n in (label, codec.broader(label)) if n in known.labels), None)
