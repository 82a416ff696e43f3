"""Draw docs/samples.png: two pictures of each class by cifar10 and ten digits spoken by digits.

python docs/make_samples.py
"""

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch

import genssm
from genssm.files import grid
from genssm.sample_quality import draw

SEED, SCALE = 1, 5
PANEL = (176, 150)  # width and height of one spectrogram


def panel(wave: np.ndarray) -> PIL.Image.Image:
    """Log-magnitude of the first 0.7 seconds over time and frequency, 80 dB; loud is dark."""
    samples = torch.from_numpy(np.pad(wave[:5600], (0, max(0, 5600 - len(wave)))))
    window = torch.hann_window(256)
    spectrum = torch.stft(samples, 256, 32, window=window, return_complex=True).abs()
    level = (20 * spectrum.clamp(min=1e-4).log10() + 60).clamp(0, 80) / 80
    shades = (255 * (1 - level.flip(0))).byte().numpy()
    return PIL.Image.fromarray(shades).resize(PANEL, PIL.Image.Resampling.BILINEAR)


def main() -> None:
    """Sample both models and write the picture."""
    drawn = draw(genssm.load("cifar10"), 20, {"seed": SEED}, print)
    left = np.kron(grid([s.raw for s in drawn], 4), np.ones((SCALE, SCALE, 1), np.uint8))
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
        canvas.paste(panel(wave), (x, y))
        pen.text((x + 4, y + 2), str(digit), fill="black", font_size=18)
    canvas.save(Path(__file__).with_name("samples.png"), optimize=True)


if __name__ == "__main__":
    main()
