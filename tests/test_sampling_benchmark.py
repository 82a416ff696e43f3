"""The benchmark of sampling counts, matches and names what it says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from genssm import cuda_benchmark
from genssm.benchmark import REFERENCE
from genssm.cli import app
from genssm.config import ModelConfig
from genssm.conversion import to_recurrent
from genssm.model import SequenceModel
from genssm.sampling_benchmark import (
    SMALL,
    Baseline,
    Speed,
    bytes_per_step,
    last_logits,
    measure_baselines,
    ratios,
    transformer_size,
)


def test_transformer_has_about_as_many_parameters():
    model = SequenceModel(REFERENCE)
    ours = sum(p.numel() for p in model.parameters())
    layers, theirs = transformer_size(ours, REFERENCE.vocab_size, REFERENCE.d_model[0])
    assert layers == 4
    assert theirs == pytest.approx(ours, rel=0.1)


def test_transformer_is_counted_as_it_is_built():
    pytest.importorskip("transformers")
    from genssm.sampling_benchmark import build_transformer

    config = replace(REFERENCE, d_model=(32,), n_layers=(1,))
    layers, counted = transformer_size(50_000, config.vocab_size, 32)
    model = build_transformer(50_000, config, positions=16)
    assert layers == 3
    assert sum(p.numel() for p in model.parameters()) == counted + 16 * 32


def test_bytes_of_a_step_are_those_of_its_weights_and_states():
    H, n, V = 32, 4, 32
    config = ModelConfig(vocab_size=V, n_outputs=V, d_model=(H,), n_layers=(1,), d_state=2 * n)
    recurrent = to_recurrent(SequenceModel(config))
    matrices = 2 * H * H + 2 * H * H + 2 * H * H + V * H  # gate, up, down, head
    biases = 2 * H + 2 * H + H + V
    norms = 3 * 2 * H
    ssm = 2 * 2 * H * n + H  # a and c are complex; D
    others = 4 * (biases + norms + ssm + H)  # and a row of the embedding
    state = 2 * 4 * H * n
    assert bytes_per_step(recurrent, "fp32") == (4 * matrices + others, state)
    assert bytes_per_step(recurrent, "bf16") == (2 * matrices + others, state)
    scales = 4 * biases  # one a row, as biases
    assert bytes_per_step(recurrent, "int8") == (matrices + others + scales, state)
    rows = 4 * 2 * H  # of the embedding, of the other two samples
    assert bytes_per_step(recurrent, "fp32", 3) == (4 * matrices + others + rows, 3 * state)
    b = 2 * 4 * H * n
    assert bytes_per_step(recurrent, engine="eager") == (4 * matrices + others + b, state)


def test_pooled_weights_are_read_once_a_group():
    config = ModelConfig(
        vocab_size=32, n_outputs=32, d_model=(32, 32), n_layers=(0, 1), pools=(4,), d_state=8
    )
    more = replace(config, n_layers=(0, 2))
    flat = replace(config, d_model=(32,), n_layers=(1,), pools=())
    two = replace(flat, n_layers=(2,))
    read = {c: bytes_per_step(to_recurrent(SequenceModel(c))) for c in (config, more, flat, two)}
    for i in range(2):  # weights, states
        added = read[more][i] - read[config][i]
        assert added == pytest.approx((read[two][i] - read[flat][i]) / 4)


@pytest.mark.parametrize("kind", ["isotropic", "pooled", "image"])
def test_the_convolution_predicts_what_the_recurrence_does(kind: str, make_model):
    model = make_model(kind)
    tokens = torch.randint(0, 20, (2, 12))
    recurrent = to_recurrent(model)
    with torch.no_grad():
        expected, _ = recurrent.prefill(tokens, recurrent.initial_state(2))
        actual = last_logits(model, tokens)
    torch.testing.assert_close(actual, expected[:, -1], rtol=1e-4, atol=1e-4)


def test_models_of_pictures_have_baselines_too(make_model):
    baselines = list(measure_baselines(make_model("image"), None, replace(SMALL, contexts=(12,))))
    assert {b.name for b in baselines} == {"own convolution of the whole context, kernels kept"}
    assert all((b.context, b.tokens_per_second > 0) == (12, True) for b in baselines)


def test_every_ratio_names_what_it_compares():
    ours = Speed("reference", "cpu", "bf16", 1, 1, 1, 1024, 600.0, 1.0, 1.0, None)
    later = replace(ours, context=3072, tokens_per_second=500.0)
    other = Baseline("GPT-2 without a cache", "fp32", 1, 1024, 2, 10.0)
    (ratio,) = ratios([ours, later], [other])
    assert ratio["ratio"] == 60
    assert ratio["name"] == (
        "genssm cpu bf16, 1 thread ÷ GPT-2 without a cache, fp32, 2 threads; batch 1, context 1024"
    )


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_existing_files_are_kept(option: str, tmp_path: Path):
    file = tmp_path / "sampling"
    file.write_text("kept")
    result = CliRunner().invoke(app, ["benchmark", "sampling", option, str(file)])
    assert result.exit_code == 2
    assert "exists; use --force" in result.stderr
    assert file.read_text() == "kept"


def test_plot_without_matplotlib_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("genssm.sampling_benchmark.importlib.util.find_spec", lambda name: None)
    file = tmp_path / "sampling.png"
    result = CliRunner().invoke(app, ["benchmark", "sampling", "--plot", str(file)])
    assert result.exit_code == 1
    assert "a plot needs matplotlib" in result.stderr


@pytest.mark.slow
def test_benchmark_writes_all_sections(tmp_path: Path):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "sampling.json", tmp_path / "sampling.png"
    options = ["--small", "--out", str(out), "--plot", str(plot)]
    result = CliRunner().invoke(app, ["benchmark", "sampling", *options])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(out.read_text())
    assert all(row["bytes_per_second"] > 0 for row in facts["bandwidth"])
    assert {row["model"] for row in facts["sampling"]} == {"reference", "digits"}
    assert {(row["engine"], row["weights"]) for row in facts["sampling"]} == {
        ("eager", "fp32"), ("cpu", "fp32"), ("cpu", "bf16"), ("cpu", "int8"),
    }  # fmt: skip
    assert all(row["tokens_per_second"] > 0 for row in facts["sampling"])
    assert all((row["bandwidth_share"] is None) == (row["batch"] > 1) for row in facts["sampling"])
    assert all(ratio["ratio"] > 0 for ratio in facts["comparison"]["ratios"])
    assert [row["rate"] for row in facts["audio"]] == [8000, 16000]
    first = facts["first_token"][0]
    assert first["threads"] == 1
    assert first["seconds_stepping_extrapolated_from_16_tokens"] > 0
    assert facts["start_up"]["seconds"] > 0
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_batches_on_a_gpu_are_measured_beside_the_transformer():
    """The measurement, on a CPU: the figures are of no interest."""
    pytest.importorskip("transformers")
    lines: list[str] = []
    facts = cuda_benchmark.benchmark_cuda(torch.device("cpu"), small=True, report=lines.append)
    speeds = facts["speeds"]
    assert len(speeds) == len(lines) == 2 * 2 * 2  # engines, weights, batches
    assert all(speed["tokens_per_second"] > 0 for speed in speeds)
    assert {(s["weights"], s["batch"]) for s in speeds if s["engine"] == "genssm cuda"} == {
        ("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2),
    }  # fmt: skip
    ours, theirs = (speed["parameters"] for speed in speeds[:2])
    assert theirs == pytest.approx(ours, rel=0.5)  # a small one with a table of positions


def test_what_does_not_fit_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch):
    def fill(*_: object) -> float:
        raise MemoryError

    monkeypatch.setattr(cuda_benchmark, "measure_captured", fill)
    monkeypatch.setattr(cuda_benchmark.importlib.util, "find_spec", lambda name: None)
    lines: list[str] = []
    facts = cuda_benchmark.benchmark_cuda(torch.device("cpu"), small=True, report=lines.append)
    assert {speed["tokens_per_second"] for speed in facts["speeds"]} == {None}
    assert all("does not fit" in line for line in lines)
