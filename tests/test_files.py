"""Prompts from files and samples to files."""

import numpy as np
import pytest

from genssm.files import grid, half_blocks, png, sound


@pytest.mark.parametrize(
    ("count", "size"), [(1, (4, 3)), (2, (4, 8)), (3, (10, 8)), (4, (10, 8)), (9, (16, 13))]
)
def test_grids_are_nearly_square(count: int, size: tuple[int, int]) -> None:
    pictures = [np.full((4, 3, 3), i, np.uint8) for i in range(count)]
    canvas = grid(pictures)
    assert canvas.shape == (*size, 3)
    present = set(np.unique(canvas).tolist())
    assert set(range(count)) <= present <= {*range(count), 255}


def test_png_keeps_every_pixel() -> None:
    import io

    import PIL.Image

    for channels in (1, 3):
        array = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
        decoded = np.asarray(PIL.Image.open(io.BytesIO(png(array)))).reshape(array.shape)
        np.testing.assert_array_equal(decoded, array)


def test_sound_keeps_rate_and_samples() -> None:
    import io

    import soundfile

    wave = np.linspace(-0.9, 0.9, 500, dtype=np.float32)
    for file_format in ("wav", "flac"):
        decoded, rate = soundfile.read(io.BytesIO(sound(wave, 8000, file_format)))
        assert rate == 8000
        np.testing.assert_allclose(decoded, wave, atol=1e-4)


def test_half_blocks_hold_two_rows_a_line() -> None:
    array = np.zeros((5, 2, 3), np.uint8)
    array[0, 0] = (1, 2, 3)
    lines = half_blocks(array).splitlines()
    assert len(lines) == 3
    assert "38;2;1;2;3;48;2;0;0;0m▀" in lines[0]
    assert all(line.count("▀") == 2 for line in lines)
