"""The web app: its functions, called as the page calls them."""

import itertools

import numpy as np
import pytest

gr = pytest.importorskip("gradio", reason="the app needs the extra [app]")

import app  # noqa: E402


def test_writing_streams_text_that_grows_from_the_prompt() -> None:
    updates = list(app.write("The river", 12, 0.8, 5))
    texts = [text for text, _ in updates]
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
    assert texts[0].startswith("The river")
    assert "seed 5" in updates[-1][1]
    assert "12 tokens" in updates[-1][1]
    assert list(app.write("The river", 12, 0.8, 5))[-1][0] == texts[-1]


def test_a_prompt_that_is_too_long_is_refused() -> None:
    with pytest.raises(gr.Error, match="at most 2000 characters"):
        next(app.write("x" * 2001, 10, 0.8, 1))


@pytest.mark.slow
def test_drawing_ends_with_the_whole_picture() -> None:
    *_, (picture, status) = app.paint("frog", 1, 0.98, 3)
    assert picture.shape == (192, 192, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 0
    assert "3072 tokens" in status


@pytest.mark.slow
def test_speaking_gives_integer_samples_at_the_models_rate() -> None:
    (rate, wave), status = app.speak("7", 0.95, 3)
    assert rate == 8000
    assert wave.dtype == np.int16
    assert len(wave) > 400
    assert "seed 3" in status


def test_the_page_names_its_endpoints() -> None:
    page = app.build()
    names = {f.api_name for f in page.fns.values()}
    assert {"write", "draw", "speak"} <= names
