"""Batches depend on nothing but a seed and the number of the step."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from genssm.batches import Batch, ClipBatches, PictureBatches, TextBatches
from genssm.codec import Audio, Image
from genssm.data import Example
from genssm.model import SequenceModel

IMAGE = Image(2, 3, 1, labels=("cat", "dog"))
AUDIO = Audio(8000, labels=("one", "two"))


@pytest.fixture
def pictures() -> np.ndarray:
    """Six different pictures, uint8 (6, 2, 3, 1)."""
    return np.arange(36, dtype=np.uint8).reshape(6, 2, 3, 1)


def text_batches(seed: int) -> TextBatches:
    return TextBatches(np.arange(100, dtype=np.uint16), 4, 10, seed)


def picture_batches(seed: int) -> PictureBatches:
    pictures = np.arange(48, dtype=np.uint8).reshape(8, 2, 3, 1)
    return PictureBatches(pictures, np.arange(8) % 2, IMAGE, 3, seed, flip=True)


def clips(*lengths: int) -> list[Example]:
    """Clips of distinct constant samples: clip i is of label one or two, by turns."""
    return [
        Example(np.full(n, (i + 1) / (len(lengths) + 1), np.float32), AUDIO.labels[i % 2])
        for i, n in enumerate(lengths)
    ]


def stream_of(examples: list[Example], codec: Audio = AUDIO) -> np.ndarray:
    encoded = [codec.encode(e.raw, e.label).numpy() for e in examples]
    return np.concatenate([*encoded, np.zeros(0)]).astype(np.uint16)


def clip_batches(seed: int, batch_size: int = 2) -> ClipBatches:
    return ClipBatches(stream_of(clips(5, 3, 9, 4, 8, 2, 7, 6)), AUDIO, batch_size, 100, seed)


def assert_same_batch(actual: Batch, expected: Batch) -> None:
    assert torch.equal(actual.tokens, expected.tokens)
    assert (actual.weights is None) == (expected.weights is None)
    if actual.weights is not None and expected.weights is not None:
        assert torch.equal(actual.weights, expected.weights)


@pytest.mark.parametrize("make", [text_batches, picture_batches, clip_batches])
def test_a_batch_depends_on_the_seed_and_the_step_alone(make: Callable[[int], Any]):
    in_order = [make(3).batch(step) for step in range(12)]
    batches = make(3)
    torch.manual_seed(1)  # the global state plays no part
    for step in (11, 0, 5, 5, 3):
        assert_same_batch(batches.batch(step), in_order[step])
    steps = {tuple(batch.tokens.reshape(-1).tolist()) for batch in in_order}
    assert len(steps) > 3
    other = [make(4).batch(step).tokens for step in range(12)]
    assert any(
        a.tokens.shape != b.shape or not torch.equal(a.tokens, b)
        for a, b in zip(in_order, other, strict=True)
    )


def test_labels_within_a_class_are_trained_as_that_and_as_any():
    """A tenth without a class, three tenths as the broader one."""
    codec = Audio(8000, labels=("7", "7_x"))
    examples = [Example(np.zeros(4, np.float32), "7_x")] * 8
    batches = ClipBatches(stream_of(examples, codec), codec, 8, 100, 3)
    starts = Counter(int(t) for step in range(250) for t in batches.batch(step).tokens[:, 0])
    shares = {codec.label_of(token): n / 2000 for token, n in starts.items()}
    assert shares == {
        None: pytest.approx(0.1, abs=0.03),
        "7": pytest.approx(0.3, abs=0.04),
        "7_x": pytest.approx(0.6, abs=0.04),
    }


def test_text_windows_are_consecutive_and_reach_both_ends():
    batches = TextBatches(np.arange(14, dtype=np.uint16), 4, 10, seed=0)
    first, last = set(), set()
    for step in range(40):
        tokens = batches.batch(step).tokens
        assert tokens.dtype == torch.int64
        assert tokens.shape == (4, 11)
        assert bool((tokens.diff() == 1).all())
        first.update(tokens[:, 0].tolist())
        last.update(tokens[:, -1].tolist())
    assert (first, last) == ({0, 1, 2, 3}, {10, 11, 12, 13})


def test_text_shorter_than_a_window_is_refused():
    TextBatches(np.zeros(11, np.uint16), 1, 10, 0).batch(0)
    with pytest.raises(ValueError, match="10 tokens, and windows of length 10 need 11"):
        TextBatches(np.zeros(10, np.uint16), 1, 10, 0)


def test_every_picture_is_visited_once_an_epoch(pictures: np.ndarray):
    batches = PictureBatches(pictures, None, IMAGE, 2, seed=0, flip=False)
    orders = []
    for epoch in range(3):
        tokens = torch.cat([batches.batch(3 * epoch + step).tokens for step in range(3)])
        assert bool((tokens[:, 0] == IMAGE.boundary).all())
        orders.append(tokens[:, 1].tolist())  # the first value names the picture
        assert sorted(orders[-1]) == [0, 6, 12, 18, 24, 30]
    assert orders[0] != orders[1] != orders[2]


def test_pictures_start_with_their_class_and_a_tenth_with_any(pictures: np.ndarray):
    batches = PictureBatches(pictures, np.arange(6) % 2, IMAGE, 6, seed=0, flip=False)
    tokens = torch.cat([batches.batch(step).tokens for step in range(200)])
    own = torch.tensor([IMAGE.start("cat"), IMAGE.start("dog")])[tokens[:, 1] // 6 % 2]
    unlabelled = tokens[:, 0] == IMAGE.boundary
    assert bool(((tokens[:, 0] == own) | unlabelled).all())
    assert 0.06 < float(unlabelled.float().mean()) < 0.14


def test_pictures_need_no_classes_in_the_codec(pictures: np.ndarray):
    codec = Image(2, 3, 1)
    batches = PictureBatches(pictures, np.arange(6) % 2, codec, 6, seed=0, flip=False)
    assert bool((batches.batch(0).tokens[:, 0] == codec.boundary).all())


def test_half_of_the_pictures_are_mirrored_where_that_is_wanted(pictures: np.ndarray):
    batches = PictureBatches(pictures, None, IMAGE, 6, seed=0, flip=True)
    rows = torch.cat([batches.batch(step).tokens[:, 1:] for step in range(100)]).view(-1, 2, 3)
    mirrored = rows[:, 0, 0] > rows[:, 0, 2]
    assert 0.4 < float(mirrored.float().mean()) < 0.6
    restored = torch.where(mirrored[:, None, None], rows.flip(2), rows)
    originals = {tuple(p.reshape(-1).tolist()) for p in pictures}
    assert {tuple(p.reshape(-1).tolist()) for p in restored} == originals


@pytest.mark.parametrize("n", [0, 1, 3])
def test_fewer_pictures_than_a_batch_are_refused(n: int, pictures: np.ndarray):
    with pytest.raises(ValueError, match=f"a batch of 4 needs at least 4 examples, got {n}"):
        PictureBatches(pictures[:n], None, IMAGE, 4, seed=0, flip=False)


def visits(batches: ClipBatches, steps: int) -> Counter[int]:
    """How often ``steps`` batches show each clip, by its first sample."""
    tokens = [batches.batch(step).tokens for step in range(steps)]
    return Counter(token for batch in tokens for token in batch[:, 1].tolist())


@pytest.mark.parametrize("group", [2, 4, 16])
def test_every_clip_is_visited_once_an_epoch(group: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ClipBatches, "group", group)
    counts = visits(clip_batches(0), 4)
    assert len(counts) == 8
    assert set(counts.values()) == {1}
    assert set(visits(clip_batches(0), 12).values()) == {3}


def test_no_clip_is_left_out_for_ever():
    """Seven clips in batches of two: each epoch leaves one out, but not always the same."""
    batches = ClipBatches(stream_of(clips(5, 3, 9, 4, 8, 2, 7)), AUDIO, 2, 100, seed=0)
    assert len(visits(batches, 60)) == 7


def test_clips_of_similar_length_share_a_batch():
    for step in range(8):
        weights = clip_batches(0).batch(step).weights
        assert weights is not None
        lengths = weights.sum(1)
        assert int(lengths.max() - lengths.min()) == 1


def test_weights_cover_a_clip_and_its_end_but_no_padding():
    examples = clips(5, 3, 9, 4)
    batches = ClipBatches(stream_of(examples), AUDIO, 4, 100, seed=0)
    expected = {tuple(AUDIO.encode(e.raw)[1:].tolist()): AUDIO.start(e.label) for e in examples}
    for step in range(10):
        batch = batches.batch(step)
        assert batch.weights is not None
        assert batch.tokens.shape == (4, 11)
        assert batch.weights.shape == (4, 10)
        for row, weight in zip(batch.tokens, batch.weights, strict=True):
            n = int(weight.sum())
            assert weight.tolist() == [1.0] * n + [0.0] * (10 - n)
            assert bool((row[n:] == AUDIO.boundary).all())  # the end, then padding
            assert int(row[0]) in (expected[tuple(row[1:n].tolist())], AUDIO.boundary)


def test_a_batch_of_short_clips_is_padded_for_the_innermost_level():
    batch = ClipBatches(stream_of(clips(3, 4)), AUDIO, 2, 100, seed=0, least=16).batch(0)
    assert batch.tokens.shape == (2, 17)
    assert batch.weights is not None
    assert sorted(batch.weights.sum(1).tolist()) == [4, 5]


def test_clips_with_durations_are_cut_where_a_sequence_ends():
    codec = Audio(8000, AUDIO.labels, durations=(20, 60))
    batch = ClipBatches(stream_of(clips(50, 60), codec), codec, 2, 20, seed=0).batch(0)
    assert batch.tokens.shape == (2, 21)
    assert batch.weights is not None
    assert bool((batch.weights > 0).all())
    assert codec.boundary not in batch.tokens[:, 1:]
    assert batch.tokens[:, 1].tolist() == [codec.duration(60)] * 2


RAMPS = [*range(17), *range(40, 60), *range(70, 120), *range(130, 190), *range(200, 238)]
LONG = Audio(8000, AUDIO.labels, levels=(-20, 0))


@pytest.fixture
def ramps() -> np.ndarray:
    """Clips of 17, 20, 50, 60 and 38 samples, all different: (label, level, samples)."""
    parts = np.split(np.array(RAMPS), [17, 37, 87, 147])
    label, level = LONG.start("two"), LONG.boundary + 1
    return np.concatenate([[label, level, *part] for part in parts]).astype(np.uint16)


def test_all_of_a_long_clip_is_trained(ramps: np.ndarray):
    """Sequences of a level, 19 samples or the end: a long clip's are windows of it."""
    batches = ClipBatches(ramps, LONG, 13, 20, seed=0, context=3)
    assert len(batches.begins) == 1 + 2 + 3 + 4 + 3  # 19, 22, 52, 62, 40 tokens; a part adds 16
    begins, ends = {0, 40, 70, 130, 200}, {16, 59, 119, 189, 237}
    level, seen = LONG.boundary + 1, Counter[int]()
    for step in range(80):  # each an epoch
        batch = batches.batch(step)
        assert batch.weights is not None
        for row, weight in zip(batch.tokens.tolist(), batch.weights.tolist(), strict=True):
            assert row[0] in (LONG.start("two"), LONG.boundary)
            assert row[1] == level
            samples = [token for token in row[2:] if token < LONG.boundary]
            at = RAMPS.index(samples[0])
            assert samples == RAMPS[at : at + len(samples)]
            rest = row[2 + len(samples) :]
            assert rest == [] or samples[-1] in ends
            predicted = samples if samples[0] in begins else samples[3:]
            expected = [float(batches.opening_weight) if samples[0] in begins else 0.0]
            expected += [0.0] * (len(samples) - len(predicted)) + [1.0] * len(predicted)
            expected += [1.0] * (rest != []) + [0.0] * (len(rest) - 1)  # the end, no padding
            assert weight == expected
            seen.update(predicted)
            seen[LONG.boundary] += rest != []
    assert set(seen) == {*RAMPS, LONG.boundary}
    assert [seen[0], seen[130], seen[LONG.boundary]] == [80, 80, 5 * 80]
    inner = [seen[i] for i in range(150, 170)]  # of the clip of four sequences
    assert min(inner) > 0.5 * max(inner)


