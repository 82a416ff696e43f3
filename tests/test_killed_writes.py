"""SIGKILL at every point of every write of a checkpoint or a training's state leaves a whole one.

One process writes an old version and then, for each of the operations on files that a second write
makes, forks a child that is killed at that operation; the parent reads what is left.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = '''
import os, signal, sys
from pathlib import Path

import torch

torch.set_num_threads(1)  # a fork must not inherit a pool of threads
import safetensors.torch
from genssm import checkpoint as checkpoints
from genssm.checkpoint import Checkpoint
from genssm.codec import Audio
from genssm.distributed import World
from genssm.config import ModelConfig
from genssm.model import SequenceModel
from genssm.optim import build_optimizers
from genssm.recipes import Recipe
from genssm.training_state import TrainingState

folder, kind = Path(sys.argv[1]), sys.argv[2]
codec = Audio(8000, ("one", "two"))
model = SequenceModel(
    ModelConfig(vocab_size=codec.vocab_size, n_outputs=codec.n_outputs, d_model=(4,),
                n_layers=(1,), d_state=2, l_max=8)
)
optimizers = build_optimizers(model, 0.01, 0.01, 0.0)
state = TrainingState(model, optimizers, Recipe("audio", {}, {}), World())
if kind == "shards":  # by the one process that there is
    TrainingState._is_sharded = lambda self: True
save_file = safetensors.torch.save_file


def write(number: float) -> None:
    with torch.no_grad():
        model.norm.bias.fill_(number)
    state.counters.step = int(number)
    if kind == "checkpoint":
        checkpoints.save(Checkpoint(model, codec, {"steps": number}), folder / "out")
    else:
        state.save(folder)


def number_on_disk() -> float:
    if kind == "checkpoint":
        loaded = checkpoints.load(folder / "out")
        assert loaded.training["steps"] == float(loaded.model.norm.bias[0])
        return loaded.training["steps"]
    state.restore(folder)
    assert state.counters.step == float(model.norm.bias[0])
    return float(state.counters.step)


def partial_save_file(tensors, file, *facts):
    """Half of the file, a point to be killed at, then all of it."""
    save_file(tensors, file, *facts)
    whole = Path(file).read_bytes()
    Path(file).write_bytes(whole[: len(whole) // 2])
    sys.audit("genssm.half", str(file))
    Path(file).write_bytes(whole)


safetensors.torch.save_file = partial_save_file
EVENTS = ("open", "os.", "shutil.", "tempfile.", "genssm.")


def killed_at(point: int) -> bool:
    """Write version 2 in a child that is killed at a point; False if it had no such point."""
    pid = os.fork()
    if pid == 0:
        seen = [0]

        def hook(event, arguments):
            if event.startswith(EVENTS) and str(folder) in str(arguments):
                seen[0] += 1
                if seen[0] == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        write(2.0)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


write(1.0)
point, found = 1, set()
while killed_at(point):
    found.add(number_on_disk())
    write(1.0)  # after a kill, the next write works
    assert number_on_disk() == 1.0
    point += 1
assert number_on_disk() == 2.0, "the last child wrote to the end"
print(point - 1, sorted(found))
'''


@pytest.mark.parametrize("kind", ["checkpoint", "state", "shards"])
def test_a_write_that_is_killed_anywhere_leaves_the_old_or_the_new(kind: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), kind], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    points, found = done.stdout.split(maxsplit=1)
    assert int(points) >= {"checkpoint": 15, "state": 6, "shards": 8}[kind]
    assert found.strip() == "[1.0, 2.0]"
