"""Prompts from files and samples to files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import genssm
from genssm.checkpoint import Checkpoint
from genssm.files import grid, half_blocks, png, sound
from genssm.pipeline import Pipeline


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


@pytest.mark.parametrize(
    ("modality", "name", "files"),
    [
        ("text", "a", ["a"]),
        ("image", "a.png", ["a.png"]),
        ("audio", "a.wav", ["a-1.wav", "a-2.wav"]),
    ],
)
def test_samples_are_written_with_what_makes_them_again(
    modality: str,
    name: str,
    files: list[str],
    make_checkpoint: Callable[[str], Checkpoint],
    tmp_path: Path,
) -> None:
    pipe = Pipeline("toy", make_checkpoint(modality), engine="eager")
    samples = pipe.sample(count=2, max_tokens=9, seed=1)
    written = genssm.write_samples(pipe, samples, tmp_path / name)
    assert [file.name for file in written] == files
    assert all(file.stat().st_size > 0 for file in written)
    with pytest.raises(FileExistsError, match="force=True"):
        genssm.write_samples(pipe, samples, tmp_path / name)
    genssm.write_samples(pipe, samples, tmp_path / name, force=True)
    if modality == "text":
        assert written[0].read_text() == "".join(f"{s.raw}\n" for s in samples)
    else:
        made = [s for file in written for s in pipe.repeat(genssm.read_recipe(str(file)))]
        assert [s.tokens for s in made] == [s.tokens for s in samples]


def test_samples_that_no_recipe_makes_together_are_not_written(
    make_checkpoint: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe = Pipeline("toy", make_checkpoint("audio"), engine="eager")
    clips = pipe.sample("one", count=2, max_tokens=9, seed=1)
    others = pipe.sample("two", count=2, max_tokens=9, seed=1)
    picture = Pipeline("toy", make_checkpoint("image"), engine="eager").sample(max_tokens=9)[0]
    file = tmp_path / "a.wav"
    for samples, place, message in (
        ([], file, "no samples to write"),
        (clips, Path("-"), "to a file"),
        ([*clips, *others], file.with_suffix(".png"), "must end in .wav"),
    ):
        with pytest.raises(ValueError, match=message):
            genssm.write_samples(pipe, samples, place)
    with pytest.raises(ValueError, match="not of one call"):
        pipe.recipe([*clips, *others])
    for stranger in (pipe.at_rate(0.5), Pipeline("toy", make_checkpoint("image"))):
        with pytest.raises(ValueError, match="drawn by another model than 'toy' at the rate"):
            stranger.recipe(clips)
    assert picture.owner != clips[0].owner
    genssm.write_samples(pipe, clips[:1], "~/b.wav", prompt="one")
    assert genssm.read_recipe(tmp_path / "b.wav").prompt == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["b.wav"]


def test_half_blocks_hold_two_rows_a_line() -> None:
    array = np.zeros((5, 2, 3), np.uint8)
    array[0, 0] = (1, 2, 3)
    lines = half_blocks(array).splitlines()
    assert len(lines) == 3
    assert "38;2;1;2;3;48;2;0;0;0m▀" in lines[0]
    assert all(line.count("▀") == 2 for line in lines)
