"""Conversion to a recurrence, and the certificate that refuses what would not agree."""

from collections.abc import Callable

import pytest
import torch

from genssm.conversion import Certificate, ConversionError, LayerReport, certify, to_recurrent
from genssm.layers import LAYERS, S4D
from genssm.model import SequenceModel

MakeModel = Callable[..., SequenceModel]
GOOD = LayerReport("stack.layers.0", 1e-7, 0.99, 1.0, (1.0, 2.0, 3.0))


def tokens(length: int = 50) -> torch.Tensor:
    return torch.randint(0, 20, (length,))


@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_of_layer_gets_a_certificate(layer: str, make_model: MakeModel):
    model = make_model("pooled", layer)
    recurrent = to_recurrent(model, check=tokens())
    certificate = certify(model, recurrent, tokens())
    assert certificate.tokens == 50
    assert max(certificate.step, certificate.prefill) < 1e-4
    assert abs(certificate.divergence) < 1e-6
    assert certificate.refusal() is None
    assert len(certificate.layers) == 3
    for report in certificate.layers:
        assert report.difference < 1e-4
        assert 0.5 < report.spectral_radius < 1
        assert report.condition >= 1
        shortest, median, longest = report.half_lives
        assert 1 <= shortest <= median <= longest <= 50 * 6


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match="got S4D; a layer has a method to_recurrent of its own"):
        to_recurrent(S4D(4))  # type: ignore[arg-type]


def test_a_step_takes_one_token_of_each_sequence(make_model: MakeModel):
    recurrent = to_recurrent(make_model("isotropic"))
    state = recurrent.initial_state(2)
    for wrong in (torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"of shape \(B,\) with B = 2"):
            recurrent.step(wrong, state)


def test_certificate_holds_at_a_rate(make_model: MakeModel):
    model = make_model("pooled", "s4")
    assert to_recurrent(model, 0.5, check=tokens()).initial_state(1)
    assert certify(model, to_recurrent(model, 0.5), tokens(), 1.0).refusal() is not None


def test_certificate_sees_a_broken_conversion_and_names_the_layer(make_model: MakeModel):
    model = make_model("pooled")
    recurrent = to_recurrent(model)
    broken = recurrent.stack.layers[1].ssm
    with torch.no_grad():
        broken.a.mul_(0.9)
        broken.tables().toeplitz.mul_(1.5)
    certificate = certify(model, recurrent, tokens())
    assert certificate.step > 1e-2
    assert certificate.divergence > 1e-6
    assert "layer stack.layers.1 differs most" in str(certificate.refusal())


def test_certificate_sees_what_reads_wrong_and_steps_right(make_model: MakeModel):
    model = make_model("pooled")
    recurrent = to_recurrent(model)
    with torch.no_grad():
        recurrent.stack.layers[1].ssm.tables().toeplitz.mul_(1.5)
    certificate = certify(model, recurrent, tokens())
    assert certificate.prefill > 1e-2
    assert certificate.step < 1e-4
    assert certificate.refusal() is not None


@pytest.mark.parametrize("name", ["C", "log_dt"])
def test_models_with_numbers_that_are_not_finite_are_refused(name: str, make_model: MakeModel):
    model = make_model("isotropic", "s4d")
    with torch.no_grad():
        getattr(model.stack.layers[1].ssm, name).fill_(float("nan"))
    with pytest.raises(ConversionError, match=r"layer stack\.layers\.1"):
        to_recurrent(model, check=tokens())


def test_a_layer_that_cannot_forget_is_refused(make_model: MakeModel):
    """Under so small an interval Ā is the identity to the last bit."""
    model = make_model("isotropic", "s4", d_state=32)
    with torch.no_grad():
        model.stack.layers[0].ssm.log_dt.fill_(-60.0)
    with pytest.raises(ConversionError, match=r"layer stack\.layers\.0 is not stable"):
        to_recurrent(model, check=tokens())


def test_certifying_leaves_the_model_as_it_was(make_model: MakeModel):
    model = make_model("isotropic").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    certify(model, to_recurrent(model), tokens())
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shape", [(0,), (1, 5)])
def test_views_are_compared_on_a_row_of_tokens(shape: tuple[int, ...], make_model: MakeModel):
    with pytest.raises(ValueError, match=r"on tokens \(L,\), L >= 1; got"):
        to_recurrent(make_model("isotropic"), check=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("step", "prefill", "report", "reason"),
    [
        (0.0, 0.0, GOOD, None),
        (2e-3, 0.0, GOOD, "differ by 0.002"),
        (0.0, 2e-3, GOOD, "differ by 0.002"),
        (float("nan"), 0.0, GOOD, "differ by nan"),
        (0.0, 0.0, LayerReport("x", 0.0, 1.0, 1.0, (1, 1, 1)), "layer x is not stable"),
        (0.0, 0.0, LayerReport("x", 0.0, float("nan"), 1.0, (1, 1, 1)), "not stable"),
    ],
)
def test_refusals_name_the_reason(step, prefill, report, reason):
    refusal = Certificate(10, step, prefill, 0.0, (report,)).refusal()
    assert refusal is None if reason is None else reason in str(refusal)


def test_half_lives_count_tokens(make_model: MakeModel):
    """A fast decay is forgotten within one position, which in a pool lasts a whole stride."""
    model = make_model("pooled")
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "log_decay"):
                layer.log_decay.fill_(12.0)
    reports = certify(model, to_recurrent(model), tokens()).layers
    assert sorted(report.half_lives[1] for report in reports) == [1.0, 2.0, 6.0]