def test_one_long_clip_makes_batches(ramps: np.ndarray):
    with pytest.raises(ValueError, match=r"parts of 62 tokens of longer ones; got 1"):
        ClipBatches(ramps[93:155], LONG, 2, 62, seed=0)
    assert len(ClipBatches(ramps[93:155], LONG, 4, 20, seed=0).batch(0).tokens) == 4


def test_noise_is_read_but_not_predicted():
    """Each clip has a level of its own; targets, labels and the padding are as without."""
    stream = stream_of(clips(*[400] * 32))
    plain, noisy = (ClipBatches(stream, AUDIO, 8, 500, 0, noise).batch(3) for noise in (0.0, 5.0))
    assert plain.read is None
    assert noisy.read is not None
    assert torch.equal(noisy.tokens, plain.tokens)
    assert torch.equal(noisy.read[:, 0], plain.tokens[:, 0])  # labels
    shift = (noisy.read - noisy.tokens[:, :-1]).double()[:, 1:]
    assert 0 <= int(noisy.read[:, 1:].min()) <= int(noisy.read[:, 1:].max()) < AUDIO.boundary
    levels = shift.std(1)
    assert float(levels.max()) < 6
    assert float(levels.max() - levels.min()) > 1
    assert abs(float(shift.mean())) < 0.2
    again = ClipBatches(stream, AUDIO, 8, 500, 0, 5.0).batch(3)
    assert again.read is not None
    assert torch.equal(noisy.read, again.read)
    cut = noisy.cut(10)
    assert cut.read is not None
    assert torch.equal(cut.read, noisy.read[:, :10])


