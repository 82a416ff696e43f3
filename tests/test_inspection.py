"""What a checkpoint is, and how exactly its two views agree."""

from collections.abc import Callable

import torch

from genssm.checkpoint import Checkpoint
from genssm.inspection import agreement, inspect
from genssm.model import SequenceModel, to_recurrent
from genssm.pipeline import Pipeline


def test_agreement_is_tight_and_sees_a_broken_conversion(
    make_model: Callable[..., SequenceModel],
) -> None:
    model = make_model("pooled")
    recurrent = to_recurrent(model)
    tokens = torch.randint(0, 20, (50,))
    good = agreement(model, recurrent, tokens)
    assert good.tokens == 50
    assert good.step < 1e-4
    assert good.prefill < 1e-4
    with torch.no_grad():
        recurrent.stack.layers[1].ssm.a.mul_(0.9)
    assert agreement(model, recurrent, tokens).step > 1e-2


def test_inspect_counts_what_is_there(make_checkpoint: Callable[[str], Checkpoint]) -> None:
    checkpoint = make_checkpoint("image")
    probe = tuple(checkpoint.codec.encode(torch.zeros(4, 3, 3).byte().numpy()).tolist())
    full = Checkpoint(checkpoint.model, checkpoint.codec, checkpoint.training, {}, probe)
    facts = inspect(Pipeline("x", full))
    assert facts["parameters"] == sum(p.numel() for p in checkpoint.model.parameters())
    assert facts["compared_tokens"] == 37
    assert facts["largest_difference_step"] < 1e-3
    state = Pipeline("x", full).recurrent.initial_state(1)
    assert facts["state_bytes"] == sum(t.nbytes for t in state.tensors())
