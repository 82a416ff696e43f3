"""Draw docs/memory.png (HiPPO remembers a signal) and docs/layers.png (what a model learned).

python docs/make_gallery.py [--model wiki] [--out docs]
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

import genssm
from genssm import hippo
from genssm.blocks import Block
from genssm.conversion import certify
from genssm.layers import TrainedLayer
from genssm.pipeline import Pipeline

STEPS, WINDOW = 2000, 1000  # steps of the signal, and of the window of LegT and Fourier
SHOWN = 4  # layers whose kernels are drawn


def signal(seed: int = 0) -> Tensor:
    """Ten tones of up to six periods in 1000 steps, (STEPS,) float64."""
    generator = torch.Generator().manual_seed(seed)
    frequency, phase = torch.rand(2, 10, 1, generator=generator, dtype=torch.float64)
    t = torch.arange(STEPS, dtype=torch.float64) / 1000
    return torch.sin(2 * torch.pi * (6 * frequency * t + phase)).mean(0)


def draw_memory(axes: np.ndarray, N: int = 32) -> None:
    """The past of a signal, read back from N coefficients after its last step."""
    u = signal()
    memories = {
        f"LegS, N={N}: the whole past": (hippo.Memory("legs", N), STEPS),
        f"LegT, N={N}: a window": (hippo.Memory("legt", N, 1 / WINDOW), WINDOW),
        f"Fourier, N={N}: a window": (hippo.Memory("fourier", N, 1 / WINDOW), WINDOW),
        f"LagT, N={N}: fading": (hippo.Memory("lagt", N, 1 / 100), 500),
    }
    for axis, (title, (memory, span)) in zip(axes, memories.items(), strict=True):
        for value in u.tolist():
            memory.push(value)
        ages = torch.arange(span)
        axis.plot(u, color="0.75", linewidth=3, label="signal")
        axis.plot(STEPS - 1 - ages, memory.reconstruct(ages), color="C0", label="remembered")
        axis.set_title(title, loc="left", fontsize=9)
        axis.set_xlim(0, STEPS)
        axis.set_ylim(-1.1 * float(u.abs().max()), 1.1 * float(u.abs().max()))
    axes[0].legend(loc="lower left", fontsize=8)
    axes[-1].set_xlabel("step")


def draw_poles(axis: Axes, layers: dict[str, TrainedLayer]) -> None:
    """exp(Δλ) for the eigenvalues λ of A: what a mode keeps, and turns, in one step.

    One of each conjugate pair, 600 of them drawn at random.
    """
    generator = torch.Generator().manual_seed(0)
    angle = np.linspace(0, np.pi, 200)
    axis.plot(np.cos(angle), np.sin(angle), color="0.8")
    for name, layer in layers.items():
        poles = torch.linalg.eigvals(layer.to_continuous().A).exp()
        poles = poles[poles.imag >= 0]
        poles = poles[torch.randperm(len(poles), generator=generator)[:600]]
        axis.plot(poles.real, poles.imag, ".", markersize=2, label=name)
    axis.set_aspect("equal")
    axis.set_title("poles exp(Δλ)", loc="left", fontsize=9)
    axis.legend(fontsize=7, loc="lower center")


def draw_layers(axes: np.ndarray, pipe: Pipeline) -> None:
    """Kernels and poles of some layers, and the memory of all."""
    blocks = {n: m for n, m in pipe.model.named_modules() if isinstance(m, Block)}
    names = list(blocks)
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(SHOWN, len(names))).astype(int)]
    layers = {f"layer {names.index(name)}": blocks[name].ssm for name in chosen}
    with torch.no_grad():
        for label, layer in layers.items():
            kernels = layer.kernel(512)[:, 0]
            loudest = kernels.square().sum(-1).argmax()
            axes[0].plot(kernels[loudest], linewidth=1, label=label)
        draw_poles(axes[1], layers)
    axes[0].set_xscale("symlog", linthresh=10)
    axes[0].set_title("the strongest kernel of each layer", loc="left", fontsize=9)
    axes[0].set_xlabel("positions back")
    axes[0].legend(fontsize=7)
    probe = torch.tensor(pipe.config["probe"])
    reports = certify(pipe.model, pipe.recurrent, probe).layers
    lives = np.array([report.half_lives for report in reports])
    x = np.arange(len(lives))
    axes[2].vlines(x, lives[:, 0], lives[:, 2], color="0.75", linewidth=5)
    axes[2].plot(x, lives[:, 1], "o", color="C0")
    axes[2].set_yscale("log")
    axes[2].set_title("half-life of the memory, all features and median", loc="left", fontsize=9)
    axes[2].set_xlabel("layer")
    axes[2].set_ylabel("tokens")


def main() -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="wiki", help="shipped name or checkpoint folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder")
    arguments = parser.parse_args()
    figure, axes = plt.subplots(4, 1, figsize=(8, 7), layout="constrained", sharex=True)
    draw_memory(np.asarray(axes))
    figure.savefig(arguments.out / "memory.png", dpi=100)
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    draw_layers(axes, genssm.load(arguments.model))
    figure.savefig(arguments.out / "layers.png", dpi=100)


if __name__ == "__main__":
    main()
