"""Folders of samples: every index once, whoever draws it, and gone on with after any end."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from genssm import bulk, notes
from genssm.bulk import sample_to_folder
from genssm.checkpoint import Checkpoint
from genssm.pipeline import Pipeline
from genssm.request import Request


@pytest.fixture(scope="module")
def pipes(make_checkpoint: Callable[[str], Checkpoint]) -> dict[str, Pipeline]:
    return {m: Pipeline("small", make_checkpoint(m), engine="eager") for m in ("text", "image")}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "side_by_side", 3)


REQUEST = Request(count=10, seed=5, max_tokens=6)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "bulk.json"}


@pytest.mark.parametrize("modality", ["text", "image"])
def test_processes_share_the_samples_of_one(
    modality: str, pipes: dict[str, Pipeline], tmp_path: Path
):
    pipe = pipes[modality]
    assert sample_to_folder(pipe, tmp_path / "one", REQUEST, None) == 10
    drawn = [
        sample_to_folder(pipe, tmp_path / "two", REQUEST, None, rank=rank, processes=2)
        for rank in (1, 0)
    ]
    assert sum(drawn) == 10
    assert min(drawn) >= 3
    one = contents(tmp_path / "one")
    assert [int(Path(name).stem) for name in one] == list(range(10))
    assert contents(tmp_path / "two") == one
    assert len(set(one.values())) == 10


def test_a_folder_has_one_rate(make_checkpoint: Callable[[str], Checkpoint], tmp_path: Path):
    pipe = Pipeline("small", make_checkpoint("audio"), engine="eager")
    request = Request(count=2, seed=5, max_tokens=6)
    assert sample_to_folder(pipe, tmp_path / "out", request, None) == 2
    with pytest.raises(ValueError, match="another model, prompt, seed or setting"):
        sample_to_folder(pipe.at_rate(0.5), tmp_path / "out", replace(request, count=4), None)


def test_what_cannot_be_drawn_takes_no_folder(pipes: dict[str, Pipeline], tmp_path: Path):
    with pytest.raises(ValueError, match="guidance needs a model with classes"):
        sample_to_folder(pipes["text"], tmp_path / "out", replace(REQUEST, guidance=2.0), None)
    for rank, processes in ((0, 0), (2, 2), (-1, 1)):
        with pytest.raises(ValueError, match="rank must lie in"):
            sample_to_folder(
                pipes["text"], tmp_path / "out", REQUEST, None, rank=rank, processes=processes
            )
    assert not (tmp_path / "out").exists()


def test_each_file_is_the_sample_of_its_index_with_its_recipe(
    pipes: dict[str, Pipeline], tmp_path: Path
):
    """Of classes by turns; ``genssm sample --like`` can make each again."""
    sample_to_folder(pipes["image"], tmp_path / "out", REQUEST, None)
    for i in (0, 3, 7):
        note = notes.find(tmp_path / "out" / f"{i:06}.png")
        assert note is not None
        recipe = json.loads(note)
        assert recipe["indices"] == [i]
        assert recipe["seed"] == 5
        assert recipe["tokens"] == [pipes["image"].codec.start(("cat", "dog")[i % 2])]


def test_what_is_there_is_not_drawn_again_and_more_can_be_added(
    pipes: dict[str, Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pipe, out = pipes["image"], tmp_path / "out"
    whole = tmp_path / "whole"
    sample_to_folder(pipe, whole, replace(REQUEST, count=14), None)
    write, written = bulk._write, []

    def fail_at_the_fifth(*arguments) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(arguments[2])
        write(*arguments)

    monkeypatch.setattr(bulk, "_write", fail_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        sample_to_folder(pipe, out, REQUEST, None)
    monkeypatch.setattr(bulk, "_write", write)
    assert len(contents(out)) == 4
    before = {p: p.stat().st_mtime_ns for p in written}
    assert sample_to_folder(pipe, out, REQUEST, None) == 6
    assert sample_to_folder(pipe, out, REQUEST, None) == 0
    assert sample_to_folder(pipe, out, replace(REQUEST, count=14), None) == 4
    assert {p: p.stat().st_mtime_ns for p in written} == before
    assert contents(out) == contents(whole)


def test_what_a_killed_writer_left_is_removed_by_who_draws_it_again(
    pipes: dict[str, Pipeline], tmp_path: Path
):
    """Of two processes each leaves alone what the other may be writing."""
    pipe = pipes["image"]
    sample_to_folder(pipe, tmp_path, replace(REQUEST, count=1), None)
    for name in (".000000-abcd_123.png", ".000009-abcd_123.png", ".mine.png"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9, 1e9))
    (tmp_path / ".000000-at__work.png").touch()
    sample_to_folder(pipe, tmp_path, REQUEST, None, rank=0, processes=2)
    hidden = [p.name for p in tmp_path.glob(".*")]
    assert sorted(hidden) == [".000000-at__work.png", ".000009-abcd_123.png", ".mine.png"]
    sample_to_folder(pipe, tmp_path, REQUEST, None, rank=1, processes=2)
    assert sorted(p.name for p in tmp_path.glob(".*")) == [".000000-at__work.png", ".mine.png"]


@pytest.mark.parametrize(
    ("request_", "prompt"),
    [
        (replace(REQUEST, seed=6), None),
        (replace(REQUEST, temperature=0.5), None),
        (REQUEST, "cat"),
    ],
)
def test_other_samples_do_not_share_a_folder(
    request_: Request, prompt: str | None, pipes: dict[str, Pipeline], tmp_path: Path
):
    sample_to_folder(pipes["image"], tmp_path / "out", replace(REQUEST, count=1), None)
    with pytest.raises(ValueError, match="of another model, prompt, seed or setting"):
        sample_to_folder(pipes["image"], tmp_path / "out", request_, prompt)


def test_a_folder_with_other_things_is_refused(pipes: dict[str, Pipeline], tmp_path: Path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="holds something else"):
        sample_to_folder(pipes["text"], tmp_path, REQUEST, None)
    with pytest.raises(ValueError, match="need a seed"):
        sample_to_folder(pipes["text"], tmp_path / "a", replace(REQUEST, seed=None), None)
    with pytest.raises(ValueError, match="rank chooses among samples"):
        sample_to_folder(pipes["text"], tmp_path / "a", replace(REQUEST, rank=2), None)
    for other in (replace(REQUEST, first=3), replace(REQUEST, label="cat")):
        with pytest.raises(ValueError, match="begins with sample 0, and its prompt names"):
            sample_to_folder(pipes["image"], tmp_path / "a", other, None)
    (tmp_path / "b").mkdir()
    for damaged in ("{}", "[" * 100_000, "[]", "\x00"):
        (tmp_path / "b" / "bulk.json").write_text(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            sample_to_folder(pipes["text"], tmp_path / "b", REQUEST, None)
