"""States of trainings: sharded, the one before stays until the next is whole; damaged, named."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystem

from genssm.config import ModelConfig
from genssm.distributed import World
from genssm.model import SequenceModel
from genssm.optim import build_optimizers
from genssm.recipes import Recipe
from genssm.training_state import STATE, TrainingState, check, kept_recipe


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> TrainingState:
    """A small one, written as if its weights were cut."""
    monkeypatch.setattr(TrainingState, "_is_sharded", lambda self: True)
    model = SequenceModel(
        ModelConfig(vocab_size=5, n_outputs=5, d_model=(4,), n_layers=(1,), d_state=2, l_max=8)
    )
    optimizers = build_optimizers(model, 0.01, 0.01, 0.0)
    return TrainingState(model, optimizers, Recipe("audio", {}, {}), World())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_second_save_of_a_step_replaces_the_first_when_it_is_whole(
    state: TrainingState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As at the end of a training: saved, validated, saved again, and here killed at that."""
    state.counters.step = 7
    state.save(tmp_path)
    save = state_dict_saver.save

    def killed(*arguments: Any, **settings: Any) -> None:
        save(*arguments, **settings)
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(state_dict_saver, "save", killed)
        with pytest.raises(SystemExit):
            state.save(tmp_path)
    state.counters.step = 0
    state.restore(tmp_path)
    assert (state.counters.step, state.counters.saves) == (7, 1)
    state.counters.best = 1.5
    state.save(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["state-000000000007-000002"]
    shutil.copytree(tmp_path / "state-000000000007-000002", tmp_path / "state-backup")
    state.save(tmp_path)  # a folder of another name is neither removed nor read
    assert {f.name for f in tmp_path.iterdir()} == {"state-000000000007-000003", "state-backup"}
    state.restore(tmp_path)
    assert (state.counters.best, state.counters.saves) == (1.5, 3)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_full_disk_is_one_sentence_and_keeps_the_save_before(
    state: TrainingState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    state.save(tmp_path)
    before = {name: t.clone() for name, t in state.model.state_dict().items()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with torch.no_grad():
        state.model.norm.bias.fill_(3.0)
    with monkeypatch.context() as patched:
        patched.setattr(FileSystem, "create_stream", full)
        with pytest.raises(OSError, match=r"could not write .*No space left.*still whole") as error:
            state.save(tmp_path)
    assert "Traceback" not in str(error.value)
    state.restore(tmp_path)
    assert all(torch.equal(t, before[name]) for name, t in state.model.state_dict().items())


@pytest.mark.parametrize(
    "facts", ["[]", "5", "[" * 100_000, "{}", '{"recipe": []}', '{"recipe": {"codec": []}}',
              '{"recipe": {"modality": "text", "codec": {}, "model": {}, "train": {"lr": "x"}}}'],
    ids=range(7),
)  # fmt: skip
def test_a_foreign_state_is_named(facts: str, tmp_path: Path):
    save_file({"x": torch.zeros(1)}, tmp_path / STATE, {"facts": facts})
    for read in (kept_recipe, lambda out: check(out, Recipe("text", {}, {}))):
        with pytest.raises(ValueError, match=r"' is not a readable training state"):
            read(tmp_path)
