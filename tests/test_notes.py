"""Notes inside PNG and WAV files."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from genssm.files import png, sound
from genssm.notes import LARGEST, NoteError, add, find

PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
WAVE = np.linspace(-0.9, 0.9, 501, dtype=np.float32)
NOTES = ("{}", "odd", "x" * 100_000)


@pytest.mark.parametrize("note", NOTES)
def test_a_png_keeps_its_pixels_and_its_note(note: str, tmp_path: Path) -> None:
    import PIL.Image

    content = add(png(PICTURE), note)
    (tmp_path / "a.png").write_bytes(content)
    picture = PIL.Image.open(io.BytesIO(content))
    np.testing.assert_array_equal(np.asarray(picture), PICTURE)
    assert picture.info["genssm"] == note
    assert find(tmp_path / "a.png") == note.encode()


@pytest.mark.parametrize("note", NOTES)
def test_a_wav_keeps_its_samples_and_its_note(note: str, tmp_path: Path) -> None:
    import soundfile

    content = add(sound(WAVE, 8000, "wav"), note)
    (tmp_path / "a.wav").write_bytes(content)
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        np.testing.assert_allclose(file.read(), WAVE, atol=1e-4)
        assert file.samplerate == 8000
        if len(note) < 1000:  # libsndfile skips long comments
            assert file.comment == note
    assert struct.unpack("<I", content[4:8])[0] == len(content) - 8
    assert find(tmp_path / "a.wav") == note.encode()


@pytest.mark.parametrize("kind", ["png", "wav"])
def test_the_note_that_was_added_last_is_found(kind: str, tmp_path: Path) -> None:
    content = png(PICTURE) if kind == "png" else sound(WAVE, 8000, "wav")
    (tmp_path / "a").write_bytes(add(add(content, "first"), "second"))
    assert find(tmp_path / "a") == b"second"


def test_files_without_a_note_have_none(tmp_path: Path) -> None:
    flac = sound(WAVE, 8000, "flac")
    assert add(flac, "{}") == flac
    for content in (png(PICTURE), sound(WAVE, 8000, "wav"), flac, b"", b"text", b"RIFF"):
        (tmp_path / "a").write_bytes(content)
        assert find(tmp_path / "a") is None


def chunk(kind: bytes, body: bytes, size: int | None = None) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body) if size is None else size) + kind + body + checksum


def test_hostile_notes_are_refused_and_other_chunks_passed_over(tmp_path: Path) -> None:
    def check(content: bytes, message: str | None) -> None:
        (tmp_path / "a").write_bytes(content)
        if message is None:
            assert find(tmp_path / "a") is None
        else:
            with pytest.raises(NoteError, match=message):
                find(tmp_path / "a")

    png_start, body = b"\x89PNG\r\n\x1a\n", b"genssm\0{}"
    check(png_start + chunk(b"tEXt", body, 2**32 - 1), f"longer than {LARGEST} bytes")
    check(png_start + chunk(b"tEXt", body, 3), f"longer than {LARGEST} bytes")
    check(png_start + chunk(b"tEXt", body, 1000), "cut off")
    check(png_start + chunk(b"tEXt", body)[:-1] + b"!", "damaged")
    check(png_start + chunk(b"tEXt", body)[:-3], "damaged")
    check(png_start + chunk(b"tEXt", b"Comment\0{}") + chunk(b"IEND", b""), None)
    check(png_start + chunk(b"IDAT", b"", 2**32 - 1) + chunk(b"tEXt", body), None)
    check(png_start + b"\0" * 100, None)

    wav = b"RIFF\0\0\0\0WAVE"
    check(wav + b"LIST" + struct.pack("<I", 2**32 - 1) + b"INFO", f"longer than {LARGEST} bytes")
    check(wav + b"LIST" + struct.pack("<I", 1) + b"INFO", f"longer than {LARGEST} bytes")
    check(wav + b"LIST" + struct.pack("<I", 60) + b"INFO", "cut off")
    check(wav + b"LIST" + struct.pack("<I", 4) + b"INFO", None)
    check(wav + b"data" + struct.pack("<I", 2**32 - 1), None)
    check(wav + b"\0" * 100, None)
