"""The scripts that draw the pictures of the documentation run."""

import runpy
import sys
from pathlib import Path

import PIL.Image
import pytest

DOCS = Path(__file__).parent.parent / "docs"


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
