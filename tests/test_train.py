"""Training: it learns, resumes exactly, keeps the best checkpoint and refuses what it must."""

import csv
import dataclasses
import errno
import io
import json
import math
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from torch import Tensor, nn

import genssm
from genssm import checkpoint as checkpoints
from genssm import recipes, sheets, training_state
from genssm import train as train_module
from genssm.batches import Batch
from genssm.codec import Text
from genssm.conversion import to_recurrent
from genssm.data import find_split, read_examples
from genssm.evaluate import Evaluation, evaluate
from genssm.layers import LAYERS
from genssm.model import SequenceModel
from genssm.optim import rate
from genssm.pipeline import Pipeline
from genssm.preparation import load_weights, prepare
from genssm.recipes import Recipe, TrainConfig
from genssm.train import Progress, train
from genssm.training_report import describe
from genssm.update import train_step

modalities = pytest.mark.parametrize("modality", ["text", "image", "audio"])
STEPS = 6  # of the trainings that are compared

_TRAIN = TrainConfig(batch_size=4, length=48, steps=STEPS, warmup=2, lr=0.01)
RECIPES = {
    "text": Recipe(
        "text",
        {"vocab_size": 290},
        {"d_model": (16,), "n_layers": (1,), "d_state": 8, "dropout": 0.1},
        _TRAIN,
    ),
    "image": Recipe(
        "image",
        {"height": 4, "width": 4, "channels": 3, "labels": ("dark", "bright")},
        {
            "d_model": (8, 16), "n_layers": (1, 1), "pools": (3,), "d_state": 8, "layer": "s4",
            "head": "logistics", "taps": (1, 2, 3, 12), "image_shape": (4, 4, 3),
        },
        dataclasses.replace(_TRAIN, flip=True),
    ),
    "audio": Recipe(
        "audio",
        {"rate": 8000, "labels": ("low", "high"), "durations": (40, 60), "levels": (-30, -9)},
        {"d_model": (8, 16), "n_layers": (1, 1), "pools": (4,), "d_state": 8, "conditioned": True},
        _TRAIN,
    ),
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, write_sound: Callable[..., Path]) -> dict[str, Path]:
    """A folder with train and validation data of each modality."""
    random = np.random.default_rng(0)
    folders = {modality: tmp_path / f"{modality} data" for modality in RECIPES}
    for folder in folders.values():
        folder.mkdir()
    for split, amount in (("train", 40), ("validation", 4)):
        text = " = Cats = \n\nthe cat sat on the mat and the dog sat on the cat .\n" * amount
        (folders["text"] / f"{split}.txt").write_text(text)
        labels = np.arange(amount) % 2
        pictures = random.integers(0, 60, (amount, 4, 4, 3)) + 150 * labels[:, None, None, None]
        np.save(folders["image"] / f"{split}.npy", pictures.astype(np.uint8))
        np.save(folders["image"] / f"{split}_labels.npy", labels)
        for i in range(amount):
            wave = 0.5 * np.sin(np.arange(30 + i % 7) * (0.1 + 0.4 * (i % 2)))
            write_sound(folders["audio"] / split / f"{('low', 'high')[i % 2]}_{i}.wav", wave)
    return folders


