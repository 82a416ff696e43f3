"""A small convolutional classifier of pictures or sound, trained on real data.

It judges samples: whether a spoken digit is recognised as the one that was asked for, and, by its
features, how far the samples as a whole are from the data. It shares nothing with the models that
it judges. One safetensors file holds it, its classes and what it reached.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genssm.codec import Audio, Codec, Image, Raw, codec_from_config, torchaudio_functional
from genssm.data import Example
from genssm.disk import replace_file

FEATURES = 64
_MELS, _WINDOW, _HOP = 32, 0.032, 0.0125  # bands, seconds
_SHORTEST = 0.4  # seconds: shorter clips are padded
_BATCH = 64


@dataclass(frozen=True)
class Report:
    """How a classifier was trained and how often it is right on clips it has not seen."""

    epochs: int
    examples: int  # trained on
    accuracy: float  # on the validation split
    validation_examples: int


class Classifier(nn.Module):
    """Spectrogram or pixels → three stages of convolutions → ``FEATURES`` numbers → classes."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        if not isinstance(codec, Audio | Image) or not codec.classes:
            raise ValueError("a classifier needs a codec of pictures or sound that has classes")
        self.codec, self.classes = codec, codec.classes
        channels, rows = (1, _MELS) if isinstance(codec, Audio) else (codec.shape[2], 8)
        widths = (16, 32, FEATURES) if isinstance(codec, Audio) else (32, 64, FEATURES)
        layers: list[nn.Module] = []
        for width in widths:
            layers += [*_convolution(channels, width), *_convolution(width, width), nn.MaxPool2d(2)]
            channels = width
        if isinstance(codec, Audio):  # join the bands: what is heard depends on where they are
            layers += _convolution(channels, FEATURES, (rows // 8, 3), (0, 1))
        self.stages = nn.Sequential(*layers)
        self.out = nn.Linear(FEATURES, len(self.classes))

    def features(self, inputs: Tensor) -> Tensor:
        """Inputs of ``prepare`` → (B, FEATURES)."""
        x = self.stages(inputs).flatten(2)
        return x.amax(-1) if isinstance(self.codec, Audio) else x.mean(-1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs of ``prepare`` → logits (B, classes)."""
        return self.out(self.features(inputs))

    def prepare(self, raws: Sequence[Raw]) -> Tensor:
        """Pictures → (B, C, H, W) on [-1, 1]; sounds → their log-mel spectrograms (B, 1, bands, T).

        Shorter sounds are padded with silence to the longest, and it is heard as such.
        """
        if isinstance(self.codec, Image):
            pictures = torch.from_numpy(np.stack([self.codec.array(raw) for raw in raws]))
            return pictures.permute(0, 3, 1, 2) / 127.5 - 1
        longest = max(_SHORTEST * self.codec.rate, *map(len, raws))
        padded = [F.pad(torch.as_tensor(r), (0, int(longest) - len(r))) for r in raws]
        return _log_mel(torch.stack(padded), self.codec.rate)

    @torch.no_grad()
    def judge(self, raws: Sequence[Raw]) -> tuple[Tensor, Tensor]:
        """Features (n, FEATURES) and probabilities (n, classes) of n pictures or sounds.

        Sounds are heard one by one, so that no company lengthens them.
        """
        if not len(raws):
            raise ValueError("there is nothing to judge; give at least one picture or sound")
        if isinstance(self.codec, Audio):
            raws = [self.codec.waveform(raw) for raw in raws]
        self.eval()
        size = 1 if isinstance(self.codec, Audio) else _BATCH
        parts = [self.features(self.prepare(raws[i : i + size]))
                 for i in range(0, len(raws), size)]  # fmt: skip
        features = torch.cat(parts)
        return features, self.out(features).softmax(-1)


def _convolution(
    channels: int, width: int, size: tuple[int, int] = (3, 3), padding: tuple[int, int] = (1, 1)
) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, size, padding=padding, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]


def _log_mel(waves: Tensor, rate: int) -> Tensor:
    """(B, samples) → (B, 1, bands, frames), the logarithm of the power in each band."""
    size = round(_WINDOW * rate)
    spectrum = torch.stft(
        waves, size, round(_HOP * rate), window=torch.hann_window(size), return_complex=True
    )
    banks = torchaudio_functional().melscale_fbanks(size // 2 + 1, 0.0, rate / 2, _MELS, rate)
    power = banks.T @ spectrum.abs().square()
    return ((power + 1e-4).log() / 4)[:, None]


def train_classifier(
    codec: Codec,
    train: Iterable[Example],
    validation: Iterable[Example],
    *,
    epochs: int = 30,
    flip: bool = False,
    seed: int = 0,
    report: Callable[[int, float], None] = lambda epoch, loss: None,
) -> tuple[Classifier, Report]:
    """Train on labelled examples, varied each time; ``report`` gets epoch and mean loss in nats.

    ``flip``: pictures of these classes may be mirrored. Raises ValueError if no example is
    labelled.
    """
    torch.manual_seed(seed)
    model = Classifier(codec)
    raws, targets = _labelled(model, train)
    random = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    steps = epochs * -(-len(raws) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for epoch in range(epochs):
        model.train()
        total, order = 0.0, random.permutation(len(raws))
        for i in range(0, len(order), _BATCH):
            chosen = order[i : i + _BATCH]
            varied = [_vary(raws[j], model.codec, flip, random) for j in chosen]
            loss = F.cross_entropy(model(model.prepare(varied)), targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
        report(epoch, total / len(raws))
    held_out, truth = _labelled(model, validation)
    right = model.judge(held_out)[1].argmax(-1) == truth
    return model, Report(epochs, len(raws), float(right.float().mean()), len(held_out))


def _labelled(model: Classifier, examples: Iterable[Example]) -> tuple[list[Raw], Tensor]:
    """Raw data as a model would make it (sound in mu-law), and the numbers of their classes."""
    codec, raws, targets = model.codec, [], []
    for example in examples:
        label = codec.class_of(example.label)
        if label is not None:
            raws.append(codec.decode(codec.encode(example.raw)))
            targets.append(model.classes.index(label))
    if not raws:
        raise ValueError(f"no example has one of the classes {', '.join(model.classes)}")
    return raws, torch.tensor(targets)


def _vary(raw: Raw, codec: Codec, flip: bool, random: np.random.Generator) -> Raw:
    """Sound: louder or softer, noise, silence before and after. Pictures: mirrored and moved."""
    if isinstance(codec, Audio):
        gain, noise = 10 ** random.uniform(-0.6, 0.3), 10 ** random.uniform(-3.5, -2)
        before, after = random.integers(0, int(0.3 * codec.rate), 2)
        wave = np.pad(gain * raw, (before, after))
        return np.clip(wave + noise * random.standard_normal(len(wave)), -1, 1).astype(np.float32)
    picture = raw[:, ::-1] if flip and random.random() < 0.5 else raw
    reach = max(1, raw.shape[0] // 8)
    y, x = random.integers(0, 2 * reach + 1, 2)
    padded = np.pad(picture, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    return padded[y : y + raw.shape[0], x : x + raw.shape[1]]


def save_classifier(model: Classifier, report: Report, path: Path) -> None:
    """Write one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    facts = {"codec": model.codec.to_config(), "report": asdict(report)}
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    replace_file(path, lambda file: save_file(tensors, file, {"classifier": json.dumps(facts)}))


def load_classifier(path: Path) -> tuple[Classifier, Report]:
    """Read what ``save_classifier`` wrote; raises ValueError for anything else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["classifier"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = Classifier(codec_from_config(facts["codec"]))
        model.load_state_dict(tensors)
        return model.eval(), Report(**facts["report"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{str(path)!r} is not a readable classifier of genssm") from error
