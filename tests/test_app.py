"""The page from behind: what its handlers yield, called as the page calls them."""

import base64
import io
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest

gr = pytest.importorskip("gradio", reason="the page needs the extra [app]")

from genssm import checkpoint, files  # noqa: E402
from genssm.checkpoint import Checkpoint  # noqa: E402
from genssm.cli import main  # noqa: E402
from genssm.codec import Audio, Image  # noqa: E402
from genssm.data import pixels, read_picture  # noqa: E402
from genssm.interface import house as houses  # noqa: E402
from genssm.interface import speak as speaking  # noqa: E402
from genssm.interface import uploads  # noqa: E402
from genssm.interface.courtesy import alone, polite, sentence, stopper  # noqa: E402
from genssm.interface.draw import Drawer, surprise_map  # noqa: E402
from genssm.interface.growth import Growth  # noqa: E402
from genssm.interface.house import House, Visit, updates  # noqa: E402
from genssm.interface.inside import Inspector  # noqa: E402
from genssm.interface.page import build_page  # noqa: E402
from genssm.interface.serving import serve  # noqa: E402
from genssm.interface.speak import Speaker, speakers  # noqa: E402
from genssm.interface.write import Writer  # noqa: E402
from genssm.scheduler import BusyError, Job  # noqa: E402


@pytest.fixture(scope="module")
def house() -> House:
    return House()


@pytest.fixture(autouse=True)
def _own_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that no page in this process makes a folder of its own."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))


def rebuilt(messages: Iterable[dict[str, Any]]) -> list[Any]:
    """What the browser has after these messages; see ``news`` in browser/shared.js."""
    run, items = 0, []
    for message in messages:
        if message["run"] != run and message["at"] == 0:
            run, items = message["run"], []
        if message["run"] == run and message["at"] <= len(items):
            items += message["items"][len(items) - message["at"] :]
    return items


def bytes_of(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8)


def sound_of(items: list[Any]) -> np.ndarray:
    """The samples of a sound on the page, int16."""
    return np.concatenate([bytes_of(i) for i in items if isinstance(i, str)]).view("<i2")


def pictures_of(items: list[Any]) -> np.ndarray:
    """The pictures on the page, (count, H, W, C)."""
    layout = items[0]
    shape = (layout["count"], layout["height"], layout["width"], layout["channels"])
    pictures = np.zeros(shape, np.uint8)
    for sample, y, row in items[1:]:
        pictures[sample, y] = bytes_of(row).reshape(shape[2:])
    return pictures


# What grows


def test_a_browser_may_pass_over_two_messages_in_a_row() -> None:
    growth = Growth(["begin"])
    messages = [growth.message([i, i + 0.5]) for i in range(12)]
    for seen in (messages, messages[::2], messages[::3]):
        expected = growth.items[: 1 + 2 * (1 + messages.index(seen[-1]))]
        assert rebuilt(seen) == expected
    assert len(messages[-1]["items"]) == 6


def test_the_last_message_repairs_whatever_was_missed() -> None:
    growth = Growth()
    messages = [growth.message([i]) for i in range(9)]
    assert rebuilt([messages[0], messages[8]]) == [0]
    assert rebuilt([messages[0], messages[8], growth.whole()]) == list(range(9))
    assert growth.whole()["done"]
    assert Growth().run != growth.run


# Text


def test_writing_streams_text_that_grows_from_the_prompt(house: House) -> None:
    shown = list(Writer(house).write("The river", 12, 0.8, seed=5))
    texts = [text for text, *_ in shown]
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
    text, whole, status, written = shown[-1]
    assert text.startswith("The river")
    assert "seed 5 · 12 tokens" in status
    assert "KiB, constant" in status
    assert rebuilt([m for _, m, *_ in shown]) == whole["items"] == written.pieces
    assert whole["items"][0] == ["The river", None]
    assert "".join(piece for piece, _ in whole["items"]) == text == written.visit.samples()[0].raw
    bits = sum(b for _, b in whole["items"][1:])
    assert bits == pytest.approx(written.visit.samples()[0].bits, abs=0.2)
    assert list(Writer(house).write("The river", 12, 0.8, seed=5))[-1][0] == text


def test_continuing_goes_on_from_the_state(house: House) -> None:
    writer = Writer(house)
    *_, (text, _, _, written) = writer.write("The river", 10, 0.8, seed=5)
    *_, (longer, whole, _, again) = writer.go_on(written, 6, 0.8)
    assert longer.startswith(text)
    assert len(longer) > len(text)
    assert whole["items"][: len(written.pieces)] == written.pieces
    assert again.visit.samples()[0].plan.state is not None
    *_, (longest, *_) = writer.go_on(again, 6, 0.8)
    assert longest.startswith(longer)


