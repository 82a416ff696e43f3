"""Files that visitors send: bounded before they are opened, decoded here, refused in a sentence."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from genssm.codec import Audio, Image, check_rate
from genssm.data import is_cut_short, pixels

BYTES = 2**21  # of a file
PIXELS = 25_000_000  # of a picture, before it is scaled
SECONDS = 30.0  # of a clip as it was recorded
_DECODING = threading.Lock()


def picture(path: str, codec: Image) -> np.ndarray:
    """A picture file as uint8 (H, W, C) of the model: its centre, scaled.

    Only the header is read before the number of pixels is known, and one picture is decoded at a
    time: it may take 300 MB. Raises ValueError.
    """
    import PIL.Image

    _check_size(path)
    unreadable = (OSError, SyntaxError, EOFError, ValueError, PIL.Image.DecompressionBombError)
    try:
        with PIL.Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "GIF")) as file:
            width, height = file.size
            if width * height <= PIXELS:
                with _DECODING:
                    return codec.fit(pixels(file, codec))
    except unreadable as error:
        raise ValueError("this file cannot be read as a picture; give a PNG or JPEG") from error
    raise ValueError(
        f"a picture may have {PIXELS // 10**6} million pixels, this one has {width:,} × "
        f"{height:,}; scale it down"
    )


def clip(path: str, codec: Audio, seconds: float) -> np.ndarray:
    """The last ``seconds`` of a sound file as float32 (samples,) at the model's rate.

    Raises ValueError.
    """
    import soundfile

    _check_size(path)
    try:
        with soundfile.SoundFile(path) as sound:
            check_rate(sound.samplerate)  # before the length, which is counted by it
            if sound.frames > SECONDS * sound.samplerate or sound.channels > 8:
                raise ValueError(
                    f"a clip may last {SECONDS:g} seconds on up to 8 channels, this one has "
                    f"{sound.frames / sound.samplerate:,.0f} s on {sound.channels}; cut it"
                )
            sound.seek(max(0, sound.frames - int(seconds * sound.samplerate)))
            wave, rate = sound.read(dtype="float32", always_2d=True), sound.samplerate
        with Path(path).open("rb") as file:
            if is_cut_short(file):
                raise ValueError("this clip is cut short; send all of it")
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError("this file cannot be read as sound; give a WAV or FLAC") from error
    if not len(wave):
        raise ValueError("this clip is empty; there is nothing to continue")
    return codec.waveform(wave, rate)


def _check_size(path: str) -> None:
    try:
        size = Path(path).stat().st_size
    except OSError as error:
        raise ValueError("the file has not arrived; send it again") from error
    if size == 0:
        raise ValueError("this file is empty")
    if size > BYTES:
        raise ValueError(f"a file may have {BYTES // 2**20} MiB, this one has {size / 2**20:.1f}")
