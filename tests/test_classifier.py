"""The classifier: it learns, is right on what it has not seen, and comes back from its file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from genssm import classifier
from genssm.classifier import (
    FEATURES,
    Classifier,
    load_classifier,
    save_classifier,
    train_classifier,
)
from genssm.codec import Audio, Codec, Image, Text
from genssm.data import Example

AUDIO = Audio(8000, labels=("low", "high", "low_anna"))
IMAGE = Image(16, 16, 3, labels=("dark", "bright"))


def tones(n: int, seed: int) -> Iterator[Example]:
    """Noisy tones of 300 or 1500 Hz, of different lengths; some low ones are Anna's."""
    random = np.random.default_rng(seed)
    for i in range(n):
        t = np.arange(random.integers(1500, 4000)) / 8000
        wave = 0.3 * np.sin(2 * np.pi * (300, 1500)[i % 2] * t + random.uniform(0, 6))
        noisy = wave + 0.02 * random.standard_normal(len(t))
        label = ("low", "high", "low_anna", "high")[i % 4]
        yield Example(noisy.astype(np.float32), label)


def pictures(n: int, seed: int) -> Iterator[Example]:
    random = np.random.default_rng(seed)
    for i in range(n):
        array = random.integers(0, 160, (16, 16, 3)) + 95 * (i % 2)
        yield Example(array.astype(np.uint8), IMAGE.labels[i % 2])


@pytest.mark.parametrize(("codec", "make"), [(AUDIO, tones), (IMAGE, pictures)])
def test_it_learns_classes_and_comes_back_from_its_file(
    codec: Codec, make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(classifier, "_BATCH", 10)  # many steps for few examples
    losses: list[float] = []
    model, report = train_classifier(
        codec, make(60, 0), make(20, 1), epochs=6, report=lambda epoch, loss: losses.append(loss)
    )
    assert losses[-1] < 0.7 * losses[0]
    assert (report.epochs, report.examples, report.validation_examples) == (6, 60, 20)
    assert report.accuracy >= 0.9
    save_classifier(model, report, tmp_path / "judge.safetensors")
    again, facts = load_classifier(tmp_path / "judge.safetensors")
    assert facts == report
    raws = [e.raw for e in make(5, 2)]
    for a, b in zip(again.judge(raws), model.judge(raws), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_it_judges_a_sound_alone_and_among_others():
    model = Classifier(AUDIO)
    raws = [e.raw[: 2000 + 1500 * i] for i, e in enumerate(tones(3, 0))]
    assert len({len(raw) for raw in raws}) > 1
    features, probabilities = model.judge(raws)
    assert features.shape == (3, FEATURES)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3))
    assert probabilities.shape == (3, len(AUDIO.classes))
    for i, raw in enumerate(raws):
        torch.testing.assert_close(model.judge([raw])[0][0], features[i])
    others = [raws[0].astype(np.float64), np.round(raws[0] * 32768).clip(-32768, 32767)]
    for other in (others[0], others[1].astype(np.int16)):
        torch.testing.assert_close(model.judge([other])[0][0], features[0], rtol=0.05, atol=0.01)
    with pytest.raises(ValueError, match="nothing to judge"):
        model.judge([])


def test_parts_of_a_class_count_as_the_class():
    assert [AUDIO.class_of(name) for name in ("low_anna", "low", None, "any")] == [
        "low", "low", None, None
    ]  # fmt: skip


def test_the_same_seed_trains_the_same_classifier():
    a, b = (train_classifier(AUDIO, tones(12, 0), tones(4, 1), epochs=1)[0] for _ in range(2))
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def test_what_cannot_be_learned_or_read_is_refused(text_codec: Text, tmp_path: Path):
    with pytest.raises(ValueError, match="pictures or sound that has classes"):
        Classifier(text_codec)
    with pytest.raises(ValueError, match="pictures or sound that has classes"):
        Classifier(Audio(8000))
    unlabelled = [Example(e.raw) for e in tones(4, 0)]
    with pytest.raises(ValueError, match="no example has one of the classes low, high"):
        train_classifier(AUDIO, unlabelled, unlabelled)
    (tmp_path / "bad.safetensors").write_bytes(b"no classifier")
    for name in ("bad.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match=f"{name}' is not a readable classifier"):
            load_classifier(tmp_path / name)
