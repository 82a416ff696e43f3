"""``genssm score``, ``evaluate``, ``models`` and ``inspect``."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from genssm.commands.console import Json, Model, Quiet, UsageError, command
from genssm.folders import record_metric, shipped_folders
from genssm.startup import collector_at_rest
from genssm.terminal import note

if TYPE_CHECKING:
    from genssm.request import Settings


@command
@collector_at_rest()
def score(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE|TEXT",
            help="Text (- reads stdin, a .txt file is read), or a picture or sound file.",
        ),
    ],
    model: Model = "wiki",
    label: Annotated[str | None, typer.Option(help="Class in whose context it is scored.")] = None,
    classify: Annotated[
        bool, typer.Option("--classify", help="The probability of each class instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the exact likelihood of one text, picture or sound, or classify by it."""
    from genssm import files
    from genssm.pipeline import load

    pipe = load(model)
    try:
        raw = files.read_prompt(pipe.codec, source, sys.stdin)
        if pipe.modality != "text" and isinstance(raw, str):
            raise UsageError(f"a class has no likelihood; give a file instead of {source!r}")
        if classify and label is not None:
            raise UsageError("--classify compares all classes; leave out --label")
        facts = files.classification(pipe, raw) if classify else files.likelihood(pipe, raw, label)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if as_json:
        sys.stdout.write(json.dumps({"model": model} | facts) + "\n")
    elif classify:
        for name, p in facts["classes"].items():
            sys.stdout.write(f"{p:7.4f}  {name}\n")
    else:
        sys.stdout.write(
            f"{facts['bits']:.4f} bits, {facts['value']:.4f} {facts['unit']}  "
            f"({len(facts['token_bits'])} tokens, {facts['units']} "
            f"{facts['unit'].removeprefix('bits/')}s)\n"
        )


@command
def evaluate(
    name: Annotated[str, typer.Argument(help="Shipped name, checkpoint folder or Hub id.")],
    data: Annotated[Path, typer.Option(help="Text, .npy of pictures, folder or tar of files.")],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most documents, pictures or clips.")
    ] = None,
    record: Annotated[
        str | None,
        typer.Option(help="Write the result into the checkpoint's config.json under this name."),
    ] = None,
    rate: Annotated[
        float, typer.Option(help="Scale the time step of sound, as in sample; 0.5: twice the Hz.")
    ] = 1.0,
    classify: Annotated[
        bool, typer.Option("--classify", help="How often the likeliest class is the right one.")
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(min=2, help="Draw so many and hold them against the data instead."),
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="With --samples: what judges pictures and sound.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="With --samples, as are the following.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep this much probability.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Over 1 stresses the class.")] = None,
    plausible: Annotated[
        float | None, typer.Option(help="With guidance over 1, keep what is this likely without.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Draw so many for each, keep the likeliest.")
    ] = None,
    rank_by: Annotated[
        str | None, typer.Option(help="bits, or class: keep what is most surely of its class.")
    ] = None,
    trim: Annotated[
        float | None, typer.Option(help="With --rank, pass over this part of the likeliest.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure exact likelihood (bits per byte, dimension or sample), or the quality of samples."""
    from genssm.pipeline import load
    from genssm.sample_quality import classification_accuracy, evaluate_samples
    from genssm.sources import read_examples, split_of

    options = {"temperature": temperature, "top_p": top_p, "guidance": guidance,
               "plausible": plausible, "rank": rank, "rank_by": rank_by, "trim": trim}  # fmt: skip
    given = {option: value for option, value in options.items() if value is not None}
    if samples is not None and limit is not None:
        raise UsageError("--limit is of data that is measured; --samples alone says how many")
    if samples is None and (given or classifier is not None):
        named = ", ".join("--" + name.replace("_", "-") for name in given or ("classifier",))
        raise UsageError(f"{named}: for samples only; add --samples N")
    if classify and samples is not None:
        raise UsageError("--classify measures data, --samples measures samples; give one of them")
    _check_record(record)
    pipe = load(name).at_rate(rate)
    if samples is not None:
        settings: Settings = {**given, "seed": seed}  # type: ignore[typeddict-item]
        told = functools.partial(note, quiet=quiet)
        facts = evaluate_samples(pipe, data, samples, settings, classifier, told)
    else:
        examples = read_examples(data, pipe.codec)
        if (split := split_of(data)) is not None:
            note(f"the {split} split of {data}", quiet)
        if classify:
            facts = classification_accuracy(pipe, examples, limit)
        else:
            facts = pipe.evaluate(examples, limit).facts()
    if record is not None:
        kept = {k: v for k, v in facts.items() if k not in ("bits", "tokens", "units")}
        if isinstance(value := kept.get("value"), float):
            kept["value"] = round(value, 6)  # it is rounded again where it is shown
        record_metric(name, record, kept)
    if as_json:
        sys.stdout.write(json.dumps({"model": name, "rate": rate, **facts}) + "\n")
    else:
        _print_measurement(facts)


def _print_measurement(facts: dict[str, object]) -> None:
    if "bits" not in facts:
        for key, value in facts.items():
            sys.stdout.write(f"{key:<20} {json.dumps(value)}\n")
        return
    unit = str(facts["unit"])
    sys.stdout.write(
        f"{facts['value']:.4f} {unit}  ({facts['examples']} examples, {facts['tokens']} tokens, "
        f"{facts['units']} {unit.removeprefix('bits/')}s)\n"
    )
    if facts.get("word_perplexity") is not None:
        sys.stdout.write(
            f"word perplexity {facts['word_perplexity']:.1f}  ({facts['words']} words and ends of "
            "lines)\n"
        )


def _check_record(record: str | None) -> None:
    if record is not None and not record.strip():
        raise UsageError("--record needs a name for the result, such as validation")


@command
def models(as_json: Json = False) -> None:
    """List the shipped models."""
    for name, folder in shipped_folders().items():
        config = json.loads((folder / "config.json").read_text())
        size = sum(f.stat().st_size for f in folder.iterdir())
        metrics = config["metrics"].items()
        measured = [item for item in metrics if str(item[1].get("unit")).startswith("bits/")]
        metric = measured[-1] if measured else None
        if as_json:
            facts = {"name": name, "modality": config["codec"]["kind"], "bytes": size}
            sys.stdout.write(json.dumps(facts | {"metrics": config["metrics"]}) + "\n")
        else:
            score = f"{metric[1]['value']:.3f} {metric[1]['unit']} ({metric[0]})" if metric else ""
            sys.stdout.write(
                f"{name:<10} {config['codec']['kind']:<6} {size / 2**20:5.1f} MiB  {score}\n"
            )


@command
@collector_at_rest()
def inspect(
    name: Annotated[str, typer.Argument(help="Shipped name, checkpoint folder or Hub id.")],
    as_json: Json = False,
) -> None:
    """Show a model's size, its training, and how exactly its two views agree."""
    from genssm.inspection import inspect as run
    from genssm.pipeline import load

    facts = run(load(name))
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    layers = facts.pop("layers", [])
    for key, value in facts.items():
        text = json.dumps(value) if isinstance(value, dict | list) else value
        sys.stdout.write(f"{key.replace('_', ' '):<34} {text}\n")
    for layer in layers:
        low, middle, high = layer["half_lives"]
        sys.stdout.write(
            f"{layer['name']:<34} difference {layer['difference']:.1e}, "
            f"spectral radius {layer['spectral_radius']:.5f}, condition {layer['condition']:.1e}, "
            f"half-lives {low:.0f} / {middle:.0f} / {high:.0f} tokens\n"
        )
