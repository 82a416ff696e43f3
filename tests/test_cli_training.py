"""The commands around a training: sheets, classifier, evaluation, folders of samples, processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from genssm.cli import app

SMALL = (
    "d_model=(8,16)", "n_layers=(1,1)", "pools=(4,)", "d_state=8", "batch_size=2", "warmup=1",
    "labels=('0','1','2')",
)  # fmt: skip
SETTINGS = [argument for setting in SMALL for argument in ("--set", setting)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line in a folder of its own, which holds clips in ``data``."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture(autouse=True)
def data(tmp_path: Path, write_sound: Callable[..., Path]) -> Path:
    """Clips of three classes."""
    for split, n in (("train", 9), ("validation", 6)):
        for i in range(n):
            wave = 0.3 * np.sin(np.arange(60 + i) / (2 + 3 * (i % 3)))
            write_sound(tmp_path / "data" / split / f"{i % 3}_{i}.wav", wave)
    return tmp_path / "data"


def launch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Two processes of ``-m genssm``, as torchrun starts them."""
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "genssm", *arguments],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_training_outlives_the_reader_of_its_report(tmp_path: Path):
    command = [
        sys.executable, "-m", "genssm", "train", "digits", "--data", "data", "-o", "out",
        *SETTINGS, "--set", "steps=4",
    ]  # fmt: skip
    gone, report = os.pipe()
    os.close(gone)
    done = subprocess.run(
        command, cwd=tmp_path, check=False, stdout=subprocess.PIPE, stderr=report, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    os.close(report)
    assert (done.returncode, done.stdout) == (0, "out/checkpoint\n")
    assert (tmp_path / "out" / "state.safetensors").exists()


def test_recordings_without_classes_are_trained_and_continued(run, tmp_path: Path, write_sound):
    for split in ("train", "validation"):
        write_sound(tmp_path / "long" / split / "all.wav", 0.5 * np.sin(np.arange(3000) / 3))
    own = [s for s in SMALL if not s.startswith("labels")]
    settings = [a for s in (*own, "steps=3", "length=128", "rate=8000") for a in ("--set", s)]
    made = run("train", "ljspeech", "--data", "long", "-o", "out", "-q", *settings)
    assert (made.exit_code, made.stdout) == (0, "out/checkpoint\n")
    sample = ("sample", "-m", "out/checkpoint", "--seconds", 0.05, "--engine", "eager", "-q")
    assert run(*sample).stdout == "checkpoint-1.wav\n"
    assert run(*sample, "-p", "long/train/all.wav").stdout == "checkpoint-2.wav\n"


@pytest.mark.slow
def test_two_processes_train_and_fill_a_folder(tmp_path: Path, run):
    done = launch("train", "digits", "--data", "data", "-o", "out", "--set", "steps=3",
                  "--set", "shard=True", "-q", *SETTINGS, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out/checkpoint\n"  # of rank 0
    assert len((tmp_path / "out" / "log.csv").read_text().splitlines()) >= 2
    sample = ["sample", "-m", "out/checkpoint", "-n", "9", "--max-tokens", "20", "--engine",
              "eager", "-q", "-o"]  # fmt: skip
    done = launch(*sample, "many/", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["many  3 samples drawn", "many  6 samples drawn"]
    assert len(list((tmp_path / "many").glob("*.wav"))) == 9
    again = run(*sample, "many")
    assert again.stdout == "many  0 samples drawn\n"
    alone = run(*sample, "alone/")
    assert alone.stdout == "alone  9 samples drawn\n"
    for file in (tmp_path / "many").glob("*.wav"):
        assert (tmp_path / "alone" / file.name).read_bytes() == file.read_bytes()


def test_a_resumed_training_keeps_its_settings(run):
    """Those that are not set anew; a recipe's own come back for nothing."""
    train = ("train", "digits", "--data", "data", "-o", "out", "-q")
    own = ("--set", "lr=0.0005", "--set", "seed=5", "--set", "length=128")
    assert run(*train, *SETTINGS, *own, "--set", "steps=2").exit_code == 0
    assert run(*train, "--resume", "--set", "steps=4", "--set", "decay=0.5").exit_code == 0
    facts = json.loads(Path("out/checkpoint/config.json").read_text())["training"]
    kept = facts["recipe"]["train"]
    assert [kept[k] for k in ("lr", "seed", "length", "decay", "steps")] == [5e-4, 5, 128, 0.5, 4]
    assert facts["recipe"]["model"]["d_model"] == [8, 16]
    other = run("train", "wiki", "--data", "data", "-o", "out", "--resume")
    assert "has another modality" in other.stderr


def test_a_training_has_the_shape_of_the_model_that_it_begins_with(run):
    train = ("train", "digits", "--data", "data", "-q")
    assert run(*train, "-o", "out", *SETTINGS, "--set", "steps=1").exit_code == 0
    shape = [s for s in SETTINGS if s.startswith(("d_model", "n_layers", "pools", "d_state"))]
    rest = [a for s in SETTINGS if s not in ("--set", *shape) for a in ("--set", s)]
    again = ("--from", "out/checkpoint", *rest, "--set", "steps=1")
    assert run(*train, "-o", "same", *again).exit_code == 0
    assert run(*train, "-o", "deep", *again, "--set", "n_layers=2,3").exit_code == 0
    models = [json.loads(Path(o, "checkpoint/config.json").read_text())["model"]
              for o in ("out", "same", "deep")]  # fmt: skip
    assert models[1] == models[0]
    assert models[2] == models[0] | {"n_layers": [2, 3]}
    wide = run(*train, "-o", "wide", *again, "--set", "d_model=16,16")
    assert "has another shape than the recipe's, first" in wide.stderr


def test_options_of_a_training_reach_it(run, monkeypatch: pytest.MonkeyPatch):
    given: dict[str, Any] = {}

    def noted(recipe: Any, data: Path, out: Path, **settings: Any) -> Path:
        given.update(settings)
        return out

    monkeypatch.setattr("genssm.train.train", noted)
    made = run("train", "digits", "--data", "data", "-o", "out", "--minutes", 3, "--sheets", 2,
               "--tensorboard", "-q")  # fmt: skip
    assert made.exit_code == 0
    chosen = {name: given[name] for name in ("minutes", "sheet_minutes", "tensorboard", "resume")}
    assert chosen == {"minutes": 3, "sheet_minutes": 2, "tensorboard": True, "resume": False}


def test_another_recipe_does_not_go_on_with_a_training(run):
    own = [s for s in SMALL if not s.startswith("labels")]
    settings = [a for setting in (*own, "steps=1", "length=128") for a in ("--set", setting)]
    train = ("train", "digits", "--data", "data", "-o", "out", "-q")
    assert run(*train, *settings).exit_code == 0
    other = run("train", "sc09", "--data", "data", "-o", "out", "--resume")
    assert (other.exit_code, "is of digits, not of sc09" in other.stderr) == (2, True)


def test_train_classify_and_judge_samples(run, tmp_path: Path):
    result = run("train", "digits", "--data", "data", "-o", "out", "--set", "steps=2", *SETTINGS)
    assert result.exit_code == 0, result.stderr
    result = run("classifier", "digits", "--data", "data", "-o", "judge.safetensors", "--epochs", 1)
    assert result.exit_code == 0, result.stderr
    assert "of 6 held-out examples" in result.stdout
    assert "epoch 1 of 1" in result.stderr
    result = run("classifier", "digits", "--data", "data", "-o", "judge.safetensors")
    assert result.exit_code == 2
    result = run("evaluate", "out/checkpoint", "--data", "data/validation", "--json")
    assert json.loads(result.stdout)["unit"] == "bits/sample"
    result = run("evaluate", "out/checkpoint", "--data", "data/validation", "--classify",
                 "--record", "classes")  # fmt: skip
    assert "accuracy" in result.stdout
    config = json.loads((tmp_path / "out" / "checkpoint" / "config.json").read_text())
    assert config["metrics"]["classes"]["examples"] == 6


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--temperature", "1"], 2, "add --samples N"),
        (["--classifier", "x"], 2, "add --samples N"),
        (["--plausible", "0.1"], 2, "add --samples N"),
        (["--samples", "4", "--classify"], 2, "give one of them"),
        (["--samples", "4", "--limit", "2"], 2, "--samples alone says how many"),
    ],
)
def test_options_of_samples_need_samples(run, arguments: list[str], code: int, message: str):
    result = run("evaluate", "wiki", "--data", "data", *arguments)
    assert result.exit_code == code
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json"], "takes no --json"),
        (["-p", "clip.wav"], "takes a class as prompt"),
        (["-p", "3", "--rank", "2"], "rank chooses among samples"),
    ],
)
def test_a_folder_of_samples_refuses_what_it_cannot_hold(run, arguments: list[str], message: str):
    result = run("sample", "-m", "digits", "-o", "many/", *arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr


def test_text_of_a_public_set_that_is_not_there_is_one_sentence(run):
    result = run("train", "wiki", "--data", "wikitext-3", "-o", "out")
    assert result.exit_code == 1
    assert "it is no public set; known: wikitext-2" in result.stderr
