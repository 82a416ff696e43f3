"""Files that are whole or not there: the old one stays, and what killed writers left goes."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genssm.disk import remove_leftovers, replace_file, replace_folder
from genssm.train import _WRITTEN


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_replace_file_leaves_the_old_file_when_writing_fails(tmp_path: Path):
    path = tmp_path / "deep" / "file.bin"
    replace_file(path, lambda file: file.write_bytes(b"old"))

    def fail(file: Path) -> None:
        file.write_bytes(b"half")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        replace_file(path, fail)
    assert contents(path.parent) == {"file.bin": b"old"}
    replace_file(path, lambda file: file.write_bytes(b"new"))
    assert contents(path.parent) == {"file.bin": b"new"}


@pytest.mark.parametrize("name", ["a.png", "a.b.png", "plain", "a-b.png", "x" * 236 + ".png"])
@pytest.mark.parametrize("replace", [replace_file, replace_folder])
def test_what_a_killed_writer_left_is_found_by_the_name_it_wrote(
    replace: Callable[..., None], name: str, tmp_path: Path
):
    def killed(file: Path) -> None:
        (tmp_path / "kept").mkdir()
        file.rename(tmp_path / "kept" / file.name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(tmp_path / name, killed)
    (left,) = (tmp_path / "kept").iterdir()
    remove_leftovers(left.parent, {"other", "b.png"}.__contains__)
    remove_leftovers(left.parent, {name}.__contains__, idle=60)
    assert left.exists()
    os.utime(left, times=(time.time() - 61,) * 2)
    remove_leftovers(left.parent, {name}.__contains__, idle=60)
    assert not left.exists()


def test_a_training_knows_the_names_that_it_writes():
    names = ("checkpoint", "state.safetensors", "log.csv", "tokenizer.model")
    assert all(map(_WRITTEN.fullmatch, (*names, "tokens-0a1b.bin", "tokens-0a1b.json")))
    assert not any(map(_WRITTEN.fullmatch, ("checkpoint2", "logxcsv", "tokens.bin", "config.json")))


def test_files_are_on_the_disk_before_they_have_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Or a power cut may leave the name of an empty file."""
    done: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            done.append(name)
            return function(*arguments)

        return call

    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "rename")):
        monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
    replace_file(tmp_path / "a.bin", lambda file: file.write_bytes(b"new"))
    replace_folder(tmp_path / "b", lambda folder: (folder / "c.bin").write_bytes(b"new"))
    assert done == ["fsync", "replace", "fsync", "rename"]
