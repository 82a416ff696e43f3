"""The live report of a training: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from genssm.codec import Audio, Image, Text
from genssm.terminal import note, write_nowhere
from genssm.training_log import Progress

_UNITS = {codec.modality: codec.unit for codec in (Text, Image, Audio)}


def describe(progress: Progress, modality: str) -> str:
    """One line: step, loss, speed, time left, and the validation when it was just measured."""
    left = progress.minutes * (1 / progress.fraction - 1) if progress.fraction > 0 else 0.0
    line = (
        f"step {progress.step} · {progress.tokens / 1e6:.2f} M tokens · "
        f"{progress.loss:.3f} bits/token · {progress.tokens_per_second:.0f} tokens/s · "
        f"{max(0.0, left):.0f} min left"
    )
    if progress.skipped:
        line += f" · {progress.skipped} steps skipped"
    if progress.validation is not None:
        line += f" · validation {progress.validation:.4f} {_UNITS[modality]}"
    return line


@contextmanager
def reporter(name: str, modality: str, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """The function that ``train`` calls every few seconds."""
    if quiet:
        yield lambda progress: None
    elif not sys.stderr.isatty():
        yield lambda progress: note(f"{name}: {describe(progress, modality)}")
    else:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        with Bar(TextColumn(name), BarColumn(), TextColumn("{task.description}"), console=console,
                 transient=False) as bar:  # fmt: skip
            task = bar.add_task("starting", total=1.0)

            def report(progress: Progress) -> None:
                line = describe(progress, modality)
                try:
                    if progress.validation is not None:
                        console.print(f"{name}: {line}")
                    bar.update(task, completed=progress.fraction, description=line)
                except OSError:  # a training outlives its terminal
                    write_nowhere(sys.stderr)

            yield report
