"""Quality beside a Transformer: GPT-2 of the same size, on the same tokens, in as many steps.

Both read the same batches, are updated by the same rules (Muon for hidden matrices, AdamW for the
rest, the recipe's rates and schedule) and are measured on the same validation windows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genssm.batches import Batch
from genssm.benchmark import machine
from genssm.config import ModelConfig
from genssm.model import SequenceModel
from genssm.optim import build_optimizers, rate, scale_rates
from genssm.preparation import Prepared, prepare
from genssm.recipes import Recipe
from genssm.update import Objective, train_step

_WINDOWS = 64  # validation windows that are measured
_BLOCKS, _HEAD = range(4, 9), 32  # of GPT-2: blocks, features of an attention head
_LN2 = math.log(2)


class Transformer(nn.Module):
    """GPT-2 from ``transformers`` (extra ``benchmark``), untrained, of about ``size`` parameters.

    Its table of positions is not counted: our models have none.
    """

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        try:
            from transformers import (  # pyright: ignore[reportMissingImports]
                GPT2Config,
                GPT2LMHeadModel,
            )
        except ImportError as error:
            raise ValueError(
                'the comparison needs transformers; pip install "genssm[benchmark]"'
            ) from error
        self.config = config
        blocks, width = _shape(size, config.vocab_size)
        self.model: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size, n_positions=config.l_max, n_embd=width,
                n_layer=blocks, n_head=width // _HEAD, use_cache=False,
                bos_token_id=None, eos_token_id=None,
                resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
            )
        )  # fmt: skip
        _turn(self.model)

    def log_prob(self, tokens: Tensor, read: Tensor | None = None) -> Tensor:
        """As ``SequenceModel.log_prob``."""
        read = tokens[:, :-1] if read is None else read
        logits = self.model(read).logits[..., : self.config.n_outputs].float()
        return torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])[..., 0]

    def parameter_groups(self) -> dict[str, list[Tensor]]:
        """As ``SequenceModel.parameter_groups``; there are no dynamics."""
        layers = self.model.transformer.h.modules()
        matrices: list[Tensor] = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
        seen = set(matrices)
        others: list[Tensor] = [p for p in self.model.parameters() if p not in seen]
        return {"dynamics": [], "matrices": matrices, "others": others}


def _turn(module: nn.Module) -> None:
    """Put the same ``nn.Linear`` in the place of every linear map that GPT-2 stores transposed.

    Muon takes a matrix to be (out, in) and makes larger steps where it has more rows.
    """
    for name, child in module.named_children():
        if type(child).__name__ != "Conv1D":
            _turn(child)
            continue
        weight, bias = child.get_parameter("weight"), child.get_parameter("bias")
        linear = nn.Linear(weight.shape[0], weight.shape[1])
        linear.weight, linear.bias = nn.Parameter(weight.detach().mT.contiguous()), bias
        setattr(module, name, linear)


def _shape(size: int, vocab_size: int) -> tuple[int, int]:
    """Blocks and width (whole heads) at which 12 w² a block and the embedding are nearest."""
    return min(
        ((blocks, width) for blocks in _BLOCKS for width in range(_HEAD, 4096, _HEAD)),
        key=lambda shape: abs(12 * shape[0] * shape[1] ** 2 + vocab_size * shape[1] - size),
    )


def benchmark_quality(
    recipe: Recipe,
    data: Path,
    out: Path,
    steps: int,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train both for ``steps`` steps; return their bits per token, sizes and times.

    Sequences are at most ``recipe.train.length`` long, of which longer examples give the beginning.

    ``out`` receives the tokenizer and the tokens. Raises ValueError without ``transformers``.
    """
    prepared = prepare(recipe, data, out, None, validation_limit=_WINDOWS)
    torch.manual_seed(recipe.train.seed)
    config = recipe.model_config(prepared.codec)
    ours, settings = SequenceModel(config), recipe.train
    size = sum(p.numel() for p in ours.parameters())
    gpt2 = Transformer(config, size)
    rates = (settings.lr, settings.matrix_lr, settings.weight_decay)
    facts: dict[str, Any] = {
        "machine": machine("cpu"),
        "recipe": asdict(recipe),
        "steps": steps,
        "tokens": sum(_batch(prepared, recipe, i).tokens[:, 1:].numel() for i in range(steps)),
        "unit": "bits/token",
    }
    subjects: dict[str, SequenceModel | Transformer] = {"genssm": ours, "gpt2": gpt2}
    for name, model in subjects.items():
        optimizers = build_optimizers(model, *rates)
        started, worked = time.perf_counter(), time.process_time()
        _train(model, optimizers, prepared, recipe, steps)
        seconds, worked = time.perf_counter() - started, time.process_time() - worked
        counted = sum(p.numel() for n, p in model.named_parameters() if "wpe" not in n)
        bits = _measure(model, prepared, settings.length)
        facts[name] = {"parameters": counted, "bits": round(bits, 4), "seconds": round(seconds, 1),
                       "processor_seconds": round(worked, 1)}  # fmt: skip
        note(f"{name}: {bits:.4f} bits/token, {counted / 1e6:.2f} M parameters, {seconds:.0f} s")
    return facts


def _batch(prepared: Prepared, recipe: Recipe, step: int) -> Batch:
    return prepared.batch(step).cut(recipe.train.length)


def _train(
    model: SequenceModel | Transformer,
    optimizers: list[torch.optim.Optimizer],
    prepared: Prepared,
    recipe: Recipe,
    steps: int,
) -> None:
    settings, objective = recipe.train, Objective(model)
    for step in range(steps):
        factor = rate(step, step / steps, settings.warmup, settings.decay, settings.schedule)
        scale_rates(optimizers, factor)
        train_step(objective, optimizers, _batch(prepared, recipe, step), settings.clip,
                   (settings.seed, step), accumulate=settings.accumulate)  # fmt: skip


@torch.no_grad()
def _measure(model: SequenceModel | Transformer, prepared: Prepared, length: int) -> float:
    model.eval()
    bits = tokens = 0.0
    for batch in _windows(prepared, length):
        bits -= float(model.log_prob(batch.tokens).double().sum()) / _LN2
        tokens += batch.tokens.shape[1] - 1
    return bits / tokens


def _windows(prepared: Prepared, length: int) -> Iterator[Batch]:
    """The beginning of every validation example, at most ``length`` targets of it."""
    for example in prepared.validation[:_WINDOWS]:
        tokens = prepared.codec.encode(example.raw, example.label)[: length + 1]
        if len(tokens) > 1:
            yield Batch(tokens[None])
