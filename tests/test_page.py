"""The page in a browser: every tab from the click to the result, what goes wrong, how it looks.

Needs Debian's Chromium (apt-get install chromium) and the packages playwright and
axe-playwright-python. GENSSM_SCREENSHOTS=docs also writes the pictures of the documentation there.
"""

import io
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("gradio", reason="the page needs the extra [app]")
pytest.importorskip("playwright", reason="the browser's tests need playwright")
pytest.importorskip("axe_playwright_python", reason="the browser's tests need axe")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("the browser's tests need Chromium", allow_module_level=True)

from api import call  # noqa: E402
from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright  # noqa: E402

from genssm.interface import uploads  # noqa: E402
from genssm.interface.house import House  # noqa: E402
from genssm.interface.page import build_page, launch  # noqa: E402
from genssm.scheduler import Job  # noqa: E402

pytestmark = pytest.mark.slow

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
]
TABS = ("Write", "Draw", "Speak", "Inside")
WAIT = 60_000  # milliseconds for the slowest answer
PAINTED = """[...document.querySelectorAll("#draw-page canvas")].map(
    (c) => [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data])"""
UNREADABLE = """document.body.insertAdjacentHTML(
    "afterbegin", "<p style='color: #777; background: #666'>hard to read</p>")"""


@pytest.fixture(scope="module")
def house() -> House:
    return House()


@pytest.fixture(scope="module")
def site(house: House) -> Iterator[str]:
    """The address of the page."""
    page = build_page(house)
    launch(page, prevent_thread_lock=True, quiet=True)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def contexts(chromium: Browser) -> dict[bool, BrowserContext]:
    """A visitor who likes it light and one who likes it dark; what was loaded once is kept."""
    return {
        dark: chromium.new_context(color_scheme="dark" if dark else "light")
        for dark in (False, True)
    }


@pytest.fixture
def opened(contexts: dict[bool, BrowserContext], site: str) -> Iterator[Callable[..., Page]]:
    """(tab, width, dark) → the page, ready; in the end nothing has failed or gone elsewhere."""
    wrong: list[str] = []
    pages: list[Page] = []

    def open_page(tab: str = "Write", width: int = 1280, dark: bool = False) -> Page:
        page = contexts[dark].new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": 900})
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: wrong.append(f"page error: {error}"))
        page.on("request", lambda request: leaves(request.url))
        page.goto(site)
        page.wait_for_selector("#write-page .page")
        show(page, tab)
        return page

    def leaves(url: str) -> None:
        if not url.startswith((site, "data:", "blob:")):
            wrong.append(f"request to {url}")

    yield open_page
    for page in pages:
        page.close()
    assert not wrong


