"""Conversion of a trained model to a recurrence, with a certificate that both are the same map."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genssm.blocks import Block, Pool, RecurrentBlock
from genssm.layers import S4
from genssm.model import RecurrentModel, SequenceModel

TOLERANCE = 1e-3  # largest difference in logits, of a model in float32


class ConversionError(ValueError):
    """The recurrence would not be the map that was trained."""


@dataclass(frozen=True)
class LayerReport:
    """How one state space layer converts, measured on its own inputs.

    ``difference`` is the largest between convolution and recurrence, relative to the largest
    output. ``half_lives`` are the shortest, median and longest time in tokens, over the features,
    in which half of the kernel's energy has passed.
    """

    name: str
    difference: float
    spectral_radius: float  # of Ā, below 1 in a stable layer
    condition: float  # of the equation for C; 1 where none is solved
    half_lives: tuple[float, float, float]


@dataclass(frozen=True)
class Certificate:
    """The agreement of a model's views over ``tokens`` positions, and that of its layers."""

    tokens: int
    step: float  # largest difference in logits between stepping and the convolution
    prefill: float  # the same for reading in parallel
    divergence: float  # mean Kullback-Leibler divergence per token, bits, of stepping
    layers: tuple[LayerReport, ...]

    def refusal(self, tolerance: float = TOLERANCE) -> str | None:
        """Why the conversion should be refused, or None."""
        for layer in self.layers:
            if not layer.spectral_radius < 1:
                return f"layer {layer.name} is not stable: spectral radius {layer.spectral_radius}"
        difference = max(self.step, self.prefill, key=lambda d: math.inf if math.isnan(d) else d)
        if difference <= tolerance:
            return None
        worst = max(
            self.layers, key=lambda r: math.inf if math.isnan(r.difference) else r.difference
        )
        return (
            f"logits of convolution and recurrence differ by {difference:.2g}, more than "
            f"{tolerance:.2g}; layer {worst.name} differs most, by {worst.difference:.2g} of its "
            f"largest output (spectral radius {worst.spectral_radius:.6f}, condition of its "
            f"output map {worst.condition:.2g})"
        )


def to_recurrent(
    model: SequenceModel, rate: float = 1.0, *, check: Tensor | None = None
) -> RecurrentModel:
    """Convert a trained model to the recurrence with the same logits; weights are copied.

    ``rate`` scales Δ in every layer: 0.5 makes a model of 8 kHz sound run at 16 kHz. With
    ``check``, tokens (L,) to compare the views on, a conversion that does not agree is refused:
    ConversionError, a ValueError, says which layer is at fault and why.
    """
    if not isinstance(model, SequenceModel):
        raise ValueError(
            f"to_recurrent converts a SequenceModel, got {type(model).__name__}; a layer has a "
            "method to_recurrent of its own"
        )
    recurrent = RecurrentModel(model, rate).eval()
    if check is not None:
        refusal = certify(model, recurrent, check, rate).refusal()
        if refusal is not None:
            raise ConversionError(refusal)
    return recurrent


@torch.no_grad()
def certify(
    model: SequenceModel, recurrent: RecurrentModel, tokens: Tensor, rate: float = 1.0
) -> Certificate:
    """Compare ``recurrent`` with ``model`` on tokens (L,), as a whole and layer by layer.

    Raises ValueError without a token to compare on.
    """
    if tokens.dim() != 1 or not len(tokens):
        raise ValueError(f"views are compared on tokens (L,), L >= 1; got {tuple(tokens.shape)}")
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: inputs.update({name: args[0]})

    hooks = [
        block.ssm.register_forward_pre_hook(keep(name))
        for name, block in model.named_modules()
        if isinstance(block, Block)
    ]
    training = model.training
    try:
        convolved = model.eval()(tokens[None], rate)[0].double()
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    prefilled = recurrent.prefill(tokens[None])[0][0]
    stepped, state = [], recurrent.initial_state(1)
    for token in tokens:
        logits, state = recurrent.step(token[None], state)
        stepped.append(logits[0])
    steps = torch.stack(stepped).double()
    reference = convolved.log_softmax(-1)
    divergence = (reference.exp() * (reference - steps.log_softmax(-1))).sum(-1).mean()
    return Certificate(
        tokens=len(tokens),
        step=float((steps - convolved).abs().max()),
        prefill=float((prefilled - convolved).abs().max()),
        divergence=float(divergence) / math.log(2),
        layers=tuple(_report_layers(model, recurrent, inputs, rate)),
    )


def _report_layers(
    model: SequenceModel, recurrent: RecurrentModel, inputs: dict[str, Tensor], rate: float
) -> list[LayerReport]:
    converted = dict(recurrent.named_modules())
    reports = []
    for name, block in model.named_modules():
        if not isinstance(block, Block) or name not in inputs:
            continue
        twin = converted[name]
        assert isinstance(twin, RecurrentBlock)
        u = inputs[name]
        expected = block.ssm(u, rate)
        actual, _ = twin.ssm.prefill(u, twin.ssm.initial_state(1))
        scale = expected.abs().max().clamp(min=1e-30)
        reports.append(
            LayerReport(
                name,
                float((actual - expected).abs().max() / scale),
                twin.ssm.spectral_radius(),
                block.ssm.condition() if isinstance(block.ssm, S4) else 1.0,
                _half_lives(block.ssm.kernel(u.shape[1], rate), _stride(model, name)),
            )
        )
    return reports


def _stride(model: SequenceModel, name: str) -> int:
    """Tokens per position of the module ``name``: the strides of the pools around it."""
    return math.prod(
        module.stride
        for around, module in model.named_modules()
        if isinstance(module, Pool) and name.startswith(f"{around}.")
    )


def _half_lives(kernel: Tensor, stride: int) -> tuple[float, float, float]:
    """Shortest, median and longest time in tokens to half of the energy of kernels (H, M, L)."""
    energy = kernel.double().square().flatten(0, 1).cumsum(-1)
    reached = (energy >= energy[:, -1:] / 2).double().argmax(-1).double() + 1
    shortest, middle, longest = (
        float(t) * stride for t in (reached.min(), reached.median(), reached.max())
    )
    return shortest, middle, longest
