"""``genssm train`` and ``genssm classifier``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genssm.commands.console import Force, Quiet, UsageError, check_new, command
from genssm.terminal import note

if TYPE_CHECKING:
    from genssm.checkpoint import Checkpoint
    from genssm.recipes import Recipe

RecipeName = Annotated[
    str, typer.Argument(help="Name of a recipe: wiki, cifar10, digits, mnist, sc09, ljspeech.")
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="key=value of the recipe (repeatable).")
]


@command
def train(
    recipe: RecipeName,
    data: Annotated[
        Path,
        typer.Option(
            help="Folder with train and validation files, or a public set: wikitext-2, "
            "wikitext-103, tinystories, cifar10, mnist, sc09, ljspeech."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the training.")],
    settings: Changes = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Training time; default: the recipe's steps.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with the training in --out, with its settings and --set.")
    ] = False,
    start: Annotated[
        str | None,
        typer.Option("--from", help="Begin with the weights and shape of this model."),
    ] = None,
    sheets: Annotated[
        float | None,
        typer.Option(min=0, help="Every so many minutes, draw samples into OUT/samples."),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write the log for TensorBoard, too.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train a model; the best checkpoint so far is OUT/checkpoint.

    On several devices: torchrun --nproc-per-node N -m genssm train …
    """
    import torch

    from genssm import checkpoint
    from genssm.distributed import rank
    from genssm.train import train as run
    from genssm.training_report import reporter

    if out == Path():
        raise UsageError("--out needs a folder of its own, such as runs/NAME")
    begun = None if start is None else checkpoint.load(start)
    chosen = recipe_of(recipe, settings or [], out if resume else None, begun)
    torch.set_flush_denormal(True)
    leads = rank() == 0
    with reporter(recipe, chosen.modality, quiet or not leads) as report:
        target = run(
            chosen, data, out, minutes=minutes, resume=resume, start=begun, sheet_minutes=sheets,
            tensorboard=tensorboard, report=report,
        )  # fmt: skip
    if leads:
        sys.stdout.write(f"{target}\n")


def recipe_of(
    name: str, settings: list[str], resumed: Path | None = None, start: Checkpoint | None = None
) -> Recipe:
    """The recipe of a name, or what the training in ``resumed`` made of it, with the settings.

    A model to ``start`` from gives the shape that is not set.
    """
    from genssm import training_state
    from genssm.recipes import RECIPES, parse_settings

    if name not in RECIPES:
        raise UsageError(f"there is no recipe {name!r}; known: {', '.join(RECIPES)}")
    begun = RECIPES[name]
    if resumed is not None and training_state.exists(resumed):
        kept = training_state.kept_recipe(resumed)
        owners = [known for known, recipe in RECIPES.items() if recipe.codec == kept.codec]
        if owners and name not in owners:
            raise UsageError(f"the training in {str(resumed)!r} is of {owners[0]}, not of {name}")
        begun = kept if kept.modality == begun.modality else begun
    try:
        if start is not None and start.codec.modality == begun.modality:
            begun = begun.shaped_as(start.model.config)
        return begun.changed(parse_settings(settings))
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


@command
def classifier(
    recipe: Annotated[
        str, typer.Argument(help="Recipe whose classes it learns: cifar10, digits, mnist, sc09.")
    ],
    data: Annotated[Path, typer.Option(help="Folder with train and validation files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write (.safetensors).")],
    epochs: Annotated[int, typer.Option(min=1, help="Times that it sees the data.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Of its weights and the order.")] = 0,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Train a small classifier of real data, which then judges samples (evaluate --samples)."""
    from genssm.classifier import save_classifier, train_classifier
    from genssm.preparation import build_codec
    from genssm.sources import open_split

    chosen = recipe_of(recipe, [])
    check_new(out, force)
    codec = build_codec(chosen)
    parts = (open_split(data, s, codec.modality).examples(codec) for s in ("train", "validation"))
    model, report = train_classifier(
        codec, *parts, epochs=epochs, flip=chosen.train.flip, seed=seed,
        report=lambda epoch, loss: note(f"epoch {epoch + 1} of {epochs} · {loss:.4f} nats", quiet),
    )  # fmt: skip
    save_classifier(model, report, out)
    sys.stdout.write(
        f"{out}  right on {report.accuracy:.1%} of {report.validation_examples} held-out examples\n"
    )