def test_continuing_ends_what_is_still_written_and_loses_none_of_it(house: House) -> None:
    writer = Writer(house)
    writing = writer.write("The river", 600, 0.8, seed=5)
    written = next(w for *_, w in writing if w.visit.samples() and w.visit.samples()[0].tokens)
    *_, (longer, _, _, again) = writer.go_on(written, 6, 0.8)
    (first,), (second,) = written.visit.samples(), again.visit.samples()
    assert 0 < len(first.tokens) < 600
    assert len(second.tokens) == 6
    assert longer.startswith(first.raw)
    assert len(longer) > len(first.raw)
    writing.close()


def test_there_must_be_something_to_continue(house: House) -> None:
    with pytest.raises(gr.Error, match="generate a text first"):
        next(Writer(house).go_on(None))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"prompt": "x" * 4001}, "may have 4000 characters, this one has 4001"),
        ({"tokens": 10**9}, "Tokens must lie in 1 … 600"),
        ({"tokens": "many"}, "Tokens must lie in 1 … 600, got 'many'"),
        ({"temperature": float("nan")}, "Temperature must lie in 0 … 1.5, got nan"),
        ({"top_p": 0}, "Top-p must lie in"),
        ({"seed": 0.5}, "A seed is a whole number"),
        ({"seed": 1e30}, "A seed is a whole number"),
        ({"prompt": "\ud800"}, "lone surrogate"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    house: House, settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(gr.Error, match=problem):
        list(Writer(house).write(**({"prompt": "The", "tokens": 5} | settings)))


def test_stopping_keeps_what_was_drawn(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text far longer than the page allows, so that it is still being written when it stops."""
    monkeypatch.setattr("genssm.interface.write.TOKENS", 10**6)
    monkeypatch.setattr(houses, "UPDATES", 1000)
    writing = Writer(house).write("The river", 10**6, 0.8, seed=3)
    written = next(written for text, _, _, written in writing if len(text) > 20)
    written.visit.stop()
    *_, (text, whole, _, _) = writing
    sample = written.visit.samples()[0]
    assert sample.finish == "interrupted"
    assert 0 < len(sample.tokens) < 10**5
    assert whole["done"]
    assert text == sample.raw


def test_what_does_not_fit_is_an_error_for_the_very_first_visitor_too() -> None:
    """Who was told that the model is loading."""
    with pytest.raises(gr.Error, match="A seed is a whole number"):
        list(Writer(House()).write("The", 5, seed=0.5))
    with pytest.raises(gr.Error, match="lone surrogate"):
        list(Writer(House()).write("\ud800", 5))


# The house


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def narrow() -> Iterator[House]:
    """A house with room for one request on each model."""
    house = House(limit=1)
    yield house
    for scheduler in house._schedulers.values():
        scheduler.close()


def started(house: House, visit: Visit) -> Iterator[Any]:
    """A request that will not end by itself."""
    for _ in house.begin(visit, "text", None, max_tokens=10**7):
        pass
    assert visit.job is not None
    return iter(visit.job)


def test_what_a_visitor_begins_ends_what_is_under_way_in_the_tab(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But nothing of other tabs, other visitors or programs; and the replaced says no more."""
    turn = Job._turn
    monkeypatch.setattr(Job, "_turn", lambda job: time.sleep(0.05) or turn(job))
    visitor, other = (cast(gr.Request, SimpleNamespace(session_hash=h)) for h in "ab")
    write = alone(house, "write", Writer(house)._write)
    settings = ["The river", 600, 0.8, 1.0, 1.0, 1]

    def begun(stream: Iterator[Any]) -> tuple[Iterator[Any], Visit]:
        shown = next(u for u in stream if u[3].visit.samples())
        return stream, shown[3].visit

    first, visit = begun(write(visitor, *settings))
    theirs, their_visit = begun(write(other, *settings))
    program, program_visit = begun(Writer(house).write(*settings))
    second, next_visit = begun(write(visitor, *settings))
    assert list(first) == []
    assert visit.left
    assert not any(v.left for v in (their_visit, program_visit, next_visit))
    stopper(house, "draw")(visitor)
    assert not next_visit.left
    stopper(house, "write")(visitor)
    assert next_visit.left
    assert "tokens" in list(second)[-1][2]
    for stream in (theirs, program):
        stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: house.scheduler("text").busy == 0)


def test_visitors_wait_in_line_and_are_told_so(narrow: House) -> None:
    first, second, third = Visit(), Visit(), Visit()
    pieces = started(narrow, first)
    next(pieces)
    line = narrow.begin(second, "text", None, max_tokens=5)
    assert "the most there is room for; you are next" in next(line)
    behind = narrow.begin(third, "text", None, max_tokens=5)
    assert "1 more before you" in next(behind)
    third.stop()  # leaves the line
    assert list(behind) == []
    assert third.job is None
    first.stop()
    list(line)
    assert second.job is not None
    assert len(second.job.run()[0].tokens) <= 5
    wait_until(lambda: narrow.scheduler("text").busy == 0)
    assert narrow._lines["text", 1.0] == []


def test_the_first_visitor_is_told_why_it_takes_long() -> None:
    house = House()
    assert "compiling the sampling loop" in house.status(Visit(), "text")
    house.warm_up().join()
    assert house.status(Visit(), "text") == "reading the prompt …"
    gone = Visit()
    gone.stop()
    assert house.status(gone, "text") == "nothing was drawn"


def test_nobody_begins_before_the_loop_is_compiled() -> None:
    house, compiled = House(), threading.Event()
    house._warming = threading.Thread(target=compiled.wait, daemon=True)
    house._warming.start()
    visit, gone = Visit(), Visit()
    told = house.begin(visit, "text", None, max_tokens=5)
    assert [next(told) for _ in range(3)] == ["loading the model …", houses.FIRST, houses.FIRST]
    assert visit.job is None
    leaving = house.begin(gone, "text", None, max_tokens=5)
    next(leaving)
    gone.stop()
    assert list(leaving) == []
    compiled.set()
    assert all(line == houses.FIRST for line in told)
    assert visit.job is not None
    assert visit.job.run()[0].tokens
    house.scheduler("text").close()


def test_a_line_that_is_too_long_turns_visitors_away(
    narrow: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(houses, "WAITING", 1)
    first, second = Visit(), Visit()
    pieces = started(narrow, first)
    next(pieces)
    waiting = narrow.begin(second, "text", None, max_tokens=5)
    next(waiting)
    with pytest.raises(gr.Error, match="1 visitors wait already; try again in a minute"):
        list(Writer(narrow).write("The", 5))
    first.stop()
    waiting.close()
    assert narrow._lines["text", 1.0] == []


def test_a_visitor_who_leaves_frees_the_place(narrow: House, monkeypatch: Any) -> None:
    monkeypatch.setattr("genssm.interface.write.TOKENS", 10**7)
    monkeypatch.setattr(houses, "UPDATES", 1000)
    writing = Writer(narrow).write("The river", 10**7)
    for text, *_ in writing:
        if len(text) > 12:
            break
    writing.close()  # what the server does when the connection ends
    wait_until(lambda: narrow.scheduler("text").busy == 0)
    assert list(Writer(narrow).write("The river", 5, seed=1))[-1][1]["done"]


def test_a_request_ends_in_time_with_what_it_has(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genssm.interface.write.TOKENS", 10**7)
    monkeypatch.setattr(houses, "SECONDS", 0.05)
    *_, (text, whole, status, written) = Writer(house).write("The river", 10**7, seed=1)
    assert written.visit.samples()[0].finish == "interrupted"
    assert whole["done"]
    assert text.startswith("The river")
    assert "seed 1" in status


class Steady:
    """A job of two seconds with a piece every millisecond of a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for _ in range(2000):
            self.now += 0.001
            yield 0, "a"


def test_the_page_gets_15_to_20_updates_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Steady()
    monkeypatch.setattr(houses, "time", job)
    shown = list(updates(job))  # type: ignore[arg-type]
    assert sum(map(len, shown)) == 2000
    assert 30 <= len(shown) <= 40


class Failing:
    """A job that fails after two pieces."""

    def __iter__(self) -> Iterator[tuple[int, str]]:
        yield 0, "a"
        yield 0, "b"
        raise RuntimeError("/secret/folder/file.py line 3")


def test_an_error_in_the_middle_keeps_what_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(gr, "Warning", said.append)

    @polite
    def stream() -> Iterator[list[tuple[int, str]]]:
        yield from updates(Failing())  # type: ignore[arg-type]

    shown = [piece for pieces in stream() for piece in pieces]
    assert shown == [(0, "a"), (0, "b")]
    assert said == ["Something went wrong on this side; what was made is kept. Please try again."]


def test_errors_tell_the_rule_and_nothing_of_the_server() -> None:
    assert sentence(ValueError("a seed must be whole")) == "A seed must be whole."
    assert sentence(BusyError("try again")) == "Try again."
    for error in (OSError(2, "No such file", "/secret"), KeyError("/secret"), MemoryError()):
        assert "secret" not in sentence(error)


def test_own_models_take_the_place_of_the_shipped(
    make_checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    own = str(checkpoint.save(make_checkpoint("image"), tmp_path / "own"))
    house = House([own])
    assert house.pipe("image").name == "own"
    assert house.pipe("text").name == "wiki"
    *_, (file, whole, _, _) = Drawer(house).draw("cat", 2, seed=1)
    assert pictures_of(whole["items"]).shape == (2, 4, 3, 3)
    assert file is not None
    assert Path(file).name == "own-1.png"
    assert files.read_recipe(Path(file)).model == "own"
    assert str(tmp_path).encode() not in Path(file).read_bytes()
    assert build_page(house).fns
    with pytest.raises(ValueError, match="both make image"):
        House([own, own])
    with pytest.raises(ValueError, match="nowhere"):
        House(["nowhere"])


# Pictures


def test_pictures_come_row_by_row_and_the_file_repeats_them(house: House) -> None:
    shown = list(Drawer(house).draw("frog", 2, 0.98, seed=3))
    file, whole, status, drawn = shown[-1]
    assert "6,144 tokens" in status
    assert rebuilt([m for _, m, *_ in shown]) == whole["items"]
    pictures = pictures_of(whole["items"])
    for picture, sample in zip(pictures, drawn.visit.samples(), strict=True):
        np.testing.assert_array_equal(picture, sample.raw)
    assert file is not None
    with PIL.Image.open(file) as saved:
        np.testing.assert_array_equal(np.asarray(saved), files.grid(list(pictures)))
    again = house.pipe("image").repeat(files.read_recipe(Path(file)))
    np.testing.assert_array_equal(np.stack([s.raw for s in again]), pictures)


def test_what_was_drawn_is_kept_without_its_states(house: House) -> None:
    *_, (_, _, _, drawn) = Drawer(house).draw("frog", 2, seed=3)
    assert drawn.visit.job is None
    assert [len(sample.tokens) for sample in drawn.visit.samples()] == [3072, 3072]


def test_pictures_are_mapped_when_they_are_complete(house: House) -> None:
    drawer, shown = Drawer(house), None
    stream = drawer.draw("frog", 1, seed=3)
    for _, _, _, shown in stream:
        if shown.visit.samples():
            break
    with pytest.raises(gr.Error, match="wait for them"):
        drawer.surprise(shown)
    *_, (_, _, _, shown) = stream
    assert len(drawer.surprise(shown)["surprise"]) == 1


def test_the_page_reads_pictures_as_the_command_does(house: House, tmp_path: Path) -> None:
    """16 bits, what is transparent, and pictures that a camera has turned."""
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    PIL.Image.fromarray(ramp).save(tmp_path / "deep.png")
    clear = PIL.Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    clear.paste((200, 30, 30, 255), (16, 16, 48, 48))
    clear.save(tmp_path / "clear.png")
    turned, exif = PIL.Image.fromarray((ramp // 257).astype(np.uint8)), PIL.Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    codec = house.pipe("image").codec
    assert isinstance(codec, Image)
    corners = {}
    for file in sorted(tmp_path.iterdir()):
        seen = uploads.picture(str(file), codec)
        with file.open("rb") as opened:
            np.testing.assert_array_equal(seen, codec.fit(read_picture(opened, codec, file.name)))
        corners[file.name] = seen[0, 0].tolist(), seen[-1, 0].tolist()
    assert corners["clear.png"] == ([255] * 3, [255] * 3)
    assert max(corners["deep.png"][0]) < 8
    assert min(corners["deep.png"][1]) > 240
    assert min(min(corners["turned.jpg"])) > 240  # what was below, and white, is on the left


def test_a_picture_is_completed_from_its_upper_rows(house: House, tmp_path: Path) -> None:
    file = tmp_path / "photo.png"
    PIL.Image.effect_noise((80, 60), 50).save(file)
    drawer = Drawer(house)
    preview = drawer.preview(str(file), 30)
    *_, (saved, whole, status, drawn) = drawer.draw("any", 2, 0.98, 1.0, str(file), 30, 3)
    layout = whole["items"][0]
    assert preview is not None
    assert layout["original"] == preview["picture"]
    assert (layout["kept"], layout["count"]) == (30, 2)
    assert "384 tokens" in status
    original = bytes_of(layout["original"]).reshape(32, 32, 3)
    for sample in drawn.visit.samples():
        np.testing.assert_array_equal(sample.raw[:30], original[:30])
    rows = pictures_of(whole["items"])[:, 30:]
    np.testing.assert_array_equal(rows, [s.raw[30:] for s in drawn.visit.samples()])
    assert saved is not None
    assert drawer.preview(None, 3) is None
    surprise = bytes_of(drawer.surprise(drawn)["surprise"][0]).reshape(32, 32)
    assert not surprise[:30].any()
    assert surprise[30:].any()


def test_the_surprise_map_holds_the_bits_of_every_pixel(house: House) -> None:
    codec = house.pipe("image").codec
    assert isinstance(codec, Image)
    sample = house.pipe("image").sample("ship", max_tokens=300, seed=1)[0]
    levels = surprise_map(sample, codec)
    bits = np.array(sample.token_bits).reshape(100, 3).sum(1)
    np.testing.assert_allclose(levels[:100], 255 * np.minimum(bits / 24, 1), atol=0.5)
    assert not levels[100:].any()
    with pytest.raises(gr.Error, match="draw one first"):
        Drawer(house).surprise(None)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def with_text(size: int) -> bytes:
    """A PNG with so many bytes of text, compressed."""
    text, file = PIL.PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text("a", "b" * size, zip=True)
    PIL.Image.new("RGB", (8, 8)).save(file, "png", pnginfo=text)
    return file.getvalue()


BAD_FILES = {
    "much text": (with_text(2**23), "This file cannot be read as"),
    "empty": (b"", "is empty"),
    "text": (b"not a picture", "cannot be read as"),
    "cut": (png_header(8, 8)[:40], "cannot be read as"),
    "no pixels": (png_header(500, 500), "cannot be read as"),
    "bomb": (png_header(60_000, 60_000), "million pixels|cannot be read as"),
    "other": (b"RIFF\x00\x00\x00\x00WAVE", "cannot be read as"),
    "too large": (b"\0" * (uploads.BYTES + 1), "may have 2 MiB"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_uploads_are_one_sentence(house: House, kind: str, tmp_path: Path) -> None:
    content, problem = BAD_FILES[kind]
    file = tmp_path / "secret-name.png"
    file.write_bytes(content)
    handlers = [
        lambda: list(Drawer(house).draw(upload=str(file))),
        lambda: Drawer(house).preview(str(file), 3),
        lambda: list(Speaker(house).speak(upload=str(file))),
    ]
    for handler in handlers:
        with pytest.raises(gr.Error, match=problem) as caught:
            handler()
        assert "secret" not in str(caught.value)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(png_header(9_000, 9_000))
    with pytest.raises(ValueError, match="25 million pixels, this one has 9,000 × 9,000"):
        uploads.picture(str(file), Image(32, 32, 3))


def test_one_picture_is_decoded_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PIL.Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    inside, most = [], []

    def slowly(*arguments: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return pixels(*arguments)

    monkeypatch.setattr(uploads, "pixels", slowly)
    with ThreadPoolExecutor(4) as visitors:
        codec = Image(32, 32, 3)
        seen = list(visitors.map(lambda _: uploads.picture(str(tmp_path / "a.png"), codec), "abcd"))
    assert most == [1, 1, 1, 1]
    assert all((picture == [255, 0, 0]).all() for picture in seen)


def test_long_clips_are_refused_and_others_cut_to_their_end(
    write_sound: Callable[..., Path], tmp_path: Path
) -> None:
    codec = Audio(8000)
    wave = 0.5 * np.sin(np.arange(2 * 4000) / 7).astype(np.float32)
    wave[:5000] *= 0.1
    file = write_sound(tmp_path / "a.wav", wave, 4000)
    heard = uploads.clip(str(file), codec, 0.5)
    assert min(np.abs(part).max() for part in np.array_split(heard, 4)) > 0.4
    cut = tmp_path / "cut.wav"
    cut.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match="this clip is cut short"):
        uploads.clip(str(cut), codec, 0.5)
    assert len(heard) == pytest.approx(4000, abs=8)
    assert np.abs(heard).max() == pytest.approx(0.5, abs=0.05)
    long = write_sound(tmp_path / "b.wav", np.zeros(31 * 4000, np.float32), 4000)
    with pytest.raises(
        ValueError, match="may last 30 seconds on up to 8 channels, this one has 31"
    ):
        uploads.clip(str(long), codec, 0.5)
    empty = write_sound(tmp_path / "c.wav", np.zeros(0, np.float32), 4000)
    with pytest.raises(ValueError, match="clip is empty"):
        uploads.clip(str(empty), codec, 0.5)
    swift = write_sound(tmp_path / "d.wav", np.zeros(100, np.float32), 2**31 - 1)
    with pytest.raises(ValueError, match="sampling rate must lie in 1000 … 192000 Hz"):
        uploads.clip(str(swift), codec, 0.5)


# Sound


def read_sound(file: str) -> tuple[int, np.ndarray]:
    import soundfile

    wave, rate = soundfile.read(file, dtype="int16")
    return rate, wave


def test_speaking_says_digit_after_digit(house: House) -> None:
    shown = list(Speaker(house).speak("47", seed=3))
    file, whole, status, spoken = shown[-1]
    assert rebuilt([m for _, m, *_ in shown]) == whole["items"]
    assert file is not None
    rate, wave = read_sound(file)
    assert rate == whole["items"][0]["rate"] == 8000
    pipe = house.pipe("audio")
    digits = [pipe.sample(d, seed=3 + i, max_tokens=12000)[0].raw for i, d in enumerate("47")]
    expected = np.concatenate([digits[0], np.zeros(960, np.float32), digits[1]])
    assert len(wave) == len(expected)
    np.testing.assert_allclose(wave / 32768, expected, atol=2e-4)
    np.testing.assert_allclose(sound_of(whole["items"]), wave, atol=1)
    assert "seed 3 ·" in status  # the second digit has the next one
    # Of each digit also its level, its duration, and what ended it.
    assert f"· {sum(map(len, digits)) + 6:,} tokens" in status
    assert "× real time" in status
    assert spoken.seed == 3


def repeated(file: str, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What ``genssm sample --like FILE`` makes."""
    monkeypatch.setattr("sys.argv", ["genssm", "sample", "--like", file, "--out", str(target)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    return target


@pytest.mark.parametrize(("number", "rate"), [("7", "× 1"), ("407", "× 1"), ("42", "× 0.5")])
def test_a_number_carries_the_recipe_of_all_its_digits(
    house: House, number: str, rate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speak = Speaker(house).speak(number, seconds=0.3, output_rate=rate, seed=1)
    *_, (file, whole, _, _) = speak
    assert file is not None
    recipe = files.read_recipe(Path(file))
    assert len(recipe.plans) == len(number)
    again = repeated(file, tmp_path / "again.wav", monkeypatch)
    assert again.read_bytes() == Path(file).read_bytes()
    np.testing.assert_allclose(sound_of(whole["items"]), read_sound(file)[1], atol=1)
    parts = [s.raw for s in house.pipe("audio").repeat(recipe)]
    gaps = (len(number) - 1) * round(0.12 * whole["items"][0]["rate"])
    assert len(read_sound(file)[1]) == sum(map(len, parts)) + gaps


def test_nothing_in_the_place_of_a_text_or_number_is_told(house: House) -> None:
    """Programs may send null."""
    nothing: Any = None
    *_, (text, *_) = Writer(house).write(nothing, tokens=10, seed=1)
    assert text
    *_, (left, _, _) = Inspector(house).fork(nothing, seed=1)
    assert left["items"]
    with pytest.raises(gr.Error, match="Give a number of 1 to 6 digits"):
        list(Speaker(house).speak(nothing))
    with pytest.raises(gr.Error, match="The duration in seconds must lie in 0 … "):
        list(Speaker(house).speak("7", duration=nothing))


def test_the_largest_seed_serves_every_digit(house: House) -> None:
    *_, (file, *_) = Speaker(house).speak("77", seconds=0.1, seed=2**32 - 1)
    assert file is not None
    assert [plan.seed for plan in files.read_recipe(Path(file)).plans] == [2**32 - 1, 0]


def test_a_number_that_was_stopped_is_repeated_as_far_as_it_came(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(houses, "UPDATES", 1000)
    speaking = Speaker(house).speak("407", seed=1)
    for _, message, _, spoken in speaking:
        pauses = [i for i in message["items"] if isinstance(i, str) and set(i) == {"A"}]
        if pauses:  # the second digit has begun
            spoken.visit.stop()
            break
    *_, (file, _, _, _) = speaking
    assert file is not None
    recipe = files.read_recipe(Path(file))
    assert len(recipe.plans) < 3
    again = repeated(file, tmp_path / "again.wav", monkeypatch)
    assert again.read_bytes() == Path(file).read_bytes()


def test_a_clip_is_repeated_with_what_followed(
    house: House,
    write_sound: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wave = 0.5 * np.sin(np.arange(4000) / 7).astype(np.float32)
    clip = write_sound(tmp_path / "a.wav", wave)
    *_, (file, whole, _, _) = Speaker(house).speak(seconds=0.2, upload=str(clip), seed=1)
    assert file is not None
    again = repeated(file, tmp_path / "again.wav", monkeypatch)
    assert again.read_bytes() == Path(file).read_bytes()
    np.testing.assert_allclose(sound_of(whole["items"]), read_sound(file)[1], atol=1)


def test_a_clip_goes_on_behind_the_seam_at_another_rate(
    house: House, write_sound: Callable[..., Path], tmp_path: Path
) -> None:
    wave = 0.5 * np.sin(np.arange(4000) / 7).astype(np.float32)
    file = write_sound(tmp_path / "a.wav", wave)
    speak = Speaker(house).speak(seconds=0.2, output_rate="× 2", upload=str(file), seed=1)
    *_, (saved, whole, status, spoken) = speak
    layout = whole["items"][0]
    assert (layout["rate"], layout["seam"]) == (16000, 8000)
    assert saved is not None
    rate, heard = read_sound(saved)
    assert rate == 16000
    drawn = len(spoken.visit.samples()[0].tokens)
    assert 0 < drawn <= 3200
    assert 8000 < len(heard) <= 8000 + drawn
    assert np.abs(heard[:8000] / 32768).max() == pytest.approx(0.5, abs=0.05)
    assert "16 kHz" in status


@pytest.mark.parametrize("number", ["", "seven", "1234567", "4 0 7", "²³", "-1"])
def test_numbers_need_one_to_six_digits(house: House, number: str) -> None:
    with pytest.raises(gr.Error, match="1 to 6 digits"):
        next(Speaker(house).speak(number))


def test_the_choices_follow_from_the_labels(
    house: House, make_checkpoint: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: Any
) -> None:
    codec = Audio(8000, ("0", "7", "0_jackson", "7_jackson", "7_theo"))
    assert speakers(codec) == ["jackson", "theo"]
    assert speakers(Audio(8000, ("0", "1"))) == []
    monkeypatch.setattr(Speaker, "codec", lambda *_: codec)
    speaker = Speaker(house)
    assert speaker._labels("707", "any") == ["7", "0", "7"]
    assert speaker._labels("707", "theo") == ["7_theo", "0", "7_theo"]
    with pytest.raises(gr.Error, match="must be one of any, jackson, theo"):
        next(speaker.speak("7", "nobody"))
    words = Audio(8000, ("one", "two"))
    monkeypatch.setattr(Speaker, "codec", lambda *_: words)
    assert Speaker(house)._labels("two", "any") == ["two"]
    with pytest.raises(gr.Error, match="The word must be one of any, one, two"):
        next(Speaker(house).speak("three"))
    monkeypatch.undo()
    with pytest.raises(gr.Error, match="The output rate must be one of"):
        next(speaker.speak("7", output_rate="× 3"))


def test_sound_is_heard_at_once_only_when_it_is_made_fast_enough() -> None:
    clock = iter([0.0, 0.05, 0.1])
    pace = speaking._Pace(8000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speaking.time, "perf_counter", lambda: next(clock))
        pace.drawn(256)  # what came before was waiting
        pace.drawn(1000)  # an eighth of a second of sound in 0.05 s
        assert pace.live
        pace.drawn(-130)  # 0.109 s in 0.1 s is too close
        assert not pace.live


# Inside


def test_the_views_are_compared_on_what_was_just_made(house: House) -> None:
    *_, (_, _, _, written) = Writer(house).write("The river", 20, seed=1)
    inspector = Inspector(house)
    shown = list(inspector.compare("Text", written, None, None))
    chart, told = shown[-1]
    tokens = len(written.visit.samples()[0].plan.tokens) + 20
    assert f"{tokens} of {tokens} tokens of what was just made" in told
    assert [len(s["points"]) for s in chart["series"]] == [tokens, tokens]
    assert max(y for s in chart["series"] for _, y in s["points"]) < 1e-3
    assert "real data" in next(inspector.compare("Sound"))[1]
    with pytest.raises(gr.Error, match="one of Text, Pictures, Sound"):
        next(inspector.compare("Smell"))


def test_one_race_at_a_time(house: House) -> None:
    inspector = Inspector(house)
    race = inspector.race("Sound")
    assert "getting ready" in next(race)[1]
    with pytest.raises(gr.Error, match="Another visitor holds a race"):
        next(inspector.race("Sound"))
    race.close()
    assert "getting ready" in next(inspector.race("Sound"))[1]


@pytest.mark.slow
def test_the_race_shows_lap_after_lap(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genssm.anatomy.race_lengths", lambda pipe: [64, 128])
    shown = list(Inspector(house).race("Sound"))
    chart, told = shown[-1]
    assert len(shown) == 3
    assert ("GPT-2 is not here" in told) == (len(chart["series"]) == 2)
    assert "after 128 tokens: step" in told
    assert [p[0] for p in chart["series"][0]["points"]] == [64, 128]
    assert all(y > 0 for s in chart["series"] for _, y in s["points"])


def test_layers_show_kernels_poles_and_half_lives(house: House) -> None:
    kernels, poles, lives = Inspector(house).layers("Sound")
    assert len(lives["series"][0]["points"]) == 12
    assert all(len(s["points"]) == 512 for s in kernels["series"])
    assert all(x * x + y * y < 1 for s in poles["series"] for x, y in s["points"])


def test_the_state_is_watched_token_by_token(house: House) -> None:
    shown = list(Inspector(house).watch("Text", "The river", 7))
    whole, told = shown[-1]
    layout, columns = whole["items"][0], whole["items"][1:]
    assert "seed 7" in told
    assert layout["rows"] == 8 * len(layout["names"])
    assert all(len(bytes_of(levels)) == layout["rows"] for levels, _ in columns)
    assert rebuilt([m for m, _ in shown]) == whole["items"]
    text = "".join(piece for _, piece in columns)
    pipe = house.pipe("text")
    state = pipe.read("The river")
    expected = pipe._with(weights="fp32").sample(state=state, max_tokens=len(columns), seed=7)[0]
    assert expected.raw.startswith("The river" + text)


def test_one_state_goes_on_in_two_ways(house: House) -> None:
    *_, (first, second, told) = Inspector(house).fork("The river", 0.8, 7)
    pipe = house.pipe("text")
    state = pipe.read("The river")
    expected = pipe.sample(state=state, count=2, max_tokens=80, temperature=0.8, seed=7)
    for message, sample in zip((first, second), expected, strict=True):
        assert message["done"]
        assert "".join(text for text, _ in message["items"]) == sample.raw
    assert first["items"] != second["items"]
    assert "seed 7, samples 0 and 1" in told


# The page


def test_the_page_names_its_endpoints_and_labels_their_outputs(house: House) -> None:
    info = build_page(house).get_api_info()["named_endpoints"]
    names = {"/write", "/continue", "/draw", "/speak", "/compare", "/race", "/layers", "/state"}
    assert names | {"/fork"} == set(info)
    for name, endpoint in info.items():
        assert all(output["label"] for output in endpoint["returns"]), name
        assert all(p["parameter_has_default"] for p in endpoint["parameters"]), name
    labels = [output["label"] for output in info["/write"]["returns"]]
    assert labels == ["Text", "Pieces with bits", "Status"]


def test_no_stub_file_is_written_beside_the_sources() -> None:
    assert not list(Path(houses.__file__).parent.glob("*.pyi"))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """The exit code of a command."""
    monkeypatch.setattr("sys.argv", ["genssm", "app", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_the_command_serves_the_page_as_it_was_asked(
    make_checkpoint: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []
    monkeypatch.setattr("genssm.interface.page.launch", lambda page, **how: served.append(how))
    monkeypatch.setattr(House, "warm_up", lambda house: served.append(house.pipe("image").name))
    own = str(checkpoint.save(make_checkpoint("image"), tmp_path / "own"))
    assert not run(monkeypatch, "--port", "8123", "--share", "--model", own)
    assert served == ["own", {"port": 8123, "share": True}]


def test_what_cannot_be_served_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(House, "warm_up", lambda house: None)
    assert run(monkeypatch, "--model", "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert run(monkeypatch, "--port", port) == 1
    told = capsys.readouterr().err
    assert port in told
    assert "Traceback" not in told


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"the port {port} is taken; give another one"):
            serve(port=port)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_files_of_visitors_end_with_the_page(tmp_path: Path, number: int) -> None:
    """``launch`` waits as Gradio's does: an interrupt ends it."""
    program = """
import os, time
from pathlib import Path
import genssm.interface.page as page

def launch(*_, **__):
    Path(os.environ["GRADIO_TEMP_DIR"], "visitor.png").touch()
    print("ready", flush=True)
    time.sleep(60)

page.launch, page.build_page = launch, lambda house: None
from genssm.interface.serving import serve
serve()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": str(tmp_path), "GRADIO_TEMP_DIR": "",
                          "PYTHONPATH": str(Path(__file__).parents[1])},
        # Background jobs inherit an ignored SIGINT, which Python would keep ignoring.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    assert list(tmp_path.glob("genssm-*/visitor.png"))
    process.send_signal(number)
    assert process.wait(30) != 0
    assert not list(tmp_path.glob("genssm-*"))


def test_files_of_visitors_are_kept_where_no_other_user_reads_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    monkeypatch.setattr(
        "genssm.interface.page.launch",
        lambda *_, **__: seen.append(Path(os.environ["GRADIO_TEMP_DIR"])),
    )
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    serve()
    assert seen[0].stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "own"))
    serve()
    assert seen[1] == tmp_path / "own"