def show(page: Page, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()
    page.wait_for_selector({"Inside": "#compare-go"}.get(tab, f"#{tab.lower()}-go"))


def unfold(page: Page, title: str) -> None:
    page.get_by_role("button", name=title).click()


def ended(page: Page, tab: str, text: str) -> str:
    """Wait until the status line of a tab holds a text; the whole line."""
    line = page.locator(f"#{tab}-status")
    expect(line).to_contain_text(text, timeout=WAIT)
    return line.inner_text()


def written(page: Page) -> str:
    page.wait_for_selector("#write-page .drawn", state="attached")  # a new line has no area
    page.wait_for_selector("#write-page .page:not(.growing)")
    return page.locator("#write-page .page").inner_text()


def reads(page: Page, text: str) -> None:
    """Wait until this is what is written, and all of it."""
    page.wait_for_function(
        "(text) => document.querySelector('#write-page .page').innerText === text", arg=text
    )
    assert written(page) == text


def finished(page: Page, tab: str) -> str:
    """Click, wait until all is drawn or spoken; the status line."""
    page.evaluate(f"document.querySelector('#{tab}-page .live').dataset.done = false")
    page.click(f"#{tab}-go")
    page.wait_for_selector(f"#{tab}-page .live[data-done=true]")
    return page.locator(f"#{tab}-status").inner_text()


def set_slider(page: Page, label: str, value: float) -> None:
    box = page.get_by_label(f"number input for {label}")
    box.fill(str(value))
    box.press("Enter")


# Text


def test_text_is_written_continued_and_repeated_by_its_seed(opened: Callable[..., Page]) -> None:
    page = opened("Write")
    page.fill("#prompt textarea", "The <b>river</b>")
    page.click("#write-go")
    assert written(page).startswith("The <b>river</b>")
    seed = ended(page, "write", "KiB, constant").split()[1]
    unfold(page, "Settings")
    page.get_by_role("button", name="Use last seed").click()
    expect(page.locator("#write-seed input")).to_have_value(seed)
    page.fill("#write-seed input", seed := "12")  # of a text that does not end early
    page.click("#write-go")
    ended(page, "write", f"seed {seed}")
    first = written(page)
    page.click("#write-more")
    page.wait_for_function(
        "(length) => document.querySelector('#write-page .page').innerText.length > length + 9",
        arg=len(first),
    )
    assert ended(page, "write", "KiB, constant").split()[1] == seed
    longer = written(page)
    assert longer.startswith(first.rstrip())
    page.click("#write-go")
    reads(page, first)
    page.click("#write-more")
    reads(page, longer)
    page.click("#write-go")
    reads(page, first)


def test_bits_appear_where_a_pointer_or_the_arrow_keys_are(opened: Callable[..., Page]) -> None:
    page = opened("Write")
    page.click("#write-go")
    written(page)
    piece = page.locator("#write-page .drawn").filter(visible=True).first  # texts may be short
    piece.hover()
    tip = page.locator("#write-page .tip")
    expect(tip).to_contain_text(f"{piece.get_attribute('data-bits')} bits · probability")
    page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    page.focus("#write-page .page")
    for key, index in (("ArrowRight", 0), ("ArrowRight", 1), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        bits = page.locator("#write-page .drawn").nth(index).get_attribute("data-bits")
        expect(tip).to_contain_text(f"{bits} bits · probability")
    page.keyboard.press("Tab")
    expect(tip).to_be_hidden()


def test_nothing_to_continue_is_said_in_a_sentence(opened: Callable[..., Page]) -> None:
    page = opened("Write")
    page.click("#write-more")
    expect(page.locator(".toast-body")).to_contain_text("generate a text first", ignore_case=True)
    page.click("#write-go")
    assert written(page)


def test_the_page_works_by_keyboard(opened: Callable[..., Page]) -> None:
    page = opened("Write")
    page.focus("#prompt textarea")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "write-go":
            break
    assert page.evaluate("document.activeElement.id") == "write-go"
    page.keyboard.press("Enter")
    assert written(page)


# Pictures


def canvases(page: Page) -> list[np.ndarray]:
    """The pixels of the pictures on the page."""
    return [np.array(c, np.uint8).reshape(32, 32, 4)[..., :3] for c in page.evaluate(PAINTED)]


def test_pictures_are_drawn_downloaded_and_mapped(opened: Callable[..., Page]) -> None:
    page = opened("Draw")
    page.get_by_label("frog").check()
    set_slider(page, "Pictures", 2)
    assert "6,144 tokens" in finished(page, "draw")
    expect(page.locator("#draw-page canvas")).to_have_count(2)
    shown = canvases(page)
    with page.expect_download() as download:
        page.click("#draw-save")
    with PIL.Image.open(download.value.path()) as picture:
        assert "genssm" in picture.info
        saved = np.asarray(picture)
    np.testing.assert_array_equal(saved[:, :32], shown[0])
    np.testing.assert_array_equal(saved[:, 34:], shown[1])
    page.click("#draw-surprise")
    back = page.get_by_role("button", name="Show the pictures")
    expect(back).to_be_visible()
    assert (canvases(page)[0] != shown[0]).any()
    back.click()
    np.testing.assert_array_equal(canvases(page)[0], shown[0])


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of a picture takes a moment, so that there is time to press Stop."""
    turn = Job._turn

    def slower(job: Job) -> bool:
        time.sleep(0.1)
        return turn(job)

    monkeypatch.setattr(Job, "_turn", slower)


@pytest.mark.usefixtures("slow")
def test_stopping_keeps_the_rows_that_are_there(opened: Callable[..., Page]) -> None:
    page = opened("Draw")
    set_slider(page, "Pictures", 1)
    page.click("#draw-go")
    ended(page, "draw", "tokens/s")
    page.click("#draw-stop")
    page.wait_for_selector("#draw-page .live[data-done=true]")
    line = page.locator("#draw-status").inner_text()
    drawn = int(line.split(" · ")[1].split()[0].replace(",", ""))
    assert 0 < drawn < 3072
    assert canvases(page)[0][: drawn // 96].any()
    page.click("#draw-surprise")
    expect(page.get_by_role("button", name="Show the pictures")).to_be_visible()


def test_an_upload_is_previewed_and_completed(opened: Callable[..., Page], tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    PIL.Image.effect_noise((90, 60), 60).convert("RGB").save(photo)
    page = opened("Draw")
    unfold(page, "Complete a picture of yours")
    page.set_input_files("#draw-upload input[type=file]", photo)
    note = page.locator("#draw-preview p")
    expect(note).to_have_text("16 rows kept, 16 to be drawn")
    set_slider(page, "Rows to keep", 28)
    expect(note).to_have_text("28 rows kept, 4 to be drawn")
    set_slider(page, "Pictures", 3)
    assert "1,152 tokens" in finished(page, "draw")
    assert page.locator("#draw-page figcaption").all_inner_texts() == [
        "original", "completion 1", "completion 2", "completion 3",
    ]  # fmt: skip
    original, *completions = canvases(page)
    for one in completions:
        np.testing.assert_array_equal(one[:28], original[:28])
        assert (one[28:] != original[28:]).any()


def bomb() -> bytes:
    """A PNG of 100 million black pixels in 100 KB."""
    buffer = io.BytesIO()
    PIL.Image.new("1", (10_000, 10_000)).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"not a picture", "cannot be read as"),
        (b"", "is empty|empty"),
        (b"\x89PNG\r\n\x1a\n cut", "cannot be read as"),
        (bomb, "million pixels"),
        (b"\0" * (uploads.BYTES + 1), "2|size"),
    ],
    ids=["wrong type", "empty", "corrupt", "bomb", "huge"],
)
def test_bad_uploads_are_told(
    opened: Callable[..., Page], tmp_path: Path, content: Any, problem: str
) -> None:
    file = tmp_path / "photo.png"
    file.write_bytes(content() if callable(content) else content)
    page = opened("Draw")
    unfold(page, "Complete a picture of yours")
    page.set_input_files("#draw-upload input[type=file]", file)
    toast = page.locator(".toast-body").first
    expect(toast).to_contain_text(re.compile(problem, re.IGNORECASE))
    assert str(tmp_path) not in toast.inner_text()


# Sound


def test_a_number_is_spoken_seen_and_played(opened: Callable[..., Page]) -> None:
    page = opened("Speak")
    page.fill("#number input, #number textarea", "42")
    assert "real time" in finished(page, "speak")
    button = page.locator("#speak-page .bar button")
    expect(button).to_have_text("▶ Play", timeout=WAIT)  # when it has been heard
    seconds = float(page.locator("#speak-page .clock").inner_text().split()[0])
    assert seconds > 0.12
    button.click()
    expect(button).to_have_text("■ Stop sound")
    button.click()
    expect(button).to_have_text("▶ Play")
    with page.expect_download() as download:
        page.click("#speak-save")
    assert Path(download.value.path()).read_bytes().startswith(b"RIFF")


def test_a_clip_goes_on_behind_a_seam_and_its_tone_is_where_it_belongs(
    opened: Callable[..., Page], tmp_path: Path, write_sound: Callable[..., Path]
) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(8000) / 8000).astype(np.float32)
    page = opened("Speak")
    unfold(page, "Continue a clip of yours")
    page.set_input_files("#speak-upload input[type=file]", write_sound(tmp_path / "a.wav", tone))
    expect(page.locator("#speak-upload")).to_contain_text("a.wav")
    assert "real time" in finished(page, "speak")
    seam = page.locator("#speak-page .seam").evaluate("s => parseFloat(s.style.left)")
    width = page.locator("#speak-page .stack").evaluate("s => s.clientWidth")
    seconds = float(page.locator("#speak-page .clock").inner_text().split()[0])
    assert seam / width == pytest.approx(1 / seconds, abs=0.02)
    column = page.evaluate(
        "(share) => { const c = document.querySelector('#speak-page .spectrogram');"
        "const d = c.getContext('2d').getImageData(c.width * share, 0, 1, c.height).data;"
        "return Array.from({length: c.height}, (_, y) => d[4 * y + 3]); }",
        0.5 / seconds,
    )
    loudest = int(np.argmax(column)) / len(column)
    assert loudest == pytest.approx(1 - 1000 / 4000, abs=0.03)


def test_what_is_no_number_is_told(opened: Callable[..., Page]) -> None:
    page = opened("Speak")
    page.fill("#number input, #number textarea", "hello")
    page.click("#speak-go")
    expect(page.locator(".toast-body")).to_contain_text("1 to 6 digits")


# Inside


def test_inside_shows_layers_views_race_state_and_fork(
    opened: Callable[..., Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genssm.anatomy.race_lengths", lambda pipe: [64, 128])
    monkeypatch.setattr("genssm.anatomy.has_transformers", lambda: False)
    page = opened("Write")
    page.click("#write-go")
    written(page)
    show(page, "Inside")
    for chart in ("kernels", "poles", "lives"):
        expect(page.locator(f"#{chart}-chart svg")).to_be_visible(timeout=WAIT)
    page.get_by_label("Sound").check()
    expect(page.locator("#lives-chart .span")).to_have_count(12, timeout=WAIT)  # its layers
    page.get_by_label("Text", exact=True).check()
    expect(page.locator("#lives-chart .span")).to_have_count(6, timeout=WAIT)
    page.click("#compare-go")
    told = ended(page, "compare", "of what was just made")
    page.wait_for_function(
        "/^(\\d+) of \\1 tokens/.test(document.querySelector('#compare-status').innerText)"
    )
    assert "differ by at most" in told
    expect(page.locator("#compare-chart polyline")).to_have_count(2)
    page.click("#race-go")
    ended(page, "race", "after 128 tokens: step")
    assert page.locator("#race-chart polyline").count() >= 2
    page.click("#watch-go")
    ended(page, "watch", "constant")
    page.click("#fork-go")
    ended(page, "fork", "forked")
    page.wait_for_selector("#fork-second .page:not(.growing) .drawn", state="attached")
    texts = [page.locator(f"#fork-{one} .page").inner_text() for one in ("first", "second")]
    assert texts[0] != texts[1]
    assert all(text.startswith("The history of the river") for text in texts)


# How it looks


def made_everywhere(page: Page) -> None:
    """Something on every tab, the surprise map and the fork included."""
    settled(page, "Write")
    page.click("#write-go")
    written(page)
    settled(page, "Draw")
    finished(page, "draw")
    settled(page, "Speak")
    finished(page, "speak")
    settled(page, "Inside")
    page.click("#compare-go")
    ended(page, "compare", "of what was just made")
    page.click("#race-go")
    ended(page, "race", "after 128 tokens")
    page.click("#watch-go")
    page.click("#fork-go")
    page.wait_for_selector("#fork-second .page:not(.growing) .drawn", state="attached")
    page.wait_for_function("document.querySelector('#watch-map .said').innerText.length > 200")


def settled(page: Page, tab: str) -> None:
    """Show a tab, and watch it from when all of it is there."""
    page.evaluate("window.watching = false")
    show(page, tab)
    if tab == "Inside":
        expect(page.locator("#lives-chart svg")).to_be_visible(timeout=WAIT)
    page.wait_for_timeout(300)
    page.evaluate("window.places?.clear(); window.watching = true")


@pytest.fixture
def short_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genssm.anatomy.race_lengths", lambda pipe: [64, 128])


# How far down everything on the shown tab lies, looked at in every frame.
WATCHED = """() => {
  const chosen = "button, label, h2, [id$=-status], [id$=-page], [id$=-chart], [id$=-map]";
  window.places = new Map();
  window.jumps = [];
  const look = () => {
    for (const part of document.querySelectorAll(chosen)) {
      if (!window.watching || !part.offsetParent || part.closest(".bar, .toast-wrap")) continue;
      const top = Math.round(part.getBoundingClientRect().top + scrollY);
      const before = window.places.get(part) ?? top;
      if (Math.abs(top - before) > 1) {
        window.jumps.push(`${part.id || part.innerText.slice(0, 40)}: ${before} → ${top}`);
      }
      window.places.set(part, top);
    }
    requestAnimationFrame(look);
  };
  look();
}"""


@pytest.mark.usefixtures("short_race")
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_jumps_while_something_is_made(opened: Callable[..., Page], width: int) -> None:
    page = opened("Write", width)
    page.evaluate(WATCHED)
    made_everywhere(page)
    assert page.evaluate("window.places.size") > 20
    jumps = page.evaluate("window.jumps")
    assert not jumps, "\n".join(jumps)
    page.evaluate("document.querySelector('.masthead').style.marginTop = '9px'")
    page.wait_for_function("window.jumps.length > 0")  # it does look


def test_no_width_needs_sideways_scrolling(opened: Callable[..., Page]) -> None:
    page = opened("Write", 390)
    for tab in TABS:
        show(page, tab)
        for width in (390, 768, 1280, 1920):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    page.set_viewport_size({"width": 390, "height": 900})
    for part in ("#kernels-chart", "#poles-chart", "#lives-chart", "#fork-first", "#fork-second"):
        assert page.locator(part).evaluate("part => part.clientWidth") > 280  # one above another


# Every rule that axe has by default: WCAG 2 to 2.2, A and AA, and best practices.
VIOLATIONS = "axe.run({resultTypes: ['violations']}).then((results) => results.violations)"


def looked_at(page: Page, stage: str) -> None:
    """Every tab at three widths in light and dark."""
    for tab in TABS:
        show(page, tab)
        for dark in (False, True):
            page.emulate_media(color_scheme="dark" if dark else "light")
            page.wait_for_selector("body.dark" if dark else "body:not(.dark)")
            for width in (390, 1280, 1920):
                page.set_viewport_size({"width": width, "height": 900})
                found = page.evaluate(VIOLATIONS)
                place = f"{tab} {stage}, {width} px, {'dark' if dark else 'light'}"
                assert not found, f"{place}: {json.dumps(found, indent=1)[:3000]}"


@pytest.mark.usefixtures("short_race")
def test_everyone_can_read_and_use_it(opened: Callable[..., Page]) -> None:
    page = opened("Write")
    page.add_style_tag(content="* { transition: none !important; }")  # the colours of the end
    page.evaluate(Axe().axe_script)
    looked_at(page, "at first")
    for tab in TABS:
        show(page, tab)
        for title in page.get_by_role("tabpanel").locator("button.label-wrap:visible").all():
            title.click()
    made_everywhere(page)
    show(page, "Draw")
    page.click("#draw-surprise")
    expect(page.get_by_role("button", name="Show the pictures")).to_be_visible()
    looked_at(page, "when all is made")
    page.evaluate(UNREADABLE)
    assert page.evaluate(VIOLATIONS)  # it does look


def test_canvases_follow_when_it_turns_dark(opened: Callable[..., Page]) -> None:
    page = opened("Speak")
    finished(page, "speak")
    page.evaluate(
        """() => { window.ink = () => {
          const c = document.querySelector("#speak-page .waveform");
          return c.getContext("2d").getImageData(1, 0, 1, c.height).data.join(); };
        window.light = window.ink(); }"""
    )
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("body.dark")
    page.wait_for_function("window.ink() !== window.light")


def test_sliders_show_that_the_keyboard_is_on_them(opened: Callable[..., Page]) -> None:
    page = opened("Draw")
    slider = page.locator("#draw-count input[type=range]")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert slider.evaluate("s => getComputedStyle(s).outlineWidth") == "2px"
    expect(page.get_by_label("number input for Pictures")).to_have_value("5")


# Programs


def test_programs_write_continue_draw_and_speak(site: str, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    client = Client(site, verbose=False, download_files=str(tmp_path))
    text, pieces, status = client.predict("The river", tokens=20, seed=1, api_name="/write")
    assert text.startswith("The river")
    assert pieces["done"]
    assert "seed 1" in status
    longer, _, _ = client.predict(tokens=20, api_name="/continue")
    assert longer.startswith(text)
    photo = tmp_path / "photo.png"
    PIL.Image.effect_noise((90, 60), 60).convert("RGB").save(photo)
    png, _, _ = client.predict(
        count=2, upload=handle_file(photo), keep_rows=30, seed=1, api_name="/draw"
    )
    with PIL.Image.open(png) as picture:
        assert picture.size == (66, 32)
    wav, rows, _ = client.predict("7", seed=1, seconds=0.3, api_name="/speak")
    assert Path(wav).read_bytes().startswith(b"RIFF")
    assert rows["items"][0]["rate"] == 8000


def test_the_examples_of_the_documentation_work(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parent.parent / "docs" / "app.md").read_text()
    text = text.replace("http://127.0.0.1:7860", site.rstrip("/"))
    examples = dict(re.findall(r"```(python|sh)\n(.*?)```", text, re.DOTALL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    PIL.Image.effect_noise((90, 60), 60).convert("RGB").save("photo.png")
    made: dict[str, Any] = {}
    exec(examples["python"], made)
    assert made["text"].startswith("The bridge")
    assert made["png"].endswith(".png")
    assert made["wav"].endswith(".wav")
    if shutil.which("curl"):
        ran = subprocess.run(
            ["bash", "-c", examples["sh"]], capture_output=True, text=True, check=True
        )
        assert json.loads(ran.stdout.rsplit("data: ", 1)[1])[0].startswith("The river")


def test_curl_gets_text_and_sentences(site: str) -> None:
    answer = call(site, "write", ["The river", 10, 0.8, 0.95, 1, 1])
    assert "event: complete" in answer
    assert json.loads(answer.rsplit("data: ", 1)[1])[0].startswith("The river")
    answer = call(site, "write", ["x" * 5000, 10, 0.8, 0.95, 1, 1])
    assert "event: error" in answer
    assert "Traceback" not in answer
    assert str(Path(__file__).parent.parent) not in answer


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("tab", ["write", "draw", "speak"])
def test_a_second_click_takes_the_place_of_the_first(
    opened: Callable[..., Page], house: House, tab: str
) -> None:
    """One request under way, which Stop ends, also when it is begun at once after another Stop."""
    scheduler = house.scheduler({"write": "text", "draw": "image", "speak": "audio"}[tab])
    page = opened(tab.capitalize())
    line, seed = page.locator(f"#{tab}-status p").first, "status"

    def begin() -> None:
        nonlocal seed
        page.click(f"#{tab}-go")
        expect(line).to_have_text(re.compile(rf"^seed (?!{seed})\d.* tokens/s"), timeout=WAIT)
        seed = line.inner_text().split()[1]
        assert scheduler.busy <= 1

    begin()
    begin()
    page.click(f"#{tab}-stop")
    begin()
    page.click(f"#{tab}-stop")
    began = time.monotonic()
    while scheduler.busy:
        assert time.monotonic() < began + 5
        time.sleep(0.1)
    time.sleep(1)
    assert line.inner_text().startswith(f"seed {seed} ")


def test_what_goes_on_is_told_to_those_who_listen(opened: Callable[..., Page]) -> None:
    """Not 18 times a second: at the beginning, and when it rests."""
    page = opened("Write")
    line = page.locator("#write-status [role=status]")
    page.click("#write-go")
    written(page)
    expect(line).to_contain_text("tokens/s", timeout=WAIT)
    shown = page.locator("#write-status p[aria-hidden]").inner_text()
    expect(line).to_have_text(shown, timeout=WAIT)


@pytest.mark.usefixtures("slow")
def test_closing_the_page_frees_the_place(opened: Callable[..., Page], house: House) -> None:
    page = opened("Draw")
    page.click("#draw-go")
    ended(page, "draw", "tokens/s")
    assert house.scheduler("image").busy == 1
    began = time.monotonic()
    page.close()
    while house.scheduler("image").busy:
        assert time.monotonic() < began + 5  # the pictures themselves would take longer
        time.sleep(0.1)


# Pictures of the documentation


@pytest.mark.skipif("GENSSM_SCREENSHOTS" not in os.environ, reason="GENSSM_SCREENSHOTS=FOLDER")
def test_screenshots(opened: Callable[..., Page]) -> None:
    folder = Path(os.environ["GENSSM_SCREENSHOTS"])
    page = opened("Write")
    page.click("#write-go")
    written(page)  # so that the speed is that of a loop that is loaded
    choose_seed(page, "write", 12)
    page.click("#write-go")
    ended(page, "write", "seed 12 · 200 tokens")
    written(page)
    page.locator("#write-page .drawn").nth(60).hover()
    shoot(page, folder / "page-write.png")
    show(page, "Draw")
    choose_seed(page, "draw", 2)
    set_slider(page, "Pictures", 16)
    assert "seed 2 ·" in finished(page, "draw")
    shoot(page, folder / "page-draw.png", whole=True)
    show(page, "Speak")
    choose_seed(page, "speak", 11)
    assert "seed 11 ·" in finished(page, "speak")
    expect(page.locator("#speak-page .bar button")).to_have_text("▶ Play", timeout=WAIT)
    shoot(page, folder / "page-speak.png")
    page = opened("Inside", dark=True)
    page.click("#compare-go")
    ended(page, "compare", "256 of 256")
    page.click("#race-go")
    ended(page, "race", "after 4,096 tokens")
    page.click("#watch-go")
    ended(page, "watch", "constant")
    page.click("#fork-go")
    page.wait_for_selector("#fork-second .page:not(.growing) .drawn")
    page.wait_for_timeout(3000)
    shoot(page, folder / "page-inside.png", whole=True)


def choose_seed(page: Page, tab: str, seed: int) -> None:
    """Set the seed, and fold the settings away again."""
    settings = page.get_by_role("tabpanel").get_by_role("button", name="Settings")
    settings.locator("visible=true").click()
    page.wait_for_timeout(500)  # just unfolded, the box is given its default once more
    page.fill(f"#{tab}-seed input", str(seed))
    settings.locator("visible=true").click()


def shoot(page: Page, file: Path, whole: bool = False) -> None:
    """A screenshot of 256 colours, which are enough."""
    content = page.screenshot(full_page=whole)
    with PIL.Image.open(io.BytesIO(content)) as picture:
        picture.convert("RGB").quantize(256).save(file, optimize=True)
