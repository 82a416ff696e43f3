"""The command line: parse, call one function, print. Heavy imports live inside the commands."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer

from genssm.terminal import harmless, note, write_nowhere

if TYPE_CHECKING:
    from genssm.checkpoint import Checkpoint
    from genssm.engine import Reading
    from genssm.files import Output
    from genssm.pipeline import Pipeline
    from genssm.recipes import Recipe
    from genssm.request import Plan, Request, Settings
    from genssm.session import Sample, Session

P = ParamSpec("P")

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


benchmark = typer.Typer(help="Measure speed, memory and exactness.", no_args_is_help=True)
app.add_typer(benchmark, name="benchmark")

PATIENCE = 3.0  # seconds without a piece after which one is told why
NO_MEMORY = "there is not enough memory; make model, batch or length smaller"
FIRST_USE = "the first sample on a machine compiles the sampling loop, about 15 seconds …"
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class UsageError(ValueError):
    """The command was given something that it cannot take."""


def _fail(message: str, code: int) -> NoReturn:
    note(f"genssm: {message}")
    raise typer.Exit(code)


def _told(error: Exception) -> str:
    """An error as a sentence; one of the operating system as its file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        if isinstance(error, FileExistsError):  # in the place of a folder
            return f"{os.fsdecode(error.filename)!r} is a file; give a folder"
        return f"{os.fsdecode(error.filename)!r}: {error.strerror}"
    return str(error) or type(error).__name__


def _command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn what can go wrong into one sentence and an exit code."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has what it wanted
            write_nowhere(sys.stdout)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except UsageError as error:
            _fail(str(error), USAGE)
        except FileExistsError as error:
            _fail(_told(error), USAGE)
        except MemoryError:
            _fail(NO_MEMORY, FAILED)
        except (ValueError, OSError) as error:
            from genssm.checkpoint import UnknownModelError

            _fail(_told(error), USAGE if isinstance(error, UnknownModelError) else FAILED)
        except RuntimeError as error:
            if not any(words in str(error) for words in ("allocate memory", "out of memory")):
                raise
            _fail(NO_MEMORY, FAILED)

    return wrapped


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


Model = Annotated[
    str, typer.Option("--model", "-m", help="Shipped name, checkpoint folder or Hub id.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes on stderr.")]


@app.command()
@_command
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
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
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
    from genssm import files
    from genssm.checkpoint import CheckpointError

    _check_out(out, as_json)
    if out is not None and (out.endswith(os.sep) or Path(out).is_dir()):
        _sample_to_folder(context, Path(out))
        return
    try:
        job = _repeated(context) if like else _requested(context)
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
    waiting = threading.Timer(PATIENCE, note, [FIRST_USE, quiet or as_json])
    waiting.daemon = True
    if pipe.engine_name.startswith("cpu"):
        waiting.start()
    drawn, interrupted = _draw(sessions, live, waiting.cancel, lost)
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


def _check_record(record: str | None) -> None:
    if record is not None and not record.strip():
        raise UsageError("--record needs a name for the result, such as validation")


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
    from genssm.checkpoint import local_folder
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


