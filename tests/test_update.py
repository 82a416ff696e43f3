"""One step of a training: what a batch says is what is counted, read and clipped."""

import math
from collections.abc import Callable

import pytest
import torch

from genssm import update
from genssm.batches import Batch
from genssm.model import SequenceModel
from genssm.update import Objective, train_step


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_counts_and_reads_what_the_batch_says(
    accumulate: int, make_model: Callable[..., SequenceModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets by their weights, given what is read in the place of the tokens; clipped."""
    monkeypatch.setattr(update, "has_fast_bfloat16", lambda device: False)
    model = make_model("pooled")
    tokens, read = torch.randint(0, 17, (4, 13)), torch.randint(0, 17, (4, 12))
    weights = torch.rand(4, 12).round() + torch.arange(4)[:, None]
    expected = -(model.log_prob(tokens, read) * weights).sum() / weights.sum() / math.log(2)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    batch = Batch(tokens, weights, read)
    step = train_step(Objective(model), [still], batch, 0.01, (0,), accumulate=accumulate)
    assert step.bits == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert float(torch.stack(gradients).norm()) == pytest.approx(0.01, rel=1e-3)
