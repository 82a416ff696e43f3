"""Public sets by name, from local files in their formats, and files that are not readable."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genssm import sources
from genssm.codec import Audio, Image, Text
from genssm.data import Example, documents_of_rows, read_documents, read_examples, read_rows
from genssm.preparation import prepare
from genssm.recipes import RECIPES
from genssm.sources import PUBLIC, PublicSet, Split, comes_in_splits, open_split

IMAGE = Image(4, 4, 3, labels=("cat", "dog"))
AUDIO = Audio(8000, labels=("one", "two"))
LINES = [
    "",
    " = One = \n",
    "\n",
    "first\n",
    " = = part = = \n",
    "more\n",
    " = Two = \n",
    "second\n",
]
ARTICLES = ["".join(LINES[1:6]), "".join(LINES[6:])]


def write_table(path: Path, columns: dict[str, list[Any]], names: list[str] | None = None) -> Path:
    """A parquet file, with the names of its labels as ``datasets`` stores them."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(columns)
    if names:
        facts = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(facts)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)
    return path


@pytest.fixture
def cells(tmp_path: Path, write_picture: Callable[..., Path], write_sound: Callable[..., Path]):
    """(modality, n) → cells {"bytes", "path"} of n files, the i-th of one value, and their raws."""

    def make(modality: str, n: int) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
        made, raws = [], []
        for i in range(n):
            if modality == "image":
                raws.append(np.full((4, 4, 3), 40 * i, np.uint8))
                file = write_picture(tmp_path / "files" / f"{i}.png", raws[-1])
            else:
                raws.append(np.full(50 + i, i / 8, np.float32))
                file = write_sound(tmp_path / "files" / f"{i}.wav", raws[-1])
            made.append({"bytes": file.read_bytes(), "path": file.name})
        return made, raws

    return make


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make a local parquet file of each split the public set of a name, read by ``datasets``."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load = datasets.load_dataset

    def make(name: str, files: dict[str, Path], **settings: Any) -> None:
        paths = {split: str(file) for split, file in files.items()}
        monkeypatch.setattr(
            datasets, "load_dataset",
            lambda repository, config, split, revision: load(
                "parquet", data_files=paths, split=split, cache_dir=str(tmp_path / "cache")
            ),
        )  # fmt: skip
        splits = {split: split for split in files}
        entry = PublicSet(settings.pop("modality"), "owner/name", None, splits, **settings)
        monkeypatch.setitem(PUBLIC, name, entry)

    return make


def assert_same_examples(actual: list[Example], raws: list[np.ndarray], labels: list) -> None:
    assert [e.label for e in actual] == labels
    for example, raw in zip(actual, raws, strict=True):
        np.testing.assert_allclose(example.raw, raw, atol=1e-4)


@pytest.mark.parametrize(("codec", "column"), [(IMAGE, "image"), (IMAGE, "img"), (AUDIO, "audio")])
@pytest.mark.parametrize("named", [True, False])
def test_parquet_files_are_read_as_the_files_inside_them(
    codec: Image | Audio, column: str, named: bool, cells, tmp_path: Path
):
    """Labels by the names in the file, in any order, or else as numbers of the codec's labels."""
    made, raws = cells(codec.modality, 4)
    names = [codec.labels[1], "other", codec.labels[0]] if named else None
    labels = ([0, 2], [1, 0]) if named else ([1, 0], [7, 1])
    for i, (part, own) in enumerate(zip((made[:2], made[2:]), labels, strict=True)):
        write_table(tmp_path / "t" / f"{i}.parquet", {column: part, "label": own}, names)
    first, second = codec.labels
    expected = [second, first, None, second]
    assert_same_examples(list(read_examples(tmp_path / "t", codec)), raws, expected)
    alone = list(read_examples(tmp_path / "t" / "0.parquet", codec))
    assert_same_examples(alone, raws[:2], expected[:2])


def test_a_row_without_a_label_has_none(cells, tmp_path: Path):
    """As ``datasets`` writes it, -1: not the last of the names."""
    made, raws = cells("image", 2)
    table = write_table(tmp_path / "t.parquet", {"image": made, "label": [1, -1]}, ["cat", "dog"])
    assert_same_examples(list(read_examples(table, IMAGE)), raws, ["dog", None])