@app.command()
@_command
def train(
    recipe: Annotated[
        str, typer.Argument(help="Name of a recipe: wiki, cifar10, digits, mnist, sc09, ljspeech.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="Folder with train and validation files, or a public set: wikitext-2, "
            "wikitext-103, tinystories, cifar10, mnist, sc09, ljspeech."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the training.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the recipe (repeatable).")
    ] = None,
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
    chosen = _recipe(recipe, settings or [], out if resume else None, begun)
    torch.set_flush_denormal(True)
    leads = rank() == 0
    with reporter(recipe, chosen.modality, quiet or not leads) as report:
        target = run(
            chosen, data, out, minutes=minutes, resume=resume, start=begun, sheet_minutes=sheets,
            tensorboard=tensorboard, report=report,
        )  # fmt: skip
    if leads:
        sys.stdout.write(f"{target}\n")


def _recipe(
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


@app.command()
@_command
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


@app.command()
@_command
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
    from genssm.checkpoint import record_metric
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


@app.command()
@_command
def classifier(
    recipe: Annotated[
        str, typer.Argument(help="Recipe whose classes it learns: cifar10, digits, mnist, sc09.")
    ],
    data: Annotated[Path, typer.Option(help="Folder with train and validation files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write (.safetensors).")],
    epochs: Annotated[int, typer.Option(min=1, help="Times that it sees the data.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Of its weights and the order.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a small classifier of real data, which then judges samples (evaluate --samples)."""
    from genssm.classifier import save_classifier, train_classifier
    from genssm.preparation import build_codec
    from genssm.sources import open_split

    chosen = _recipe(recipe, [])
    _check_new(out, force)
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


@app.command()
@_command
def models(as_json: Json = False) -> None:
    """List the shipped models."""
    from genssm.checkpoint import shipped_folders

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


@app.command()
@_command
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


@app.command("app")
@_command
def page(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="Model to show instead of the shipped one of its modality (repeatable).",
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port (the first free one from 7860).")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Make a public link, through Gradio's servers.")
    ] = False,
) -> None:
    """Open the page for the browser: write, draw, speak, look inside."""
    _require_gradio()
    from genssm.interface.serving import serve

    serve(models or [], port=port, share=share)


def _require_gradio() -> None:
    if importlib.util.find_spec("gradio") is None:
        raise UsageError('the page needs gradio; install it with: pip install "genssm[app]"')


@benchmark.command("app")
@_command
def load(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write all figures as JSON.")
    ] = None,
    visitors: Annotated[int, typer.Option(min=1, max=256, help="At the same time.")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="How long they keep coming.")] = 60,
    cold: Annotated[
        bool,
        typer.Option("--cold", help="Only the first text of a new process with nothing compiled."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Measure the page: simulated visitors on three tabs, their waiting time, the memory."""
    _require_gradio()
    from genssm.app_benchmark import benchmark_app, measure_cold_start

    _check_new(out, force)
    facts = measure_cold_start(_say) if cold else benchmark_app(visitors, seconds, _say)
    _write_facts(out, facts)


@benchmark.command()
@_command
def layers(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write all figures as JSON.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    small: Annotated[bool, typer.Option("--small", help="The smallest sizes only.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Measure the layers: cost against LSSL, training speed, agreement of the views."""
    import torch

    from genssm.benchmark import benchmark_layers

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"there is no device {device!r} here; known: cpu, and cuda with a GPU")
    _check_new(out, force)
    torch.set_flush_denormal(True)
    facts = benchmark_layers(device, small, _say)
    _write_facts(out, facts)


@benchmark.command()
@_command
def sampling(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write all figures as JSON.")
    ] = None,
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
    from genssm.disk import replace_file

    for file in (out, plot):
        _check_new(file, force)
    if plot is not None:
        sampling_benchmark.require_plots()
    torch.set_flush_denormal(True)
    facts = sampling_benchmark.benchmark_sampling(small, _say)
    if torch.cuda.is_available():
        facts["cuda"] = cuda_benchmark.benchmark_cuda(torch.device("cuda"), small, _say)
    _write_facts(out, facts)
    if plot is not None:
        replace_file(plot, lambda file: sampling_benchmark.plot(facts, file))


@benchmark.command()
@_command
def quality(
    recipe: Annotated[
        str, typer.Argument(help="Name of a recipe: wiki, cifar10, digits, mnist, sc09, ljspeech.")
    ],
    data: Annotated[Path, typer.Option(help="As for genssm train.")],
    work: Annotated[Path, typer.Option(help="Folder for the tokenizer and the tokens.")],
    steps: Annotated[int, typer.Option(min=1, help="Updates of each model.")] = 1000,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the recipe (repeatable).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write all figures as JSON.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Train a recipe and a GPT-2 of its size on the same tokens; measure both."""
    import torch

    from genssm.quality_benchmark import benchmark_quality

    _check_new(out, force)
    chosen = _recipe(recipe, settings or [])
    torch.set_flush_denormal(True)
    facts = benchmark_quality(chosen, data, work, steps, _say)
    _write_facts(out, facts)


def _write_facts(out: Path | None, facts: dict[str, Any]) -> None:
    """As JSON, where that is wanted."""
    from genssm.disk import replace_file

    if out is not None:
        text = json.dumps(facts, indent=1) + "\n"
        replace_file(out, lambda file: file.write_text(text))


def _check_new(file: Path | None, force: bool) -> None:
    """Refuse a file that cannot be written, before the work that it is to hold."""
    from genssm.files import check_target

    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        check_target(file, force)
    except ValueError as error:
        raise UsageError(str(error)) from error


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
        note(f"genssm: {_told(problem)}")
        code = FAILED
    sys.exit(code)


if __name__ == "__main__":
    main()
