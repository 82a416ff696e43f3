"""Data sets: files and folders to raw examples."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from tokenize import TokenError
from typing import IO, Any, BinaryIO, NoReturn, TypeVar, cast
from zipfile import BadZipFile

import numpy as np

from genssm.codec import Audio, Codec, Image, Raw

T = TypeVar("T")

_OPENERS: dict[str, Callable[..., Any]] = {
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".gz": gzip.open,
}
# A document begins at a title line " = Title = " (WikiText) or after <|endoftext|>.
_DOCUMENT = re.compile(r"(?m)^(?= = [^=\n](?:.*[^=\n])? = $)|^<\|endoftext\|>\n?")
# Of PIL; not EPS, for which it would start a program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PARQUET = ".parquet"
_DAMAGES = (tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error)  # of a file or archive
LARGEST_FILE = 2**30  # bytes of a picture or sound file
LONGEST_SOUND = 2**27  # samples over all channels that a sound file may decode to
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")


@dataclass(frozen=True)
class Example:
    """One document, picture or clip; ``label`` names its class where one is known."""

    raw: Raw
    label: str | None = None


def read_examples(path: Path, codec: Codec, skip: bool = False) -> Iterator[Example]:
    """The examples at ``path`` in the modality of ``codec``, in a fixed order.

    A picture or sound that is not readable raises ValueError, which names it; with ``skip`` it is
    left out, and a warning names it.
    """
    readers: dict[str, Callable[[], Iterator[Example]]] = {
        "text": lambda: (Example(text) for text in read_documents(path, skip)),
        "image": lambda: read_pictures(path, codec, skip),  # type: ignore[arg-type]
        "audio": lambda: read_clips(path, codec, skip),  # type: ignore[arg-type]
    }
    if not path.exists() and not files_at(path):
        raise ValueError(f"there is no file or folder {str(path)!r}")
    return readers[codec.modality]()


def files_at(path: Path) -> list[Path]:
    """The file at ``path``, the files of the folder, or those of a pattern, by name."""
    if path.is_dir():
        return [file for file in _names_in(path) if file.is_file()]
    return [path] if path.is_file() else sorted(path.parent.glob(path.name))


def _hidden(name: str) -> bool:
    """Whether a name begins with a dot, as of what systems and writers keep beside the data."""
    return name.startswith(".")


def _unreadable(error: OSError) -> NoReturn:
    raise ValueError(f"the folder {error.filename!r} is not readable: {error.strerror}") from error


def _names_in(folder: Path) -> list[Path]:
    """All that is in a folder, and in those that are linked in it, but folders and the hidden.

    A link into what is read anyway, or to what holds it, is not followed: nothing is read twice.
    """
    found, known = [], [folder.resolve()]
    for root, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        shown = sorted(name for name in folders if not _hidden(name))
        folders[:] = []
        for path in (Path(root, name) for name in shown):
            place = path.resolve()
            if path.is_symlink():
                if any(p.is_relative_to(place) or place.is_relative_to(p) for p in known):
                    continue
                known.append(place)
            folders.append(path.name)
        found += [Path(root, name) for name in files if not _hidden(name)]
    return sorted(found)


def read_documents(path: Path, skip: bool = False) -> Iterator[str]:
    """Documents of a UTF-8 text file (also .bz2, .xz, .gz) or a parquet file with a column "text".

    Of a folder, those of all text files, then those of the parquet files: one table, in which a
    document may go on from file to file. With ``skip`` files that are not readable are left out.
    """
    found = files_at(path)
    tables = [file for file in found if _is_table(file)]
    files = [file for file in found if not _is_table(file)]
    if path.is_dir():
        files = [file for file in files if ".txt" in map(str.lower, file.suffixes)]
        if not files and not tables:
            raise ValueError(f"the folder {str(path)!r} holds no .txt file")
    if not files and not tables:
        raise ValueError(f"there is no file or folder {str(path)!r}")
    skip = skip and len(files) + len(tables) > 1  # nothing would be left of one
    for documents in _readable((partial(_documents, file) for file in files), skip):
        yield from documents
    yield from documents_of_rows(_rows(tables, skip, _texts))


def _texts(table: Path) -> Iterator[str]:
    return map(_text, (row.get("text") for row in read_rows(table)))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError('a table of text needs a column "text" of strings')
    return value


def _documents(path: Path) -> list[str]:
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            text = file.read().decode()
    except (*_DAMAGES, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not readable UTF-8 text: {error}") from error
    return list(_split(text))


def _split(text: str) -> Iterator[str]:
    start = 0
    for match in _DOCUMENT.finditer(text):
        if text[start : match.start()].strip():
            yield text[start : match.start()]
        start = match.end()
    if text[start:].strip():
        yield text[start:]


def documents_of_rows(rows: Iterable[Any]) -> Iterator[str]:
    """Each row a document; or, where the first begins one in WikiText's form, each row a line.

    Of those an empty row is a line that was blank, " \\n" in WikiText's own files.
    """
    lines: list[str] | None = None
    rows = map(_text, rows)
    for row in rows:
        if lines is None and row.strip():
            lines = [] if _DOCUMENT.match(row) else None
            if lines is None:
                yield from (r for r in chain([row], rows) if r.strip())
                return
        if lines is not None:
            if _DOCUMENT.match(row):
                yield from _split("".join(lines))
                lines = []
            lines.append(row or " \n")
    yield from _split("".join(lines or []))


def read_pictures(path: Path, codec: Image, skip: bool = False) -> Iterator[Example]:
    """Pictures of a .npy file of uint8 (n, H, W[, C]), of a folder or tar of picture files, or of
    parquet files with a column "image" or "img".

    Labels: ``<name>_labels.npy`` beside a .npy file, the nearest folder with the name of one for
    picture files, the column "label" of a parquet file.
    """
    if path.suffix == ".npy":
        array, labels = open_picture_array(path, codec)
        for i in range(len(array)):
            yield Example(
                codec.array(array[i]), None if labels is None else codec.labels[labels[i]]
            )
        return
    if tables := _tables(path):
        yield from examples_of_rows(_rows(tables, skip), codec, skip)
        return

    def read(name: PurePosixPath, load: Callable[[], bytes]) -> Example:
        return Example(_fitting_picture(load(), codec, str(name)), _folder_label(name, codec))

    yield from _readable((partial(read, *member) for member in _members(path, PICTURES)), skip)


def _folder_label(name: PurePosixPath, codec: Codec) -> str | None:
    return next((folder.name for folder in name.parents if folder.name in codec.labels), None)


def _fitting_picture(data: bytes, codec: Image, name: str) -> np.ndarray:
    picture = read_picture(io.BytesIO(data), codec, name)
    if picture.shape != codec.shape:
        raise ValueError(
            f"{name!r} is {picture.shape}, the model takes {codec.shape}; scale it first"
        )
    return picture


def open_picture_array(path: Path, codec: Image) -> tuple[np.ndarray, np.ndarray | None]:
    """A memory-mapped uint8 array (n, H, W[, C]) and, if the codec has classes, labels (n,)."""
    array = _array(path)
    beside = path.with_name(f"{path.stem}_labels.npy")
    labels = _array(beside) if beside.exists() and codec.labels else None
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise ValueError(
            f"pictures must be uint8 of shape (n, H, W, C), got {array.dtype} {array.shape}"
        )
    if labels is not None:
        if labels.shape != (len(array),):
            raise ValueError(f"{len(array)} pictures but labels {labels.shape} in {str(beside)!r}")
        classes = len(codec.labels)
        if not np.issubdtype(labels.dtype, np.integer) or (
            len(labels) and not 0 <= labels.min() <= labels.max() < classes
        ):
            raise ValueError(f"labels must be integers in 0 … {classes - 1} in {str(beside)!r}")
    return array, labels


def _array(path: Path) -> np.ndarray:
    """A memory-mapped .npy file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (
        OSError, ValueError, EOFError, SyntaxError, TokenError, BadZipFile, OverflowError,
    ) as error:  # fmt: skip
        raise ValueError(f"{str(path)!r} is not a readable .npy array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{str(path)!r} is not a readable .npy array but an archive of several")
    return array


