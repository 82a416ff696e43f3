"""States as files: what a model remembers of a sequence, saved, and continued another day.

A safetensors file: the tokens read, the logits of the next one and the state of every layer. Its
size grows by four bytes a token read; the state itself has a constant size.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from genssm.blocks import map_nested
from genssm.disk import replace_file
from genssm.engine import Reading
from genssm.model import RecurrentModel, State

FORMAT_VERSION = 1


class StateError(ValueError):
    """A state file that cannot be continued; the message says why and what to do."""


def fingerprint(reading: Reading) -> str:
    """SHA-256 of all that a reading holds: the same for readings that are continued the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(reading).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(reading: Reading, path: Path, *, checkpoint: str, rate: float) -> None:
    """Write a state file, whole or not at all.

    ``checkpoint``: the content hash of the model; ``rate``: by which its Δ was scaled.
    """
    from safetensors.torch import save_file

    facts = {
        "genssm": "state",
        "format_version": str(FORMAT_VERSION),
        "checkpoint": checkpoint,
        "rate": repr(float(rate)),
        "position": str(len(reading.tokens)),
    }
    tensors = {name: tensor.contiguous() for name, tensor in _tensors(reading).items()}
    replace_file(path, lambda target: save_file(tensors, target, facts))


def load(path: Path, model: RecurrentModel, *, checkpoint: str, rate: float) -> Reading:
    """Read a state file that belongs to the model with this content hash and rate.

    Raises StateError for a file that is missing, damaged, foreign or of another model.
    """
    from safetensors import SafetensorError, safe_open

    name = repr(str(path))
    if not path.is_file():
        raise StateError(f"there is no state file {name}; save_state (--save-state) writes one")
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            _check_facts(facts, name, checkpoint, rate)
            # Copies, because the tensors of safetensors live in the file as long as it is there.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StateError(f"{name} is not a readable state file of genssm") from error
    return _reading(tensors, model, name)


def _check_facts(facts: dict[str, str], name: str, checkpoint: str, rate: float) -> None:
    if facts.get("genssm") != "state":
        raise StateError(
            f"{name} is not a state file of genssm; save_state (--save-state) writes one"
        )
    version = facts.get("format_version")
    if version != str(FORMAT_VERSION):
        raise StateError(
            f"{name} has format version {version!r}, this genssm reads {FORMAT_VERSION}"
        )
    if facts.get("checkpoint") != checkpoint:
        raise StateError(f"{name} is the state of another checkpoint; give the model it came from")
    if facts.get("rate") != repr(float(rate)):
        raise StateError(
            f"{name} was made at the rate {facts.get('rate')!r}, not {rate}; ask for that rate"
        )


def _reading(tensors: dict[str, Tensor], model: RecurrentModel, name: str) -> Reading:
    def check(holds: bool) -> None:
        if not holds:
            raise StateError(f"{name} is damaged: it does not hold a state of this model")

    config, empty = model.config, model.initial_state(1)
    tokens = tensors.get("tokens", torch.empty(0))
    check(tokens.dtype == torch.int32 and tokens.dim() == 1 and len(tokens) > 0)
    check(0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size)
    tokens = tokens.long()
    history, recall = model.remembered(tokens[None])
    kept = iter([tensors.get(key) for key in _layer_names(empty)])

    def filled(place: Tensor) -> Tensor:
        stored = next(kept)
        check(stored is not None and (stored.shape, stored.dtype) == (place.shape, place.dtype))
        assert stored is not None
        return stored

    layers = map_nested(filled, empty.layers)
    state = State(torch.tensor(len(tokens)), history, recall, layers)
    logits = tensors.get("logits", torch.empty(0))
    check(logits.shape == (1, config.n_outputs) and logits.dtype == torch.float32)
    reading = Reading(tokens, logits, state)
    expected = _tensors(reading)
    check(set(expected) == set(tensors))
    check(all(bool(t.isfinite().all()) for t in expected.values()))
    return reading


def _layer_names(state: State) -> list[str]:
    return [f"state.{i:03d}" for i in range(len(_layer_tensors(state)))]


def _layer_tensors(state: State) -> list[Tensor]:
    return state.tensors()[3:]  # without position, history and recall, which follow from the tokens


def _tensors(reading: Reading) -> dict[str, Tensor]:
    layers = dict(zip(_layer_names(reading.state), _layer_tensors(reading.state), strict=True))
    return {"tokens": reading.tokens.int(), "logits": reading.logits, **layers}
