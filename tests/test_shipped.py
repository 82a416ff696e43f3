"""The shipped checkpoints: complete, small, and equal in both views on real data."""

import json
from pathlib import Path

import pytest
import torch

import genssm
from genssm.conversion import certify
from genssm.folders import shipped_folders
from genssm.pipeline import Pipeline

NAMES = ("wiki", "cifar10", "digits")


@pytest.fixture(scope="module", params=NAMES)
def pipe(request: pytest.FixtureRequest) -> Pipeline:
    return genssm.load(request.param)


def test_three_checkpoints_are_shipped() -> None:
    assert set(shipped_folders()) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_at_most_16_mib_and_holds_no_pickle(name: str) -> None:
    files = list(shipped_folders()[name].iterdir())
    assert sum(f.stat().st_size for f in files) <= 16 * 2**20
    assert {f.name for f in files} <= {"config.json", "model.safetensors", "tokenizer.model"}


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_states_how_it_was_made_and_what_it_reached(name: str) -> None:
    config = json.loads((shipped_folders()[name] / "config.json").read_text())
    assert config["training"]["tokens"] > 0
    metric = config["metrics"]["validation"]
    assert metric["unit"].startswith("bits/")
    assert metric["value"] > 0


@pytest.mark.slow
def test_convolution_equals_recurrence_on_a_thousand_real_tokens(pipe: Pipeline) -> None:
    tokens = torch.tensor(pipe.config["probe"])
    assert len(tokens) >= 1000
    measured = certify(pipe.model, pipe.recurrent, tokens)
    assert measured.step < 1e-3
    assert measured.prefill < 1e-3
    assert measured.refusal() is None


def test_samples_are_the_same_alone_and_in_a_batch(pipe: Pipeline) -> None:
    batch = pipe.sample(count=3, max_tokens=40, seed=9)
    alone = pipe.start(count=1, first=2, max_tokens=40, seed=9).run()[0]
    assert alone.tokens == batch[2].tokens
    assert alone.token_bits == batch[2].token_bits


def test_real_data_is_likelier_than_noise(pipe: Pipeline) -> None:
    tokens = torch.tensor([pipe.config["probe"][:400]])
    noise = tokens.clone()
    noise[:, 1:] = torch.randint(0, 256, noise[:, 1:].shape, generator=torch.manual_seed(0))
    with torch.no_grad():
        real, random = (float(pipe.model.log_prob(t).sum()) for t in (tokens, noise))
    assert 2 * real > random  # nats, below zero


def test_the_readme_states_the_measured_figures() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for name, folder in shipped_folders().items():
        metric = json.loads((folder / "config.json").read_text())["metrics"]["validation"]
        assert f"{metric['value']:.3f} {metric['unit']}" in readme, name