@pytest.mark.parametrize(
    ("rows", "documents"),
    [
        (LINES, ARTICLES),
        (["a story .\n\nIts end", "", "another"], ["a story .\n\nIts end", "another"]),
        ([], []),
        (["", " "], []),
    ],
)
def test_rows_of_text_are_lines_of_wikitext_or_documents(rows: list[str], documents: list[str]):
    assert list(documents_of_rows(iter(rows))) == documents


@pytest.mark.parametrize(
    "metadata",
    [
        b"[" * 5000,
        b"\xff",
        b"[]",
        b'{"info": 1}',
        b'{"info": {"features": {"label": 2}}}',
        b'{"info": {"features": {"label": {"names": 7}}}}',
        b'{"info": {"features": {"label": {"names": [1, 2]}}}}',
    ],
)
def test_a_table_without_sensible_names_has_none(metadata: bytes, tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["a"], "label": [0]})
    parquet.write_table(
        table.replace_schema_metadata({b"huggingface": metadata}), tmp_path / "a.parquet"
    )
    assert list(read_rows(tmp_path / "a.parquet")) == [{"text": "a", "label": 0}]


def test_a_table_of_other_things_than_bytes_is_told(tmp_path: Path):
    table = write_table(tmp_path / "a.parquet", {"audio": [{"bytes": "text", "path": "a.wav"}]})
    with pytest.raises(ValueError, match=r"a\.wav has no bytes in a column 'audio'"):
        list(read_examples(table, AUDIO))


def test_parquet_text_is_read_as_the_text_file(tmp_path: Path):
    (tmp_path / "text.txt").write_text("".join(LINES))
    table = write_table(tmp_path / "text.parquet", {"text": LINES})
    assert list(read_documents(table)) == list(read_documents(tmp_path / "text.txt")) == ARTICLES
    assert open_split(tmp_path_with(table, tmp_path), "train", "text").path is not None
    other = write_table(tmp_path / "other.parquet", {"body": ["x"]})
    with pytest.raises(ValueError, match='needs a column "text"'):
        list(read_documents(other))


def test_an_article_goes_on_in_the_next_table(tmp_path: Path):
    """Tables named as the Hub names its own; cut within the first article."""
    for split in ("train", "validation"):
        for i, part in enumerate((LINES[:4], LINES[4:])):
            write_table(tmp_path / f"{split}-0000{i}-of-00002.parquet", {"text": part})
    split = open_split(tmp_path, "train", "text")
    assert list(split.documents()) == ARTICLES
    assert comes_in_splits(tmp_path)
    before = split.fingerprint()
    write_table(tmp_path / "train-00001-of-00002.parquet", {"text": LINES})
    assert split.fingerprint() != before


@pytest.mark.parametrize("skip", [False, True])
def test_a_damaged_table_among_others_is_fatal_or_left_out(skip: bool, cells, tmp_path: Path):
    made, raws = cells("image", 3)
    for i, cell in enumerate(made):
        write_table(tmp_path / "t" / f"{i}.parquet", {"image": [cell], "label": [0]})
    (tmp_path / "t" / "1.parquet").write_bytes(b"PAR1 and no more")
    found = read_examples(tmp_path / "t", IMAGE, skip)
    if skip:
        with pytest.warns(UserWarning, match=r"left out: .*1.parquet' is not a readable"):
            assert_same_examples(list(found), [raws[0], raws[2]], ["cat", "cat"])
    else:
        with pytest.raises(ValueError, match=r"1.parquet' is not a readable"):
            list(found)


def test_a_table_of_other_columns_among_texts_is_fatal_or_left_out(tmp_path: Path):
    for i, columns in enumerate(({"text": ["a", "b"]}, {"body": ["c"]}, {"text": ["d"]})):
        write_table(tmp_path / "t" / f"{i}.parquet", columns)
    with pytest.raises(ValueError, match='needs a column "text"'):
        list(read_documents(tmp_path / "t"))
    with pytest.warns(UserWarning, match='left out: .*needs a column "text"'):
        assert list(read_documents(tmp_path / "t", skip=True)) == ["a", "b", "d"]


