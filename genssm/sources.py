"""Where data comes from: a folder of one's own, or a public set by its name.

Public sets come through Hugging Face ``datasets`` (extra ``train``), which keeps them in its cache;
the spoken digits of Speech Commands equally from the folder of torchaudio's own class.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssm.codec import Audio, Codec, Image
from genssm.data import (
    Example,
    documents_of_rows,
    examples_of_rows,
    files_at,
    find_split,
    read_documents,
)
from genssm.data import read_examples as read_local

_OWN = {split: split for split in ("train", "validation", "test")}
_SPEECH_COMMANDS = "SpeechCommands/speech_commands_v0.02"  # where torchaudio's class unpacks it
_SUBSETS = {"train": "training", "validation": "validation", "test": "testing"}
SC09 = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class PublicSet:
    """A data set on the Hugging Face Hub; ``splits`` in the slicing language of ``datasets``."""

    modality: str
    repository: str
    config: str | None
    splits: dict[str, str]
    revision: str | None = None
    only: tuple[str, ...] = ()  # labels; rows of others are left out


PUBLIC = {
    "wikitext-2": PublicSet("text", "Salesforce/wikitext", "wikitext-2-raw-v1", _OWN),
    "wikitext-103": PublicSet("text", "Salesforce/wikitext", "wikitext-103-raw-v1", _OWN),
    "tinystories": PublicSet(
        "text", "roneneldan/TinyStories", None, {"train": "train", "validation": "validation"}
    ),
    "cifar10": PublicSet(
        "image", "uoft-cs/cifar10", None,
        {"train": "train[:-5000]", "validation": "train[-5000:]", "test": "test"},
    ),
    "mnist": PublicSet(
        "image", "ylecun/mnist", None,
        {"train": "train[:-5000]", "validation": "train[-5000:]", "test": "test"},
    ),
    "sc09": PublicSet(
        "audio", "google/speech_commands", "v0.02", _OWN, "refs/convert/parquet", SC09
    ),
    "ljspeech": PublicSet(
        "audio", "keithito/lj_speech", None,
        {"train": "train[:-500]", "validation": "train[-500:]"}, "refs/convert/parquet",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """One split of a data set: a local file or folder, or the part ``name`` of a public set.

    With both, the public set is read from where torchaudio's class keeps it.
    """

    path: Path | None = None
    public: str | None = None
    name: str = ""

    def examples(self, codec: Codec, skip: bool = False) -> Iterator[Example]:
        """The examples, in a fixed order; ``skip``: leave out what is not readable."""
        if self.path is not None and self.public is None:
            yield from read_local(self.path, codec, skip)
        elif isinstance(codec, Image | Audio):
            yield from examples_of_rows(self._rows(), codec, skip)
        else:
            yield from map(Example, self.documents(skip))

    def documents(self, skip: bool = False) -> Iterator[str]:
        """The documents of a text."""
        if self.path is not None:
            return read_documents(self.path, skip)
        return documents_of_rows(row.get("text") for row in self._rows())

    def fingerprint(self) -> bytes:
        """Changes with the name, size or date of any source file, or with the public set."""
        if self.path is None:
            return f"{self.public} {self.name} {self._set}".encode()
        digest = hashlib.sha256()
        for file in files_at(self.path):
            facts, name = file.stat(), file.relative_to(self.path.parent).as_posix()
            digest.update(f"{name} {facts.st_size} {facts.st_mtime_ns}".encode())
        return digest.digest()

    @property
    def _set(self) -> PublicSet:
        return PUBLIC[self.public or ""]

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Rows as in a parquet file: files as bytes, labels by name."""
        path, only = self.path, self._set.only
        rows = self._fetched_rows() if path is None else _rows_of_torchaudio(path, self.name, only)
        return (row for row in rows if not only or row.get("label") in only)

    def _fetched_rows(self) -> Iterator[dict[str, Any]]:
        table = _load(self._set, self.name)
        for column, feature in table.features.items():
            if hasattr(feature, "decode") and hasattr(feature, "decode_example"):
                table = table.cast_column(column, type(feature)(decode=False))
        names = getattr(table.features.get("label"), "names", None)
        for row in table:
            if names and isinstance(row["label"], int):
                row["label"] = names[row["label"]] if row["label"] >= 0 else None
            yield row


def _rows_of_torchaudio(root: Path, split: str, only: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Clips of the words ``only`` that torchaudio's class counts to a split."""
    from torchaudio.datasets import SPEECHCOMMANDS

    try:
        clips = SPEECHCOMMANDS(root, subset=_SUBSETS[split])
    except OSError as error:
        raise ValueError(
            f"Speech Commands in {str(root)!r} has no list of a split: {error}"
        ) from error
    for name, _, word, _, _ in map(clips.get_metadata, range(len(clips))):
        if word in only:
            file = (root / _SPEECH_COMMANDS).parent / name
            data = file.read_bytes() if file.exists() else b""  # listed, and not there
            yield {"audio": {"bytes": data, "path": name}, "label": word}


def _load(chosen: PublicSet, split: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            'public data sets need the package datasets; pip install "genssm[train]", or give a '
            "folder of your own"
        ) from error
    try:
        return datasets.load_dataset(
            chosen.repository, chosen.config, split=chosen.splits[split], revision=chosen.revision
        )
    except KeyError as error:
        raise ValueError(
            f"{chosen.repository} has no split {split!r}; known: {', '.join(chosen.splits)}"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"could not fetch {chosen.repository!r}: {error}") from error


def open_split(data: Path, split: str, modality: str) -> Split:
    """A split of a folder, or of the public set of this name where there is no such folder.

    A folder in which torchaudio's SPEECHCOMMANDS has put the set is the public set "sc09".
    Raises ValueError if there is neither, or it is of another modality.
    """
    name, folder = str(data), None
    if (data / _SPEECH_COMMANDS).is_dir():
        name, folder = "sc09", data
    elif data.exists() or name not in PUBLIC:
        if not data.exists():
            raise ValueError(
                f"there is no folder {name!r}, and it is no public set; known: {', '.join(PUBLIC)}"
            )
        return Split(find_split(data, split, modality))
    if PUBLIC[name].modality != modality:
        raise ValueError(f"{name} is {PUBLIC[name].modality}, the recipe is for {modality}")
    return Split(folder, name, split)


def comes_in_splits(data: Path) -> bool:
    """Whether ``open_split`` finds training and validation data apart."""
    if not data.exists():
        return str(data) in PUBLIC
    names = [re.split(r"\.|-\d+-of-", file.name)[0] for file in data.glob("*")]
    return {"train", "validation"} <= {*names} or (data / _SPEECH_COMMANDS).is_dir()


def read_examples(data: Path, codec: Codec) -> Iterator[Example]:
    """The examples of a file or folder, or of a part of a public set: "wikitext-2:train".

    Of data that comes in splits, if none is named, those of validation.
    """
    whole, split = _part(data)
    if split is None:
        return read_local(data, codec)
    return open_split(whole, split, codec.modality).examples(codec)


def split_of(data: Path) -> str | None:
    """The split that ``read_examples`` takes; None for data that does not come in splits."""
    return _part(data)[1]


def _part(data: Path) -> tuple[Path, str | None]:
    """A folder or public set, and which of its splits; "SET:SPLIT" names one."""
    if comes_in_splits(data):
        return data, "validation"
    name, _, split = str(data).rpartition(":")
    if not name or data.exists() or not comes_in_splits(Path(name)):
        return data, None
    return Path(name), split or "validation"