def test_noise_leaves_what_is_no_sample():
    """Boundaries behind the shorter clips of a batch are read as boundaries."""
    batch = ClipBatches(stream_of(clips(5, 9)), AUDIO, 2, 100, 0, noise=9.0).batch(0)
    assert batch.read is not None
    assert batch.weights is not None
    ends = batch.tokens[:, :-1] >= AUDIO.boundary
    assert bool(ends.any())
    assert torch.equal(batch.read[ends], batch.tokens[:, :-1][ends])


def test_a_part_of_some_clips_is_read_quieter():
    examples = [Example(0.3 * np.sin(np.arange(n) / 5), "one") for n in range(300, 460, 10)]
    stream, gains, steps = stream_of(examples), [], 20
    for step in range(steps):
        plain, faded = (
            ClipBatches(stream, AUDIO, 16, 500, 0, 0.0, fade).batch(step) for fade in (0, 12)
        )
        assert plain.read is None
        assert faded.read is not None
        assert torch.equal(faded.tokens, plain.tokens)
        off = faded.read != faded.tokens[:, :-1]
        assert not bool(off[:, 0].any())  # labels
        assert not bool(off[faded.tokens[:, :-1] == AUDIO.boundary].any())
        for row, read, where in zip(faded.tokens, faded.read, off, strict=True):
            if bool(where.any()):
                first, last = int(where.nonzero()[0]), int(where.nonzero()[-1])
                heard, true = (AUDIO.decode(t[first : last + 1]) for t in (read, row))
                gains.append(20 * np.log10(np.abs(heard).max() / np.abs(true).max()))
    assert 0.08 < len(gains) / (16 * steps) < 0.17
    assert -12.5 <= min(gains) < -8
    assert max(gains) < 0


