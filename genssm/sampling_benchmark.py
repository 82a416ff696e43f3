"""Measurements of sampling: tokens per second, what bounds them, and what other models reach."""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genssm.benchmark import REFERENCE, machine
from genssm.blocks import Linear, PhasedLinear, RecurrentBlock, RecurrentPool, RecurrentStack
from genssm.config import ModelConfig
from genssm.conversion import to_recurrent
from genssm.engine import BLOCK, CompiledGeneration, Reading, begin, read
from genssm.model import RecurrentModel, SequenceModel
from genssm.pace import Pace
from genssm.pipeline import load
from genssm.pool import in_threads
from genssm.recurrence import RecurrentStateSpace
from genssm.sampling import RandomStream, SamplingConfig, draw, probabilities
from genssm.stepper import CompiledModel
from genssm.stepping import EXACT
from genssm.threads import torch_threads

VARIANTS = (("eager", EXACT), ("cpu", EXACT), ("cpu", "bf16"), ("cpu", "int8"))  # engine, weights
BYTES = {EXACT: 4, "bf16": 2, "int8": 1}  # of one weight of a linear map
WARM_UP = 2 * BLOCK - 1  # tokens in blocks of 1, 2, 4, …, BLOCK
# Tokens after them in which the ways to step a batch, three at most, are compared.
COMPARING = 3 * Pace.TURNS * BLOCK
MARGIN = 64  # tokens that a Transformer's cache grows by while it is measured
MiB = 2**20

# As large as the SaShiMi of 8 blocks a tier (arXiv 2202.09729), for sound of 16 kHz.
SASHIMI = ModelConfig(
    vocab_size=257, n_outputs=256, d_model=(64, 128, 256), n_layers=(8, 8, 8), pools=(4, 4),
    d_state=64, l_max=16000,
)  # fmt: skip

Report = Callable[[str], None]


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    reference: ModelConfig
    sashimi: ModelConfig
    shipped: tuple[str, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]  # tokens read before the next is drawn, for the comparisons
    prompts: tuple[int, ...]  # tokens, for the time to the first
    seconds: float  # about how long one repeat lasts
    repeats: int
    stepped: int  # tokens of a prompt that are stepped; the rest is extrapolated
    beyond_cache: int  # bytes read to measure the memory behind the caches, at least


