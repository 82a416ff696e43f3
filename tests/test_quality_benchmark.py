"""The comparison with GPT-2: same tokens, same size, both learn, both measured alike."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from genssm import quality_benchmark
from genssm.config import ModelConfig
from genssm.optim import build_optimizers
from genssm.quality_benchmark import Transformer, benchmark_quality
from genssm.recipes import Recipe, TrainConfig

pytest.importorskip("transformers")
CONFIG = ModelConfig(vocab_size=260, n_outputs=257, d_model=(64,), l_max=24)


@pytest.mark.parametrize("size", [500_000, 4_000_000])
def test_gpt2_has_the_size_that_was_asked_for(size: int):
    model = Transformer(CONFIG, size)
    counted = sum(p.numel() for n, p in model.named_parameters() if "wpe" not in n)
    assert 0.9 * size < counted < 1.1 * size


def test_muon_sees_the_matrices_of_gpt2_as_those_of_our_models(monkeypatch: pytest.MonkeyPatch):
    """(out, in), by which it scales its steps; the map stays that of ``transformers``."""
    torch.manual_seed(3)
    model = Transformer(CONFIG, 300_000).eval()
    monkeypatch.setattr(quality_benchmark, "_turn", lambda model: None)
    torch.manual_seed(3)
    plain = Transformer(CONFIG, 300_000).eval()
    tokens = torch.randint(0, 257, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model.log_prob(tokens), plain.log_prob(tokens))
    muon, adam = build_optimizers(model, 0.01, 0.02, 0.0)
    block, width = model.model.transformer.h[0], model.model.config.n_embd
    shapes = {p: tuple(p.shape) for p in muon.param_groups[0]["params"]}
    assert shapes[block.mlp.c_fc.weight] == (4 * width, width)
    assert shapes[block.mlp.c_proj.weight] == (width, 4 * width)
    assert shapes[block.attn.c_attn.weight] == (3 * width, width)
    owned = [*shapes, *adam.param_groups[0]["params"]]
    assert len(owned) == len(set(owned)) == len(list(model.parameters()))


def test_gpt2_is_normalised_and_reads_no_future():
    model = Transformer(CONFIG, 300_000).eval()
    tokens = torch.randint(0, 257, (2, 20))
    with torch.no_grad():
        every = torch.stack(
            [model.log_prob(torch.cat([tokens[:, :8], torch.full((2, 1), v)], 1))[:, -1]
             for v in range(257)]
        )  # fmt: skip
        torch.testing.assert_close(every.exp().sum(0), torch.ones(2), rtol=1e-4, atol=1e-4)
        later = tokens.clone()
        later[:, 10:] = 0
        torch.testing.assert_close(model.log_prob(tokens)[:, :9], model.log_prob(later)[:, :9])


@pytest.mark.slow
def test_both_learn_and_are_measured_on_the_same_tokens(
    tmp_path: Path, write_sound: Callable[..., Path]
):
    for split, amount in (("train", 12), ("validation", 3)):
        for i in range(amount):
            wave = 0.5 * np.sin(np.arange(60) * (0.1 + 0.4 * (i % 2)))
            write_sound(tmp_path / split / f"{('low', 'high')[i % 2]}_{i}.wav", wave)
    recipe = Recipe(
        "audio", {"rate": 8000, "labels": ("low", "high")},
        {"d_model": (32,), "n_layers": (2,), "d_state": 8},
        TrainConfig(batch_size=4, length=64, warmup=2, lr=0.01),
    )  # fmt: skip
    notes: list[str] = []
    short, longer = (
        benchmark_quality(recipe, tmp_path, tmp_path / "work", n, notes.append) for n in (1, 12)
    )
    for name in ("genssm", "gpt2"):
        assert longer[name]["bits"] < short[name]["bits"]
    assert longer["tokens"] > short["tokens"]
    assert longer["unit"] == "bits/token"
    assert [line.split(":")[0] for line in notes] == ["genssm", "gpt2"] * 2


def test_of_longer_pictures_both_read_the_first_rows(tmp_path: Path):
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    for split in ("train", "validation"):
        np.save(tmp_path / f"{split}.npy", pictures)
    recipe = Recipe(
        "image", {"height": 8, "width": 8, "channels": 3, "labels": ()},
        {"d_model": (32,), "n_layers": (1,), "d_state": 4}, TrainConfig(batch_size=2, length=48),
    )  # fmt: skip
    facts = benchmark_quality(recipe, tmp_path, tmp_path / "work", 2)
    assert facts["tokens"] == 2 * 2 * 48
    assert all(facts[name]["bits"] > 0 for name in ("genssm", "gpt2"))
