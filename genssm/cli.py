"""The command line. Heavy imports live inside the commands."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from genssm.commands import benchmarks
from genssm.commands.console import FAILED, OK, told
from genssm.commands.measuring import evaluate, inspect, models, score
from genssm.commands.page import page
from genssm.commands.sample import sample
from genssm.commands.training import classifier, train
from genssm.terminal import note, write_nowhere

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for function in (sample, train, score, evaluate, classifier, models, inspect):
    app.command()(function)
app.command("app")(page)
benchmark = typer.Typer(help="Measure speed, memory and exactness.", no_args_is_help=True)
benchmark.command("app")(benchmarks.load)
for function in (benchmarks.layers, benchmarks.sampling, benchmarks.quality):
    benchmark.command()(function)
app.add_typer(benchmark, name="benchmark")


def _version(asked: bool) -> None:
    if asked:
        import genssm

        sys.stdout.write(f"genssm {genssm.__version__}\n")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Write, draw and speak with state space models."""


def main() -> None:
    """Entry point of the ``genssm`` command."""
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open()  # noqa: SIM115 - to the end
    for name in ("stdout", "stderr"):  # None where they were closed, as some services do
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - to the end
        # So that a terminal of another encoding, or a file's odd name, costs no sample.
        getattr(sys, name).reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: note(f"genssm: {message}")
    code, problem = OK, None
    try:
        app()
    except SystemExit as ended:
        code = ended.code
    except OSError as error:  # of --help
        problem = error
    try:
        sys.stdout.flush()
    except OSError as error:
        write_nowhere(sys.stdout)
        problem = None if code else error  # it has been told
    if problem is not None:
        note(f"genssm: {told(problem)}")
        code = FAILED
    sys.exit(code)


if __name__ == "__main__":
    main()
