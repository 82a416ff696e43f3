"""Measurements of the layers: cost against LSSL, training speed, and agreement of the views."""

from __future__ import annotations

import math
import os
import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from genssm import ssm
from genssm.batches import Batch
from genssm.blocks import Block
from genssm.config import ModelConfig
from genssm.conversion import to_recurrent
from genssm.layers import LAYERS, S4, S4D, TrainedLayer, build_layer
from genssm.model import SequenceModel
from genssm.optim import build_optimizers, has_fast_bfloat16
from genssm.update import Objective, train_step

FEATURES = 8  # H of the layers whose cost is compared, where nothing else is said
REFERENCE = ModelConfig(
    vocab_size=257, n_outputs=256, d_model=(256,), n_layers=(8,), d_state=64, l_max=3072
)


@dataclass(frozen=True)
class Case:
    """A layer to measure."""

    kind: str
    N: int
    L: int
    H: int = FEATURES
    device: str = "cpu"


@dataclass(frozen=True)
class Cost:
    """Median seconds of one forward and backward pass, and the memory it takes at its peak."""

    kind: str
    N: int
    L: int
    H: int
    seconds: float
    bytes: int | None  # None where the system does not tell


@dataclass(frozen=True)
class Speed:
    """Training or reading of the reference model: the median of the repeats."""

    layer: str
    batch: int
    length: int
    tokens_per_second: float


@dataclass(frozen=True)
class Difference:
    """Largest difference of reading and stepping from the convolution over its largest output."""

    kind: str
    N: int
    dtype: str
    L: int
    prefill: float
    step: float


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].partition(":")[2].strip() if models else name
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": has_fast_bfloat16(torch.device(device)),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def _seconds(function: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _median_seconds(function: Callable[[], Any], device: str, repeats: int) -> float:
    """After one call to warm up, and only one more when that took long."""
    first = _seconds(function, device)
    times = [_seconds(function, device) for _ in range(repeats if first < 5 else 1)]
    return statistics.median(times)


# Cost: S4 and S4D against LSSL


