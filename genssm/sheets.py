"""Sample sheets: what a model makes at one moment of its training, in one file.

Sixteen pictures in a grid, a clip of each class one after the other, or three texts: always of the
same seed, so that one can watch it learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genssm.checkpoint import Checkpoint
from genssm.codec import Audio, Image
from genssm.disk import replace_file
from genssm.files import grid, png, sound
from genssm.pipeline import Pipeline
from genssm.sample_quality import draw

_PICTURES, _CLIPS, _TEXTS = 16, 10, 3
_TEXT_TOKENS = 200
_PAUSE = 0.25  # seconds between clips


@dataclass(frozen=True)
class Sheet:
    """Pictures in a grid, uint8 (H, W, C), clips in a row, float32 (samples,), or texts."""

    step: int
    raw: np.ndarray | str
    rate: int | None = None  # Hz, of sound


def draw_sheet(checkpoint: Checkpoint, step: int, engine: str = "auto") -> Sheet:
    """What a model makes after ``step`` steps, with seed 0."""
    pipe = Pipeline("training", checkpoint, engine=engine)
    codec = pipe.codec
    if isinstance(codec, Image):
        return Sheet(step, grid([s.raw for s in draw(pipe, _PICTURES, {"seed": 0})]))
    if isinstance(codec, Audio):
        pause = np.zeros(round(_PAUSE * codec.rate), np.float32)
        waves = [part for s in draw(pipe, _CLIPS, {"seed": 0}) for part in (s.raw, pause)]
        return Sheet(step, np.concatenate(waves), codec.rate)
    samples = pipe.sample(count=_TEXTS, max_tokens=_TEXT_TOKENS, seed=0)
    return Sheet(step, "\n\n----\n\n".join(s.raw for s in samples))


def write_sheet(sheet: Sheet, folder: Path) -> Path:
    """Write ``<folder>/step-<step>.png``, ``.wav`` or ``.txt``."""
    if isinstance(sheet.raw, str):
        content, suffix = sheet.raw.encode() + b"\n", ".txt"
    elif sheet.rate is not None:
        content, suffix = sound(sheet.raw, sheet.rate, "wav"), ".wav"
    else:
        content, suffix = png(sheet.raw), ".png"
    target = folder / f"step-{sheet.step:08}{suffix}"
    replace_file(target, lambda file: file.write_bytes(content))
    return target
