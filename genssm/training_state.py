"""The mutable part of a training, all of it on disk after a save.

One process, or several that each hold all of the weights, write ``state.safetensors``. Sharded
weights go to ``state-<step>-<save>/``, a safetensors file a process, by
``torch.distributed.checkpoint``: nothing is gathered, nothing is pickled, and another number of
processes can read it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from genssm.disk import replace_file
from genssm.distributed import World
from genssm.model import SequenceModel
from genssm.optim import average
from genssm.recipes import Recipe, TrainConfig

T = TypeVar("T")

STATE = "state.safetensors"
Place = Callable[[str, torch.Size], Tensor]  # the name and shape of a stored tensor → its receiver


@dataclass
class Counters:
    """How far a training has come."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    skipped: int = 0  # steps whose gradient was not finite
    best: float = math.inf  # validation
    loss: float | None = None  # bits per token, smoothed
    before: dict[str, Any] | None = None  # training facts of the checkpoint it began with
    saves: int = 0


def exists(out: Path) -> bool:
    """Whether ``out`` holds the state of a training."""
    return (out / STATE).exists() or _shards(out) is not None


def kept_recipe(out: Path) -> Recipe:
    """The recipe of the training in ``out``. Raises ValueError if its state is damaged."""

    def read() -> Recipe:
        facts: dict[str, Any] = _kept_facts(out)["recipe"]
        codec, model, train = (
            {k: tuple(v) if isinstance(v, list) else v for k, v in facts[section].items()}
            for section in ("codec", "model", "train")
        )
        names = {f.name for f in fields(TrainConfig)}
        known: dict[str, Any] = {k: v for k, v in train.items() if k in names}
        return Recipe(facts["modality"], codec, model, TrainConfig(**known))

    return _readable(out, read)


def check(out: Path, recipe: Recipe) -> None:
    """Raise ValueError if the state in ``out`` is damaged, or of another recipe.

    A warning tells of settings that will make other batches of the data.
    """
    begun, wanted = (json.loads(json.dumps(asdict(r))) for r in (kept_recipe(out), recipe))
    for section in ("modality", "codec", "model", "length"):
        then, now = (r["train"][section] if section == "length" else r[section]
                     for r in (begun, wanted))  # fmt: skip
        if then != now:
            raise ValueError(
                f"the training in {str(out)!r} has another {section}: {then}; resume it with "
                "that, or use another folder"
            )
    order = ("seed", "batch_size", "cut_documents", "flip", "noise", "fade", "first_length", "grow")
    then, now = ({k: r["train"].get(k) for k in order} for r in (begun, wanted))
    if changed := [f"{k}={then[k]}" for k in order if then[k] not in (None, now[k])]:
        warnings.warn(
            f"the training in {str(out)!r} had {', '.join(changed)}; with other values the rest of "
            "it is not as if it had never stopped",
            stacklevel=2,
        )


def _kept_facts(out: Path) -> dict[str, Any]:
    from safetensors import safe_open

    def facts() -> dict[str, Any]:
        folder = _shards(out)
        if folder is not None:
            return _facts_of_shards(folder)
        with safe_open(out / STATE, framework="pt") as file:
            return _facts_of_file(file)

    return _readable(out, facts)