def resident_bytes(process: int | str = "self") -> tuple[int, int] | None:
    """Memory that a process holds, now and at its peak; None where the system does not say so."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "VmRSS" not in lines:  # of a process that has ended
        return None
    now, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def measure_cost(case: Case, repeats: int = 3) -> Cost:
    """Forward and backward of one layer on one sequence.

    Memory is right in a fresh process, to some hundred KiB: the system counts pages for each
    processor apart, so that a peak can be read as less than what was there before it.
    """
    torch.manual_seed(0)
    layer = build_layer(case.kind, case.H, case.N, case.L).to(case.device)
    u = torch.randn(1, case.L, case.H, device=case.device)

    def step() -> None:
        layer.zero_grad()
        layer(u).square().mean().backward()

    other = build_layer(case.kind, case.H, 8, 8).to(case.device)
    other(u[:, :8]).mean().backward()  # libraries are loaded and threads started
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        memory = torch.cuda.max_memory_allocated() - before
    else:
        resident = resident_bytes()
        step()
        after = resident_bytes()
        memory = None if resident is None or after is None else max(0, after[1] - resident[0])
    seconds = _median_seconds(step, case.device, repeats)
    return Cost(case.kind, case.N, case.L, case.H, seconds, memory)


def measure_costs(cases: Iterable[Case]) -> Iterator[Cost]:
    """Each case in a process of its own, so that no memory is left over from another."""
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with pool:
        yield from pool.map(measure_cost, cases)


def slope(sizes: list[int], values: list[float]) -> float:
    """The exponent p of the least-squares fit value = c · size^p."""
    x = [math.log(size) for size in sizes]
    y = [math.log(max(value, 1e-12)) for value in values]
    return statistics.linear_regression(x, y).slope


# Speed: training steps of the reference model, beside the plain versions of the kernels


def plain_vandermonde(c: Tensor, log_a: Tensor, length: int) -> Tensor:
    """``ssm.vandermonde_kernel`` with the whole Vandermonde matrix (H, n, L)."""
    k = torch.arange(length, device=c.device, dtype=c.real.dtype)
    return (c @ torch.exp(log_a[..., None] * k)).real


def plain_cauchy(
    C_tilde: Tensor, Lambda: Tensor, P: Tensor, B: Tensor, dt: Tensor, length: int
) -> Tensor:
    """``ssm.cauchy_kernel`` of rank 1 with the whole Cauchy matrix (H, N, L)."""
    Lambda, P, B = (torch.cat([t, t.conj()], -1) for t in (Lambda, P[:, 0], B))
    rows = torch.cat([torch.cat([C_tilde, C_tilde.conj()], -1), P.conj()[:, None]], 1)
    # Nodes slightly off the root z = -1, where g has a pole.
    roots = torch.arange(length, device=dt.device, dtype=torch.float64) + 1e-7
    z = torch.exp(-2j * math.pi / length * roots)
    g = (2 / dt)[:, None] * ((1 - z) / (1 + z)).to(Lambda.dtype)
    cauchy = 1 / (g[:, None] - Lambda[..., None])  # (H, N, L)
    s = torch.einsum("hin,hjn,hnl->hijl", rows, torch.stack([B, P], 1), cauchy)
    spectrum = s[:, :-1, 0] - s[:, :-1, 1] * (s[:, -1, 0] / (1 + s[:, -1, 1]))[:, None]
    return torch.fft.ifft((2 / (1 + z)).to(spectrum.dtype) * spectrum).real


class PlainS4D(S4D):
    """S4D with the whole Vandermonde matrix and the FFT left to autograd."""

    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        log_a, b = self._discrete(self.Lambda(), self.dt(rate))
        return plain_vandermonde(2 * self._output() * b[:, None], log_a, length)

    def forward(self, u: Tensor, rate: float = 1.0) -> Tensor:
        L = u.shape[1]
        with torch.autocast(u.device.type, enabled=False):
            x = rearrange(u.to(self.D.dtype), "b l h -> b h l")
            kernel = torch.fft.rfft(self.kernel(L, rate)[:, 0], n=2 * L)
            y = torch.fft.irfft(torch.fft.rfft(x, n=2 * L) * kernel, n=2 * L)[..., :L]
            return rearrange(y + self.D[:, None] * x, "b h l -> b l h")


class PlainS4(S4):
    """S4 with the whole Cauchy matrix."""

    def kernel(self, length: int, rate: float = 1.0) -> Tensor:
        P, B = self._low_rank()
        span = self.l_max
        return plain_cauchy(self._output(), self.Lambda(), P, B, self.dt(rate), span)[..., :length]


PLAIN: dict[str, Callable[[int, int, int], TrainedLayer]] = {
    "s4d": lambda H, N, L: PlainS4D(H, N),
    "s4": lambda H, N, L: PlainS4(H, N, l_max=L),
}
TRAINED = (*PLAIN, *(f"{kind}, plain" for kind in PLAIN))


def reference_model(layer: str, length: int) -> SequenceModel:
    """8 blocks, H=256, N=64, 256 classes; ``layer`` is one of ``TRAINED``."""
    kind, _, plain = layer.partition(", ")
    torch.manual_seed(0)
    model = SequenceModel(replace(REFERENCE, layer=kind, l_max=length))
    if plain:
        for block in model.modules():
            if isinstance(block, Block):
                twin = PLAIN[kind](REFERENCE.d_model[0], REFERENCE.d_state, length)
                twin.load_state_dict(block.ssm.state_dict())
                block.ssm = twin
    return model


def measure_training(layer: str, batch: int, length: int, device: str, repeats: int = 3) -> Speed:
    """Whole training steps: forward, backward, both optimizers."""
    model = reference_model(layer, length).to(device)
    optimizers = build_optimizers(model, 1e-3, 0.01, 0.01)
    tokens = torch.randint(0, 256, (batch, length + 1))

    objective = Objective(model)

    def step() -> None:
        train_step(objective, optimizers, Batch(tokens), 1.0, (0,))

    return Speed(layer, batch, length, batch * length / _median_seconds(step, device, repeats))


def measure_reading(layer: str, length: int, device: str, repeats: int = 3) -> Speed:
    """A prompt read in parallel by the recurrence of the reference model, in pieces of 2,048."""
    recurrent = to_recurrent(reference_model(layer, length).to(device))
    pieces = torch.randint(0, 256, (1, length), device=device).split(2048, 1)

    def read() -> None:
        state = None
        for piece in pieces:
            _, state = recurrent.prefill(piece, state)

    return Speed(layer, 1, length, length / _median_seconds(read, device, repeats))


# Agreement of the views


@torch.no_grad()
def measure_difference(kind: str, N: int, dtype: torch.dtype, L: int, seeds: int = 3) -> Difference:
    """Read L positions in parallel; read all but the last 256, and step those.

    The worst of some layers and inputs, each convolved as where no gradient is needed.
    """
    pairs = [_differences(kind, N, dtype, L, seed) for seed in range(seeds)]
    prefill, step = map(max, zip(*pairs, strict=True))
    return Difference(kind, N, str(dtype).removeprefix("torch."), L, prefill, step)


def _differences(kind: str, N: int, dtype: torch.dtype, L: int, seed: int) -> tuple[float, float]:
    torch.manual_seed(seed)
    layer = build_layer(kind, 4, N, L).to(dtype)
    recurrent, u = layer.to_recurrent(), torch.randn(1, L, 4, dtype=dtype)
    expected = layer(u)
    read, _ = recurrent.prefill(u, recurrent.initial_state(1))
    stepped = min(L, 256)
    _, x = recurrent.prefill(u[:, : L - stepped], recurrent.initial_state(1))
    last = []
    for t in range(L - stepped, L):
        y, x = recurrent.step(u[:, t], x)
        last.append(y)
    scale = float(expected.abs().max())
    difference = torch.stack(last, 1) - expected[:, L - stepped :]
    return float((read - expected).abs().max()) / scale, float(difference.abs().max()) / scale


# Parts of the convolution


def measure_parts(device: str, H: int = 256, compiled: bool = True) -> dict[str, float]:
    """Milliseconds of the kernels (forward and backward) and of the convolution (forward).

    N=64, L=1024, batch 8. "chunks" is the convolution as products of chunks of 64.
    """
    N, L, batch = 64, 1024, 8
    torch.manual_seed(0)
    parts: dict[str, Callable[[], Any]] = {}

    def kernel_of(layer: TrainedLayer) -> Callable[[], Any]:
        return lambda: layer.kernel(L).square().sum().backward()

    for name, kind in (("Vandermonde", "s4d"), ("Cauchy", "s4")):
        plain = PLAIN[kind](H, N, L).to(device)
        parts[f"{name} kernel, factored"] = kernel_of(build_layer(kind, H, N, L).to(device))
        parts[f"{name} kernel, plain"] = kernel_of(plain)
        if compiled and shutil.which("c++") is not None:
            parts[f"{name} kernel, plain, compiled"] = torch.compile(kernel_of(plain))
    u = torch.randn(batch, L, H, device=device)
    layer = build_layer("s4d", H, N, L).to(device)
    kernel, D = layer.kernel(L).detach(), layer.D.detach()[:, None]
    recurrent = layer.to_recurrent().to(device)
    parts["convolution, FFT"] = lambda: ssm.fft_convolution(u, kernel, D)
    parts["convolution, chunks"] = lambda: recurrent.prefill(u, recurrent.initial_state(batch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler leaves complex numbers to plain torch
        return {name: 1000 * _median_seconds(part, device, 5) for name, part in parts.items()}


def benchmark_layers(
    device: str = "cpu", small: bool = False, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """All measurements, JSON-able; ``report`` gets every figure as a line when it is there.

    ``small`` takes the smallest sizes only: a look, or a test, in a minute.
    """
    facts: dict[str, Any] = {"machine": machine(device)}
    report(", ".join(f"{name} {value}" for name, value in facts["machine"].items()))
    facts["cost"] = []
    for cost in measure_costs(cost_cases(device, small)):
        facts["cost"].append(asdict(cost))
        memory = "?" if cost.bytes is None else f"{cost.bytes / 2**20:.1f}"
        report(
            f"{cost.kind:<5} H {cost.H:<4} N {cost.N:<5} L {cost.L:<7} "
            f"{1000 * cost.seconds:9.2f} ms {memory:>8} MiB"
        )
    facts["advantage"] = advantage(facts["cost"])
    for row in facts["advantage"]:
        memory = "?" if row["memory"] is None else f"{row['memory']:.1f}"
        report(
            f"LSSL over S4: H {row['H']:<4} N {row['N']:<5} L {row['L']:<7} "
            f"{row['time']:6.1f} × time {memory:>6} × memory"
        )
    facts["growth"] = growth(facts["cost"]) if not small else {}
    for name, exponents in facts["growth"].items():
        report(f"{name:<20} " + "  ".join(f"{k} {v:.2f}" for k, v in exponents.items()))
    facts["parts"] = measure_parts(device, 8, compiled=False) if small else measure_parts(device)
    for name, milliseconds in facts["parts"].items():
        report(f"{name:<30} {milliseconds:8.2f} ms")
    facts["training"] = []
    shapes = [(1, 256)] if small else [(8, 1024), (4, 3072)]
    for batch, length in shapes:
        for layer in TRAINED:
            repeats = 1 if small or "plain" in layer else 3
            speed = measure_training(layer, batch, length, device, repeats)
            facts["training"].append(asdict(speed))
            report(f"{layer:<12} {batch} × {length:<5} {speed.tokens_per_second:9.0f} tokens/s")
    facts["marks"] = marks(facts["training"])
    for name, value in facts["marks"].items():
        report(f"{name:<40} {value:9.2f}")
    facts["reading"] = []
    for layer in PLAIN:
        for length in [256] if small else [1024, 8192]:
            speed = measure_reading(layer, length, device)
            facts["reading"].append(asdict(speed))
            report(f"{layer:<5} reads {length:<6} {speed.tokens_per_second:9.0f} tokens/s")
    facts["agreement"] = []
    spans = [1024] if small else [1024, 16384, 65536]
    for kind in LAYERS:
        for N, dtype, L in (
            (N, dtype, L)
            for N in (16, 64)
            for dtype in (torch.float32, torch.float64)
            for L in spans
        ):
            difference = measure_difference(kind, N, dtype, L)
            facts["agreement"].append(asdict(difference))
            report(
                f"{kind:<10} N {N:<3} {difference.dtype} L {L:<6} prefill "
                f"{difference.prefill:.1e}  step {difference.step:.1e}"
            )
    return facts


def cost_cases(device: str, small: bool) -> list[Case]:
    """What is measured of LSSL, S4 and S4D.

    A grid at few features, where LSSL can follow; beyond it what S4 and S4D grow like; and as many
    states as features, where the published comparison stands (S4, arXiv 2111.00396, Table 2: 30
    times faster and 400 times less memory at 512).
    """
    kinds = ("lssl", "s4", "s4d")
    sizes, lengths = ([64], [1024]) if small else ([64, 128, 256], [1024, 4096, 16384])
    shapes = [(FEATURES, N, L) for N in sizes for L in lengths]
    further = [(512, 16384), (1024, 16384), (256, 65536), (256, 262144)]
    square = [(N, N, 1024) for N in ([] if small else [128, 256, 512])]
    return [
        Case(kind, N, L, H, device)
        for kind in kinds
        for H, N, L in (
            *shapes,
            *((FEATURES, *shape) for shape in further if kind != "lssl" and not small),
            *square,
        )
    ]


def advantage(costs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times the time and the memory of S4 LSSL takes, at every size of both."""
    by_size = {(c["kind"], c["H"], c["N"], c["L"]): c for c in costs}
    rows = []
    for (kind, *size), lssl in by_size.items():
        s4 = by_size.get(("s4", *size))
        if kind != "lssl" or s4 is None:
            continue
        known = lssl["bytes"] is not None and s4["bytes"]
        rows.append(
            {
                **dict(zip("HNL", size, strict=True)),
                "time": lssl["seconds"] / s4["seconds"],
                "memory": lssl["bytes"] / s4["bytes"] if known else None,
            }
        )
    return rows


