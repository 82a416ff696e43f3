"""A note inside a PNG or WAV file: put in, and found again without decoding the file.

PNG: a tEXt chunk with the keyword "genssm" (PNG specification, 11.3.4.3). WAV: the comment of a
LIST INFO chunk (RIFF, ICMT). Files may come from anywhere: sizes are bounded, nothing is unpacked.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import IO

_PNG = b"\x89PNG\r\n\x1a\n"
_KEYWORD = b"genssm\0"
LARGEST = 2**22  # bytes of a note
_MOST_CHUNKS = 100_000


class NoteError(ValueError):
    """A file whose note cannot be read."""


def add(content: bytes, note: str) -> bytes:
    """A PNG or WAV file with an ASCII note; other files have no place for one and stay as is."""
    if content.startswith(_PNG):
        body = b"tEXt" + _KEYWORD + note.encode("ascii")
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        header = len(_PNG) + 25  # the signature and IHDR
        return content[:header] + chunk + content[header:]
    if content.startswith(b"RIFF"):
        text = note.encode("ascii") + b"\0"
        text += b"\0" * (len(text) % 2)
        info = b"INFOICMT" + struct.pack("<I", len(text)) + text
        content += b"\0" * (len(content) % 2) + b"LIST" + struct.pack("<I", len(info)) + info
        return b"RIFF" + struct.pack("<I", len(content) - 8) + content[8:]
    return content


def find(path: Path) -> bytes | None:
    """The note of a PNG or WAV file, None if it holds none or is of another kind.

    Raises NoteError for a note that is too large or damaged, OSError for a file that cannot be
    read.
    """
    with path.open("rb") as file:
        start = file.read(12)
        if start.startswith(_PNG):
            file.seek(len(_PNG))
            return _find_in_png(file)
        if start.startswith(b"RIFF") and start.endswith(b"WAVE"):
            return _find_in_wav(file)
    return None


def _find_in_png(file: IO[bytes]) -> bytes | None:
    for _ in range(_MOST_CHUNKS):
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return None
        (size,) = struct.unpack(">I", head[:4])
        start = file.tell()
        if head[4:] == b"tEXt" and file.read(len(_KEYWORD)) == _KEYWORD:
            body = _KEYWORD + _bounded(file, size - len(_KEYWORD))
            (checksum,) = struct.unpack(">I", file.read(4).rjust(4, b"\0"))
            if zlib.crc32(b"tEXt" + body) != checksum:
                raise NoteError("its note is damaged")
            return body.removeprefix(_KEYWORD)
        file.seek(start + size + 4)
    return None


def _find_in_wav(file: IO[bytes]) -> bytes | None:
    """The last note, which was added last."""
    found = None
    for _ in range(_MOST_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            return found
        (size,) = struct.unpack("<I", head[4:])
        start = file.tell()
        if head[:4] == b"LIST" and file.read(4) == b"INFO":
            comment = _comment(_bounded(file, size - 4))
            found = found if comment is None else comment
        file.seek(start + size + size % 2)
    return found


def _comment(info: bytes) -> bytes | None:
    at = 0
    while at + 8 <= len(info):
        (size,) = struct.unpack("<I", info[at + 4 : at + 8])
        if info[at : at + 4] == b"ICMT":
            return info[at + 8 : at + 8 + size].rstrip(b"\0")
        at += 8 + size + size % 2
    return None


def _bounded(file: IO[bytes], size: int) -> bytes:
    if not 0 <= size <= LARGEST:
        raise NoteError(f"its note is longer than {LARGEST} bytes")
    content = file.read(size)
    if len(content) < size:
        raise NoteError("its note is cut off")
    return content