class TrainingState:
    """A model, its optimizers, its averaged weights and its counters."""

    def __init__(
        self,
        model: SequenceModel,
        optimizers: list[torch.optim.Optimizer],
        recipe: Recipe,
        world: World,
    ) -> None:
        self.model, self.optimizers, self.recipe, self.world = model, optimizers, recipe, world
        self.counters = Counters()
        self.averages: dict[str, Tensor] | None = None
        self._whole: SequenceModel | None = None  # receives weights that are not the model's own
        if recipe.train.ema:
            self.begin_average()

    def begin_average(self) -> None:
        """Let the average begin with the weights as they are."""
        self.averages = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def average(self) -> None:
        """Take the weights into their average, after a step that changed them."""
        if self.averages is not None:
            updates = self.counters.step + 1 - self.counters.skipped
            weights = dict(self.model.named_parameters())
            average(self.averages, weights, self.recipe.train.ema, updates)

    def exported(self) -> SequenceModel:
        """The model that is validated and shipped: averaged where there is an average, whole."""
        if self.averages is None and not self._is_sharded():
            return self.model.eval()
        if self._whole is None:
            self._whole = SequenceModel(self.model.config).to(self.world.device)
        weights = self.model.state_dict() | (self.averages or {})
        self._whole.load_state_dict(
            {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in weights.items()}
        )
        return self._whole.eval()

    def save(self, out: Path) -> None:
        """Write everything that a resumed training needs; all processes must take part."""
        self.counters.saves += 1
        facts = {**asdict(self.counters), "recipe": asdict(self.recipe)}
        tensors, target = self._tensors(), out / STATE
        if self._is_sharded():
            target = _save_shards(tensors, facts, out, self.world)
        elif self.world.leads:
            _save_file(tensors, facts, target)
        if self.world.leads:
            _remove_others(out, target)
        self.world.wait()

    def restore(self, out: Path) -> None:
        """Read what ``save`` wrote, of a recipe that ``check`` accepts; ValueError if damaged."""
        folder = _shards(out)
        facts, tensors = _readable(
            out,
            lambda: (
                _read_file(out / STATE, self._place)
                if folder is None
                else _read_shards(folder, self._place)
            ),
        )
        prefix = "model."
        self.model.load_state_dict(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
        for k, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer.{k}."):
                    _, _, i, key = name.split(".")
                    state.setdefault(int(i), {})[key] = tensor
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.averages is not None:
            self.begin_average()  # of a training that had none
            for name, mean in self.averages.items():
                mean.copy_(tensors.get(f"average.{name}", mean))
        known = {f.name for f in fields(Counters)} & set(facts)
        self.counters = Counters(**{name: facts[name] for name in known})

    def _is_sharded(self) -> bool:
        return any(isinstance(p, DTensor) for p in self.model.parameters())

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for k, optimizer in enumerate(self.optimizers):
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{k}.{i}.{name}": t for name, t in state.items()}
        tensors |= {f"average.{name}": t for name, t in (self.averages or {}).items()}
        return {name: t.detach() for name, t in tensors.items()}

    def _place(self, name: str, shape: torch.Size) -> Tensor:
        """A tensor to receive a stored one: cut as what it belongs to, wherever that is cut."""
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            k, i, _ = rest.split(".")
            params = [p for group in self.optimizers[int(k)].param_groups for p in group["params"]]
            like = params[int(i)].detach()
        else:
            own = dict(self.model.named_parameters()) if kind == "average" else {}
            like = (own or self.model.state_dict())[rest].detach()
        return torch.zeros_like(like) if like.shape == shape else torch.zeros(shape)


def _readable(out: Path, read: Callable[[], T]) -> T:
    from safetensors import SafetensorError

    try:
        return read()
    except (
        SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError,
    ) as error:  # fmt: skip
        place = _shards(out) or out / STATE
        raise ValueError(f"{str(place)!r} is not a readable training state") from error


def _facts_of_file(file: Any) -> dict[str, Any]:
    return json.loads(file.metadata()["facts"])


def _facts_of_shards(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text())


def _save_file(tensors: dict[str, Tensor], facts: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    stored = {name: t.cpu().contiguous() for name, t in tensors.items()}
    replace_file(path, lambda file: save_file(stored, file, {"facts": json.dumps(facts)}))


def _read_file(path: Path, place: Place) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import safe_open

    tensors = {}
    with safe_open(path, framework="pt") as file:
        facts = _facts_of_file(file)
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            like = place(name, tensor.shape)
            if isinstance(like, DTensor):
                tensor = distribute_tensor(
                    tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
                )
            tensors[name] = tensor
    return facts, tensors


def _shards(out: Path) -> Path | None:
    """The folder of the newest sharded state that was written to its end."""
    return max((f for f in _folders(out) if (f / "facts.json").exists()), default=None)


def _folders(out: Path) -> list[Path]:
    """The folders of sharded states in ``out``, whole or not."""
    return [f for f in out.glob("state-*") if re.fullmatch(r"state-\d{12}-\d{6}", f.name)]


def _save_shards(
    tensors: dict[str, Tensor], facts: dict[str, Any], out: Path, world: World
) -> Path:
    """Every process writes its parts; the facts, written last, make the folder count.

    A step may be saved twice, so that the number of the save is in the name, too: the folder before
    stays until this one is whole.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = out / f"state-{facts['step']:012}-{facts['saves']:06}"
    if world.leads:  # what a save that was killed has left
        shutil.rmtree(folder, ignore_errors=True)
    world.wait()
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # no Exception; every process gets it
        reasons = {str(reason) for reason, _ in error.failures.values()}
        raise OSError(
            f"could not write {str(folder)!r}: {'; '.join(sorted(reasons))}; the save before is "
            "still whole. Make room and go on from there"
        ) from error
    world.wait()
    if world.leads:
        text = json.dumps(facts)
        replace_file(folder / "facts.json", lambda file: file.write_text(text))
    return folder


def _read_shards(folder: Path, place: Place) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    facts = _facts_of_shards(folder)
    reader = HuggingFaceStorageReader(str(folder))
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {name: place(name, facts.size) for name, facts in stored.items()}
    load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return facts, tensors


def _remove_others(out: Path, keep: Path) -> None:
    """Remove every state other than ``keep``."""
    for old in (*_folders(out), out / STATE):
        if old == keep:
            continue
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)
