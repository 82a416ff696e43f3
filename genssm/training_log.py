"""What a training writes down as it goes: a row of CSV, and TensorBoard where that is wanted.

TensorBoard gets the sample sheets as well: to see, to hear or to read beside the curves.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from genssm.disk import replace_file, space_for
from genssm.sheets import Sheet

LOG = "log.csv"


@dataclass(frozen=True)
class Progress:
    """What a training reports about every few seconds."""

    step: int
    minutes: float
    fraction: float  # of the budget, 0 … 1
    tokens: int
    loss: float  # bits per token, smoothed
    tokens_per_second: float
    validation: float | None  # in the unit of the codec, when it was just measured
    skipped: int = 0  # steps so far whose gradient was not finite
    length: int = 0  # of the sequences, now


class Log:
    """Rows of ``log.csv``, and the same numbers for TensorBoard in ``tensorboard/``."""

    def __init__(self, file: Any, board: Any) -> None:
        self._file, self._board, self._rows = file, board, csv.writer(file)

    def write(self, progress: Progress) -> None:
        """Append one report."""
        values = asdict(progress)
        self._rows.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values.values()])
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if value is not None and name != "step":
                    self._board.add_scalar(name, value, progress.step)
            self._board.flush()

    def show(self, sheet: Sheet) -> None:
        """Show a sample sheet in TensorBoard, if that is wanted."""
        if self._board is None:
            return
        if isinstance(sheet.raw, str):
            self._board.add_text("samples", sheet.raw, sheet.step)
        elif sheet.rate is not None:
            self._board.add_audio("samples", sheet.raw, sheet.step, sheet.rate)
        else:
            self._board.add_image("samples", sheet.raw, sheet.step, dataformats="HWC")
        self._board.flush()


@contextmanager
def open_log(out: Path, step: int, tensorboard: bool) -> Iterator[Log]:
    """The log of the training in ``out``, begun or continued after ``step`` steps.

    What an earlier process wrote of later steps, and did not save, is left out. Raises ValueError
    if TensorBoard is wanted and not installed.
    """
    path, board = out / LOG, None
    if tensorboard:
        board = _board(out / "tensorboard", step)
    names = [field.name for field in fields(Progress)]
    before = _rows(path, names, step) if step and path.exists() else []
    replace_file(path, lambda file: _begin(file, names, before))
    try:
        with space_for(path), path.open("a", newline="") as file:
            yield Log(file, board)
    finally:
        if board is not None:
            board.close()


def _rows(path: Path, names: list[str], step: int) -> list[list[str]]:
    """The rows to ``step`` of a log that may have been written with other columns."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdecimal()]
    return [[row.get(name) or "" for name in names] for row in rows if int(row["step"]) <= step]


def _begin(path: Path, names: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            'TensorBoard is not installed; pip install "genssm[train]" or leave it out'
        ) from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
