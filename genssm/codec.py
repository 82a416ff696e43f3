"""Codecs: raw text, pictures and sound to integer tokens and back.

Every codec begins a sequence with one start token: the *boundary*, or a class label where it has
any. ``encode(raw)`` → 1-D int64 tokens, start included; ``decode(tokens)`` → raw.
"""

from __future__ import annotations

import io
import math
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import numpy as np
import torch
from torch import Tensor

from genssm.settings import check_type

ANY = "any"  # the label that means no label
RATES = (1_000, 192_000)  # Hz of sound, the least and the most
CHANNELS = 32  # the most of one sound
FINEST = 1_000  # the most in the denominator of a ratio of sampling rates; common ones stay exact

Raw = Any  # str, or a uint8 (H, W, C) array, or a float32 (samples,) array


class Codec(ABC):
    """What every modality shares. ``boundary`` is the id that starts (and ends) a sequence."""

    modality: ClassVar[str]
    unit: ClassVar[str]  # of the exact likelihood: bits per what

    boundary: int
    n_outputs: int
    labels: tuple[str, ...] = ()
    durations: tuple[int, ...] = ()  # of clips, in samples, that have a token
    levels: tuple[int, ...] = ()  # of clips, in dB, that have a token

    @property
    def vocab_size(self) -> int:
        """Ids read by the model: the predicted ones, the boundary and, last, the labels."""
        return max(self.n_outputs, self.boundary + 1) + len(self.labels)

    def broader(self, label: str) -> str | None:
        """The class that a label is a part of: "7" of "7_jackson"; None for a whole class."""
        while "_" in label:
            label = label.rpartition("_")[0]
            if label in self.labels:
                return label
        return None

    def class_of(self, label: str | None) -> str | None:
        """The whole class that a label is, or is a part of; None if it is neither."""
        while label is not None and label not in self.classes:
            label = self.broader(label)
        return label

    def label_of(self, start: int) -> str | None:
        """The label of a start token; None for the boundary."""
        i = start - (self.vocab_size - len(self.labels))
        return self.labels[i] if i >= 0 else None

    @property
    def opening(self) -> int:
        """Tokens between the start token and the raw values."""
        return bool(self.durations) + bool(self.levels)

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels that are no part of another."""
        return tuple(label for label in self.labels if self.broader(label) is None)

    def start(self, label: str | None = None) -> int:
        """The start token of a label; the boundary for None and "any"."""
        if label is None or label == ANY:
            return self.boundary
        if label not in self.labels:
            known = ", ".join((*self.labels, ANY)) if self.labels else "none"
            raise ValueError(f"unknown class {label!r}; this model knows: {known}")
        return self.vocab_size - len(self.labels) + self.labels.index(label)

    def _with_start(self, tokens: np.ndarray, label: str | None) -> Tensor:
        sequence = np.empty(len(tokens) + 1, np.int64)
        sequence[0], sequence[1:] = self.start(label), tokens
        return torch.from_numpy(sequence)

    def _without_start(self, tokens: Tensor | Sequence[int] | np.ndarray) -> np.ndarray:
        """Drop start tokens and boundaries: what is left stands for raw values."""
        ids = np.asarray(tokens, np.int64).reshape(-1)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ValueError(
                f"token ids must lie in 0 … {self.vocab_size - 1}, got {ids.min()} … {ids.max()}"
            )
        return ids[self._stand_for_raw(ids)]

    def _stand_for_raw(self, ids: np.ndarray) -> np.ndarray:
        """Which ids stand for raw values, and are no start token, boundary or the like."""
        return (ids < self.n_outputs) & (ids != self.boundary)

    @abstractmethod
    def encode(self, raw: Raw, label: str | None = None) -> Tensor:
        """Raw → int64 tokens (L + 1,), the start token first."""

    def prompt(self, raw: Raw, label: str | None = None) -> Tensor:
        """``encode`` for what is to be continued."""
        return self.encode(raw, label)

    @abstractmethod
    def decode(self, tokens: Tensor | Sequence[int] | np.ndarray) -> Raw:
        """Tokens → raw; start tokens and boundaries are dropped."""

    @abstractmethod
    def units(self, raw: Raw) -> int:
        """How many bytes, dimensions or samples ``raw`` holds: the divisor of its bits."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """JSON-able settings, from which ``codec_from_config`` builds the codec again."""

    @abstractmethod
    def decoder(self) -> Decoder:
        """A fresh incremental decoder for streaming."""

    def whole(self, tokens: Sequence[int]) -> int:
        """How many of the tokens are whole raw; the rest is for a decoder to begin with."""
        return len(tokens)


class Decoder(ABC):
    """Turns tokens into pieces of raw as soon as they are whole; the pieces join to ``decode``."""

    @abstractmethod
    def push(self, token: int) -> Raw | None:
        """Take one token; return the raw that it completes, or None."""

    @abstractmethod
    def flush(self) -> Raw | None:
        """Return what is left."""


class Text(Codec):
    """Text by SentencePiece with byte fallback: every string of Unicode characters round-trips."""

    modality = "text"
    unit = "bits/byte"
    _SPACE = "\u2581"  # SentencePiece writes a blank as this character, so it must go as bytes

    def __init__(self, tokenizer: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self.tokenizer = tokenizer
        if not tokenizer:
            raise ValueError("the tokenizer is empty")
        try:
            self._pieces = SentencePieceProcessor(model_proto=tokenizer)
        except RuntimeError as error:
            raise ValueError("the tokenizer is not a readable SentencePiece model") from error
        self.boundary = self._pieces.bos_id()
        self.n_outputs = self._pieces.vocab_size()
        self._bytes = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self.byte_of = {token: byte for byte, token in enumerate(self._bytes)}
        if self.boundary < 0 or self._pieces.unk_id() in self._bytes:
            raise ValueError("the tokenizer needs a <s> piece and byte fallback")

    @classmethod
    def train(cls, documents: Sequence[str], vocab_size: int) -> Text:
        """Learn ``vocab_size`` byte-pair pieces from the documents (a sample of them will do)."""
        import sentencepiece

        model = io.BytesIO()
        lines = (line[i : i + 4000] for text in documents for line in text.split("\n")
                 for i in range(0, len(line), 4000))  # fmt: skip
        settings: dict[str, Any] = {
            "sentence_iterator": lines,
            "model_writer": model,
            "vocab_size": vocab_size,
            "model_type": "bpe",
            "byte_fallback": True,
            "character_coverage": 0.9995,
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "split_digits": True,
            "hard_vocab_limit": True,
            "unk_id": 0,
            "bos_id": 1,
            "eos_id": -1,
            "pad_id": -1,
            "max_sentence_length": 16000,
            "num_threads": 2,
            "minloglevel": 2,
        }
        try:
            sentencepiece.SentencePieceTrainer.train(**settings)
        except RuntimeError as error:
            raise ValueError(
                f"cannot learn {vocab_size} pieces from this text (vocab_size must exceed 256 and "
                f"the text must be rich enough): {str(error).splitlines()[-1]}"
            ) from error
        return cls(model.getvalue())

    def encode(self, raw: str, label: str | None = None) -> Tensor:
        if not isinstance(raw, str):
            raise ValueError(f"a text prompt must be a string, got {type(raw).__name__}")
        try:
            raw.encode()
        except UnicodeEncodeError as error:
            raise ValueError("the text holds a lone surrogate, which is no character") from error
        ids: list[int] = []
        for i, part in enumerate(raw.split(self._SPACE)):
            if i:
                ids += [self._bytes[byte] for byte in self._SPACE.encode()]
            for j, piece in enumerate(part.split("\0")):  # SentencePiece stops at a NUL
                if j:
                    ids.append(self._bytes[0])
                ids += self._pieces.encode(piece)
        return self._with_start(np.array(ids, np.int64), label)

    def decode(self, tokens: Tensor | Sequence[int] | np.ndarray) -> str:
        return self._pieces.decode(self._without_start(tokens).tolist())

    def units(self, raw: str) -> int:
        return len(raw.encode())

    def to_config(self) -> dict[str, Any]:
        return {"kind": "text"}

    def decoder(self) -> Decoder:
        return _TextDecoder(self)

    def whole(self, tokens: Sequence[int]) -> int:
        """All but the last if those are the first bytes of a character that is not complete."""
        for count, token in enumerate(reversed(tokens[-3:]), 1):
            byte = self.byte_of.get(token, 0)  # 0 for pieces that are no single byte
            if byte >= 0xC0:  # the first byte of 2, 3 or 4
                complete = count >= 2 + (byte >= 0xE0) + (byte >= 0xF0)
                return len(tokens) - (0 if complete else count)
            if byte < 0x80:  # a whole character
                break
        return len(tokens)


class _TextDecoder(Decoder):
    """Holds back the bytes of a character until it is whole."""

    def __init__(self, codec: Text) -> None:
        self.codec, self.pending = codec, []

    def push(self, token: int) -> str | None:
        if token == self.codec.boundary:
            return None
        self.pending.append(token)
        ready = self.codec.whole(self.pending)
        text, self.pending = self.codec.decode(self.pending[:ready]), self.pending[ready:]
        return text or None

    def flush(self) -> str | None:
        text, self.pending = self.codec.decode(self.pending), []
        return text or None


class Image(Codec):
    """Pictures as raster bytes: rows from the top, pixels from the left, channels in order."""

    modality = "image"
    unit = "bits/dim"
    boundary = 256
    n_outputs = 256

    def __init__(self, height: int, width: int, channels: int, labels: Sequence[str] = ()) -> None:
        if height < 1 or width < 1 or channels not in (1, 3):
            raise ValueError(
                f"a picture needs height, width >= 1 and 1 or 3 channels, got "
                f"{height}×{width}×{channels}"
            )
        self.shape = (height, width, channels)
        self.labels = _distinct(labels)

    @property
    def length(self) -> int:
        """Values in one picture."""
        return int(np.prod(self.shape))

    def array(self, raw: Raw) -> np.ndarray:
        """Validate and bring a picture to uint8 of this codec's shape (H, W, C)."""
        array = np.asarray(raw)
        if array.ndim == 2:
            array = array[..., None]
        if array.dtype != np.uint8 or array.shape != self.shape:
            remedy = "convert it to uint8" if array.shape == self.shape else "crop or scale it"
            raise ValueError(
                f"a picture must be uint8 of shape {self.shape}, got {array.dtype} of shape "
                f"{array.shape}; {remedy} first"
            )
        return array

    def fit(self, array: np.ndarray) -> np.ndarray:
        """Crop the centre of a picture uint8 (h, w, C) of any size and scale it to this shape."""
        import PIL.Image
        import PIL.ImageOps

        height, width, channels = self.shape
        if array.shape == self.shape:
            return array
        if array.ndim != 3 or array.shape[2] != channels or 0 in array.shape:
            raise ValueError(f"a picture must be (h, w, {channels}), got {array.shape}")
        picture = PIL.Image.fromarray(array if channels == 3 else array[..., 0])
        fitted = PIL.ImageOps.fit(picture, (width, height), PIL.Image.Resampling.LANCZOS)
        return np.asarray(fitted).reshape(self.shape)

    def encode(self, raw: Raw, label: str | None = None) -> Tensor:
        return self._with_start(self.array(raw).reshape(-1), label)

    def decode(self, tokens: Tensor | Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens → uint8 (H, W, C); a picture that ends early is black from there on."""
        values = self._without_start(tokens)
        if len(values) > self.length:
            raise ValueError(f"a picture has {self.length} values, got {len(values)}")
        array = np.zeros(self.length, np.uint8)
        array[: len(values)] = values
        return array.reshape(self.shape)

    def units(self, raw: Raw) -> int:
        return self.array(raw).size

    def to_config(self) -> dict[str, Any]:
        height, width, channels = self.shape
        return {
            "kind": "image",
            "height": height,
            "width": width,
            "channels": channels,
            "labels": list(self.labels),
        }

    def decoder(self) -> Decoder:
        return _ImageDecoder(self)


class _ImageDecoder(Decoder):
    """Yields rows, uint8 (1, W, C)."""

    def __init__(self, codec: Image) -> None:
        self.row_shape = (1, *codec.shape[1:])
        self.size = math.prod(self.row_shape)
        self.row: list[int] = []

    def push(self, token: int) -> np.ndarray | None:
        if token < Image.n_outputs:
            self.row.append(token)
        if len(self.row) < self.size:
            return None
        row, self.row = np.array(self.row, np.uint8).reshape(self.row_shape), []
        return row

    def flush(self) -> None:
        return None  # an unfinished row stays black, as in Image.decode


class Audio(Codec):
    """Mono sound as 8-bit mu-law at one sampling rate, ended by the boundary.

    The start token is followed by one for the duration that is nearest to the clip's, of
    ``durations`` in samples, and one for the nearest level, of ``levels`` in dB: the mean square
    relative to a square wave of full scale. The boundary in their place leaves them open.
    """

    modality = "audio"
    unit = "bits/sample"
    boundary = 256

    def __init__(
        self,
        rate: int,
        labels: Sequence[str] = (),
        durations: tuple[int, ...] = (),
        levels: tuple[int, ...] = (),
    ) -> None:
        check_rate(rate)
        self.rate = rate
        self.labels = _distinct(labels)
        self.durations, self.levels = tuple(durations), tuple(levels)
        if any(n < 1 for n in self.durations) or sorted(set(self.durations)) != [*self.durations]:
            raise ValueError(
                f"durations must be numbers of samples, the shortest first; got {self.durations}"
            )
        if not all(-200 <= n <= 0 for n in self.levels) or sorted(set(levels)) != [*levels]:
            raise ValueError(f"levels must lie in -200 … 0 dB, the lowest first; got {self.levels}")

    @property
    def n_outputs(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.boundary + 1 + len(self.levels) + len(self.durations)

    def duration(self, samples: float) -> int:
        """The token of the duration that is nearest by ratio."""
        distances = np.abs(np.log(self.durations) - np.log(max(1, samples)))
        return self.n_outputs - len(self.durations) + int(distances.argmin())

    def level(self, wave: np.ndarray) -> int:
        """The token of the level that is nearest to that of sound on [-1, 1]."""
        power = float(np.square(wave, dtype=np.float64).mean()) if len(wave) else 0.0
        distances = np.abs(np.array(self.levels) - 10 * np.log10(max(power, 1e-20)))
        return self.boundary + 1 + int(distances.argmin())

    def _stand_for_raw(self, ids: np.ndarray) -> np.ndarray:
        return ids < self.boundary

    def waveform(self, raw: Raw, rate: int | None = None) -> np.ndarray:
        """Bring sound to float32 mono (samples,) on [-1, 1] at this codec's rate.

        ``raw``: (samples,) or (samples, channels), floats on [-1, 1] or int16, at ``rate`` Hz.
        Louder floats are clipped; channels are averaged. Rates without a common factor, such as
        47,999 and 8,000 Hz, would need a filter of gigabytes: they are taken to be in the nearest
        ratio of smaller numbers, here 6, which changes the pitch by at most a thousandth.
        """
        wave = np.asarray(raw)
        if wave.dtype.newbyteorder("=") == np.int16:
            wave = wave / np.float32(32768)
        if wave.ndim not in (1, 2) or not np.issubdtype(wave.dtype, np.floating):
            raise ValueError(
                "sound must be floats or int16 of shape (samples,) or (samples, channels), got "
                f"{wave.dtype} of shape {wave.shape}"
            )
        if wave.ndim == 2:
            if wave.shape[1] == 0:
                raise ValueError(f"the sound has no channel: its shape is {wave.shape}")
            if wave.shape[1] > max(wave.shape[0], CHANNELS):
                raise ValueError(
                    f"sound must be (samples, channels), at most {CHANNELS} channels; got "
                    f"{wave.shape}, which looks transposed"
                )
            wave = wave.mean(1)
        wave = wave.astype(np.float32)
        if not np.isfinite(wave).all():
            raise ValueError("the sound holds values that are not finite numbers")
        if rate is not None:
            wave = _resampled(wave, rate, self.rate)
        return np.clip(wave, -1, 1)

    def encode(self, raw: Raw, label: str | None = None) -> Tensor:
        wave = self.waveform(raw)
        opening = [self.duration(len(wave))] if self.durations else []
        if self.levels:
            opening.append(self.level(wave))
        tokens = torchaudio_functional().mu_law_encoding(torch.from_numpy(wave), 256).numpy()
        return self._with_start(np.insert(tokens, 0, opening), label)

    def scaled(self, tokens: Tensor, gain: Tensor) -> Tensor:
        """Tokens whose samples are ``gain`` times as loud, or as loud as can be."""
        mu_law = torchaudio_functional()
        samples = tokens < self.boundary
        wave = mu_law.mu_law_decoding(tokens.where(samples, 0), 256) * gain.float()
        return mu_law.mu_law_encoding(wave.clamp(-1, 1), 256).where(samples, tokens)

    def prompt(self, raw: Raw, label: str | None = None) -> Tensor:
        tokens = self.encode(raw, label)
        tokens[1 : 1 + self.opening] = self.boundary  # it goes on, nobody knows how
        return tokens

    def decode(self, tokens: Tensor | Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens → float32 (samples,) on [-1, 1]."""
        samples = torch.from_numpy(self._without_start(tokens))
        return torchaudio_functional().mu_law_decoding(samples, 256).numpy()

    def units(self, raw: Raw) -> int:
        return len(self.waveform(raw))

    def to_config(self) -> dict[str, Any]:
        config = {"kind": "audio", "rate": self.rate, "labels": list(self.labels)}
        for name in ("durations", "levels"):
            if values := getattr(self, name):
                config[name] = list(values)
        return config

    def decoder(self) -> Decoder:
        return _AudioDecoder(self)


def torchaudio_functional() -> Any:
    """The module ``torchaudio.functional``.

    Raises OSError where the installed torchaudio was built for another torch.
    """
    try:
        from torchaudio import functional
    except (ImportError, OSError, RuntimeError) as error:
        raise OSError(
            f"sound needs torchaudio, and the one that is installed does not load beside torch "
            f"{torch.__version__}; install releases that belong together: "
            'python3 -m pip install "torch>=2.11,<2.13" "torchaudio>=2.11,<2.11.1"'
        ) from error
    return functional


def check_rate(rate: int) -> None:
    """Raise ValueError for a sampling rate that no sound has."""
    least, most = RATES
    if not least <= rate <= most:
        raise ValueError(f"the sampling rate must lie in {least} … {most} Hz, got {rate}")


def _resampled(wave: np.ndarray, rate: int, own: int) -> np.ndarray:
    """float32 (samples,) at ``rate`` → (samples·own/rate,). The filter grows with both terms."""
    check_rate(rate)
    low, high = sorted((rate, own))
    ratio = Fraction(low, high).limit_denominator(FINEST)
    if ratio == 1 or not len(wave):
        return wave
    old, new = ratio.numerator, ratio.denominator
    if rate > own:
        old, new = new, old
    return torchaudio_functional().resample(torch.from_numpy(wave), old, new).numpy()


class _AudioDecoder(Decoder):
    """Yields blocks of samples, float32 (n,)."""

    block = 256

    def __init__(self, codec: Audio) -> None:
        self.codec, self.pending = codec, []

    def push(self, token: int) -> np.ndarray | None:
        self.pending.append(token)
        return self.flush() if len(self.pending) >= self.block else None

    def flush(self) -> np.ndarray | None:
        wave, self.pending = self.codec.decode(self.pending), []
        return wave if len(wave) else None


def _distinct(labels: Sequence[str]) -> tuple[str, ...]:
    if len(set(labels)) < len(labels) or ANY in labels or "" in labels:
        raise ValueError(f"labels must be distinct names other than {ANY!r}, got {labels!r:.80}")
    if any(unicodedata.category(c) == "Cc" for label in labels for c in label):
        raise ValueError(f"labels must have no control characters, got {labels!r:.80}")
    return tuple(labels)


def codec_from_config(config: dict[str, Any], folder: Path | None = None) -> Codec:
    """Build the codec that ``to_config`` described; text reads ``folder/tokenizer.model``."""
    settings = dict(config)
    kind = settings.pop("kind", None)
    if kind == "text" and not settings:
        if folder is None:
            raise ValueError("a text codec needs the folder of its tokenizer.model")
        file = folder / "tokenizer.model"
        if file.exists() and not file.is_file():
            raise ValueError(f"{str(file)!r} is no regular file")
        return Text(file.read_bytes())
    kinds = {"image": Image, "audio": Audio}
    if kind not in kinds:
        raise ValueError(f"unknown codec {config!r}")
    types = get_type_hints(kinds[kind].__init__)
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    try:
        for name in settings.keys() & types.keys():
            check_type(name, settings[name], types[name])
        return kinds[kind](**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the codec does not fit its kind {kind!r}: {error}") from error
