"""Reading data sets, and batches that depend on nothing but a seed and the number of the step."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genssm.codec import Audio, Image, Text
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

Write = Callable[..., Path]
IMAGE = Image(2, 3, 1, labels=("cat", "dog"))
AUDIO = Audio(8000, labels=("one", "two"))
ARTICLES = " = One = \n\nfirst\n = = part = = \nmore\n = Two words = \n\nsecond\n"


@pytest.fixture
def pictures() -> np.ndarray:
    """Six different pictures, uint8 (6, 2, 3, 1)."""
    return np.arange(36, dtype=np.uint8).reshape(6, 2, 3, 1)


def assert_same_examples(actual: list[Example], expected: list[Example]) -> None:
    assert [e.label for e in actual] == [e.label for e in expected]
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a.raw, b.raw)


# Text


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".txt", bytes),
        (".txt.xz", lzma.compress),
        (".txt.bz2", bz2.compress),
        (".txt.gz", gzip.compress),
    ],
)
def test_text_is_read_packed_or_not(suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path):
    path = tmp_path / f"train{suffix}"
    path.write_bytes(pack("Größe\r\nΩ\0\n".encode()))
    assert list(read_documents(path)) == ["Größe\r\nΩ\0\n"]


def test_folder_of_texts_is_read_in_the_order_of_names(tmp_path: Path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"first"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.txt").write_text("third")
    (tmp_path / "ignored.md").write_text("no")
    assert list(read_documents(tmp_path)) == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("", []),
        ("\n \n", []),
        ("one document\n\nof two parts", ["one document\n\nof two parts"]),
        (ARTICLES, [ARTICLES[: ARTICLES.index(" = Two")], ARTICLES[ARTICLES.index(" = Two") :]]),
        ("a\n<|endoftext|>\nb\n<|endoftext|>c\n", ["a\n", "b\n", "c\n"]),
        ("before\n" + ARTICLES[-24:], ["before\n", ARTICLES[-24:]]),
    ],
)
def test_text_splits_into_documents(text: str, documents: list[str], tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text(text)
    assert list(read_documents(path)) == documents


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.txt", "Größe".encode("latin-1")),
        ("broken.txt.gz", b"no gzip"),
        ("broken.txt.bz2", b"no bzip2"),
        ("broken.txt.xz", b"no xz"),
        ("cut.txt.gz", gzip.compress(b"abc" * 1000)[:20]),
        ("cut.txt.xz", lzma.compress(b"abc" * 1000)[:40]),
    ],
)
def test_text_that_is_not_readable_is_named(name: str, content: bytes, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}' is not readable UTF-8"):
        list(read_documents(tmp_path / name))


def test_folder_without_texts_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=f"{tmp_path.name}' holds no .txt file"):
        list(read_documents(tmp_path))


# Pictures


@pytest.mark.parametrize("labelled", [True, False])
def test_pictures_are_read_from_an_array_with_its_labels(
    labelled: bool, tmp_path: Path, pictures: np.ndarray
):
    np.save(tmp_path / "test.npy", pictures)
    if labelled:
        np.save(tmp_path / "test_labels.npy", np.array([0, 1, 1, 0, 0, 1]))
    names = ["cat", "dog", "dog", "cat", "cat", "dog"] if labelled else [None] * 6
    expected = [Example(p, name) for p, name in zip(pictures, names, strict=True)]
    assert_same_examples(list(read_pictures(tmp_path / "test.npy", IMAGE)), expected)


def test_labels_are_ignored_by_a_codec_without_classes(tmp_path: Path, pictures: np.ndarray):
    np.save(tmp_path / "test.npy", pictures)
    np.save(tmp_path / "test_labels.npy", np.zeros(6, np.int64))
    assert {e.label for e in read_pictures(tmp_path / "test.npy", Image(2, 3, 1))} == {None}


def test_pictures_are_read_from_folders_of_their_classes(
    tmp_path: Path, pictures: np.ndarray, write_picture: Write
):
    for i, name in enumerate(["dog/a.png", "cat/b.png", "cat/a.bmp", "cow/x.png", "top.PNG"]):
        write_picture(tmp_path / name, pictures[i, ..., 0])
    (tmp_path / "cat" / "notes.txt").write_text("ignored")
    expected = [
        Example(pictures[2], "cat"),
        Example(pictures[1], "cat"),
        Example(pictures[3], None),
        Example(pictures[0], "dog"),
        Example(pictures[4], None),
    ]
    assert_same_examples(list(read_pictures(tmp_path, IMAGE)), expected)


def test_picture_files_are_brought_to_the_channels_of_the_codec(
    tmp_path: Path, write_picture: Write
):
    write_picture(tmp_path / "grey.png", np.full((2, 3), 7, np.uint8))
    (example,) = read_pictures(tmp_path / "grey.png", Image(2, 3, 3))
    np.testing.assert_array_equal(example.raw, np.full((2, 3, 3), 7))
    write_picture(tmp_path / "grey.png", np.full((2, 3, 3), 9, np.uint8))
    (example,) = read_pictures(tmp_path / "grey.png", IMAGE)
    np.testing.assert_array_equal(example.raw, np.full((2, 3, 1), 9))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 2, 3, 1), np.float32), "uint8"),
        (np.zeros((4, 6), np.uint8), "uint8 of shape"),
        (np.zeros((4, 9, 9, 1), np.uint8), "uint8 of shape"),
        (np.array([{"pickled": 1}]), "not a readable .npy"),
    ],
)
def test_array_of_no_such_pictures_is_refused(array: np.ndarray, message: str, tmp_path: Path):
    np.save(tmp_path / "test.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        list(read_pictures(tmp_path / "test.npy", IMAGE))


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY"])
def test_array_that_is_not_readable_is_named(content: bytes, tmp_path: Path):
    (tmp_path / "test.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"test.npy' is not a readable .npy array"):
        open_picture_array(tmp_path / "test.npy", IMAGE)


def test_labels_of_another_number_are_refused(tmp_path: Path, pictures: np.ndarray):
    np.save(tmp_path / "test.npy", pictures)
    np.save(tmp_path / "test_labels.npy", np.zeros(5, np.int64))
    with pytest.raises(ValueError, match="6 pictures but labels"):
        open_picture_array(tmp_path / "test.npy", IMAGE)


@pytest.mark.parametrize("label", [2, -1])
def test_labels_of_no_class_are_refused(label: int, tmp_path: Path, pictures: np.ndarray):
    np.save(tmp_path / "test.npy", pictures)
    np.save(tmp_path / "test_labels.npy", np.full(6, label))
    with pytest.raises(ValueError, match="label"):
        list(read_pictures(tmp_path / "test.npy", IMAGE))


def test_picture_file_that_is_not_readable_is_named(
    tmp_path: Path, pictures: np.ndarray, write_picture: Write
):
    path = write_picture(tmp_path / "cut.png", pictures[0, ..., 0])
    for content in (b"", b"no picture", path.read_bytes()[:40]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"'cut.png' is not a readable picture"):
            list(read_pictures(tmp_path, IMAGE))


# Sound


def test_clips_are_read_from_a_folder_with_the_class_in_their_names(
    tmp_path: Path, write_sound: Write
):
    wave = np.linspace(-0.9, 0.9, 50)
    for name in ("one_jim_0.wav", "two_jim_1.wav", "three_jim.flac", "two/jim.wav"):
        write_sound(tmp_path / name, wave)
    found = list(read_clips(tmp_path, AUDIO))
    assert [e.label for e in found] == ["one", None, "two", "two"]
    for example in found:
        np.testing.assert_allclose(example.raw, wave, atol=1e-4)


def test_clips_are_read_from_an_archive_as_from_the_folder(tmp_path: Path, write_sound: Write):
    folder = tmp_path / "clips"
    for i, name in enumerate(("two_b.wav", "one_a.wav", "x.txt")):
        write_sound((folder / name).with_suffix(".wav"), np.full(10 + i, 0.5))
    with tarfile.open(tmp_path / "clips.tar.xz", "w:xz") as archive:
        archive.add(folder, "clips")
    from_archive = list(read_clips(tmp_path / "clips.tar.xz", AUDIO))
    assert [(len(e.raw), e.label) for e in from_archive] == [(11, "one"), (10, "two"), (12, None)]
    assert_same_examples(from_archive, list(read_clips(folder, AUDIO)))


def test_one_clip_is_resampled_and_mixed_down(tmp_path: Path, write_sound: Write):
    path = write_sound(tmp_path / "one_a.wav", np.tile([[0.5, 0.1]], (1600, 1)), 16_000)
    (example,) = read_clips(path, AUDIO)
    assert example.label == "one"
    assert example.raw.shape == (800,)
    np.testing.assert_allclose(example.raw[100:-100], 0.3, atol=0.01)


def test_sound_file_that_is_not_readable_is_named(tmp_path: Path):
    (tmp_path / "bad.wav").write_bytes(b"RIFF no sound")
    with pytest.raises(ValueError, match=r"'bad.wav' is not a readable sound file"):
        list(read_clips(tmp_path, AUDIO))


@pytest.mark.parametrize("name", ["bad.tar", "bad.tar.xz", "bad.tar.gz"])
def test_archive_that_is_not_readable_is_named(name: str, tmp_path: Path):
    whole = io.BytesIO()
    mode: Any = "w:" + name[8:]  # the packing by its suffix, if any
    with tarfile.open(fileobj=whole, mode=mode) as archive:
        member = tarfile.TarInfo("one_a.wav")
        member.size = 5000
        archive.addfile(member, io.BytesIO(np.random.default_rng(0).bytes(5000)))
    for content in (b"", b"no archive", whole.getvalue()[:2000]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}' is not a readable tar archive"):
            list(read_clips(tmp_path / name, AUDIO))


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_folder_without_such_files_is_named(modality: str, tmp_path: Path):
    codec = IMAGE if modality == "image" else AUDIO
    with pytest.raises(ValueError, match=f"{tmp_path.name}' holds no file ending in ."):
        list(read_examples(tmp_path, codec))


# Finding data


def test_examples_are_read_in_the_modality_of_the_codec(
    tmp_path: Path, text_codec: Text, pictures: np.ndarray, write_sound: Write
):
    (tmp_path / "a.txt").write_text("text")
    assert list(read_examples(tmp_path, text_codec)) == [Example("text")]
    np.save(tmp_path / "a.npy", pictures)
    assert len(list(read_examples(tmp_path / "a.npy", IMAGE))) == 6
    write_sound(tmp_path / "one_a.wav", np.zeros(5))
    assert [e.label for e in read_examples(tmp_path, AUDIO)] == ["one"]


def test_data_that_is_not_there_is_named(tmp_path: Path, text_codec: Text):
    with pytest.raises(ValueError, match=r"no file or folder '.*nowhere'"):
        read_examples(tmp_path / "nowhere", text_codec)


@pytest.mark.parametrize(
    ("modality", "name"),
    [
        ("text", "train.txt"),
        ("text", "train.txt.xz"),
        ("text", "train/"),
        ("image", "train.npy"),
        ("image", "train/"),
        ("audio", "train.tar.xz"),
        ("audio", "train/"),
    ],
)
def test_a_split_is_found_by_its_name(modality: str, name: str, tmp_path: Path):
    for made in (name, "validation" + name.removeprefix("train"), "train_labels.npy"):
        path = tmp_path / made
        if made.endswith("/"):
            path.mkdir()
            (path / "a.txt").write_text("text")
        else:
            path.touch()
    assert find_split(tmp_path, "train", modality) == tmp_path / name


def test_no_split_or_two_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"one file or folder named 'train' .* found 0"):
        find_split(tmp_path, "train", "text")
    (tmp_path / "train.txt").touch()
    (tmp_path / "train.txt.gz").touch()
    with pytest.raises(ValueError, match="found 2"):
        find_split(tmp_path, "train", "text")
    with pytest.raises(ValueError, match="must be a folder"):
        find_split(tmp_path / "train.txt", "train", "text")


# Batches


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


def clip_batches(seed: int, batch_size: int = 2) -> ClipBatches:
    return ClipBatches(clips(5, 3, 9, 4, 8, 2, 7, 6), AUDIO, batch_size, 100, seed)


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
    with pytest.raises(ValueError, match="10 tokens, fewer than a window of 10"):
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


@pytest.mark.parametrize("n", [1, 3])
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
    batches = ClipBatches(clips(5, 3, 9, 4, 8, 2, 7), AUDIO, 2, 100, seed=0)
    assert len(visits(batches, 60)) == 7


def test_clips_of_similar_length_share_a_batch():
    for step in range(8):
        weights = clip_batches(0).batch(step).weights
        assert weights is not None
        lengths = weights.sum(1)
        assert int(lengths.max() - lengths.min()) == 1


def test_weights_cover_a_clip_and_its_end_but_no_padding():
    examples = clips(5, 3, 9, 4)
    batches = ClipBatches(examples, AUDIO, 4, 100, seed=0)
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


def test_clips_longer_than_a_sequence_are_cut_before_their_end():
    batch = ClipBatches(clips(50, 60), AUDIO, 2, 20, seed=0).batch(0)
    assert batch.tokens.shape == (2, 21)
    assert batch.weights is not None
    assert bool((batch.weights == 1).all())
    assert AUDIO.boundary not in batch.tokens[:, 1:]


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_clips_than_a_batch_are_refused(n: int):
    with pytest.raises(ValueError, match="a batch of 2 needs"):
        ClipBatches(clips(*[5] * n), AUDIO, 2, 100, seed=0).batch(0)