def test_the_opening_is_learned_from_all_clips_and_read_from_most():
    codec = Audio(8000, AUDIO.labels, (3, 6, 12), levels=(-18, -10, -2))
    examples = clips(5, 3, 9, 4, 8, 2, 7, 13)  # the last is cut
    batches = ClipBatches(stream_of(examples, codec), codec, 4, 12, seed=0)
    assert sorted(batches.lengths) == sorted(min(len(e.raw) + 3, 12) for e in examples)
    told = {tuple(t[3:13]): tuple(t[1:3]) for t in (codec.encode(e.raw).tolist() for e in examples)}
    assert len(set(told.values())) > 4
    read: Counter[tuple[bool, ...]] = Counter()
    for step in range(400):
        batch = batches.batch(step)
        assert batch.read is not None
        assert batch.weights is not None
        for tokens, given, weight in zip(batch.tokens, batch.read, batch.weights, strict=True):
            n = int(weight.count_nonzero())
            assert weight[:n].tolist() == [ClipBatches.opening_weight] * 2 + [1.0] * (n - 2)
            ended = int(tokens[n] == codec.boundary)
            opening = told[tuple(tokens[3 : n + 1 - ended].tolist())]
            assert tuple(tokens[1:3].tolist()) == opening
            is_open = given[1:3] == codec.boundary
            assert torch.equal(given[1:3][~is_open], tokens[1:3][~is_open])
            assert torch.equal(given[3:], tokens[3:-1])
            assert int(given[0]) == int(tokens[0])
            read[int(given[0]) != codec.boundary, *is_open.tolist()] += 1
    for labelled, everything in ((True, 0.05), (False, 0.5)):
        total = sum(read[labelled, a, b] for a in (True, False) for b in (True, False))
        assert read[labelled, True, True] / total == pytest.approx(everything, abs=0.1)
        for one in ((True, False), (False, True)):
            assert 0.01 < read[labelled, *one] / total < 0.1


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_clips_than_a_batch_are_refused(n: int):
    with pytest.raises(ValueError, match="a batch of 2 needs"):
        ClipBatches(stream_of(clips(*[5] * n)), AUDIO, 2, 100, seed=0).batch(0)


