"""Checkpoints: a folder with config.json, model.safetensors and, for text, tokenizer.model.

Nothing is pickled. Large matrices are stored in bfloat16, everything else in float32.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genssm import disk
from genssm.codec import Codec, Image, Text, codec_from_config
from genssm.config import ModelConfig
from genssm.folders import CheckpointError, check_replaceable, resolve
from genssm.model import SequenceModel

FORMAT_VERSION = 1
LONGEST_PROBE = 2**14  # tokens
# What older checkpoints do not set, and did without: at their defaults these change nothing.
LATER_SETTINGS = {"token_taps", "recall", "recall_slots", "opening", "durations"}


@dataclass(frozen=True)
class Checkpoint:
    """A model with the codec of its tokens, how it was trained and what it reached."""

    model: SequenceModel
    codec: Codec
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    probe: tuple[int, ...] = ()  # real tokens, on which the two views of the model are compared

    def to_config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "format_version": FORMAT_VERSION,
            "codec": self.codec.to_config(),
            "model": asdict(self.model.config),
            "training": self.training,
            "metrics": self.metrics,
            "probe": list(self.probe),
        }


def load(name: str | Path) -> Checkpoint:
    """Load a checkpoint by shipped name, folder or Hub id, in float32 on the CPU.

    Raises CheckpointError for anything missing, truncated, foreign, mismatched or newer.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=()):  # no weight stays random
        return _load(resolve(name))


def _load(folder: Path) -> Checkpoint:
    config = _read_config(folder)
    codec, model, tensors = _build(folder, config)
    check = partial(_check, folder)
    shape = codec.shape if isinstance(codec, Image) else model.config.image_shape
    fits = model.config.image_shape in (None, shape) and all(
        getattr(codec, name) == getattr(model.config, name)
        for name in ("vocab_size", "n_outputs", "opening", "durations")
    )
    check(fits, "has a codec that does not fit its model")
    expected = model.state_dict()
    wrong = sorted(set(expected) ^ set(tensors)) or sorted(
        k for k in expected if expected[k].shape != tensors[k].shape
    )
    check(not wrong, f"has weights that do not fit its config, first {wrong[:1]}")
    real = all(t.is_floating_point() for t in tensors.values())
    finite = real and all(bool(t.float().isfinite().all()) for t in tensors.values())
    check(finite, "holds weights that are not finite numbers")
    model.load_state_dict({k: t.float() for k, t in tensors.items()})
    probe = config["probe"]
    known = all(isinstance(t, int) and 0 <= t < model.config.vocab_size for t in probe)
    check(known and len(probe) <= LONGEST_PROBE, "has a damaged section 'probe'")
    return Checkpoint(model.eval(), codec, config["training"], config["metrics"], tuple(probe))


def _check(folder: Path, holds: bool, problem: str) -> None:
    if not holds:
        raise CheckpointError(f"the checkpoint {str(folder)!r} {problem}")


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json, of this version and with all of its sections."""
    check = partial(_check, folder)
    inner = folder / "checkpoint"  # where a training keeps its best
    hint = f"; give {str(inner)!r}" if (inner / "config.json").is_file() else ""
    for file in ("config.json", "model.safetensors"):
        check((folder / file).is_file(), f"has no {file}; it is no genssm checkpoint{hint}")
    try:
        config = json.loads((folder / "config.json").read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{str(folder / 'config.json')!r} is not readable JSON") from error
    check(isinstance(config, dict) and "format_version" in config, "is not in genssm's format")
    version = config["format_version"]
    newer = isinstance(version, int) and version > FORMAT_VERSION
    check(
        version == FORMAT_VERSION,
        f"has format version {version}, this genssm reads {FORMAT_VERSION}; "
        + ("upgrade genssm" if newer else "convert or retrain it"),
    )
    sections = {"codec": dict, "model": dict, "training": dict, "metrics": dict, "probe": list}
    names = sorted(["format_version", *sections])
    check(sorted(config) == names, f"must have exactly the sections {', '.join(names)}")
    for section, kind in sections.items():
        check(isinstance(config[section], kind), f"has a damaged section {section!r}")
    return config


def _build(folder: Path, config: dict[str, Any]) -> tuple[Codec, SequenceModel, dict[str, Tensor]]:
    """The codec and the model that a config describes, and the weights that lie beside it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check = partial(_check, folder)
    try:
        codec = codec_from_config(config["codec"], folder)
        known = {f.name for f in fields(ModelConfig)}
        exact = set(config["model"]) | LATER_SETTINGS == known
        check(exact, f"must set exactly {', '.join(sorted(known))}")
        settings = ModelConfig(**config["model"])
        tensors = load_file(folder / "model.safetensors")
        count = sum(t.numel() for t in tensors.values() if t.is_floating_point())
        check(_least_weights(settings) <= count, "has fewer weights than its config says")
        return codec, SequenceModel(settings).float(), tensors
    except CheckpointError:
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"{str(folder / 'model.safetensors')!r} is truncated or no safetensors file"
        ) from error
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(f"the checkpoint {str(folder)!r} is not usable: {error}") from error


