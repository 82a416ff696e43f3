"""Muon, its orthogonalised updates, the assignment of parameters and the schedule."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from genssm.model import SequenceModel
from genssm.optim import Muon, build_optimizers, orthogonalize, rate

MakeModel = Callable[..., SequenceModel]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 20), (2, 20, 4), (1, 1, 6)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalized_matrices_have_singular_values_near_one(
    shape: tuple[int, int, int], scale: float
):
    G = scale * torch.randn(shape)
    X = orthogonalize(G)
    assert X.shape == shape
    values = torch.linalg.svdvals(X)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape: tuple[int, int]):
    """Uᵀ X V is diagonal and positive: the nearest orthogonal matrix is U Vᵀ."""
    U, S, Vh = torch.linalg.svd(torch.randn(2, *shape), full_matrices=False)
    G = U @ torch.diag_embed(S.clamp(min=0.1)) @ Vh
    core = U.mT @ orthogonalize(G) @ Vh.mT
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(core, torch.diag_embed(diagonal), rtol=0, atol=1e-4)
    assert float(diagonal.min()) > 0.6
    assert float(diagonal.max()) < 1.3


def test_orthogonalizing_nothing_gives_nothing():
    assert torch.equal(orthogonalize(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))


def test_matrices_are_orthogonalized_one_by_one():
    G = torch.randn(3, 5, 7)
    torch.testing.assert_close(
        orthogonalize(G), torch.cat([orthogonalize(matrix[None]) for matrix in G])
    )


def test_muon_steps_as_its_plain_definition(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("genssm.optim.has_fast_bfloat16", lambda device: False)
    lr, decay, momentum = 0.1, 0.5, 0.9
    parameters = [nn.Parameter(torch.randn(s)) for s in ((4, 6), (4, 6), (12, 3))]
    expected = [p.detach().clone() for p in parameters]
    average = [torch.zeros_like(p) for p in expected]
    muon = Muon(parameters, lr, decay, momentum)
    for _ in range(3):
        for i, p in enumerate(parameters):
            g = torch.randn_like(p)
            p.grad = g.clone()
            average[i] = momentum * average[i] + (1 - momentum) * g
            nesterov = (1 - momentum) * g + momentum * average[i]
            scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
            update = orthogonalize(nesterov[None])[0]
            expected[i] = expected[i] * (1 - lr * decay) - lr * scale * update
        muon.step()
        for p, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.detach(), value, rtol=1e-4, atol=1e-5)


def test_muon_in_bfloat16_takes_nearly_the_same_step(monkeypatch: pytest.MonkeyPatch):
    gradient, steps = torch.randn(16, 24), []
    for fast in (False, True):
        monkeypatch.setattr("genssm.optim.has_fast_bfloat16", lambda device, fast=fast: fast)
        p = nn.Parameter(torch.zeros(16, 24))
        p.grad = gradient.clone()
        Muon([p], lr=1.0, weight_decay=0.0).step()
        steps.append(p.detach())
    assert p.dtype == torch.float32
    assert not torch.equal(*steps)
    assert float((steps[0] - steps[1]).norm() / steps[0].norm()) < 0.05


def test_muon_moves_only_parameters_with_a_gradient():
    still, moved = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
    before = still.detach().clone(), moved.detach().clone()
    muon = Muon([still, moved], lr=0.1, weight_decay=0.1)
    moved.grad = torch.randn(3, 4)
    muon.step()
    assert torch.equal(still, before[0])
    assert not torch.equal(moved, before[1])
    assert set(muon.state) == {moved}


def test_muon_goes_on_from_its_saved_state():
    gradients = torch.randn(4, 3, 5)

    def step(muon: Muon, p: nn.Parameter, gradient: torch.Tensor) -> None:
        p.grad = gradient
        muon.step()

    p = nn.Parameter(torch.randn(3, 5))
    muon = Muon([p], lr=0.1, weight_decay=0.0)
    for gradient in gradients[:2]:
        step(muon, p, gradient)
    q = nn.Parameter(p.detach().clone())
    resumed = Muon([q], lr=0.1, weight_decay=0.0)
    resumed.load_state_dict(copy.deepcopy(muon.state_dict()))
    for gradient in gradients[2:]:
        step(muon, p, gradient)
        step(resumed, q, gradient)
    assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["isotropic", "pooled", "image"])
@pytest.mark.parametrize("layer", ["s4", "s4d"])
def test_every_parameter_has_one_optimizer(kind: str, layer: str, make_model: MakeModel):
    model = make_model(kind, layer)
    optimizers = build_optimizers(model, lr=3e-3, matrix_lr=0.02, weight_decay=0.01)
    owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned))
    assert set(owned) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(("lr", "slow"), [(3e-3, 1e-3), (1e-4, 1e-4)])
def test_dynamics_are_slow_and_not_decayed(lr: float, slow: float, make_model: MakeModel):
    model = make_model("pooled", "s4")
    muon, adam = build_optimizers(model, lr=lr, matrix_lr=0.02, weight_decay=0.01)
    assert [(g["lr"], g["weight_decay"]) for g in muon.param_groups] == [(0.02, 0.01)]
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in adam.param_groups for p in g["params"]}
    groups = model.parameter_groups()
    assert {rates[id(p)] for p in groups["dynamics"]} == {(slow, 0.0)}
    assert {rates[id(p)] for p in groups["others"]} == {(lr, 0.0)}


def test_one_step_of_the_optimizers_lowers_the_loss(make_model: MakeModel):
    model = make_model("pooled")
    optimizers = build_optimizers(model, lr=3e-3, matrix_lr=0.02, weight_decay=0.01)
    tokens = torch.randint(0, 20, (4, 24))
    losses = []
    for _ in range(6):
        loss = -model.log_prob(tokens).mean()
        losses.append(float(loss.detach()))
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("step", "progress", "factor"),
    [
        (0, 0.0, 0.1),  # the first of ten steps of warm-up
        (4, 0.0, 0.5),
        (9, 0.1, 1.0),
        (50, 0.6, 1.0),  # the plateau ends where the last 0.4 begin
        (70, 0.8, 0.5),
        (90, 0.9, 0.25),
        (99, 1.0, 0.0),
        (99, 1.5, 0.0),
        (0, 0.9, 0.025),
    ],
)
def test_rate_warms_up_stays_and_falls_to_zero(step: int, progress: float, factor: float):
    assert rate(step, progress, warmup=10, decay=0.4) == pytest.approx(factor)


def test_rate_needs_no_warm_up():
    assert rate(0, 0.0, warmup=0, decay=1.0) == 1.0


@pytest.mark.parametrize("layer", ["s4", "s4d"])
def test_a_step_is_noticed_by_what_is_kept_between_evaluations(layer: str, make_model: MakeModel):
    """A model evaluated before and after a step equals one that was never evaluated before."""
    model = make_model("isotropic", layer)
    optimizers = build_optimizers(model, lr=0.05, matrix_lr=0.02, weight_decay=0.01)
    tokens = torch.randint(0, 20, (2, 24))
    with torch.no_grad():
        model(tokens)
    (-model.log_prob(tokens).mean()).backward()
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(model(tokens), copy.deepcopy(model)(tokens))
        fresh = make_model("isotropic", layer)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(model(tokens), fresh(tokens))


@pytest.mark.parametrize(("left", "factor"), [(1.0, 1.0), (0.5, 0.5), (0.25, 0.1464), (0.0, 0.0)])
def test_cosine_begins_and_ends_flat(left: float, factor: float):
    """``left``: of the descent, which here is all of the training."""
    actual = rate(100, 1 - left, warmup=1, decay=1.0, schedule="cosine")
    assert actual == pytest.approx(factor, abs=1e-4)