# Documents


def test_cut_windows_hold_nothing_of_another_document():
    """Targets that count lie in the document of the window's first token, and its end; the rest of
    the window is neither counted nor read."""
    boundary, documents = 0, [np.arange(100 * d, 100 * d + n) for d, n in ((1, 7), (2, 30), (3, 5))]
    stream = np.concatenate([[boundary, *d] for d in documents]).astype(np.uint16)
    padded = np.concatenate([stream, np.full(20, boundary)])
    batches = TextBatches(stream, 4, 12, seed=0, boundary=boundary)
    seen = set()
    for start in range(len(stream)):
        batch = batches.windows(np.array([start]))
        assert batch.weights is not None
        tokens, weights, n = batch.tokens[0], batch.weights[0], int(batch.weights.sum())
        assert weights.tolist() == [1.0] * n + [0.0] * (12 - n)
        assert tokens[: n + 1].tolist() == padded[start : start + n + 1].tolist()
        assert set(tokens[n + 1 :].tolist()) <= {boundary}
        inner = tokens[: n + 1][tokens[: n + 1] != boundary] // 100
        assert len(inner.unique()) <= 1  # of one document
        assert n == 12 or int(tokens[n]) == boundary  # where the next one begins
        seen.update(tokens[1 : n + 1].tolist())
    assert seen == set(stream.tolist())
    drawn = torch.cat([batches.batch(step).tokens[:, 1] for step in range(100)])
    assert set(drawn.tolist()) == set(
        stream.tolist()
    )  # nothing is left out, the last ones included


@pytest.mark.parametrize("layer", ["s4", "s4d"])
def test_no_target_depends_on_another_document_or_on_the_future(
    layer: str, make_model: Callable[..., SequenceModel]
):
    """Other documents before and after, other tokens later: the counted losses stay the same."""
    model, boundary = make_model("isotropic", layer), 19
    random = np.random.default_rng(0)
    stream = random.integers(0, 19, 80).astype(np.uint16)
    stream[[0, 30, 50]] = boundary
    other = stream.copy()
    other[1:30], other[51:] = (random.integers(0, 19, n) for n in (29, 29))
    losses = []
    for tokens in (stream, other):
        batches = TextBatches(tokens, 16, 24, seed=3, boundary=boundary)
        starts = range(30, 50)
        batch = batches.windows(np.array(starts))
        with torch.no_grad():
            assert batch.weights is not None
            losses.append(-model.log_prob(batch.tokens) * batch.weights)
    assert torch.equal(losses[0], losses[1])
    later = batch.tokens.clone()
    later[:, 10:] = (later[:, 10:] + 1) % 19
    with torch.no_grad():
        a, b = model.log_prob(batch.tokens)[:, :9], model.log_prob(later)[:, :9]
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_cut_batch_counts_its_first_targets():
    weights = torch.tensor([[1.0, 1.0, 0.0]])
    batch = Batch(torch.tensor([[1, 2, 3, 4]]), weights).cut(2)
    assert batch.tokens.tolist() == [[1, 2, 3]]
    assert batch.weights is not None
    assert batch.weights.tolist() == [[1.0, 1.0]]
    assert Batch(torch.tensor([[1, 2, 3, 4]])).cut(9).tokens.tolist() == [[1, 2, 3, 4]]
