"""The scripts of the documentation run, and what they wrote is current."""

import runpy
import sys
import tomllib
from pathlib import Path

import PIL.Image
import pytest

from genssm.folders import shipped_folders

DOCS = Path(__file__).parent.parent / "docs"


def test_a_space_finds_what_it_needs() -> None:
    root = DOCS.parent
    _, front, _ = (root / "README.md").read_text().split("---\n", 2)
    facts = dict(line.split(": ", 1) for line in front.splitlines() if ": " in line)
    needed = {"title", "emoji", "colorFrom", "colorTo", "short_description", "license"}
    assert needed <= set(facts)
    assert (facts["sdk"], facts["suggested_hardware"]) == ("gradio", "cpu-basic")
    assert (root / facts["app_file"]).is_file()
    assert len(facts["short_description"]) <= 60  # the most that Spaces show
    lines = (root / "requirements.txt").read_text().splitlines()
    assert f"gradio=={facts['sdk_version']}" in lines
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert facts["python_version"].strip('"') == project["requires-python"].removeprefix(">=")
    assert set(project["dependencies"]) <= set(lines)  # and PyTorch without CUDA
    assert any(line.endswith("whl/cpu") for line in lines)


@pytest.mark.slow
def test_gallery_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(
        sys, "argv", ["make_gallery.py", "--model", "digits", "--out", str(tmp_path)]
    )
    runpy.run_path(str(DOCS / "make_gallery.py"), run_name="__main__")
    for name in ("memory", "layers"):
        with PIL.Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width >= 800
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 100


@pytest.mark.parametrize("name", ["wiki", "cifar10", "digits"])
def test_model_cards_state_the_facts_of_their_checkpoints(name: str):
    """After a change of a checkpoint: python docs/make_cards.py"""
    cards = runpy.run_path(str(DOCS / "make_cards.py"))
    card = (cards["CARDS"] / f"{name}.md").read_text()
    assert card == cards["filled"](card, cards["table"](shipped_folders()[name]))
    assert card.count("\n| ") >= 10
