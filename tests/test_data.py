"""Reading data sets: text, pictures and sound, packed or not, and what is refused."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genssm.codec import Audio, Image, Text
from genssm.data import (
    Example,
    files_at,
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
        ("damaged.txt.gz", gzip.compress(b"abc" * 1000)[:10] + b"\xff" * 20),
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


def saved(save: Callable[..., None], array: np.ndarray) -> bytes:
    file = io.BytesIO()
    save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("name", ["test.npy", "test_labels.npy"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no array",
        b"\x93NUMPY",
        saved(np.savez, np.zeros(6, np.int64)),
        saved(np.savez, np.zeros(6, np.int64))[:100],
        saved(np.save, np.zeros(6, np.int64)).replace(b"}", b"("),
        saved(np.save, np.zeros(6, np.int64)).replace(b"(6,), }" + b" " * 20, b"(%d,), }" % 10**20),
        saved(np.save, np.zeros(6, np.int64)).replace(b"(6,), } ", b"(-6,), }"),
    ],
    ids=[
        "empty",
        "other",
        "beginning",
        "archive",
        "cut archive",
        "damaged header",
        "huge",
        "negative",
    ],
)
def test_array_that_is_not_readable_is_named(
    name: str, content: bytes, tmp_path: Path, pictures: np.ndarray
):
    np.save(tmp_path / "test.npy", pictures)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}' is not a readable .npy array"):
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


def test_a_picture_that_is_a_program_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """PIL would start Ghostscript for it, whatever its name."""
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: started.append(1))
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: started.append(1))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 3 2\n%%EndComments\nshowpage\n"
    (tmp_path / "a.png").write_bytes(program)
    with pytest.raises(ValueError, match=r"'a\.png' is not a readable picture"):
        list(read_pictures(tmp_path / "a.png", IMAGE))
    assert started == []


def test_sixteen_bits_keep_their_range_and_what_is_transparent_is_white(tmp_path: Path):
    import PIL.Image

    PIL.Image.fromarray(np.full((2, 3), 257 * 78, np.uint16)).save(tmp_path / "deep.png")
    clear = np.full((2, 3, 4), 9, np.uint8)
    clear[0, 0, 3], clear[1:, :, 3] = 0, 255
    PIL.Image.fromarray(clear).save(tmp_path / "clear.png")
    rgb = Image(2, 3, 3)
    (example,) = read_pictures(tmp_path / "deep.png", rgb)
    np.testing.assert_array_equal(example.raw, np.full((2, 3, 3), 78))
    (example,) = read_pictures(tmp_path / "clear.png", rgb)
    assert example.raw[0, 0].tolist() == [255] * 3
    assert example.raw[1].tolist() == [[9] * 3] * 3


# Sound


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("damage", ["cut", "folder", "dangling", "not finite"])
def test_a_damaged_clip_among_others_is_named_or_left_out(
    damage: str, skip: bool, tmp_path: Path, write_sound: Write
):
    import soundfile

    bad = tmp_path / "two_bad.wav"
    for name in ("one_a.wav", "two_z.wav"):
        write_sound(tmp_path / name, np.zeros(50))
    if damage == "cut":
        whole = write_sound(bad, np.zeros(900)).read_bytes()
        bad.write_bytes(whole[:200])
    elif damage == "folder":
        bad.mkdir()
    elif damage == "dangling":
        bad.symlink_to(tmp_path / "nowhere")
    else:
        soundfile.write(bad, np.full(50, np.nan, np.float32), 8000, "FLOAT")
    found = read_clips(tmp_path, AUDIO, skip)
    if damage == "folder":  # which is none of the files
        assert [e.label for e in found] == ["one", "two"]
    elif skip:
        with pytest.warns(UserWarning, match=r"left out: .*two_bad.wav"):
            assert [e.label for e in found] == ["one", "two"]
    else:
        with pytest.raises(ValueError, match=r"two_bad.wav"):
            list(found)


def test_the_folder_of_a_clip_wins_over_its_name(tmp_path: Path, write_sound: Write):
    """Unless the name tells more: which speaker of the class."""
    codec = Audio(8000, labels=("one", "two", "one_jim"))
    names = {
        "one/0/two_take.wav": "one",
        "one/one_jim_3.wav": "one_jim",
        "two/one_jim_3.wav": "two",
        "other/two_take.wav": "two",
        "other/one_jim.wav": "one_jim",
    }
    for name in names:
        write_sound(tmp_path / name, np.zeros(50))
    assert [e.label for e in read_clips(tmp_path, codec)] == [names[n] for n in sorted(names)]


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


def test_hidden_files_are_no_data(tmp_path: Path, write_sound: Write):
    """Those that macOS keeps beside every file, of a killed writer, in a hidden folder."""
    folder = tmp_path / ".cache" / "train"
    write_sound(folder / "one.wav", np.zeros(5))
    for name in ("._one.wav", ".two-abcdefgh.wav", ".trash/three.wav"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no sound")
    archive = tmp_path / "train.tar"
    with tarfile.open(archive, "w") as file:
        file.add(folder, arcname=".")
    for source in (folder, archive):
        assert [len(e.raw) for e in read_examples(source, AUDIO)] == [5]
    (folder / "a.txt").write_text("seen")
    (folder / ".b.txt").write_text("not seen")
    assert list(read_documents(folder)) == ["seen"]


def test_a_member_that_claims_to_be_huge_is_refused_unread(tmp_path: Path):
    """8 GiB of a sparse file in an archive of 10 KiB."""
    member = tarfile.TarInfo("one.wav")
    member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1",
                          "GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**33),
                          "GNU.sparse.realsize": str(2**33)}  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member)
    with pytest.raises(ValueError, match=r"'one.wav' is larger than 1 GiB; cut it"):
        list(read_clips(tmp_path / "a.tar", AUDIO))


def test_an_archive_with_impossible_numbers_is_named(tmp_path: Path):
    member = tarfile.TarInfo("one.wav")
    member.pax_headers = {"GNU.sparse.major": "x", "GNU.sparse.size": "many"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member)
    with pytest.raises(ValueError, match=r"a.tar' is not a readable tar archive"):
        list(read_clips(tmp_path / "a.tar", AUDIO))


def test_linked_folders_are_followed_once(tmp_path: Path, write_sound: Write):
    """Also one that leads back to where it lies."""
    write_sound(tmp_path / "elsewhere" / "a.wav", np.zeros(5))
    write_sound(tmp_path / "clips" / "two" / "b.wav", np.zeros(6))
    (tmp_path / "clips" / "one").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "clips" / "two" / "loop").symlink_to(tmp_path / "clips")
    (tmp_path / "clips" / "a link to two").symlink_to(tmp_path / "clips" / "two")
    (tmp_path / "clips" / "two" / "all").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    found = list(read_clips(tmp_path / "clips", AUDIO))
    assert [(len(e.raw), e.label) for e in found] == [(5, "one"), (6, "two")]


def test_a_folder_that_is_not_readable_is_named(
    tmp_path: Path, write_sound: Write, monkeypatch: pytest.MonkeyPatch
):
    write_sound(tmp_path / "one" / "a.wav", np.zeros(5))
    (tmp_path / "two").mkdir()
    scan = os.scandir

    def refused(folder: Any) -> Any:
        if str(folder).endswith("two"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ValueError, match=r"the folder '.*two' is not readable: Permission denied"):
        list(read_clips(tmp_path, AUDIO))


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
        with pytest.raises(ValueError, match=f"{name}' is not a readable tar archive: [^\n]+$"):
            list(read_clips(tmp_path / name, AUDIO))


@pytest.mark.parametrize("damage", ["a header", "cut in a header", "cut before a header"])
def test_an_archive_that_ends_early_is_named(damage: str, tmp_path: Path, write_sound: Write):
    """tarfile takes a damaged header, but for the first, for the end."""
    path = tmp_path / "clips.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for i in range(4):
            name = f"one_{i}.wav"
            archive.add(write_sound(tmp_path / name, np.full(10 + i, 0.5)), name)
    whole = path.read_bytes()
    assert len(list(read_clips(path, AUDIO))) == 4
    third = whole.index(b"one_2.wav")
    changed = {
        "a header": whole[:third] + b"x" + whole[third + 1 :],
        "cut in a header": whole[: third + 100],
        "cut before a header": whole[:third],
    }
    path.write_bytes(changed[damage])
    with pytest.raises(
        ValueError, match=r"clips.tar' is not .*: it is damaged or cut .* 2 members"
    ):
        list(read_clips(path, AUDIO))


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


def test_a_split_is_found_in_its_numbered_tables(tmp_path: Path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (tmp_path / f"{name}.parquet").touch()
    found = find_split(tmp_path, "train", "text")
    assert [file.name[:11] for file in files_at(found)] == ["train-00000", "train-00001"]
    (tmp_path / "train.txt").touch()
    with pytest.raises(ValueError, match="found 2"):
        find_split(tmp_path, "train", "text")
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="holds 1 parquet files of 'train', of 2; it needs all"):
        find_split(tmp_path, "train", "text")


@pytest.mark.parametrize("stated", [0x7FFFF024, 0x80000024, 0xFFFFFFFF, "whole"])
def test_a_clip_that_was_streamed_is_whole(
    stated: int | str, tmp_path: Path, write_sound: Write
) -> None:
    file = write_sound(tmp_path / "one_a.wav", np.zeros(50))
    data = bytearray(file.read_bytes())
    size = len(data) if isinstance(stated, str) else stated
    data[4:8] = size.to_bytes(4, "little")
    file.write_bytes(data)
    assert [len(e.raw) for e in read_clips(tmp_path, AUDIO)] == [50]


def test_one_text_that_is_not_readable_is_named_with_skip_too(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match=r"a.txt' is not readable UTF-8"):
            list(read_documents(path, skip=True))
    with pytest.raises(ValueError, match="there is no file or folder"):
        list(read_documents(tmp_path / "gone.txt", skip=True))


def test_no_split_or_two_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"one file or folder named 'train' .* found 0"):
        find_split(tmp_path, "train", "text")
    (tmp_path / "train.txt").touch()
    (tmp_path / "train.txt.gz").touch()
    with pytest.raises(ValueError, match="found 2"):
        find_split(tmp_path, "train", "text")
    with pytest.raises(ValueError, match="must be a folder"):
        find_split(tmp_path / "train.txt", "train", "text")
