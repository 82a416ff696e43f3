"""Figures of samples: known values, and the order in which better and worse samples come."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from genssm.checkpoint import Checkpoint
from genssm.classifier import Classifier, Report, save_classifier, train_classifier
from genssm.codec import Audio, Image
from genssm.data import Example
from genssm.pipeline import Pipeline
from genssm.sample_quality import (
    COPIED,
    classification_accuracy,
    draw,
    evaluate_samples,
    frechet_distance,
    inception_score,
    measure,
    measure_text,
)

IMAGE = Image(16, 16, 3, labels=("dark", "bright"))


def pictures(n: int, seed: int) -> list[Example]:
    random = np.random.default_rng(seed)
    return [
        Example((random.integers(0, 160, (16, 16, 3)) + 95 * (i % 2)).astype(np.uint8),
                IMAGE.labels[i % 2])
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def judging() -> Classifier:
    return train_classifier(IMAGE, pictures(60, 0), pictures(8, 1), epochs=5)[0]


def test_frechet_distance_of_gaussians_is_known():
    """Of one-dimensional ones (μ, σ): (μ₁ - μ₂)² + (σ₁ - σ₂)²; against SciPy in more dimensions."""
    x = torch.tensor([[-1.0], [1.0]])  # μ 0, σ 1
    assert frechet_distance(x, 3 * x + 2) == pytest.approx(4 + 4)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    from scipy.linalg import sqrtm

    a, b = torch.randn(50, 6).double(), torch.randn(70, 6).double() @ torch.randn(6, 6).double()
    covariances = [np.cov(m.numpy().T, bias=True) for m in (a, b)]
    gap = float((a.mean(0) - b.mean(0)).square().sum())
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    expected = gap + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_inception_score_lies_between_one_and_the_classes():
    assert inception_score(torch.eye(5)) == pytest.approx(5, rel=1e-6)
    assert inception_score(torch.full((4, 5), 0.2)) == pytest.approx(1)
    assert inception_score(torch.eye(5)[[0, 0, 0]]) == pytest.approx(1)


def test_real_pictures_are_recognised_and_noise_and_copies_are_seen(judging: Classifier):
    train, held_out = pictures(60, 0), pictures(40, 3)
    random = np.random.default_rng(9)
    noise = [Example(random.integers(0, 256, (16, 16, 3)).astype(np.uint8), IMAGE.labels[i % 2])
             for i in range(40)]  # fmt: skip
    real, noisy, copied = (measure(s, judging, train, held_out)
                           for s in (pictures(40, 4), noise, train[:20]))  # fmt: skip
    assert real["recognised"] == 1.0
    assert real["recognised by class"] == {"dark": 1.0, "bright": 1.0}
    assert 0.3 < float(str(noisy["recognised"])) < 0.7
    assert float(str(noisy["frechet"])) > 10 * float(str(real["frechet"]))
    assert copied["copies"] == 1.0
    assert float(str(real["copies"])) < 0.2
    assert copied["nearest"] == 0
    same = measure([train[0], train[1]] * 10, judging, train, [])
    assert float(str(same["diversity"])) < float(str(real["diversity"]))
    assert "held out" not in same


def test_text_is_measured_by_what_it_repeats():
    train = ["".join(chr(97 + (i * i + 7 * i) % 23) for i in range(2000))]
    copied = measure_text([train[0][100:400]], train, ["nothing of the kind, " * 30])
    fresh = measure_text(["one two three four five six seven eight nine ten " * 2], train, [])
    assert float(str(copied["copied"])) > 0.8
    assert fresh["copied"] == 0.0
    assert fresh["distinct"] == pytest.approx(10 / 17, abs=1e-4)
    held_out = copied["held out"]
    assert isinstance(held_out, dict)
    assert held_out["copied"] == 0.0
    assert COPIED == 40
    many = measure_text([train[0][:300]] * 3, train, ["nothing of the kind, " * 60])["held out"]
    assert isinstance(many, dict)
    assert many["samples"] == 3  # pieces of the one document


def test_samples_of_a_model_are_held_against_data(
    make_checkpoint: Callable[[str], Checkpoint], tmp_path: Path, write_sound: Callable[..., Path]
):
    checkpoint = make_checkpoint("audio")
    pipe = Pipeline("small", checkpoint, engine="eager")
    assert isinstance(pipe.codec, Audio)
    for split in ("train", "validation"):
        for i, name in enumerate(("one", "two", "one", "two")):
            wave = 0.5 * np.sin(np.arange(60) * (0.1 + 0.3 * (i % 2)))
            write_sound(tmp_path / split / f"{name}_{i}.wav", wave)
    with pytest.raises(ValueError, match="judged by a classifier; train one"):
        evaluate_samples(pipe, tmp_path, 4, {})
    file = tmp_path / "judge.safetensors"
    save_classifier(Classifier(Audio(16_000, ("a", "b"))), Report(0, 0, 0.5, 0), file)
    with pytest.raises(ValueError, match="is for other data than this model"):
        evaluate_samples(pipe, tmp_path, 4, {}, file)
    save_classifier(Classifier(pipe.codec), Report(0, 0, 0.5, 0), file)
    settings = {"max_tokens": 40, "seed": 1}
    facts = evaluate_samples(pipe, tmp_path, 5, settings, file)  # type: ignore[arg-type]
    assert facts["samples"] == 5
    assert facts["settings"] == settings
    assert facts["value"] == facts["recognised"]
    assert facts["held out"]["samples"] == 4  # type: ignore[index]
    assert facts == evaluate_samples(pipe, tmp_path, 5, settings, file)  # type: ignore[arg-type]
    alone = evaluate_samples(pipe, tmp_path / "train", 4, settings, file)  # type: ignore[arg-type]
    assert "held out" not in alone


def test_samples_of_different_classes_are_drawn_with_different_random_numbers(
    make_checkpoint: Callable[[str], Checkpoint],
):
    pipe = Pipeline("small", make_checkpoint("audio"), engine="eager")
    samples = draw(pipe, 5, {"max_tokens": 4, "seed": 1}, lambda note: None)
    assert [sample.index for sample in samples] == list(range(5))
    labels = [pipe.codec.label_of(sample.plan.tokens[0]) for sample in samples]
    assert labels == ["one"] * 3 + ["two"] * 2


def test_text_samples_of_a_model_need_no_classifier(
    make_checkpoint: Callable[[str], Checkpoint], tmp_path: Path
):
    (tmp_path / "data.txt").write_text("the quick brown fox " * 20)
    pipe = Pipeline("small", make_checkpoint("text"), engine="eager")
    facts = evaluate_samples(pipe, tmp_path / "data.txt", 2, {"max_tokens": 20, "seed": 1})
    assert facts["samples"] == 2
    assert 0 <= float(str(facts["distinct"])) <= 1


def test_classification_by_likelihood_counts_the_right_ones(
    make_checkpoint: Callable[[str], Checkpoint], examples: dict[str, list]
):
    pipe = Pipeline("small", make_checkpoint("audio"), engine="eager")
    chosen = [max(pipe.classify(raw).items(), key=lambda kv: kv[1])[0] for raw in examples["audio"]]
    other = {"one": "two", "two": "one"}
    labels = [chosen[0], chosen[1], other[chosen[2]]]
    given = [Example(r, label) for r, label in zip(examples["audio"], labels, strict=True)]
    given.append(Example(examples["audio"][0]))  # of no known class
    facts = classification_accuracy(pipe, given)
    assert facts["examples"] == 3
    assert math.isclose(float(str(facts["value"])), 2 / 3)
    with pytest.raises(ValueError, match="no example has a class"):
        classification_accuracy(pipe, [Example(examples["audio"][0])])