def test_examples_of_no_known_class_are_told(tmp_path: Path, write_picture: Callable[..., Path]):
    for i, folder in enumerate(("0", "1", "zero", "one", "2")):
        for split in ("train", "validation"):
            file = tmp_path / "data" / split / folder / f"{i}.png"
            write_picture(file, np.full((28, 28), i, np.uint8))
    recipe = RECIPES["mnist"].changed({"batch_size": 2})
    with pytest.warns(UserWarning, match="2 of 5 examples are of no class that the model knows"):
        prepare(recipe, tmp_path / "data", tmp_path / "out", None)


def test_an_array_without_its_labels_is_told(tmp_path: Path):
    for split in ("train", "validation"):
        np.save(tmp_path / f"{split}.npy", np.zeros((4, 28, 28), np.uint8))
    recipe = RECIPES["mnist"].changed({"batch_size": 2})
    with pytest.warns(UserWarning, match="4 of 4 examples are of no class that the model knows"):
        prepare(recipe, tmp_path, tmp_path / "out", None)


@pytest.mark.parametrize("limit", [3, 4, 5, 7, 8, 20])
def test_the_validation_subset_is_spread_over_the_whole(limit: int, tmp_path: Path):
    """The first is of the beginning, the last of the end, however many there are."""
    for split in ("train", "validation"):
        pictures = np.arange(8, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
        np.save(tmp_path / f"{split}.npy", pictures)
        np.save(tmp_path / f"{split}_labels.npy", np.arange(8))
    recipe = RECIPES["mnist"].changed({"batch_size": 2})
    chosen = prepare(recipe, tmp_path, tmp_path / "out", None, validation_limit=limit).validation
    found = [int(example.raw[0, 0, 0]) for example in chosen]
    assert len(set(found)) == len(found) == min(limit, 8)
    assert found[0] == 0
    assert np.diff([*found, 8]).max() <= -(-8 // len(found))


def test_a_wave_in_a_table_that_is_cut_short_is_named(cells, tmp_path: Path):
    made, _ = cells("audio", 2)
    made[1]["bytes"] = made[1]["bytes"][:-40]
    table = write_table(tmp_path / "t.parquet", {"audio": made, "label": [0, 1]}, ["one", "two"])
    with pytest.raises(ValueError, match=r"1.wav' is cut short: its header tells of more samples"):
        list(read_examples(table, AUDIO))


def tmp_path_with(table: Path, folder: Path) -> Path:
    (folder / "data").mkdir()
    (folder / "data" / "train.parquet").write_bytes(table.read_bytes())
    return folder / "data"


def test_public_pictures_and_sounds_come_by_name(cells, publish, tmp_path: Path):
    made, raws = cells("audio", 4)
    table = write_table(
        tmp_path / "a.parquet", {"audio": made, "label": [0, 1, 2, 0]}, ["two", "stop", "one"]
    )
    publish("sc09", {"train": table}, modality="audio", only=("one", "two"))
    split = open_split(Path("sc09"), "train", "audio")
    actual = list(split.examples(AUDIO))
    assert_same_examples(actual, [raws[0], raws[2], raws[3]], ["two", "one", "two"])
    assert_same_examples(list(sources.read_examples(Path("sc09:train"), AUDIO)),
                         [e.raw for e in actual], [e.label for e in actual])  # fmt: skip
    with pytest.raises(ValueError, match="has no split 'validation'; known: train"):
        list(open_split(Path("sc09"), "validation", "audio").examples(AUDIO))
    with pytest.raises(ValueError, match="sc09 is audio, the recipe is for image"):
        open_split(Path("sc09"), "train", "image")


@pytest.fixture
def commands(tmp_path: Path, write_sound: Callable[..., Path]) -> Path:
    """Speech Commands where torchaudio's class unpacks it: one, two and yes by three speakers."""
    root = tmp_path / "downloads"
    folder = root / "SpeechCommands" / "speech_commands_v0.02"
    for speaker in range(3):
        for i, word in enumerate(("one", "two", "yes")):
            name = f"{word}/0{speaker}ab_nohash_0.wav"
            write_sound(folder / name, np.full(40 + 10 * speaker, i / 8, np.float32))
    write_sound(folder / "_background_noise_" / "tap.wav", np.zeros(400, np.float32))
    for split, speaker in (("validation", 1), ("testing", 2)):
        listed = [f"{word}/0{speaker}ab_nohash_0.wav\n" for word in ("two", "yes", "one")]
        (folder / f"{split}_list.txt").write_text("".join(listed))
    return root


def test_digits_are_read_where_torchaudios_class_unpacked_them(commands: Path):
    """Its splits, by its lists; other words and the noises are left out."""
    for split, labels, length in (("train", ["one", "two"], 40), ("validation", ["two", "one"], 50),
                                  ("test", ["two", "one"], 60)):  # fmt: skip
        examples = list(open_split(commands, split, "audio").examples(AUDIO))
        values = {"one": 0.0, "two": 1 / 8}
        assert_same_examples(examples, [np.full(length, values[word]) for word in labels], labels)
        named = sources.read_examples(Path(f"{commands}:{split}"), AUDIO)
        assert [e.label for e in named] == labels
    assert [e.label for e in sources.read_examples(commands, AUDIO)] == ["two", "one"]
    with pytest.raises(ValueError, match="sc09 is audio, the recipe is for text"):
        open_split(commands, "train", "text")


def test_the_recipe_sc09_reads_them(commands: Path, tmp_path: Path):
    recipe = RECIPES["sc09"].changed({"batch_size": 2, "length": 128})
    prepared = prepare(recipe, commands, tmp_path / "out", None)
    assert [e.label for e in prepared.validation] == ["two", "one"]
    assert len(prepared.validation[0].raw) == 50 * 2  # of 8 kHz files, at 16 kHz
    starts = {int(row[0]) for step in range(20) for row in prepared.batch(step).tokens}
    assert starts == {prepared.codec.start(label) for label in ("any", "one", "two")}


def test_the_recipe_mnist_reads_its_table(tmp_path: Path, write_picture: Callable[..., Path]):
    """Grey pictures and classes by name, as in the public set."""
    pictures = [np.full((28, 28), 20 * i, np.uint8) for i in range(10)]
    files = [write_picture(tmp_path / f"{i}.png", p) for i, p in enumerate(pictures)]
    cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    digits = [str(i) for i in range(10)]
    for split in ("train", "validation"):
        table = {"image": cells, "label": list(range(10))}
        write_table(tmp_path / "mnist" / f"{split}.parquet", table, digits)
    prepared = prepare(RECIPES["mnist"], tmp_path / "mnist", tmp_path / "out", None)
    assert [e.label for e in prepared.validation] == digits
    tokens = prepared.batch(0).tokens
    assert tokens.shape == (8, 785)
    for row in tokens:
        label = prepared.codec.label_of(int(row[0]))
        assert label is None or int(row[1]) == 20 * int(label)


def test_what_is_listed_and_missing_is_fatal_or_left_out(commands: Path):
    folder = commands / "SpeechCommands" / "speech_commands_v0.02"
    (folder / "two" / "01ab_nohash_0.wav").unlink()
    split = open_split(commands, "validation", "audio")
    with pytest.raises(ValueError, match=r"two/01ab_nohash_0.wav has no bytes"):
        list(split.examples(AUDIO))
    with pytest.warns(UserWarning, match="left out: .*two/01ab_nohash_0.wav"):
        assert [e.label for e in split.examples(AUDIO, skip=True)] == ["one"]
    (folder / "validation_list.txt").unlink()
    with pytest.raises(ValueError, match=r"has no list of a split: .*validation_list.txt"):
        list(split.examples(AUDIO))


def test_what_comes_in_splits_is_known(commands: Path, tmp_path: Path):
    (tmp_path / "own" / "train").mkdir(parents=True)
    assert not comes_in_splits(tmp_path / "own")
    (tmp_path / "own" / "validation.tar").touch()
    for data in (commands, tmp_path / "own", Path("sc09")):
        assert comes_in_splits(data)
    for data in (tmp_path, tmp_path / "own" / "validation.tar", Path("sc90")):
        assert not comes_in_splits(data)


def test_of_a_folder_of_splits_validation_is_measured_unless_another_is_named(
    tmp_path: Path, text_codec: Text, monkeypatch: pytest.MonkeyPatch
):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text(split)
    for name, raw in (("", "validation"), (":train", "train"), ("/train.txt", "train")):
        data = Path(f"{tmp_path}{name}")
        assert [e.raw for e in sources.read_examples(data, text_codec)] == [raw]
        assert sources.split_of(data) == (None if "/train.txt" in name else raw)
    assert sources.split_of(Path(f"{tmp_path}:")) == "validation"
    assert sources.split_of(Path("wikitext-2:")) == "validation"
    monkeypatch.chdir(tmp_path)
    assert sources.split_of(Path("train")) is None
    with pytest.raises(ValueError, match="there is no file or folder 'nowhere'"):
        sources.read_examples(Path("nowhere"), text_codec)
    (tmp_path / "validation.txt").unlink()
    assert [e.raw for e in sources.read_examples(tmp_path, text_codec)] == ["train"]


def test_public_text_comes_by_name_and_is_identified(publish, tmp_path: Path, text_codec: Text):
    publish("wikitext-2", {"train": write_table(tmp_path / "t.parquet", {"text": LINES})},
            modality="text")  # fmt: skip
    split = open_split(Path("wikitext-2"), "train", "text")
    assert list(split.documents()) == ARTICLES
    assert [e.raw for e in split.examples(text_codec)] == ARTICLES
    assert split.fingerprint() != open_split(Path("wikitext-103"), "train", "text").fingerprint()


def test_a_folder_wins_over_a_public_set_and_unknown_names_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no folder 'mnits', and it is no public set; known: wiki"):
        open_split(Path("mnits"), "train", "image")
    (tmp_path / "mnist" / "train").mkdir(parents=True)
    assert open_split(Path("mnist"), "train", "image") == Split(Path("mnist/train"))


def test_files_are_identified_by_name_size_and_date(tmp_path: Path):
    (tmp_path / "train.txt").write_text("abc")
    split = open_split(tmp_path, "train", "text")
    before = split.fingerprint()
    assert split.fingerprint() == before
    (tmp_path / "train.txt").write_text("abcd")
    assert split.fingerprint() != before


def test_a_class_folder_of_another_name_is_another_source(tmp_path: Path):
    """The token cache holds the labels."""
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.wav").write_bytes(b"sound")
    split = open_split(tmp_path, "train", "audio")
    before = split.fingerprint()
    (tmp_path / "train" / "cat").rename(tmp_path / "train" / "dog")
    assert split.fingerprint() != before


def test_what_is_not_readable_is_fatal_or_left_out_as_asked(
    cells, tmp_path: Path, write_sound: Callable[..., Path]
):
    folder = tmp_path / "clips"
    for i in range(3):
        write_sound(folder / f"one_{i}.wav", np.zeros(40, np.float32))
    (folder / "one_1.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"one_1.wav' is not a readable sound file"):
        list(read_examples(folder, AUDIO))
    with pytest.warns(UserWarning, match=r"left out: .*one_1.wav' is not a readable sound file"):
        assert len(list(read_examples(folder, AUDIO, skip=True))) == 2
    made, _ = cells("image", 3)
    made[1]["bytes"] = made[1]["bytes"][:20]
    table = write_table(tmp_path / "t.parquet", {"image": [*made, None]})
    with pytest.warns(UserWarning, match="left out") as warned:
        assert len(list(read_examples(table, IMAGE, skip=True))) == 2
    assert len(warned) == 2
    table.write_bytes(table.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"t.parquet' is not a readable parquet file"):
        list(read_examples(table, IMAGE))
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("fine")
    (texts / "b.txt").write_bytes(b"\xff\xfe not utf-8 \xff")
    with pytest.raises(ValueError, match=r"b.txt' is not readable UTF-8"):
        list(read_documents(texts))
    with pytest.warns(UserWarning, match=r"b.txt"):
        assert list(read_documents(texts, skip=True)) == ["fine"]