FULL = Extent(
    reference=REFERENCE, sashimi=SASHIMI, shipped=("wiki", "cifar10", "digits"),
    batches=(1, 8, 64), contexts=(1024, 3072), prompts=(1024, 8192, 65536), seconds=0.4,
    repeats=5, stepped=1024, beyond_cache=512 * MiB,
)  # fmt: skip
SMALL = Extent(
    reference=replace(REFERENCE, d_model=(64,), n_layers=(1,)),
    sashimi=replace(SASHIMI, d_model=(32, 32, 32), n_layers=(1, 1, 1)), shipped=("digits",),
    batches=(1, 2), contexts=(32,), prompts=(64,), seconds=0.0, repeats=1, stepped=16,
    beyond_cache=64 * MiB,
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model to sample."""

    name: str
    recurrent: RecurrentModel
    start: Reading


@dataclass(frozen=True)
class Speed:
    """Tokens drawn a second, of all samples together: the median of the repeats."""

    model: str
    engine: str
    weights: str
    batch: int
    threads: int  # that the loop chose to use, of
    threads_allowed: int
    context: int  # tokens read before
    tokens_per_second: float
    weight_bytes_per_step: float  # read once for the whole batch
    state_bytes_per_step: float  # read, of all samples; as much is written
    bandwidth_share: float | None  # batch 1: bytes read a second over those that can be read


@dataclass(frozen=True)
class Baseline:
    """Another way to draw the next token, with the whole context or a cache of it."""

    name: str
    weights: str
    batch: int
    context: int
    threads: int
    tokens_per_second: float


@cache
def _compiled(model: RecurrentModel, weights: str) -> CompiledModel:
    return CompiledModel(model, weights)


# Time


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def thread_counts() -> tuple[int, ...]:
    """One thread, and as many as torch may use (OMP_NUM_THREADS) if that is more."""
    return tuple(sorted({1, torch.get_num_threads()}))


# What can be read: caches and memory


@cache
def _reader() -> Callable[[np.ndarray, int], int]:
    import numba

    @numba.njit(nogil=True)
    def read_all(values, passes):
        total = 0
        for p in range(passes):
            for i in range(len(values)):
                total += values[i] ^ p  # p, so that no pass can be left out
        return total

    return read_all


def read_bandwidth(n_bytes: float, threads: int) -> float:
    """Bytes a second that threads read from a buffer of so many bytes, over and over: the best.

    The buffer is rounded up to MiB; every thread reads its own part of it.
    """
    read_all, mebibytes = _reader(), max(1, math.ceil(n_bytes / MiB))
    parts = np.array_split(np.ones(mebibytes * MiB // 8, np.int64), threads)
    passes = max(1, 256 // mebibytes)

    def run() -> None:
        in_threads(lambda part: read_all(part, passes), parts, threads)

    run()
    return passes * mebibytes * MiB / min(_seconds(run) for _ in range(5))


def last_level_cache() -> int | None:
    """Bytes of the largest cache that the first core sees; None where the system does not tell."""
    sizes = [
        int(text.removesuffix("K")) * 1024
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := file.read_text().strip()).endswith("K")
    ]
    return max(sizes, default=None)


def measure_bandwidths(subject: Subject, extent: Extent) -> list[dict[str, Any]]:
    """Of buffers of the size of the model's weights, and of one that no cache can hold."""
    sizes = {
        f"weights and state of the reference model, {kind}": sum(
            bytes_per_step(subject.recurrent, kind)
        )
        for kind in BYTES
    }
    sizes = {name: MiB * math.ceil(size / MiB) for name, size in sizes.items()}
    sizes["beyond the caches"] = max(extent.beyond_cache, 8 * (last_level_cache() or 0))
    return [
        {
            "buffer": name,
            "bytes": size,
            "threads": threads,
            "bytes_per_second": read_bandwidth(size, threads),
        }
        for name, size in sizes.items()
        for threads in thread_counts()
    ]


def bytes_per_step(
    model: RecurrentModel, weights: str = EXACT, batch: int = 1, engine: str = "cpu"
) -> tuple[float, float]:
    """Bytes of weights and of states that a step of a batch must read, in the mean over all phases.

    Matrices count in the format of ``weights``, everything else in float32. Of the embeddings one
    row a sample is read, of a pool's inner stack all, but only every ``stride`` steps.
    """
    inputs = model.inputs
    tables = [inputs.embedding.weight, *inputs.token_taps, *inputs.positions]
    if inputs.condition is not None:
        tables.append(inputs.condition.weight)
    total = 4.0 * batch * sum(table.shape[1] for table in tables)
    for phased in (inputs.taps, inputs.prediction):
        if isinstance(phased, PhasedLinear):
            size = BYTES[weights] if phased is inputs.taps else 4
            total += size * phased.weight[0].numel()
    total += _module_bytes(model.norm, weights) + _module_bytes(model.head, weights)
    inner, states = _stack_bytes(model.stack, weights, engine)
    return total + inner, batch * states


def _stack_bytes(stack: RecurrentStack, weights: str, engine: str) -> tuple[float, float]:
    total, states = 0.0, 0.0
    for layer in stack.layers:
        if isinstance(layer, RecurrentPool):
            read, kept = _stack_bytes(layer.inner, weights, engine)
            own = _module_bytes(layer.down, weights) + _module_bytes(layer.up, weights)
            total += (read + own) / layer.stride
            width = layer.down.weight.shape[1] // layer.stride
            states += 2 * 4 * width + kept / layer.stride  # a row of the group, one of the queue
        else:
            assert isinstance(layer, RecurrentBlock)
            assert isinstance(layer.ssm, RecurrentStateSpace)
            ssm = layer.ssm
            tables = [ssm.a, ssm.c, ssm.D]
            tables += [table for table in (ssm.p, ssm.q) if table is not None]
            if engine == "eager" or ssm.p is not None:
                tables.append(ssm.b)  # the compiled diagonal layer has it in c
            total += sum(table.nbytes for table in tables)
            total += _module_bytes(layer.norm, weights) + _module_bytes(layer.mixer, weights)
            states += layer.initial_state(1).nbytes
    return total, states


def _module_bytes(module: nn.Module, weights: str) -> float:
    total = 4 * sum(p.numel() for p in module.parameters())
    for linear in module.modules():
        if isinstance(linear, Linear):
            total += (BYTES[weights] - 4) * linear.weight.numel()
            total += 4 * len(linear.weight) * (weights == "int8")  # a scale a row
    return total


# How fast tokens are drawn


def random_subject(name: str, config: ModelConfig) -> tuple[Subject, SequenceModel]:
    """A model of random weights, as a recurrence and as it would be trained."""
    torch.manual_seed(0)
    model = SequenceModel(config).eval()
    recurrent = to_recurrent(model)
    return Subject(name, recurrent, read(recurrent, torch.tensor([config.vocab_size - 1]))), model


def shipped_subject(name: str) -> Subject:
    """A model that comes with the package, before its first token."""
    pipe = load(name)
    return Subject(name, pipe.recurrent, pipe.read())


def measure_speed(
    subject: Subject,
    variant: tuple[str, str],
    batch: int,
    threads: int,
    extent: Extent,
    start: Reading | None = None,
) -> Speed:
    """Draw on from ``start`` or from the model's own, as ``genssm sample`` does.

    What is timed are whole blocks and whole periods of the pools, after a warm-up. The bandwidth is
    measured beside every repeat, since caches that others use, too, are faster at times.
    """
    start = start or subject.start
    engine, weights = variant
    stepper = subject.recurrent if engine == "eager" else _compiled(subject.recurrent, weights)
    with torch_threads(threads):
        generation = begin(stepper, start, SamplingConfig(), seed=0, indices=range(batch))

        def draw_all(steps: int) -> None:
            for _ in range(steps):
                generation.step()

        def threads_used() -> int:
            return generation.threads if isinstance(generation, CompiledGeneration) else 1

        period = subject.recurrent.config.period
        unit = period if engine == "eager" else math.lcm(BLOCK, period)
        draw_all(2 if engine == "eager" else WARM_UP + COMPARING)
        steps = unit * max(1, round(extent.seconds / _seconds(lambda: draw_all(unit))))
        read_bytes, state_bytes = bytes_per_step(subject.recurrent, weights, batch, engine)
        total, speeds, shares = read_bytes + state_bytes, [], []
        for _ in range(extent.repeats):
            speeds.append(batch * steps / _seconds(lambda: draw_all(steps)))
            if batch == 1:
                shares.append(speeds[-1] * total / read_bandwidth(total, threads_used()))
        used = threads_used()
    speed = statistics.median(speeds)
    share = statistics.median(shares) if shares else None
    return Speed(
        subject.name, engine, weights, batch, used, threads, len(start.tokens), speed, read_bytes,
        state_bytes, share,
    )  # fmt: skip


def measure_speeds(subject: Subject, extent: Extent) -> Iterator[Speed]:
    """Every engine and batch; more than one thread is for the compiled loop."""
    for batch in extent.batches:
        for variant in VARIANTS:
            for threads in thread_counts() if variant[0] == "cpu" else (1,):
                yield measure_speed(subject, variant, batch, threads, extent)


# Against a Transformer, and against the convolution


def transformer_size(parameters: int, vocab_size: int, width: int) -> tuple[int, int]:
    """Layers of a GPT-2 of this width that come nearest to ``parameters``, and its parameters.

    Its table of positions is left out of the count: a token reads one row of it. With the width
    of our own model the Transformer is the shallower, which makes it the faster.
    """
    block = 12 * width**2 + 13 * width
    others = vocab_size * width + 2 * width
    layers = max(1, round((parameters - others) / block))
    return layers, layers * block + others


def build_transformer(parameters: int, config: ModelConfig, positions: int) -> nn.Module:
    """A GPT-2 of random weights and about as many parameters, with heads of 64 or fewer."""
    from transformers import GPT2Config, GPT2LMHeadModel  # pyright: ignore[reportMissingImports]

    width = config.d_model[0]
    layers, _ = transformer_size(parameters, config.vocab_size, width)
    settings = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=max(1, width // 64),
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return GPT2LMHeadModel(settings).eval()


def _drawn(logits: Tensor, stream: RandomStream) -> Tensor:
    """logits (B, V) → tokens (B,)."""
    uniform = torch.from_numpy(stream.take(len(logits))).to(logits.device)
    return draw(probabilities(logits, SamplingConfig()), uniform)


def _counting(length: int, device: torch.device | None = None) -> Tensor:
    """Tokens to read (1, L): which they are does not matter to the time."""
    return torch.arange(length, device=device)[None] % 256


@torch.no_grad()
def measure_cached(model: nn.Module, context: int, repeats: int, batch: int = 1) -> float:
    """Tokens a second, of all samples, of a Transformer with its cache of keys and values.

    A step costs what it does at ``context`` to ``context + MARGIN`` tokens.
    """
    stream, steps = RandomStream(0, 0), MARGIN // (repeats + 1)
    tokens = _counting(context, next(model.parameters()).device)
    out = model(tokens.expand(batch, -1), use_cache=True, logits_to_keep=1)

    def run() -> None:
        nonlocal out
        for _ in range(steps):
            token = _drawn(out.logits[:, -1], stream)
            out = model(token[:, None], past_key_values=out.past_key_values, use_cache=True)
        out.logits.cpu()  # waits for a GPU

    run()
    return batch * steps / statistics.median(_seconds(run) for _ in range(repeats))


@torch.no_grad()
def measure_recomputed(logits: Callable[[Tensor], Tensor], context: int, repeats: int) -> float:
    """Tokens a second where all of the context is computed again for every token.

    ``logits``: tokens (1, L) → (1, V) of the next.
    """
    stream, tokens = RandomStream(0, 0), _counting(context)

    def run() -> None:
        _drawn(logits(tokens), stream)

    run()
    return 1 / statistics.median(_seconds(run) for _ in range(repeats))


def last_logits(model: SequenceModel, tokens: Tensor, rate: float = 1.0) -> Tensor:
    """Tokens (B, L) → logits (B, V) of the next, by convolution; kernels are kept between calls."""
    features, known = model.features(tokens, rate)
    return model.head.logits(features[:, -1], known[:, -1])


def measure_baselines(
    model: SequenceModel, transformer: nn.Module | None, extent: Extent
) -> Iterator[Baseline]:
    """The convolution and the Transformer (or not, if None) at every context, batch 1."""
    convolved = partial(last_logits, model)
    for context in extent.contexts:
        for threads in thread_counts():
            with torch_threads(threads):
                measured = {
                    "own convolution of the whole context, kernels kept": measure_recomputed(
                        convolved, context, extent.repeats
                    )
                }
                if transformer is not None:
                    whole = _last_logits(transformer)
                    measured |= {
                        "GPT-2 with KV cache": measure_cached(transformer, context, extent.repeats),
                        "GPT-2 without a cache": measure_recomputed(whole, context, extent.repeats),
                    }
            for name, speed in measured.items():
                yield Baseline(name, EXACT, 1, context, threads, speed)


def _last_logits(transformer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda tokens: transformer(tokens, use_cache=False, logits_to_keep=1).logits[:, -1]


def ratios(own: list[Speed], baselines: list[Baseline]) -> list[dict[str, Any]]:
    """How many times faster ours is at the same batch and context, with all that it depends on."""
    return [
        {
            "name": f"genssm {ours.engine} {ours.weights}, {_count(ours.threads)} ÷ {other.name}, "
            f"{other.weights}, {_count(other.threads)}; batch {other.batch}, "
            f"context {other.context}",
            "ratio": ours.tokens_per_second / other.tokens_per_second,
        }
        for other in baselines
        for ours in own
        if (ours.batch, ours.context) == (other.batch, other.context)
    ]


def _count(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def compare(
    subject: Subject, model: SequenceModel, extent: Extent, report: Report
) -> dict[str, Any]:
    """The reference model at long contexts, beside what others reach there."""
    parameters = sum(p.numel() for p in model.parameters())
    facts: dict[str, Any] = {"parameters": {"reference": parameters}}
    transformer = None
    if importlib.util.find_spec("transformers") is None:
        report("GPT-2 is left out: transformers is missing; pip install 'genssm[benchmark]'")
    else:
        positions = max(extent.contexts) + MARGIN
        transformer = build_transformer(parameters, model.config, positions)
        every = sum(p.numel() for p in transformer.parameters())
        table = positions * model.config.d_model[0]
        facts["parameters"] |= {"gpt2": every - table, "gpt2_positions": table}
    report(", ".join(f"{name} {count:,} parameters" for name, count in facts["parameters"].items()))
    own = []
    for context in extent.contexts:
        start = read(subject.recurrent, torch.randint(0, 256, (context,)))
        for engine, weights in VARIANTS:
            for threads in thread_counts() if engine == "cpu" else (1,):
                speed = measure_speed(subject, (engine, weights), 1, threads, extent, start)
                own.append(speed)
                report(_speed_line(speed))
    baselines = []
    for baseline in measure_baselines(model, transformer, extent):
        baselines.append(baseline)
        report(
            f"{baseline.name}, {baseline.weights}, context {baseline.context}, "
            f"{_count(baseline.threads)}: {baseline.tokens_per_second:.1f} tokens/s"
        )
    facts |= {"own": [asdict(s) for s in own], "baselines": [asdict(b) for b in baselines]}
    facts["ratios"] = ratios(own, baselines)
    for ratio in facts["ratios"]:
        report(f"{ratio['ratio']:8.1f} × {ratio['name']}")
    return facts


# Sound, the first token, and the command


def measure_audio(subject: Subject, rate: int, extent: Extent) -> dict[str, Any]:
    """Seconds of sound of ``rate`` Hz made in a second, one sample on one thread."""
    speed = measure_speed(subject, ("cpu", "bf16"), 1, 1, extent)
    factor = speed.tokens_per_second / rate
    return asdict(speed) | {"rate": rate, "real_time_factor": factor}


def measure_first_token(
    subject: Subject, length: int, threads: int, extent: Extent
) -> dict[str, Any]:
    """Seconds from a prompt of ``length`` tokens to the first drawn token, bf16.

    ``extrapolated``: had the prompt been stepped through the same compiled loop on one thread, by
    the time that some of its tokens take.
    """
    model = _compiled(subject.recurrent, "bf16")
    prompt = torch.randint(0, 256, (length,))

    def parallel() -> None:
        start = read(subject.recurrent, prompt)
        begin(model, start, SamplingConfig(), seed=0, indices=[0]).step()

    memory = model.load(subject.start.state)
    few = [prompt[i : i + 1] for i in range(min(length, extent.stepped))]

    def stepping() -> None:
        for token in few:
            model.step(token, memory)

    repeats = extent.repeats if length < 2**15 else 1  # long ones vary little
    with torch_threads(threads):
        if repeats > 1:
            parallel()
        times = [_seconds(parallel) for _ in range(repeats)]
        stepping()
        stepped = statistics.median(_seconds(stepping) for _ in range(extent.repeats))
    return {
        "tokens": length,
        "threads": threads,
        "seconds_parallel": statistics.median(times),
        f"seconds_stepping_extrapolated_from_{len(few)}_tokens": stepped / len(few) * length,
    }


def measure_start_up(repeats: int) -> dict[str, Any]:
    """Seconds of ``genssm sample --max-tokens 1`` as a process, the compiled code being there."""
    command = [sys.executable, "-m", "genssm.cli", "sample", "--max-tokens", "1", "--quiet"]

    def run() -> None:
        subprocess.run(command, check=True, capture_output=True)

    run()
    times = [_seconds(run) for _ in range(repeats)]
    return {"command": "genssm sample --max-tokens 1", "seconds": statistics.median(times)}


# All of it


def _speed_line(speed: Speed) -> str:
    share = "" if speed.bandwidth_share is None else f"  {speed.bandwidth_share:4.0%} of bandwidth"
    per_step = (speed.weight_bytes_per_step + speed.state_bytes_per_step) / MiB
    return (
        f"{speed.model:<10} {speed.engine:<5} {speed.weights} batch {speed.batch:<3} "
        f"{speed.threads} of {_count(speed.threads_allowed):<9} context {speed.context:<5} "
        f"{speed.tokens_per_second:9.0f} tokens/s  {per_step:6.2f} MiB/step{share}"
    )


def benchmark_sampling(small: bool = False, report: Report = lambda line: None) -> dict[str, Any]:
    """All measurements, JSON-able; ``report`` gets every figure as a line when it is there.

    ``small`` takes tiny models and single repeats: a look, or a test, in a minute.
    """
    extent = SMALL if small else FULL
    torch.manual_seed(0)
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    facts: dict[str, Any] = {
        "machine": machine("cpu")
        | {"last_level_cache_bytes": last_level_cache(), "load_before": load_average},
        "method": {
            "small": small,
            "repeats": extent.repeats,
            "statistic": "median; bandwidth: best of 5, beside every repeat",
        },
    }
    report(", ".join(f"{name} {value}" for name, value in facts["machine"].items()))
    reference, model = random_subject("reference", extent.reference)
    facts["bandwidth"] = measure_bandwidths(reference, extent)
    for row in facts["bandwidth"]:
        report(
            f"{row['buffer']:<50} {row['bytes'] / MiB:7.1f} MiB {_count(row['threads']):<9} "
            f"{row['bytes_per_second'] / 1e9:7.1f} GB/s"
        )
    shipped = {name: shipped_subject(name) for name in extent.shipped}
    facts["sampling"] = []
    for subject in (reference, *shipped.values()):
        for speed in measure_speeds(subject, extent):
            facts["sampling"].append(asdict(speed))
            report(_speed_line(speed))
    facts["comparison"] = compare(reference, model, extent, report)
    sashimi, _ = random_subject("SaShiMi-8", extent.sashimi)
    facts["audio"] = [
        measure_audio(shipped["digits"], 8000, extent),
        measure_audio(sashimi, 16000, extent),
    ]
    for row in facts["audio"]:
        report(
            f"{row['model']:<10} {row['rate']} Hz, cpu bf16, 1 thread: "
            f"{row['real_time_factor']:.2f} s of sound a second"
        )
    facts["first_token"] = []
    for length in extent.prompts:
        for threads in thread_counts():
            row = measure_first_token(reference, length, threads, extent)
            facts["first_token"].append(row)
            report(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    facts["start_up"] = measure_start_up(extent.repeats)
    report(f"{facts['start_up']['command']}: {facts['start_up']['seconds']:.2f} s")
    return facts


def require_plots() -> None:
    """Raise ValueError unless matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib; pip install 'genssm[docs]', or leave --plot out")


def plot(facts: dict[str, Any], file: Path) -> None:
    """Draw tokens a second as a PNG: the models at batch 1, and the comparisons."""
    require_plots()
    from matplotlib.figure import Figure

    figure = Figure((12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    single = [row for row in facts["sampling"] if (row["batch"], row["threads_allowed"]) == (1, 1)]
    models = list(dict.fromkeys(row["model"] for row in single))
    for i, (engine, weights) in enumerate(VARIANTS):
        rows = [r for r in single if (r["engine"], r["weights"]) == (engine, weights)]
        places = [models.index(row["model"]) + 0.2 * (i - 1.5) for row in rows]
        speeds = [row["tokens_per_second"] for row in rows]
        left.bar(places, speeds, 0.18, label=f"{engine} {weights}")
    left.set_xticks(range(len(models)), models)
    left.set_ylabel("tokens/s")
    left.set_title("Batch 1, one thread", loc="left")
    left.legend()
    compared = [
        (f"genssm {row['engine']} {row['weights']}", row) for row in facts["comparison"]["own"]
    ] + [(row["name"].partition(",")[0], row) for row in facts["comparison"]["baselines"]]
    longest = max(row["context"] for _, row in compared)
    bars = [
        (f"{name}, {_count(row['threads'])}", row["tokens_per_second"])
        for name, row in compared
        if row["context"] == longest
    ]
    right.barh([name for name, _ in bars], [speed for _, speed in bars], color="C0")
    right.set_xscale("log")
    right.invert_yaxis()
    right.set_xlabel("tokens/s")
    right.set_title(f"Reference model, batch 1, after {longest} tokens", loc="left")
    figure.savefig(file, format="png", dpi=120)
