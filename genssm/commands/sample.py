"""``genssm sample``."""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genssm.commands.console import Force, Json, Quiet, UsageError, command
from genssm.folders import CheckpointError, local_folder
from genssm.startup import collector_at_rest
from genssm.terminal import harmless, note, write_nowhere

if TYPE_CHECKING:
    from genssm.engine import Reading
    from genssm.files import Output
    from genssm.pipeline import Pipeline
    from genssm.request import Plan, Request
    from genssm.session import Sample, Session

PATIENCE = 3.0  # seconds without a piece after which one is told why
FIRST_USE = "the first sample on a machine compiles the sampling loop, about 10 seconds …"


@command
def sample(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Shipped name, checkpoint folder or Hub id (wiki)."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="Text to continue (- reads stdin, a .txt file is read); for pictures and sound a "
            "file to continue or the name of a class.",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="File to write; - is stdout.")
    ] = None,
    force: Force = False,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="Number of samples (1).")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=0, help="Most tokens to draw (text: 256).")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Longest sound to draw (default 2).")
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds that the sound is to last (the model draws them)."),
    ] = None,
    keep_rows: Annotated[
        int | None, typer.Option(min=0, help="Rows of a prompt picture to keep (half).")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Class of a picture or sound given as prompt.")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0, help="0 is greedy, 1 is the model itself (text 0.8, pictures 0.95, sound 0.9)."
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Keep the k likeliest.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep this much probability (text 0.95).")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Keep what is this likely relative to the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Over 1 makes what was said less likely.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the text before this string (repeatable).")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="The same seed gives the same sample (a new one; folders: 0)."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="auto, eager (torch), cpu (compiled, many times faster) or cuda (GPU, batches)."
        ),
    ] = "auto",
    weights: Annotated[
        str,
        typer.Option(
            help="bf16, fp32 (exact) or int8 (fastest on x86; cpu). The eager engine is exact."
        ),
    ] = "bf16",
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Over 1 stresses the class: any + w (class - any), in logits "
            "(pictures 5, sound 5)."
        ),
    ] = None,
    plausible: Annotated[
        float | None,
        typer.Option(
            help="With guidance over 1, keep what is this likely without it, relative to the "
            "likeliest (sound 0.15)."
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Draw so many for each sample, keep the best.")
    ] = None,
    rank_by: Annotated[
        str | None,
        typer.Option(
            help="With --rank, the best is of the fewest bits per token (bits) or the most surely "
            "of its class (class)."
        ),
    ] = None,
    trim: Annotated[
        float | None, typer.Option(help="With --rank, pass over this part of the likeliest.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Scale the time step of sound: 0.5 gives twice the sampling rate, 2 half of it. "
            "Pools keep their number of samples, so quality falls with the distance from 1."
        ),
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Continue from this state file instead of a prompt.")
    ] = None,
    save_state: Annotated[
        Path | None, typer.Option(help="Write the state after the sample, to continue it later.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="Repeat the samples of this PNG, WAV or JSON exactly.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Sample text, pictures or sound; the model decides which.

    --out FOLDER/ gets one file a sample; repeated, only those that are missing are drawn.
    """
    _check_out(out, as_json)
    if out is not None and (out.endswith(os.sep) or Path(out).is_dir()):
        _sample_to_folder(context, Path(out))
        return
    with ExitStack() as start:  # closed by the first piece
        start.enter_context(collector_at_rest())
        _sample(context, start)


def _sample(context: typer.Context, start: ExitStack) -> None:
    from genssm import files

    options = context.params
    out, force, as_json = options["out"], options["force"], options["as_json"]
    quiet, save_state = options["quiet"], options["save_state"]
    try:
        job = _repeated(context) if options["like"] else _requested(context)
        pipe, plan = job.pipe, job.plan
        count = len(plan.indices) // job.request.rank
        output = files.Output(pipe, out, count, force, job.prompt, job.pause)
        if save_state is not None:
            _check_state_file(save_state, output, force, len(plan.indices) == 1 and not job.then)
        sessions = itertools.chain(pipe.batches(plan, job.state), *map(pipe.batches, job.then))
    except CheckpointError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
    single = len(plan.indices) == 1
    live = pipe.modality == "text" and single and out is None and not as_json
    lost: list[OSError] | None = None if save_state is None else []
    if live:
        _write(pipe.codec.decode(plan.tokens[: pipe.codec.whole(plan.tokens)]), lost)
    if pipe.engine_name.startswith("cpu"):
        waiting = threading.Timer(PATIENCE, note, [FIRST_USE, quiet or as_json])
        waiting.daemon = True
        waiting.start()
        start.callback(waiting.cancel)
    drawn, interrupted = _draw(sessions, live, start.close, lost)
    samples = pipe.best([s for session in drawn for s in session.samples()], job.request)
    try:
        _deliver(samples, output, as_json, live)
    finally:
        if save_state is not None and drawn:
            with files.claimed([save_state], force):
                pipe.save_state(drawn[0].reading(), save_state)
    if lost:
        raise lost[0]
    if not quiet and not as_json and samples:
        _summarize(samples, output, drawn)
    if interrupted:
        raise KeyboardInterrupt


def _check_out(out: str | None, as_json: bool) -> None:
    if out == "":
        raise UsageError("--out needs a file, a folder/ or -, got ''")
    if out == "-" and sys.__stdout__ is None:
        raise UsageError("--out - writes to stdout, which is closed; give --out a file")
    if out == "-" and as_json:
        raise UsageError("--out - and --json both write to stdout; give --out a file")


def _check_state_file(file: Path, output: Output, force: bool, single: bool) -> None:
    from genssm.files import check_target

    if not single:
        raise UsageError("--save-state keeps one sample; leave --count and --rank at 1")
    check_target(file, force)
    if file.resolve() in [path.resolve() for path in output.paths()]:
        raise UsageError(f"the state and the sample need a file each, not {str(file)!r} both")


def _sample_to_folder(context: typer.Context, out: Path) -> None:
    from genssm import files
    from genssm.bulk import sample_to_folder
    from genssm.distributed import processes, rank

    options = context.params
    for name in ("like", "state", "save_state", "as_json", "keep_rows", "label", "force"):
        if options[name]:
            option = "json" if name == "as_json" else name.replace("_", "-")
            rest = "; a class is its --prompt" if name == "label" else ""
            raise UsageError(f"a folder of samples takes no --{option}{rest}")
    try:
        pipe = _loaded(options)
        seed = options["seed"] or 0  # so that the same command goes on
        request = _request(pipe, options | {"seed": seed})
        prompt = options["prompt"]
        if prompt == "-" and processes() > 1:
            raise UsageError("several processes cannot share stdin; give the prompt as a .txt file")
        if pipe.modality == "text":
            prompt = files.read_prompt(pipe.codec, prompt, sys.stdin)
        elif prompt not in (None, *pipe.codec.labels, "any"):
            raise UsageError(f"a folder of samples takes a class as prompt, not {prompt!r}")
    except ValueError as error:
        raise UsageError(str(error)) from error
    quiet = options["quiet"] or rank() > 0
    drawn = sample_to_folder(
        pipe, out, request, prompt, rank=rank(), processes=processes(),
        report=lambda done, every: note(f"{done} of {every} samples drawn here", quiet),
    )  # fmt: skip
    sys.stdout.write(f"{out}  {drawn} samples drawn\n")


@dataclass(frozen=True)
class _Job:
    """What one ``genssm sample`` does."""

    pipe: Pipeline
    plan: Plan
    state: Reading | None
    prompt: str | None  # as it was given
    request: Request
    then: tuple[Plan, ...] = ()  # of what follows in the same sound,
    pause: float | None = None  # after so many seconds; None where nothing does


def _loaded(options: dict[str, Any]) -> Pipeline:
    from genssm import pipeline

    name = "wiki" if options["model"] is None else options["model"]
    pipe = pipeline.load(name, options["engine"], options["weights"])
    return pipe if options["rate"] is None else pipe.at_rate(options["rate"])


def _request(pipe: Pipeline, options: dict[str, Any]) -> Request:
    from genssm.request import Request

    settings = {f.name: options.get(f.name) for f in fields(Request)}
    if options["seconds"] is not None:
        settings["max_tokens"] = _tokens(pipe, options["seconds"], options["max_tokens"])
    return Request(**{k: v for k, v in settings.items() if v is not None})


def _requested(context: typer.Context) -> _Job:
    from genssm import files

    options = context.params
    pipe = _loaded(options)
    request = _request(pipe, options)
    state = None if options["state"] is None else pipe.load_state(options["state"])
    prompt = files.read_prompt(pipe.codec, options["prompt"], sys.stdin)
    plan = pipe.plan(prompt, request, state)
    return _Job(pipe, plan, state, options["prompt"], request)


def _repeated(context: typer.Context) -> _Job:
    """``--like``: the recipe decides all; ``--model`` and ``--state`` may say where things are."""
    from genssm import files, pipeline
    from genssm.request import Request

    options = context.params
    allowed = {"like", "model", "state", "save_state", "out", "force", "as_json", "quiet"}
    for name in options:
        source = context.get_parameter_source(name)
        if name not in allowed and source is not None and source.name == "COMMANDLINE":
            option = name.replace("_", "-")
            raise UsageError(f"--like repeats a file as it was made; leave out --{option}")
    recipe = files.read_recipe(options["like"])
    model = options["model"] or recipe.model
    if options["model"] is None and local_folder(model) is None:  # a file starts no download
        raise UsageError(f"the file was made by the model {model!r:.200}; give it with --model")
    pipe = pipeline.load(model).at_recipe(recipe)
    state = None if options["state"] is None else pipe.load_state(options["state"])
    pause = recipe.pause if recipe.then else None
    return _Job(pipe, recipe.plan, state, recipe.prompt, Request(), recipe.then, pause)


def _tokens(pipe: Pipeline, seconds: float, max_tokens: int | None) -> int:
    if not isinstance(rate := getattr(pipe.codec, "rate", None), int):
        raise UsageError(f"--seconds is for sound; {pipe.name!r} makes {pipe.modality}")
    if max_tokens is not None:
        raise UsageError("give --seconds or --max-tokens, not both")
    if not seconds < 1e6:
        raise UsageError(f"--seconds must be less than a million, got {seconds}")
    return round(seconds * rate)


def _write(text: str, lost: list[OSError] | None) -> None:
    """Write text to stdout. An error, because its reader has gone or its disk is full, ends all,
    unless there is a list in which it can wait."""
    try:
        sys.stdout.write(harmless(text))
        sys.stdout.flush()
    except OSError as error:
        if lost is None:
            raise
        lost.append(error)
        write_nowhere(sys.stdout)


def _draw(
    sessions: Iterable[Session], live: bool, begun: Callable[[], None],
    lost: list[OSError] | None = None,
) -> tuple[list[Session], bool]:  # fmt: skip
    """What was drawn, and whether Ctrl-C cut it short. ``live`` writes text as it comes.

    ``begun`` is called at every piece, and when there is no more. ``lost``: see ``_write``.
    """
    drawn: list[Session] = []
    try:
        for session in sessions:
            drawn.append(session)
            for _, piece in session:
                begun()
                if live:
                    _write(piece, lost)
    except KeyboardInterrupt:
        if not drawn:
            raise
        return drawn, True
    finally:
        begun()
    return drawn, False


def _deliver(samples: list[Sample], output: Output, as_json: bool, live: bool) -> None:
    written = output.write(samples)
    if as_json:
        for item, file in zip(samples, written, strict=True):
            sys.stdout.write(json.dumps(output.facts(item, file)) + "\n")
    elif live:
        sys.stdout.write("\n")
    elif output.target is None:  # text for stdout
        for item in samples:
            sys.stdout.write(f"{harmless(item.raw)}\n")
    elif output.target != "-":
        for file in dict.fromkeys(written):
            sys.stdout.write(f"{file}\n")


def _summarize(samples: list[Sample], output: Output, drawn: list[Session]) -> None:
    preview = (
        output.preview(samples) if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ""
    )
    tokens = sum(len(s.tokens) for s in samples)
    bits = sum(s.bits for s in samples)
    seconds = sum(session.seconds for session in drawn)
    speed = sum(len(t) for session in drawn for t in session.tokens) / max(seconds, 1e-9)
    note(
        f"{preview}seed {samples[0].seed} · {tokens} tokens · {speed:.0f} tokens/s · "
        f"{bits / max(1, tokens):.2f} bits/token · {output.pipe.engine_name}"
    )