def _least_weights(config: ModelConfig) -> int:
    """Weights that a model of these settings has at least: a small file must not fill the memory.

    A part of them, which grows with every setting.
    """
    channels = config.layer_settings.get("channels")
    channels = channels if isinstance(channels, int) else 1
    rows = config.vocab_size * (1 + len(config.token_taps)) + sum(config.image_shape or ())
    rows += len(config.taps) * config.channels + len(config.recall)
    weights = config.d_model[0] * rows
    for level, (d_model, blocks) in enumerate(zip(config.d_model, config.n_layers, strict=True)):
        inputs = channels * (d_model + config.d_state) + config.expand * d_model
        dense = config.d_state**2 if config.layer == "lssl" else 0
        weights += blocks * (d_model * inputs + dense)
        if level < len(config.pools):
            weights += config.pools[level] * d_model * config.d_model[level + 1]
    return weights


def storage_dtypes(model: SequenceModel) -> dict[str, torch.dtype]:
    """bfloat16 for linear and embedding matrices; float32 for norms, biases and the dynamics."""
    halved = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    }
    halved |= {f"inputs.token_taps.{i}" for i in range(len(model.config.token_taps))}
    return {
        name: torch.bfloat16 if name in halved else torch.float32 for name in model.state_dict()
    }


def stored_weights(model: SequenceModel) -> dict[str, Tensor]:
    """The weights as a checkpoint stores them."""
    dtypes = storage_dtypes(model)
    return {
        name: value.detach().to("cpu", dtypes[name]).contiguous()
        for name, value in model.state_dict().items()
    }


def content_hash(checkpoint: Checkpoint) -> str:
    """SHA-256 of what decides samples: architecture, codec and weights; not the metrics.

    Of weights that a checkpoint would store less exactly, as they are.
    """
    digest = hashlib.sha256()
    config = checkpoint.to_config()
    parts = {key: config[key] for key in ("format_version", "codec", "model")}
    defaults = {f.name: f.default for f in fields(ModelConfig) if f.name in LATER_SETTINGS}
    parts["model"] = {k: v for k, v in parts["model"].items() if v != defaults.get(k, ...)}
    digest.update(json.dumps(parts, sort_keys=True).encode())
    if isinstance(checkpoint.codec, Text):
        digest.update(hashlib.sha256(checkpoint.codec.tokenizer).digest())
    weights = checkpoint.model.state_dict()
    for name, stored in sorted(stored_weights(checkpoint.model).items()):
        own = weights[name].detach().cpu()
        tensor = stored if torch.equal(stored.to(own.dtype), own) else own.contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(checkpoint: Checkpoint, folder: str | Path) -> Path:
    """Write a checkpoint; the folder holds the old one or the new one, never a mixture.

    The new one is written beside and swapped in by two renames; a kill between them leaves the old
    one as ``<folder>.previous``, which ``load`` finds. Raises FileExistsError for a folder that
    holds anything else than a checkpoint.
    """
    from safetensors.torch import save_file

    def write(target: Path) -> None:
        (target / "config.json").write_text(json.dumps(checkpoint.to_config(), indent=1) + "\n")
        save_file(stored_weights(checkpoint.model), target / "model.safetensors")
        if isinstance(checkpoint.codec, Text):
            (target / "tokenizer.model").write_bytes(checkpoint.codec.tokenizer)

    target = Path(folder).expanduser().resolve()
    for place in (target, disk.previous(target)):
        check_replaceable(place)
    disk.replace_folder(target, write)
    return Path(folder)