@pytest.fixture(autouse=True)
def _signals_stay() -> Iterator[None]:
    """A signal that training does not catch must not end the tests; and it gives back its own."""

    def uncaught(number: int, frame: object) -> None:
        raise AssertionError(f"training did not catch signal {number}")

    before = {s: signal.signal(s, uncaught) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    after = [signal.signal(number, handler) for number, handler in before.items()]
    assert after == [uncaught, uncaught]


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    return recipe.changed({"steps": steps})


def weights_of(out: Path) -> dict[str, Tensor]:
    """Everything numeric that a training would resume from."""
    from safetensors.torch import load_file

    return load_file(out / "state.safetensors")


def assert_same_weights(actual: Path, expected: Path) -> None:
    a, b = weights_of(actual), weights_of(expected)
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def interrupt_at(step: int, number: int) -> Callable[[Progress], None]:
    """A report that sends this process a signal once, after ``step`` steps."""
    sent = []

    def report(progress: Progress) -> None:
        if progress.step == step and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    return report


@modalities
def test_training_lowers_the_validation_loss_and_writes_all_it_promises(
    modality: str, data: dict[str, Path], tmp_path: Path
):
    reports: list[Progress] = []
    recipe, out = with_steps(RECIPES[modality], 20), tmp_path / "out"
    folder = train(recipe, data[modality], out, validate_minutes=0, report=reports.append)

    assert [r.step for r in reports] == [*range(1, 21), 20]
    assert [r.fraction for r in reports[:-1]] == pytest.approx([i / 20 for i in range(1, 21)])
    values = [r.validation for r in reports if r.validation is not None]
    assert len(values) == 21
    assert min(values) < 0.95 * values[0]
    assert reports[-1].tokens > 0

    with (out / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [r.step for r in reports]
    assert [float(row["validation"]) for row in rows] == pytest.approx(values, rel=1e-4)

    assert folder == out / "checkpoint"
    loaded = checkpoints.load(folder)
    best = values.index(min(values))
    assert loaded.training["steps"] == reports[best].step
    assert loaded.metrics["validation subset"]["value"] == min(values)
    assert loaded.codec.decode(list(loaded.probe)) is not None
    validation = find_split(data[modality], "validation", modality)
    measured = evaluate(loaded.model, loaded.codec, read_examples(validation, loaded.codec))
    assert measured.value == pytest.approx(min(values), rel=0.01)  # matrices are stored in bfloat16
    left = {path.name for path in out.iterdir() if not path.name.startswith("token")}
    assert left == {".lock", "checkpoint", "log.csv", "state.safetensors"}


# Averaged weights, parts of a batch, growing length and both descents, all at once
EVERYTHING = {"ema": 0.9, "accumulate": 2, "first_length": 12, "grow": 0.6, "schedule": "cosine"}


@modalities
@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_interrupted_and_resumed_training_equals_the_uninterrupted_one(
    modality: str, settings: dict[str, Any], number: int, data: dict[str, Path], tmp_path: Path
):
    """The same batches, losses, weights, averages and states of the optimizers, bit by bit."""
    recipe, source = RECIPES[modality].changed(settings), data[modality]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    uninterrupted: list[Progress] = []
    train(recipe, source, whole, validate_minutes=0, report=uninterrupted.append)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, source, halves, validate_minutes=0, report=interrupt_at(3, number))
    torch.manual_seed(99)  # the global state plays no part
    reports: list[Progress] = []
    train(recipe, source, halves, resume=True, validate_minutes=0, report=reports.append)
    assert [r.step for r in reports] == [4, 5, 6, 6]
    for a, b in zip(reports, uninterrupted[3:], strict=True):
        assert (a.loss, a.validation, a.tokens, a.length) == (
            b.loss, b.validation, b.tokens, b.length
        )  # fmt: skip
    assert_same_weights(halves, whole)
    assert any(name.startswith("average.") for name in weights_of(whole)) == bool(settings)
    with (halves / "log.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_while_data_are_prepared_ends_at_once(
    number: int, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is there to be saved; and the training can be begun again."""
    after = []

    def prepared(*_: Any) -> None:
        os.kill(os.getpid(), number)
        after.append(number)

    with monkeypatch.context() as patched:
        patched.setattr("genssm.train.prepare", prepared)
        with pytest.raises(KeyboardInterrupt):
            train(RECIPES["text"], data["text"], tmp_path / "out")
    assert after == []
    train(RECIPES["text"], data["text"], tmp_path / "out")


def test_killed_training_goes_on_from_its_last_save(data: dict[str, Path], tmp_path: Path):
    recipe, source = RECIPES["text"], data["text"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(recipe, source, whole)

    def kill(progress: Progress) -> None:
        if progress.step == 4:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(recipe, source, killed, save_minutes=0, validate_minutes=0, report=kill)
    train(recipe, source, killed, resume=True)
    assert_same_weights(killed, whole)


@pytest.mark.parametrize("modality", ["text", "audio"])
def test_a_damaged_token_cache_is_noticed_and_changes_nothing(
    modality: str, data: dict[str, Path], tmp_path: Path
):
    recipe, source = RECIPES[modality], data[modality]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(recipe, source, whole)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, source, halves, validate_minutes=0,
              report=interrupt_at(3, signal.SIGTERM))  # fmt: skip
    (cache,) = halves.glob("tokens-*.bin")
    made = cache.read_bytes()
    cache.write_bytes(made[:40] + bytes([made[40] ^ 1]) + made[41:])
    with pytest.warns(UserWarning, match="is damaged: its checksum differs; it is made again"):
        train(recipe, source, halves, resume=True)
    assert cache.read_bytes() == made
    assert_same_weights(halves, whole)


def test_a_training_stops_at_a_damaged_file_or_leaves_it_out_as_asked(
    data: dict[str, Path], tmp_path: Path
):
    folder, out = data["audio"] / "train", tmp_path / "out"
    (folder / "low_0.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"low_0.wav' is not a readable sound file"):
        train(RECIPES["audio"], data["audio"], out)
    with pytest.warns(UserWarning, match=r"left out: .*low_0.wav"):
        train(RECIPES["audio"].changed({"on_corrupt": "skip"}), data["audio"], out)
    (folder / "low_0.wav").unlink()
    train(RECIPES["audio"], data["audio"], tmp_path / "without")
    assert_same_weights(out, tmp_path / "without")


def test_the_same_seed_trains_the_same_model_and_another_seed_another(
    data: dict[str, Path], tmp_path: Path
):
    recipe, source = RECIPES["audio"], data["audio"]
    train(recipe, source, tmp_path / "a")
    torch.manual_seed(99)
    train(recipe, source, tmp_path / "b")
    train(recipe.changed({"seed": 1}), source, tmp_path / "c")
    assert_same_weights(tmp_path / "b", tmp_path / "a")
    name = "model.head.linear.weight"
    assert not torch.equal(weights_of(tmp_path / "c")[name], weights_of(tmp_path / "a")[name])


def test_finished_training_can_be_prolonged(data: dict[str, Path], tmp_path: Path):
    recipe = RECIPES["text"]
    train(with_steps(recipe, 2), data["text"], tmp_path / "out")
    reports: list[Progress] = []
    train(with_steps(recipe, 5), data["text"], tmp_path / "out", resume=True, report=reports.append)
    assert [r.step for r in reports] == [5]


def test_training_ends_when_its_minutes_are_spent(data: dict[str, Path], tmp_path: Path):
    reports: list[Progress] = []
    train(
        with_steps(RECIPES["text"], 10**9), data["text"], tmp_path / "out",
        minutes=0.5 / 60, report=reports.append,
    )  # fmt: skip
    assert reports[-1].fraction >= 1
    assert 0.5 <= 60 * reports[-1].minutes < 5


def test_training_starts_from_a_checkpoint_and_its_tokenizer(data: dict[str, Path], tmp_path: Path):
    recipe = RECIPES["text"]
    first = train(recipe, data["text"], tmp_path / "first")
    other = tmp_path / "other data"
    other.mkdir()
    for split in ("train", "validation"):
        (other / f"{split}.txt").write_text("quite another text, of zebras and xylophones .\n" * 40)
    still = recipe.changed({"steps": 1, "lr": 1e-12, "matrix_lr": 1e-12})
    second = train(still, other, tmp_path / "second", start=str(first))
    assert checkpoints.load(second).training["before"] == checkpoints.load(first).training
    before, after = checkpoints.load(first), checkpoints.load(second)
    assert isinstance(before.codec, Text)
    assert isinstance(after.codec, Text)
    assert after.codec.tokenizer == before.codec.tokenizer
    for name, weight in after.model.state_dict().items():
        torch.testing.assert_close(weight, before.model.state_dict()[name], rtol=0, atol=1e-5)
    narrow, shallow = recipe.changed({"d_model": (8,)}), recipe.changed({"n_layers": (0,)})
    for wrong, first_difference in ((narrow, r"head.*bias|head.*\(290, 16\) and \(290, 8\)"),
                                    (shallow, r"stack.layers.0.*\(.*\) and None")):  # fmt: skip
        with pytest.raises(ValueError, match=f"another shape .*, first {first_difference}"):
            train(wrong, other, tmp_path / "third", start=str(first))


def test_what_a_checkpoint_does_not_know_begins_as_what_is_nearest(
    data: dict[str, Path], tmp_path: Path
):
    recipe = RECIPES["audio"].changed({"steps": 1, "durations": (60,), "levels": (-9,)})
    first = train(recipe, data["audio"], tmp_path / "first")
    more: dict[str, Any] = {"durations": (40, 60), "levels": (-30, -9), "token_taps": (2,)}
    more["labels"] = ("low", "high", "low_man")
    still = recipe.changed({"lr": 1e-12, "matrix_lr": 1e-12, **more})
    second = train(still, data["audio"], tmp_path / "second", start=str(first))
    before, after = (checkpoints.load(folder).model.state_dict() for folder in (first, second))
    # Before: 0 … 255, 256 any, 257 of -9 dB, 258 of 60 samples, 259 low, 260 high.
    ids = [*range(257), 256, 257, 256, 258, 259, 260, 259]
    for name in ("inputs.embedding.weight", "inputs.condition.weight"):
        torch.testing.assert_close(after[name], before[name][ids], rtol=0, atol=1e-5)
    for name in ("head.linear.weight", "head.linear.bias"):
        torch.testing.assert_close(after[name], before[name][ids[:261]], rtol=0, atol=1e-5)
    assert float(after["inputs.token_taps.0"].abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["text", "image", "audio"])
def test_more_blocks_than_the_checkpoint_has_begin_as_the_identity(
    name: str, data: dict[str, Path], tmp_path: Path
):
    """The deeper model predicts what the checkpoint does, and all of it can learn."""
    recipe = RECIPES[name].changed({"steps": 2, "dropout": 0.0})
    start = checkpoints.load(train(recipe, data[name], tmp_path / "out"))
    layers = tuple(n + 2 for n in recipe.model["n_layers"])
    model = SequenceModel(recipe.changed({"n_layers": layers}).model_config(start.codec))
    load_weights(start, model, start.codec)
    tokens = torch.randint(start.codec.n_outputs, (2, 13), generator=torch.manual_seed(0))
    assert torch.equal(model(tokens), start.model(tokens))
    new = set(dict(model.named_parameters())) - set(dict(start.model.named_parameters()))
    learned = set[str]()
    for _ in range(3):  # what lies before a weight that is zero learns once that is not
        model.zero_grad()
        model.log_prob(tokens).sum().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None
            learned |= {key} if bool(parameter.grad.any()) else set()
            parameter.data += 1e-3 * parameter.grad.sign()
    assert new <= learned


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_settings": {"decay": "softplus"}}, "has decay=exp, the recipe softplus"),
        ({"layer_settings": {"discretization": "bilinear"}}, "has discretization=zoh"),
        ({"token_taps": (2, 4)}, r"has token_taps=\(2, 3\), the recipe \(2, 4\)"),
    ],
)
def test_weights_are_not_taken_for_those_of_another_map(
    settings: dict[str, Any], message: str, data: dict[str, Path], tmp_path: Path
):
    """Of the same shapes, and yet another model."""
    recipe = with_steps(RECIPES["text"].changed({"token_taps": (2, 3)}), 1)
    first = train(recipe, data["text"], tmp_path / "first")
    with pytest.raises(ValueError, match=message):
        train(recipe.changed(settings), data["text"], tmp_path / "other", start=str(first))


def test_a_resumed_training_keeps_its_tokenizer(data: dict[str, Path], tmp_path: Path):
    """That of the checkpoint it began with, of other pieces than the recipe would have learned."""
    recipe, out = with_steps(RECIPES["text"], 1), tmp_path / "out"
    first = train(recipe, data["text"], tmp_path / "first")
    other = recipe.changed({"vocab_size": 300})
    train(other, data["text"], out, start=str(first))
    tokenizer = (out / "tokenizer.model").read_bytes()
    folder = train(with_steps(other, 3), data["text"], out, resume=True)
    assert checkpoints.load(folder).training["steps"] == 3
    assert (out / "tokenizer.model").read_bytes() == tokenizer
    (out / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.model' is not .*; bring it back, from"):
        train(with_steps(other, 4), data["text"], out, resume=True)


@pytest.mark.parametrize("settings", [{"length": 24}, {"layer_settings": {"truncated": False}}])
def test_s4_starts_from_a_checkpoint_of_another_length(
    settings: dict[str, Any], data: dict[str, Path], tmp_path: Path
):
    """C is stored for one length; with it for another the model would be another one."""
    recipe = RECIPES["image"].changed({"steps": 1, "flip": False})
    first = train(recipe, data["image"], tmp_path / "first")
    still = recipe.changed({"lr": 1e-12, "matrix_lr": 1e-12, **settings})
    second = train(still, data["image"], tmp_path / "second", start=str(first))
    before, after = (checkpoints.load(folder) for folder in (first, second))
    tokens = before.codec.encode(np.full((4, 4, 3), 90, np.uint8))[None]
    with torch.no_grad():
        torch.testing.assert_close(after.model(tokens), before.model(tokens), rtol=0, atol=1e-3)


def test_best_checkpoint_is_kept_when_later_ones_are_worse(data: dict[str, Path], tmp_path: Path):
    """Rates this high destroy what was learned."""
    reports: list[Progress] = []
    recipe = RECIPES["text"].changed({"lr": 3.0, "matrix_lr": 3.0, "steps": 8})
    folder = train(
        recipe, data["text"], tmp_path / "out", validate_minutes=0, report=reports.append
    )
    values = [r.validation for r in reports if r.validation is not None]
    assert min(values) < values[-1]
    assert checkpoints.load(folder).metrics["validation subset"]["value"] == min(values)


def test_step_without_a_finite_loss_is_left_out_and_counted(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[dict[str, Tensor]] = []
    monkeypatch.setattr(SequenceModel, "log_prob", nan_at({3}, seen))
    reports: list[Progress] = []
    recipe, out = RECIPES["text"].changed({"ema": 0.5}), tmp_path / "out"
    folder = train(recipe, data["text"], out, report=reports.append)
    assert len(seen) == STEPS
    moved = [
        any(not torch.equal(before[name], after[name]) for name in before)
        for before, after in pairwise(seen)
    ]
    assert moved == [True, True, False, True, True]
    assert all(bool(t.isfinite().all()) for t in weights_of(out).values())
    assert reports[-1].skipped == 1
    assert "1 steps skipped" in describe(reports[-1], "text")
    with (out / "log.csv").open() as file:
        assert [row["skipped"] for row in csv.DictReader(file)] == ["1"]
    assert checkpoints.load(folder).training["skipped"] == 1
    train(with_steps(recipe, STEPS + 1), data["text"], out, resume=True, report=reports.append)
    assert reports[-1].skipped == 1  # it is not forgotten


def nan_at(calls: set[int], seen: list[dict[str, Tensor]]) -> Callable[..., Tensor]:
    """A ``log_prob`` that is NaN at some calls (all, if none are given) and notes the weights."""
    log_prob = SequenceModel.log_prob

    def sometimes_nan(self: SequenceModel, tokens: Tensor, read: Tensor | None = None) -> Tensor:
        seen.append({name: t.detach().clone() for name, t in self.state_dict().items()})
        value = log_prob(self, tokens, read)
        return value * torch.nan if len(seen) in calls or not calls else value

    return sometimes_nan


def test_training_without_any_finite_step_is_given_up(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(SequenceModel, "log_prob", nan_at(set(), []))
    with pytest.raises(ValueError, match=r"100 steps in a row had no finite gradient; .* lower lr"):
        train(with_steps(RECIPES["text"], 1000), data["text"], tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_disk_that_fills_under_the_log_is_told(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "genssm.training_log.replace_file", lambda path, write: path.symlink_to("/dev/full")
    )
    with pytest.raises(
        OSError, match=r"could not write .*log.csv': the disk is full; .* Make room"
    ):
        train(with_steps(RECIPES["text"], 2), data["text"], tmp_path / "out")
    assert training_state.exists(tmp_path / "out")


def test_training_that_diverges_is_an_error(data: dict[str, Path], tmp_path: Path):
    recipe = with_steps(RECIPES["audio"], 3).changed({"lr": 1e30, "matrix_lr": 1e30})
    with pytest.raises(ValueError, match=r"has diverged: .* train anew with lower rates"):
        train(recipe, data["audio"], tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.mark.parametrize("minutes", [-1, math.nan])
def test_budgets_are_not_negative(minutes: float, data: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match="minutes must be at least 0"):
        train(RECIPES["text"], data["text"], tmp_path / "out", minutes=minutes)


def test_batches_that_cannot_be_parted_are_refused_before_the_data(tmp_path: Path):
    recipe = RECIPES["text"].changed({"batch_size": 4, "accumulate": 3})
    with pytest.raises(ValueError, match="batch_size must be divisible by processes × accumulate"):
        train(recipe, tmp_path / "nothing", tmp_path / "out")


def test_pictures_of_another_shape_are_refused_before_the_data(tmp_path: Path):
    height = RECIPES["image"].codec["height"]
    recipe = RECIPES["image"].changed({"height": height + 1})
    with pytest.raises(ValueError, match="image_shape must be that of the pictures"):
        train(recipe, tmp_path / "nothing", tmp_path / "out")


@modalities
@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_exported_checkpoint_is_as_good_as_the_trained_one(
    modality: str, ema: float, data: dict[str, Path], tmp_path: Path
):
    """Within 0.002 bits per unit, though its matrices are in bfloat16.

    The average, if there is one, is what is validated and shipped.
    """
    recipe = RECIPES[modality].changed({"ema": ema, "steps": 12})
    reports: list[Progress] = []
    folder = train(recipe, data[modality], tmp_path / "out", report=reports.append)
    loaded = checkpoints.load(folder)
    assert loaded.metrics["validation subset"]["value"] == reports[-1].validation
    validation = find_split(data[modality], "validation", modality)
    measured = evaluate(loaded.model, loaded.codec, read_examples(validation, loaded.codec))
    assert measured.value == pytest.approx(reports[-1].validation, abs=0.002)
    weights = weights_of(tmp_path / "out")
    prefix = "average." if ema else "model."
    name = "norm.weight"  # stored in float32
    assert torch.equal(loaded.model.state_dict()[name], weights[prefix + name])
    if ema:
        assert not torch.equal(weights["average." + name], weights["model." + name])


def test_average_is_the_mean_of_the_weights_it_has_seen(data: dict[str, Path], tmp_path: Path):
    """Against the recursion, from the weights after each step."""
    recipe, name = RECIPES["audio"].changed({"ema": 0.7}), "head.linear.weight"
    seen = []
    for steps in (1, 2, 3, 4):
        out = tmp_path / "out"
        train(with_steps(recipe, steps), data["audio"], out, resume=steps > 1)
        seen.append(weights_of(out)["model." + name])
    loaded = checkpoints.load(tmp_path / "out" / "checkpoint")
    torch.manual_seed(recipe.train.seed)
    expected = SequenceModel(loaded.model.config).state_dict()[name]
    for n, weight in enumerate(seen, 1):
        d = min(0.7, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * weight
    torch.testing.assert_close(weights_of(tmp_path / "out")["average." + name], expected)


def test_averaging_can_begin_late(data: dict[str, Path], tmp_path: Path):
    """A training without an average goes on with one, which begins where it stands."""
    recipe, out = with_steps(RECIPES["text"], 2), tmp_path / "out"
    train(recipe, data["text"], out)
    train(recipe.changed({"ema": 0.9}), data["text"], out, resume=True)
    weights = weights_of(out)
    assert torch.equal(weights["average.norm.weight"], weights["model.norm.weight"])


@pytest.mark.parametrize("parts", [2, 4])
def test_the_parts_of_a_batch_add_up_to_the_whole(
    parts: int, data: dict[str, Path], tmp_path: Path
):
    """Clips of different lengths: every target counts as much as in one batch."""
    recipe = RECIPES["audio"]
    reports: dict[int, list[Progress]] = {1: [], parts: []}
    for n, seen in reports.items():
        changed = recipe.changed({"accumulate": n})
        out = tmp_path / str(n)
        train(changed, data["audio"], out, validate_minutes=0, report=seen.append)
    for a, b in zip(reports[1], reports[parts], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.tokens == b.tokens
    with pytest.raises(ValueError, match=r"divisible by processes × accumulate \(1 × 3\), got 4"):
        train(recipe.changed({"accumulate": 3}), data["audio"], tmp_path / "three")


def test_clips_that_do_not_fit_are_counted(data: dict[str, Path], tmp_path: Path):
    """Lengths of 30 … 36 samples, by turns, their opening of two tokens and the end."""
    recipe = RECIPES["audio"].changed({"length": 33})
    with pytest.warns(UserWarning, match="34 of 40 clips are longer than length, 33 tokens, and"):
        prepare(recipe, data["audio"], tmp_path / "out", None)


def test_one_long_recording_is_trained_in_parts(
    tmp_path: Path, write_sound: Callable[..., Path], recwarn: pytest.WarningsRecorder
):
    """One file a split, without a warning; 96 sequences of 48 tokens are an epoch."""
    recipe = RECIPES["audio"].changed(
        {"labels": (), "durations": (), "levels": (), "conditioned": False, "steps": 22}
    )
    for split in ("train", "validation"):
        write_sound(tmp_path / "data" / split / "long.wav", 0.9 * np.sin(np.arange(4000) / 5))
    seen: list[Progress] = []
    train(recipe, tmp_path / "data", tmp_path / "out", report=seen.append)
    assert not recwarn.list
    assert seen[-1].tokens == 22 * 4 * 48
    assert seen[-1].validation is not None
    assert seen[-1].validation < 8


@pytest.mark.parametrize("durations", [(), (40, 60)])
def test_validation_is_of_all_of_a_recording_and_bounded(
    durations: tuple[int, ...], tmp_path: Path, write_sound: Callable[..., Path]
):
    """In pieces, of which a million samples are chosen; with durations, beginnings of clips."""
    random = np.random.default_rng(0)
    for split, lengths in (("train", [100] * 4), ("validation", [100, 1_300_000])):
        for i, n in enumerate(lengths):
            wave = random.uniform(-0.5, 0.5, n)
            write_sound(tmp_path / "data" / split / f"low_{i}.wav", wave)
    recipe = RECIPES["audio"].changed({"length": 128, "durations": durations})
    prepared = prepare(recipe, tmp_path / "data", tmp_path / "out", None)
    lengths = [len(e.raw) for e in prepared.validation]
    if durations:
        assert lengths == [100, 65_536]
    else:
        assert lengths == [100, *[65_536] * 15]
        assert len({float(e.raw[7]) for e in prepared.validation}) == 16


def test_length_grows_by_doubling(data: dict[str, Path], tmp_path: Path):
    recipe = RECIPES["text"].changed({"first_length": 6, "grow": 0.6, "steps": 10})
    reports: list[Progress] = []
    train(recipe, data["text"], tmp_path / "out", validate_minutes=0, report=reports.append)
    tokens = np.diff([0, *(r.tokens for r in reports[:-1])])
    assert (tokens / 4).tolist() == [6, 6, 12, 12, 24, 24, *[48] * 4]


def test_log_with_other_columns_is_continued(data: dict[str, Path], tmp_path: Path):
    recipe, log = RECIPES["text"], tmp_path / "out" / "log.csv"
    train(with_steps(recipe, 2), data["text"], tmp_path / "out")
    log.write_text("step,minutes,loss\n2,0.1,7.5\n")
    train(with_steps(recipe, 3), data["text"], tmp_path / "out", resume=True)
    with log.open() as file:
        first, second = csv.DictReader(file)
    assert (first["step"], first["loss"], first["validation"]) == ("2", "7.5", "")
    assert second["step"] == "3"
    assert float(second["validation"]) > 0


def test_tensorboard_gets_the_numbers_of_the_log(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reports: list[Progress] = []
    out = tmp_path / "out"
    train(RECIPES["text"], data["text"], out, tensorboard=True, validate_minutes=0,
          report=reports.append)  # fmt: skip
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([r.loss for r in reports])
    assert [e.step for e in events.Scalars("validation")] == [r.step for r in reports]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"TensorBoard is not installed; pip install"):
        train(RECIPES["text"], data["text"], tmp_path / "other", tensorboard=True)


@modalities
def test_sheets_show_what_the_model_makes(
    modality: str, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train_module, "draw_sheet", partial(sheets.draw_sheet, engine="eager"))
    monkeypatch.setattr(sheets, "_TEXT_TOKENS", 20)
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, out = with_steps(RECIPES[modality], 1), tmp_path / "out"
    if modality == "audio":  # two seconds of sound take a while
        plan = Pipeline._length
        monkeypatch.setattr(Pipeline, "_length", lambda self, n, m: min(60, plan(self, n, m)))
    train(recipe, data[modality], out, sheet_minutes=1000, tensorboard=True)
    suffix = {"text": ".txt", "image": ".png", "audio": ".wav"}[modality]
    (sheet,) = (out / "samples").iterdir()
    assert sheet.name == f"step-00000001{suffix}"
    shown = EventAccumulator(str(out / "tensorboard"), {"images": 0, "audio": 0, "tensors": 0})
    shown.Reload()
    if modality == "text":
        assert sheet.read_text().count("----") == 2
        (event,) = shown.Tensors("samples/text_summary")
        assert event.tensor_proto.string_val == [sheet.read_bytes().removesuffix(b"\n")]
    elif modality == "image":
        pictures = []
        (event,) = shown.Images("samples")
        for file in (sheet, io.BytesIO(event.encoded_image_string)):
            with PIL.Image.open(file) as picture:
                pictures.append(np.asarray(picture))
        assert pictures[0].shape[:2] == (4 * 4 + 3 * 2, 4 * 4 + 3 * 2)  # 4 × 4, gaps of 2
        assert np.array_equal(*pictures)
    else:
        (event,) = shown.Audio("samples")
        (wave, rate), (heard, again) = (
            soundfile.read(file) for file in (sheet, io.BytesIO(event.encoded_audio_string))
        )
        assert (rate, again) == (8000, 8000)
        np.testing.assert_allclose(heard, wave, atol=2 / 2**15)
    assert event.step == 1


def test_pictures_are_read_from_class_folders_too(
    data: dict[str, Path], tmp_path: Path, write_picture: Callable[..., Path]
):
    for split in ("train", "validation"):
        pictures = np.load(data["image"] / f"{split}.npy")
        for i, picture in enumerate(pictures):
            label = ("dark", "bright")[i % 2]
            write_picture(tmp_path / "folders" / split / label / f"{i:03}.png", picture)
    folder = train(with_steps(RECIPES["image"], 2), tmp_path / "folders", tmp_path / "out")
    assert checkpoints.load(folder).codec.labels == ("dark", "bright")


def test_one_picture_without_a_class_leaves_the_others_theirs(
    data: dict[str, Path], tmp_path: Path, write_picture: Callable[..., Path]
):
    folders, recipe = tmp_path / "folders", RECIPES["image"].changed({"batch_size": 3})
    for split in ("train", "validation"):
        for name in ("dark/0", "bright/1", "2"):
            write_picture(folders / split / f"{name}.png", np.full((4, 4, 3), 9, np.uint8))
    with pytest.warns(UserWarning, match="1 of 3 examples are of no class"):
        prepared = prepare(recipe, folders, tmp_path / "out", None)
    starts = Counter(int(t) for step in range(30) for t in prepared.batch(step).tokens[:, 0])
    assert set(starts) == {prepared.codec.start(label) for label in ("dark", "bright", None)}
    assert starts[prepared.codec.boundary] < 45  # the third, and a tenth of the others


@modalities
@pytest.mark.filterwarnings("ignore:left out")
def test_an_empty_split_is_found_before_any_step(
    modality: str, data: dict[str, Path], tmp_path: Path, write_sound: Callable[..., Path]
):
    folder = data[modality]
    if modality == "text":
        (folder / "validation.txt").write_text("\n")
    elif modality == "image":
        np.save(folder / "validation.npy", np.zeros((0, 4, 4, 3), np.uint8))
        np.save(folder / "validation_labels.npy", np.zeros(0, int))
    else:
        for file in (folder / "validation").iterdir():
            file.write_bytes(b"no sound")
        write_sound(folder / "validation" / "low_0.wav", np.zeros(0))
    recipe = RECIPES[modality].changed({"on_corrupt": "skip"})
    with pytest.raises(ValueError, match="validation split is empty"):
        train(recipe, folder, tmp_path / "out")


# What ends a training from outside


def test_full_disk_is_named_and_the_last_save_stays_whole(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, out = RECIPES["text"], tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(recipe, data["text"], out, validate_minutes=0, report=interrupt_at(2, signal.SIGTERM))
    before = weights_of(out)

    def full(tensors: object, file: Path, *_: object) -> None:
        Path(file).write_bytes(b"a part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match=r"could not write .*the disk is full; what was there be"):
            train(recipe, data["text"], out, resume=True, save_minutes=0)
    assert all(torch.equal(t, before[name]) for name, t in weights_of(out).items())
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == [".lock"]
    checkpoints.load(out / "checkpoint")
    train(recipe, data["text"], out, resume=True)
    train(recipe, data["text"], tmp_path / "whole")
    assert_same_weights(out, tmp_path / "whole")


def test_what_killed_writers_left_is_removed(data: dict[str, Path], tmp_path: Path):
    out, mine = tmp_path / "out", [".mine", ".my-settings.json", ".pre-commit-config.yaml"]
    kept = [".lock", *mine]
    train(with_steps(RECIPES["text"], 1), data["text"], out)
    (out / ".checkpoint-ab12cd34").mkdir()
    for name in (".state-ab12cd34.safetensors", ".tokens-0123456789abcdef-ab12cd34.bin", *mine):
        (out / name).touch()
    train(with_steps(RECIPES["text"], 2), data["text"], out, resume=True)
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == kept


# Refusals


def test_folder_with_a_training_is_not_overwritten(data: dict[str, Path], tmp_path: Path):
    recipe, out = with_steps(RECIPES["text"], 1), tmp_path / "out"
    train(recipe, data["text"], out)
    before = weights_of(out)
    with pytest.raises(FileExistsError, match="holds a training; resume it or use another folder"):
        train(recipe, data["text"], out)
    assert all(torch.equal(t, before[name]) for name, t in weights_of(out).items())


def test_two_trainings_do_not_share_a_folder(data: dict[str, Path], tmp_path: Path):
    recipe, out = with_steps(RECIPES["text"], 2), tmp_path / "out"
    refused = []

    def again(progress: Progress) -> None:
        with pytest.raises(FileExistsError, match="is where another process trains"):
            train(recipe, data["text"], out, resume=True)
        refused.append(progress.step)

    train(recipe, data["text"], out, validate_minutes=0, report=again)
    assert refused
    train(with_steps(recipe, 3), data["text"], out, resume=True)


def test_a_checkpoint_without_its_training_is_not_replaced(data: dict[str, Path], tmp_path: Path):
    recipe, out = with_steps(RECIPES["text"], 1), tmp_path / "out"
    train(recipe, data["text"], out)
    (out / "state.safetensors").unlink()  # as one does to save space
    before = (out / "checkpoint" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a checkpoint, which the training would repl"):
        train(recipe.changed({"seed": 5}), data["text"], out)
    assert (out / "checkpoint" / "model.safetensors").read_bytes() == before


def test_what_is_not_there_is_not_resumed(data: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match="holds no training to resume"):
        train(RECIPES["text"], data["text"], tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


def test_resumed_training_starts_from_no_other_weights(data: dict[str, Path], tmp_path: Path):
    recipe = with_steps(RECIPES["text"], 1)
    folder = train(recipe, data["text"], tmp_path / "out")
    with pytest.raises(ValueError, match="goes on from its own weights"):
        train(recipe, data["text"], tmp_path / "out", resume=True, start=str(folder))


@pytest.mark.parametrize(
    ("modality", "settings", "section"),
    [
        ("text", {"d_state": 4}, "model"),
        ("text", {"layer": "s4"}, "model"),
        ("text", {"vocab_size": 300}, "codec"),
        ("audio", {"labels": ("high", "low")}, "codec"),
        ("image", {"length": 96}, "length"),  # C of S4 is stored for one length
    ],
)
def test_training_is_not_resumed_with_other_settings(
    modality: str, settings: dict[str, Any], section: str, data: dict[str, Path], tmp_path: Path
):
    recipe, out = with_steps(RECIPES[modality], 1), tmp_path / "out"
    train(recipe, data[modality], out)
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    with pytest.raises(ValueError, match=f"has another {section}"):
        train(recipe.changed({"steps": 2, **settings}), data[modality], out, resume=True)
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_damaged_state_is_named(content: bytes | None, data: dict[str, Path], tmp_path: Path):
    out = tmp_path / "out"
    train(with_steps(RECIPES["text"], 1), data["text"], out)
    state = out / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=r"state.safetensors' is not a readable training state"):
        train(RECIPES["text"], data["text"], out, resume=True)


def test_tokenizer_of_a_training_that_never_began_is_not_taken_over(
    data: dict[str, Path], tmp_path: Path
):
    """A training that dies before its first save leaves a tokenizer and tokens of its own."""
    out = tmp_path / "out"
    train(with_steps(RECIPES["text"], 1), data["text"], out)
    (out / "state.safetensors").unlink()
    shutil.rmtree(out / "checkpoint")
    recipe = RECIPES["text"].changed({"steps": 1, "vocab_size": 295})
    with pytest.warns(UserWarning, match="holds the tokens of other data or of another codec"):
        folder = train(recipe, data["text"], out)
    assert checkpoints.load(folder).codec.vocab_size == 295


def test_tokenizer_of_other_data_is_not_taken_over(data: dict[str, Path], tmp_path: Path):
    recipe, out = with_steps(RECIPES["text"], 1), tmp_path / "out"
    train(recipe, data["text"], out)
    (out / "state.safetensors").unlink()
    shutil.rmtree(out / "checkpoint")
    text = data["text"] / "train.txt"
    text.write_text(text.read_text().upper())
    with pytest.warns(UserWarning, match="holds the tokens of other data"):
        train(recipe, data["text"], out)
    train(recipe, data["text"], tmp_path / "clean")
    for name in ("tokenizer.model", "checkpoint/model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "clean" / name).read_bytes()
    assert len(list(out.glob("tokens-*.bin"))) == 1


def test_a_resumed_training_tells_what_makes_it_another(data: dict[str, Path], tmp_path: Path):
    out = tmp_path / "out"
    train(with_steps(RECIPES["text"], 1), data["text"], out)
    other = with_steps(RECIPES["text"], 2).changed({"seed": 5, "first_length": 8})
    with pytest.warns(UserWarning, match=r"had seed=0, first_length=0; with other values"):
        train(other, data["text"], out, resume=True)
    (data["text"] / "train.txt").write_text("a quick brown fox " * 3000)
    with pytest.warns(UserWarning, match="holds the tokens of other data"):
        train(with_steps(other, 3), data["text"], out, resume=True)


def test_a_killed_training_goes_on_from_its_best(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What it did after its last save is forgotten in the log, too, and a best is saved at once."""
    recipe, out = with_steps(RECIPES["text"], 8), tmp_path / "out"

    def killed(progress: Progress) -> None:
        if progress.step == 4:
            raise RuntimeError("killed")

    bits = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(
        "genssm.train.evaluate", lambda *_: Evaluation(next(bits, 9.0), "bits/byte", 1, 1, 1, 1)
    )
    with pytest.raises(RuntimeError, match="killed"):
        train(recipe, data["text"], out, save_minutes=99, validate_minutes=0, report=killed)
    train(recipe, data["text"], out, resume=True, validate_minutes=0)
    steps = [int(row["step"]) for row in csv.DictReader((out / "log.csv").open())]
    assert steps == [*range(1, 9), 8]
    assert checkpoints.load(out / "checkpoint").metrics["validation subset"]["value"] == 1.0


@pytest.mark.parametrize("missing", ["train.txt", "validation.txt"])
def test_missing_data_is_found_before_any_step(missing: str, data: dict[str, Path], tmp_path: Path):
    (data["text"] / missing).unlink()
    with pytest.raises(ValueError, match=f"named '{missing[:-4]}'"):
        train(RECIPES["text"], data["text"], tmp_path / "out")
    assert not (tmp_path / "out" / "state.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 100_000}, "windows of length 100000 need"),
        ({"vocab_size": 4096}, "vocab"),
        ({"d_model": (16, 16)}, "d_model"),
    ],
)
def test_unusable_settings_are_refused(
    settings: dict[str, Any], message: str, data: dict[str, Path], tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        train(RECIPES["text"].changed(settings), data["text"], tmp_path / "out")


def test_too_few_examples_for_a_batch_are_refused(data: dict[str, Path], tmp_path: Path):
    for modality in ("image", "audio"):
        with pytest.raises(ValueError, match="a batch of 50 needs"):
            train(
                RECIPES[modality].changed({"batch_size": 50}), data[modality], tmp_path / modality
            )


# Every kind of layer, on real text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        *((kind, {}) for kind in LAYERS),
        ("lssl", {"train_A": True}),
        ("s4", {"n_ssm": 2, "channels": 2, "train_B": False, "truncated": False}),
        ("s4d", {"discretization": "bilinear", "decay": "softplus"}),
    ],
)
def test_every_kind_of_layer_learns_converts_and_writes(layer: str, settings: dict, tmp_path: Path):
    """On the licence of this project, cut in two."""
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    (tmp_path / "train.txt").write_text(text[: len(text) * 4 // 5])
    (tmp_path / "validation.txt").write_text(text[len(text) * 4 // 5 :])
    recipe = recipes.RECIPES["wiki"].changed(
        {
            "vocab_size": 400, "d_model": (32,), "n_layers": (2,), "d_state": 8, "layer": layer,
            "layer_settings": settings, "batch_size": 4, "length": 64, "steps": 25, "warmup": 5,
        }
    )  # fmt: skip
    target = train(recipe, tmp_path, tmp_path / "out")
    pipe = genssm.load(target, engine="eager")
    untrained = SequenceModel(pipe.model.config)
    tokens = pipe.codec.encode(text[-2000:])
    before, after = (
        float(-m.log_prob(tokens[None]).detach().mean()) for m in (untrained, pipe.model)
    )
    assert after < before - 0.5
    to_recurrent(pipe.model, check=tokens[:200])
    assert pipe.sample("The License", max_tokens=8, seed=1)[0].raw.startswith("The License")


def test_compiled_training_equals_the_plain_one(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Traced and run without a compiler here: the same losses, and a state that shows nothing."""
    compiled = []

    def compile_by_tracing(module: nn.Module, dynamic: bool) -> None:
        compiled.append(type(module).__name__)
        plain = module.forward
        module._compiled_call_impl = torch.compile(plain, backend="eager", dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", compile_by_tracing)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++")
    recipe = RECIPES["audio"]
    train(recipe, data["audio"], tmp_path / "plain")
    assert not compiled
    train(recipe.changed({"compile": True}), data["audio"], tmp_path / "compiled")
    assert compiled == ["Mixer", "Mixer"]
    plain, traced = (weights_of(tmp_path / name) for name in ("plain", "compiled"))
    assert set(plain) == set(traced)
    for name, tensor in plain.items():
        torch.testing.assert_close(traced[name], tensor, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler"):
        train(recipe.changed({"compile": True}), data["audio"], tmp_path / "none")


def test_a_training_follows_its_schedule(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []

    def noted(objective: nn.Module, optimizers: list[Any], *rest: Any, **settings: Any) -> Any:
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        seen.append([group["lr"] / group["initial_lr"] for group in groups])
        return train_step(objective, optimizers, *rest, **settings)

    monkeypatch.setattr(train_module, "train_step", noted)
    recipe = RECIPES["text"].changed({"schedule": "cosine", "decay": 0.5})
    train(recipe, data["text"], tmp_path / "out")
    factors = [rate(i, i / STEPS, 2, 0.5, "cosine") for i in range(STEPS)]
    assert seen == [[pytest.approx(factor)] * 3 for factor in factors]


def test_what_a_recipe_says_of_batches_reaches_them(data: dict[str, Path], tmp_path: Path):
    def batch(modality: str, step: int = 0, **settings: Any) -> Batch:
        recipe = RECIPES[modality].changed(settings)
        return prepare(recipe, data[modality], tmp_path / modality, None).batch(step)

    def read(step: int, **settings: Any) -> Tensor:
        given = batch("audio", step, **settings).read
        assert given is not None
        return given[:, 3:]  # behind the opening

    assert not torch.equal(batch("image", flip=True).tokens, batch("image", flip=False).tokens)
    assert batch("text").weights is None
    assert batch("text", cut_documents=True).weights is not None
    for settings in ({"noise": 5.0}, {"fade": 12.0}):
        assert any(not torch.equal(read(i, **settings), read(i)) for i in range(8)), settings


def test_a_resumed_training_has_what_is_left_of_its_minutes(data: dict[str, Path], tmp_path: Path):
    def last(**settings: Any) -> Progress:
        reports: list[Progress] = []
        train(
            with_steps(RECIPES["text"], 10**9), data["text"], tmp_path / "out",
            minutes=0.3 / 60, report=reports.append, **settings,
        )  # fmt: skip
        return reports[-1]

    assert last().step == last(resume=True).step


def test_a_training_is_saved_between_improvements(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from safetensors import safe_open

    bits = iter([1.0, 2.0, 3.0, 4.0])  # worse each time
    monkeypatch.setattr(
        "genssm.train.evaluate", lambda *_: Evaluation(next(bits), "bits", 1, 1, 1, 1)
    )

    def killed(progress: Progress) -> None:
        if progress.step == 4:
            raise RuntimeError("killed")

    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="killed"):
        train(RECIPES["text"], data["text"], out, save_minutes=0, validate_minutes=0, report=killed)
    with safe_open(out / "state.safetensors", "pt") as file:
        assert json.loads(file.metadata()["facts"])["step"] == 4