def growth(costs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Exponents of time and memory in N and in L, between the two largest sizes of each line.

    The other size is fixed where most were measured. Small sizes are left out because there the
    constant cost of a call hides the growth.
    """
    table: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(cost["kind"] for cost in costs):
        own = [c for c in costs if c["kind"] == kind and c["H"] == FEATURES]
        for axis, fixed in (("N", "L"), ("L", "N")):
            lines: dict[int, list[dict[str, Any]]] = {}
            for cost in own:
                lines.setdefault(cost[fixed], []).append(cost)
            where = max(lines, key=lambda value: (len(lines[value]), value))
            line = sorted(lines[where], key=lambda cost: cost[axis])[-2:]
            sizes = [cost[axis] for cost in line]
            exponents = {"time": slope(sizes, [cost["seconds"] for cost in line])}
            if all(cost["bytes"] is not None for cost in line):
                exponents["memory"] = slope(sizes, [cost["bytes"] for cost in line])
            table[f"{kind} in {axis}, {fixed} {where}"] = exponents
    return table


def marks(speeds: list[dict[str, Any]]) -> dict[str, float]:
    """Speeds of training as ratios within one run."""
    table: dict[str, float] = {}
    speed = {(s["layer"], s["batch"], s["length"]): s["tokens_per_second"] for s in speeds}
    for batch, length in dict.fromkeys((s["batch"], s["length"]) for s in speeds):
        fast, plain, s4 = (speed[name, batch, length] for name in ("s4d", "s4d, plain", "s4"))
        table[f"S4D over plain S4D, {batch} × {length}"] = fast / plain
        table[f"S4 over S4D, {batch} × {length}"] = s4 / fast
    return table
