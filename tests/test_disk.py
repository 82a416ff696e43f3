"""Files that are whole or not there: the old one stays, and what killed writers left goes."""

import os
import time
from pathlib import Path

import pytest

from genssm.disk import remove_leftovers, replace_file


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


@pytest.mark.parametrize("name", ["a.png", "a.b.png", "folder", "a-b.png"])
def test_what_a_killed_writer_left_is_found_by_the_name_it_wrote(name: str, tmp_path: Path):
    def killed(file: Path) -> None:
        (tmp_path / "kept").mkdir()
        file.rename(tmp_path / "kept" / file.name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / name, killed)
    (left,) = (tmp_path / "kept").iterdir()
    remove_leftovers(left.parent, {"other", "b.png"}.__contains__)
    remove_leftovers(left.parent, {name}.__contains__, idle=60)
    assert left.exists()
    os.utime(left, times=(time.time() - 61,) * 2)
    remove_leftovers(left.parent, {name}.__contains__, idle=60)
    assert not left.exists()