def read_picture(file: IO[bytes], codec: Image, name: str) -> np.ndarray:
    """Decode a picture file to uint8 (h, w, channels of the codec), whatever its size."""
    import PIL.Image

    try:
        with PIL.Image.open(file, formats=FORMATS) as picture:
            large = picture.width * picture.height > 50_000_000
            array = None if large else pixels(picture, codec)
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{name!r} is not a readable picture; give a PNG or JPEG") from error
    if array is None:
        raise ValueError(f"the picture {name!r} is larger than 50 million pixels; scale it down")
    return array


def pixels(picture: Any, codec: Image) -> np.ndarray:
    """A picture of PIL, upright, as uint8 (h, w, channels); what is transparent is white."""
    import PIL.Image
    import PIL.ImageOps

    picture = PIL.ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits, which convert would cut off at 255
        values = np.asarray(picture)
        picture = PIL.Image.fromarray((values // values.dtype.type(257)).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
    array = np.asarray(picture.convert("RGB" if codec.shape[2] == 3 else "L"))
    return array if array.ndim == 3 else array[..., None]


def read_clips(path: Path, codec: Audio, skip: bool = False) -> Iterator[Example]:
    """Clips of one sound file, of a folder or tar of sound files, or of parquet files with a column
    "audio", at the rate of the codec.

    Labels: the nearest folder with the name of one, or else as much of the file name, up to a "_",
    as is a label ("7_jackson_12" is one of "7_jackson", or else of "7"; the first in a folder "7",
    too); the column "label" of a parquet file.
    """
    if tables := _tables(path):
        yield from examples_of_rows(_rows(tables, skip), codec, skip)
        return

    def read(name: PurePosixPath, load: Callable[[], bytes]) -> Example:
        return Example(read_sound(io.BytesIO(load()), codec, str(name)), _sound_label(name, codec))

    yield from _readable((partial(read, *member) for member in _members(path, SOUNDS)), skip)


def _sound_label(name: PurePosixPath, codec: Codec) -> str | None:
    parts, folder = name.stem.split("_"), _folder_label(name, codec)
    candidates = ("_".join(parts[:n]) for n in range(len(parts), 0, -1))
    own = next((c for c in candidates if c in codec.labels), None)
    return folder if folder and (own is None or codec.broader(own) != folder) else own


def is_cut_short(file: IO[bytes]) -> bool:
    """Whether this is the beginning of a WAV file.

    One that was streamed states no length but 2^31 or 2^32, about; some state 8 bytes too many.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(8)
    stated = int.from_bytes(head[4:], "little")
    return head[:4] == b"RIFF" and stated < 2**31 - 2**16 and size < stated


def read_sound(file: IO[bytes], codec: Audio, name: str) -> np.ndarray:
    """Decode a sound file to float32 mono (samples,) at the rate of the codec.

    Raises ValueError for one that is not readable, too long, or cut short.
    """
    import soundfile

    try:
        with soundfile.SoundFile(cast(BinaryIO, file)) as sound:
            if sound.frames * sound.channels > LONGEST_SOUND:
                raise ValueError(
                    f"the sound {name!r} is longer than {LONGEST_SOUND:,} samples; cut it"
                )
            wave = sound.read(dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{name!r} is not a readable sound file") from error
    if is_cut_short(file):
        raise ValueError(f"{name!r} is cut short: its header tells of more samples")
    try:
        return codec.waveform(wave, sound.samplerate)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error


def _tables(path: Path) -> list[Path]:
    """The parquet files at ``path``, by name."""
    return [file for file in files_at(path) if _is_table(file)]


def _is_table(file: Path) -> bool:
    return file.suffix.lower() == PARQUET


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file; "label" is a name where the file has names (as ``datasets``
    writes them).

    Raises ValueError if it is damaged, or where pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            'parquet files need pyarrow; pip install "genssm[train]", or unpack them'
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = _label_names((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            for batch in file.iter_batches(256):
                for row in batch.to_pylist():
                    if names and isinstance(number := row.get("label"), int):
                        row["label"] = names[number] if number >= 0 else None
                    yield row
    except (pyarrow.ArrowException, OSError, ValueError, IndexError) as error:
        raise ValueError(f"{str(path)!r} is not a readable parquet file: {error}") from error


def _label_names(metadata: bytes) -> list[str] | None:
    """The names of the classes by number, as ``datasets`` keeps them in a file; None without."""
    try:
        names = json.loads(metadata)["info"]["features"]["label"]["names"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if known else None


def _rows(
    tables: Iterable[Path], skip: bool, read: Callable[[Path], Iterator[T]] = read_rows
) -> Iterator[T]:
    """The rows of parquet files, with ``skip`` without what is not readable of them."""
    for table in tables:
        try:
            yield from read(table)
        except ValueError as error:
            if not skip:
                raise
            warnings.warn(f"left out: {error}", stacklevel=2)


def examples_of_rows(
    rows: Iterable[dict[str, Any]], codec: Image | Audio, skip: bool = False
) -> Iterator[Example]:
    """Examples of rows with a column "image", "img" or "audio" of {"bytes", "path"}.

    A label that is a number without a name counts the labels of the codec; one that the codec does
    not know counts as none.
    """
    column = ("image", "img") if isinstance(codec, Image) else ("audio",)

    def read(number: int, row: dict[str, Any]) -> Example:
        cell = next((row[name] for name in column if row.get(name) is not None), None)
        known: dict[str, Any] = cell if isinstance(cell, dict) else {}
        data, name = known.get("bytes"), known.get("path") or f"row {number}"
        if not data or not isinstance(data, bytes):
            raise ValueError(f"{name} has no bytes in a column {' or '.join(map(repr, column))}")
        label = row.get("label")
        if isinstance(label, int):
            label = codec.labels[label] if 0 <= label < len(codec.labels) else None
        label = label if label in codec.labels else None
        if isinstance(codec, Image):
            return Example(_fitting_picture(data, codec, name), label)
        return Example(read_sound(io.BytesIO(data), codec, name), label)

    yield from _readable((partial(read, i, row) for i, row in enumerate(rows)), skip)


def _readable(readers: Iterable[Callable[[], T]], skip: bool) -> Iterator[T]:
    """What the readers return, without those that raise ValueError if they are to be skipped."""
    for read in readers:
        try:
            item = read()
        except ValueError as error:
            if not skip:
                raise
            warnings.warn(f"left out: {error}", stacklevel=2)
        else:
            yield item


def _members(
    path: Path, suffixes: tuple[str, ...]
) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    """One file, a folder's files or a tar archive's members, sorted by name: names, and readers."""
    found = False
    if path.suffix.lower() in suffixes and not path.is_dir():
        yield PurePosixPath(path.name), partial(_content, path)
        return
    if path.is_dir():
        for file in _names_in(path):
            if file.suffix.lower() in suffixes:
                found = True
                name = PurePosixPath(*file.relative_to(path).parts)
                yield name, partial(_content, file)
    else:
        try:
            with tarfile.open(path) as archive:
                for member in _all_members(archive):
                    name = PurePosixPath(member.name)
                    shown = not any(map(_hidden, name.parts))
                    if member.isfile() and shown and name.suffix.lower() in suffixes:
                        found = True
                        file = archive.extractfile(member)
                        assert file is not None
                        yield name, partial(_bytes, member.name, file.read, member.size)
        except (*_DAMAGES, ValueError, OverflowError) as error:
            reason = str(error).partition("\n")[0].rstrip(":")  # without a line for each format
            raise ValueError(f"{str(path)!r} is not a readable tar archive: {reason}") from error
    if not found:
        raise ValueError(f"{str(path)!r} holds no file ending in {', '.join(suffixes)}")


def _all_members(archive: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """Sorted by name. tarfile stops in silence at a header that is damaged, or is not there."""
    members = sorted(archive.getmembers(), key=lambda m: m.name)
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it is damaged or cut short after {len(members)} members")
    return members


def _content(file: Path) -> bytes:
    return _bytes(file, file.read_bytes, file.stat().st_size if file.is_file() else 0)


def _bytes(name: Path | str, read: Callable[[], bytes], size: int) -> bytes:
    if size > LARGEST_FILE:  # of an archive no more than a claim
        raise ValueError(f"{str(name)!r} is larger than {LARGEST_FILE / 2**30:g} GiB; cut it")
    try:
        return read()
    except _DAMAGES as error:
        raise ValueError(f"{str(name)!r} is not readable: {error}") from error


def find_split(path: Path, split: str, modality: str) -> Path:
    """The file or folder of a split inside a data folder: ``train*`` or ``validation*``.

    Or the pattern of its parquet files where there are several, ``train-00000-of-00002.parquet``.
    """
    if not path.is_dir():
        raise ValueError(
            f"training data must be a folder with train and validation files, got {str(path)!r}"
        )
    suffixes = {".txt", PARQUET} if modality == "text" else set()
    shards = path / f"{split}-[0-9]*-of-[0-9]*{PARQUET}"
    parts = files_at(shards)
    if parts and [int(p.stem.rpartition("-")[2]) for p in parts] != [len(parts)] * len(parts):
        raise ValueError(
            f"the folder {str(path)!r} holds {len(parts)} parquet files of {split!r}, of "
            f"{int(parts[-1].stem.rpartition('-')[2])}; it needs all of one set, and no others"
        )
    found = [shards] if parts else []
    found += [
        p
        for p in sorted(path.iterdir())
        if p.name.split(".")[0] == split
        and (p.is_dir() or not suffixes or suffixes & set(p.suffixes))
    ]
    if len(found) != 1:
        raise ValueError(
            f"the folder {str(path)!r} must hold one file or folder named {split!r} (such as "
            f"{split}.txt, {split}.npy, {split}.tar, {split}/ or {split}-00000-of-00001.parquet), "
            f"found {len(found)}"
        )
    return found[0]
