"""Draw docs/samples.png: sixteen pictures by cifar10 and ten digits spoken by digits.

python docs/make_samples.py
"""

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch

import genssm
from genssm.files import grid

SEED, SCALE = 1, 5
PANEL = (176, 120)  # width and height of one spectrogram


def spectrogram(wave: np.ndarray) -> PIL.Image.Image:
    """Log-magnitude of a clip over time (0.7 s) and frequency (0 … 4 kHz), dark is loud."""
    samples = torch.zeros(5600)
    samples[: min(5600, len(wave))] = torch.from_numpy(wave[:5600])
    spectrum = torch.stft(
        samples, n_fft=256, hop_length=32, window=torch.hann_window(256), return_complex=True
    ).abs()
    level = (20 * spectrum.clamp(min=1e-4).log10() + 60).clamp(0, 80) / 80
    picture = (255 * (1 - level.flip(0))).byte().numpy()
    return PIL.Image.fromarray(picture).resize(PANEL, PIL.Image.Resampling.BILINEAR)


def main() -> None:
    """Sample both models and write the picture."""
    pictures = grid([s.raw for s in genssm.load("cifar10").sample(count=16, seed=SEED)])
    left = np.kron(pictures, np.ones((SCALE, SCALE, 1), np.uint8))
    speaker = genssm.load("digits")
    gap = 10
    width = left.shape[1] + 2 * (PANEL[0] + gap)
    canvas = PIL.Image.new("RGB", (width, left.shape[0]), "white")
    canvas.paste(PIL.Image.fromarray(left), (0, 0))
    pen = PIL.ImageDraw.Draw(canvas)
    pitch = left.shape[0] // 5
    for digit in range(10):
        wave = speaker.sample(str(digit), seed=SEED)[0].raw
        x = left.shape[1] + gap + digit // 5 * (PANEL[0] + gap)
        y = digit % 5 * pitch
        canvas.paste(spectrogram(wave), (x, y))
        pen.text((x + 4, y + 2), str(digit), fill="black", font_size=18)
    canvas.save(Path(__file__).with_name("samples.png"), optimize=True)


if __name__ == "__main__":
    main()
