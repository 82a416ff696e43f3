"""Thousands of samples into a folder: shared among processes, resumed, none written twice.

Sample i of a seed is the same whoever draws it, so a file is named by its index: ``000042.png``.
What is there already is not drawn again; ``bulk.json`` says what the folder holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from genssm.disk import remove_leftovers, replace_file
from genssm.files import SUFFIXES, encoded, noted
from genssm.pipeline import Pipeline
from genssm.request import Plan, Request
from genssm.session import Sample
from genssm.settings import check_types

_FACTS = "bulk.json"


@dataclass(frozen=True)
class Bulk:
    """What a folder of samples holds: ``count`` of them, class after class by turns."""

    checkpoint: str  # content hash
    weights: str
    request: dict[str, Any]  # settings of Request, the same for all
    prompt: str | None  # text, or the name of a class; None: every class by turns
    seed: int
    count: int
    rate: float = 1.0  # of the model

    def __post_init__(self) -> None:
        check_types(self)


def sample_to_folder(
    pipe: Pipeline,
    folder: Path,
    request: Request,
    prompt: str | None,
    *,
    rank: int = 0,
    processes: int = 1,
    report: Callable[[int, int], None] = lambda done, all: None,
) -> int:
    """Draw what is missing of ``request.count`` samples in ``folder``; return how many that was.

    Process ``rank`` of ``processes`` draws every ``processes``-th block. Interrupted or killed, it
    goes on where it stopped; a larger count adds to the samples that are there. ``request`` must
    set a seed. Raises ValueError for a folder with other samples, or for settings that do not fit.
    """
    if request.seed is None:
        raise ValueError("samples in a folder need a seed, so that drawing can be resumed")
    if request.rank > 1:
        raise ValueError("rank chooses among samples; in a folder each is kept")
    if request.first or request.label is not None:
        raise ValueError("a folder begins with sample 0, and its prompt names the class, if any")
    if not 0 <= rank < processes:
        raise ValueError(f"rank must lie in 0 … processes - 1, got {rank} of {processes}")
    label, _ = next(_blocks(pipe, request.count, prompt))
    _plan(pipe, prompt, replace(request, label=label))  # refuses before the folder is made
    _agree(pipe, folder, request, prompt)
    blocks = list(_blocks(pipe, request.count, prompt))[rank::processes]
    mine = {_FACTS} | {_file(pipe, folder, i).name for _, indices in blocks for i in indices}
    remove_leftovers(folder, mine.__contains__, idle=60)  # a file is written in less
    drawn = 0
    for label, indices in blocks:
        missing = [i for i in indices if not _file(pipe, folder, i).exists()]
        if not missing:
            continue
        plan = replace(_plan(pipe, prompt, replace(request, label=label)), indices=tuple(missing))
        for session in pipe.batches(plan):
            for sample in session.run():
                _write(pipe, sample, _file(pipe, folder, sample.index), prompt)
                drawn += 1
            report(drawn, request.count)
    return drawn


def _plan(pipe: Pipeline, prompt: str | None, request: Request) -> Plan:
    text = prompt if pipe.modality == "text" else None
    return pipe.plan(text, replace(request, count=1))


def _agree(pipe: Pipeline, folder: Path, request: Request, prompt: str | None) -> None:
    """Check that the folder is new or holds fewer or more of the same samples, and say so in it."""
    assert request.seed is not None
    settings = {k: v for k, v in asdict(request).items() if k not in ("count", "seed", "first")}
    plain = json.loads(json.dumps(settings))
    seed, count = request.seed, request.count
    facts = Bulk(pipe.content_hash, pipe.stepped_weights, plain, prompt, seed, count, pipe.rate)
    file = folder / _FACTS
    # Looked at before the facts: another process writes those before its first sample.
    occupied = folder.is_dir() and any(not p.name.startswith(".") for p in folder.iterdir())
    if file.exists():
        try:
            before = Bulk(**json.loads(file.read_text()))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{str(file)!r} is damaged; use another folder") from error
        if replace(before, count=facts.count) != facts:
            raise ValueError(
                f"{str(folder)!r} holds samples of another model, prompt, seed or setting; use "
                "another folder"
            )
        if before.count >= facts.count:
            return
    elif occupied:
        raise FileExistsError(f"{str(folder)!r} holds something else; use another folder")
    replace_file(file, lambda target: target.write_text(json.dumps(asdict(facts), indent=1)))


def _blocks(pipe: Pipeline, count: int, prompt: str | None) -> Iterator[tuple[str | None, range]]:
    """Indices that are drawn side by side, with their class: index i has class i mod classes."""
    size = pipe.side_by_side
    classes = pipe.codec.classes if prompt is None else ()
    if not classes:
        label = prompt if pipe.modality != "text" else None
        for first in range(0, count, size):
            yield label, range(first, min(count, first + size))
        return
    stride = size * len(classes)
    for first in range(0, count, stride):
        for i, label in enumerate(classes):
            if indices := range(first + i, min(count, first + stride), len(classes)):
                yield label, indices


def _file(pipe: Pipeline, folder: Path, index: int) -> Path:
    return folder / f"{index:06}{SUFFIXES[pipe.modality]}"


def _write(pipe: Pipeline, sample: Sample, path: Path, prompt: str | None) -> None:
    content = noted(encoded(pipe.codec, sample.raw), pipe.recipe([sample], prompt))
    replace_file(path, lambda file: file.write_bytes(content))
