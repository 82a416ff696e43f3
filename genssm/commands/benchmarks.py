"""``genssm benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genssm.commands.console import (
    Force,
    UsageError,
    check_new,
    command,
    require_gradio,
    say,
    write_facts,
)
from genssm.commands.training import Changes, RecipeName, recipe_of
from genssm.disk import replace_file

Figures = Annotated[Path | None, typer.Option("--out", "-o", help="Write all figures as JSON.")]


@command
def load(
    out: Figures = None,
    visitors: Annotated[int, typer.Option(min=1, max=256, help="At the same time.")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="How long they keep coming.")] = 60,
    cold: Annotated[
        bool,
        typer.Option("--cold", help="Only the first text of a new process with nothing compiled."),
    ] = False,
    force: Force = False,
) -> None:
    """Measure the page: simulated visitors on three tabs, their waiting time, the memory."""
    require_gradio()
    from genssm.app_benchmark import benchmark_app, measure_cold_start

    check_new(out, force)
    facts = measure_cold_start(say) if cold else benchmark_app(visitors, seconds, say)
    write_facts(out, facts)


@command
def layers(
    out: Figures = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    small: Annotated[bool, typer.Option("--small", help="The smallest sizes only.")] = False,
    force: Force = False,
) -> None:
    """Measure the layers: cost against LSSL, training speed, agreement of the views."""
    import torch

    from genssm.benchmark import benchmark_layers

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"there is no device {device!r} here; known: cpu, and cuda with a GPU")
    check_new(out, force)
    torch.set_flush_denormal(True)
    facts = benchmark_layers(device, small, say)
    write_facts(out, facts)


@command
def sampling(
    out: Figures = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the speeds as PNG (needs matplotlib).")
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="Tiny models only.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Measure sampling: tokens/s, bandwidth, GPT-2 and convolution beside it, first token.

    With a GPU, also batches of the engine cuda, and GPT-2 there.
    """
    import torch

    from genssm import cuda_benchmark, sampling_benchmark

    for file in (out, plot):
        check_new(file, force)
    if plot is not None:
        sampling_benchmark.require_plots()
    torch.set_flush_denormal(True)
    facts = sampling_benchmark.benchmark_sampling(small, say)
    if torch.cuda.is_available():
        facts["cuda"] = cuda_benchmark.benchmark_cuda(torch.device("cuda"), small, say)
    write_facts(out, facts)
    if plot is not None:
        replace_file(plot, lambda file: sampling_benchmark.plot(facts, file))


@command
def quality(
    recipe: RecipeName,
    data: Annotated[Path, typer.Option(help="As for genssm train.")],
    work: Annotated[Path, typer.Option(help="Folder for the tokenizer and the tokens.")],
    steps: Annotated[int, typer.Option(min=1, help="Updates of each model.")] = 1000,
    settings: Changes = None,
    out: Figures = None,
    force: Force = False,
) -> None:
    """Train a recipe and a GPT-2 of its size on the same tokens; measure both."""
    import torch

    from genssm.quality_benchmark import benchmark_quality

    check_new(out, force)
    chosen = recipe_of(recipe, settings or [])
    torch.set_flush_denormal(True)
    facts = benchmark_quality(chosen, data, work, steps, say)
    write_facts(out, facts)
