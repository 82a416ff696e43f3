"""The web app: its functions, called as the page calls them."""

import html
import itertools
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

gr = pytest.importorskip("gradio", reason="the app needs the extra [app]")

import app  # noqa: E402


def test_writing_streams_text_that_grows_from_the_prompt() -> None:
    updates = list(app.write("The river", 12, 0.8, 5))
    texts = [text for _, text, _, _ in updates]
    assert all(b.startswith(a) for a, b in itertools.pairwise(t for t in texts if t))
    page, text, status, job = updates[-1]
    assert text.startswith("The river")
    assert "seed 5" in status
    assert "12 tokens" in status
    assert re.sub("<[^>]*>", "", page.replace("<br>", "\n")) == html.escape(text)
    assert page.count(" bits") >= 5
    assert list(app.write("The river", 12, 0.8, 5))[-1][1] == text
    continued = list(app.write_on(job, page, 6, 0.8))[-1]
    assert continued[0].startswith(page)
    assert continued[1].startswith(text)
    assert len(continued[1]) > len(text)


def test_what_is_written_cannot_be_markup() -> None:
    page = list(app.write("<script>alert(1)</script>", 3, 0.8, 5))[-1][0]
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_prompt_that_is_too_long_is_refused() -> None:
    with pytest.raises(gr.Error, match="at most 2000 characters"):
        next(app.write("x" * 2001, 10, 0.8, 1))


def test_there_must_be_something_to_continue() -> None:
    with pytest.raises(gr.Error, match="write first"):
        next(app.write_on(None, "", 6, 0.8))


def test_stopping_keeps_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text far longer than the page allows, so that it is still being written when it stops."""
    monkeypatch.setattr(app, "TOKENS", 10**6)
    monkeypatch.setattr(app, "UPDATES", 1000)
    writing = app.write("The river", 10**6, 0.8, 3)
    *_, job = next(writing)
    app.stop(job)
    last = list(writing)[-1]
    assert 0 < len(job.samples()[0].tokens) < 10**5
    assert job.samples()[0].finish == "interrupted"
    assert last[1] == job.samples()[0].raw


def test_a_full_house_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.scheduler("wiki"), "limit", 0)
    with pytest.raises(gr.Error, match="try again in a moment"):
        next(app.write("The river", 10, 0.8, 1))


@pytest.mark.slow
def test_drawing_ends_with_the_whole_picture() -> None:
    *_, (picture, status, _) = app.paint("frog", 1, 0.98, seed=3)
    assert picture is not None
    assert picture.shape == (192, 192, 3)
    assert picture.std() > 0
    assert "3,072 tokens" in status


@pytest.mark.slow
def test_an_uploaded_picture_is_completed_beside_itself(tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    PIL.Image.effect_noise((80, 60), 50).save(file)
    *_, (picture, status, _) = app.paint("any", 1, 0.98, 1.0, str(file), 30, 3)
    assert picture is not None
    page = picture[:: app.SCALE, :: app.SCALE]
    np.testing.assert_array_equal(page[:30, :32], page[:30, 34:])
    assert "192 tokens" in status


@pytest.mark.parametrize("data", [b"", b"not a picture", b"RIFF\x00\x00\x00\x00WAVE"])
def test_uploads_that_cannot_be_read_are_one_sentence(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "secret-folder-name.png"
    file.write_bytes(data)
    with pytest.raises(gr.Error, match=r"^'This file is no picture that can be read\.'$"):
        next(app.paint("any", 1, 0.98, 1.0, str(file)))
    with pytest.raises(gr.Error, match=r"^'This file is no sound that can be read\.'$"):
        next(app.speak("4", 0.95, str(file)))


@pytest.mark.slow
def test_speaking_says_digit_after_digit() -> None:
    *_, (sound, picture, status, _) = app.speak("47", 0.95, seed=3)
    assert sound is not None
    assert picture is not None
    rate, wave = sound
    assert rate == 8000
    assert wave.dtype == np.int16
    assert len(wave) > 2 * rate // 8
    assert picture.shape == (200, 880, 3)
    assert "seed 4" in status


@pytest.mark.parametrize("number", ["", "seven", "1234567"])
def test_numbers_need_one_to_six_digits(number: str) -> None:
    with pytest.raises(gr.Error, match="1 to 6 digits"):
        next(app.speak(number))


@pytest.mark.slow
def test_inside_shows_views_and_race() -> None:
    facts, rows = app.look_inside("digits")
    assert "256 real tokens" in facts
    assert len(rows) == 12
    lengths = [row[0] for row in list(app.race("digits"))[-1]]
    assert lengths == [256, 512, 1024, 2048]


def test_the_page_names_its_endpoints() -> None:
    page = app.build()
    names = {f.api_name for f in page.fns.values()}
    assert {"write", "draw", "speak", "inspect", "race"} <= names
