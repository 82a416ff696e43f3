"""Several processes train as one: the same losses, the same weights, states that each can read."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genssm import checkpoint as checkpoints
from genssm.distributed import World, joined
from genssm.recipes import Recipe, TrainConfig
from genssm.threads import torch_threads
from genssm.train import Progress, train
from genssm.training_state import exists

STEPS = 6
RECIPE = Recipe(
    "audio",
    {"rate": 8000, "labels": ("low", "high")},
    {"d_model": (8, 12), "n_layers": (1, 1), "pools": (4,), "d_state": 8, "layer": "s4"},
    TrainConfig(batch_size=4, length=48, steps=STEPS, warmup=2, lr=0.01, ema=0.9),
)
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_distributed import RECIPE, STEPS, losses_of
from genssm.distributed import joined

root = Path(sys.argv[1])
with joined() as world:
    facts = {{
        "plain": losses_of(RECIPE, root, "plain"),
        "dropout": losses_of(RECIPE.changed({{"dropout": 0.2}}), root, "dropout"),
        "accumulate": losses_of(RECIPE.changed({{"accumulate": 2}}), root, "accumulate"),
        "sharded": losses_of(RECIPE.changed({{"shard": True}}), root, "sharded", 3),
    }}
    resumed = RECIPE.changed({{"shard": True}})
    facts["resumed"] = losses_of(resumed, root, "sharded", STEPS, resume=True)
    facts["from one file"] = losses_of(resumed, root, "single", STEPS, resume=True)
    assert world.sums([1.0, world.rank]) == [2.0, 1.0]
    assert world.largest([world.rank, -world.rank]) == [1.0, 0.0]
    if world.leads:
        (root / "facts.json").write_text(json.dumps(facts))
"""


def losses_of(
    recipe: Recipe, root: Path, name: str, steps: int = STEPS, resume: bool = False
) -> list[list[Any]]:
    """Step, smoothed loss and validation after every step of a training in ``root/name``."""
    reports: list[Progress] = []

    def report(progress: Progress) -> None:
        reports.append(progress)
        if progress.step == steps and len(reports) == steps and steps < STEPS:
            os.kill(os.getpid(), 15)  # rank 0 is told to end, and so all do

    try:
        with torch_threads(1):  # as torchrun gives each process; more add in another order
            train(
                recipe, root / "data", root / name, validate_minutes=0, resume=resume, report=report
            )
    except KeyboardInterrupt:
        assert steps < STEPS
    return [[r.step, r.loss, r.validation] for r in reports]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a training by one process to go on with, and all that two made of it."""
    import soundfile

    folder = tmp_path_factory.mktemp("distributed")
    for split, amount in (("train", 12), ("validation", 3)):
        (folder / "data" / split).mkdir(parents=True)
        for i in range(amount):
            wave = 0.5 * np.sin(np.arange(30 + i) * (0.1 + 0.4 * (i % 2)))
            soundfile.write(
                folder / "data" / split / f"{('low', 'high')[i % 2]}_{i}.wav", wave, 8000
            )
    losses_of(RECIPE, folder, "single", 3)
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    run_two(str(script), str(folder))
    return folder


def run_two(*command: str) -> str:
    """Run a script by two processes, as torchrun does."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "--standalone", *command],
        capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def facts(root: Path) -> dict[str, Any]:
    return json.loads((root / "facts.json").read_text())


def assert_same_losses(actual: list[Any], expected: list[Any], tolerance: float) -> None:
    assert [a[0] for a in actual] == [e[0] for e in expected]
    for a, e in zip(actual, expected, strict=True):
        assert a[1:] == pytest.approx(e[1:], rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("plain", {"accumulate": 2}),
        ("dropout", {"accumulate": 2, "dropout": 0.2}),
        ("accumulate", {"accumulate": 4}),
    ],
)
def test_two_processes_equal_one_that_computes_the_same_parts(
    name: str, settings: dict[str, Any], root: Path, facts: dict[str, Any], tmp_path: Path
):
    """Losses and validations of averaged weights agree to rounding in the order of a sum."""
    (tmp_path / "data").symlink_to(root / "data")
    alone = losses_of(RECIPE.changed(settings), tmp_path, "alone")
    assert_same_losses(facts[name], alone, 1e-5)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_global_batch(
    root: Path, facts: dict[str, Any], tmp_path: Path
):
    (tmp_path / "data").symlink_to(root / "data")
    assert_same_losses(facts["plain"], losses_of(RECIPE, tmp_path, "alone"), 1e-3)


@pytest.mark.slow
def test_sharded_weights_train_as_whole_ones_and_resume_exactly(root: Path, facts: dict[str, Any]):
    """Muon gets whole matrices whichever way; the resumed training goes on as if never ended."""
    assert_same_losses(facts["sharded"][:3], facts["plain"][:3], 1e-5)
    assert_same_losses(facts["resumed"], facts["plain"][3:], 1e-5)
    shards = sorted(p.name for p in (root / "sharded").glob("state-*/*"))
    assert [name[:11] for name in shards] == ["facts.json", "shard-00001", "shard-00002"]
    assert not (root / "sharded" / "state.safetensors").exists()


@pytest.mark.slow
def test_a_state_is_read_by_another_number_of_processes(
    root: Path, facts: dict[str, Any], tmp_path: Path
):
    """One process → two with shards (in the script), and two with shards → one."""
    assert_same_losses(facts["from one file"], facts["plain"][3:], 1e-3)
    (tmp_path / "data").symlink_to(root / "data")
    assert exists(root / "sharded")
    longer = RECIPE.changed({"steps": STEPS + 2})
    train(longer, root / "data", root / "sharded", resume=True)
    assert [p.name for p in (root / "sharded").glob("state*")] == ["state.safetensors"]
    whole = load_file(root / "sharded" / "state.safetensors")
    train(longer, root / "data", root / "plain", resume=True)
    for name, tensor in load_file(root / "plain" / "state.safetensors").items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_rank_0_alone_writes_log_and_checkpoint(root: Path):
    for name in ("plain", "sharded"):
        lines = (root / name / "log.csv").read_text().splitlines()
        assert len(lines) >= 1 + STEPS
        training = checkpoints.load(root / name / "checkpoint").training
        assert training["processes"] in (1, 2)


def test_processes_wait_for_rank_0_to_prepare_the_data(monkeypatch: pytest.MonkeyPatch):
    """By default NCCL gives up after ten minutes."""
    settings: dict[str, Any] = {}
    monkeypatch.setenv("RANK", "0")
    for name, function in {
        "init_process_group": lambda backend, **given: settings.update(given),
        "get_rank": lambda: 0,
        "get_world_size": lambda: 1,
        "barrier": lambda: None,
        "destroy_process_group": lambda: None,
    }.items():
        monkeypatch.setattr(torch.distributed, name, function)
    with joined():
        pass
    assert settings["timeout"] >= timedelta(hours=2)


def test_alone_nothing_is_sent():
    with joined() as world:
        assert world == World(device=world.device)
        assert world.sums([1.5]) == [1.5]
        assert world.largest([2.0, -1.0]) == [2.0, -1.0]
        world.wait()
        with world.leader_first():
            pass
