"""What a checkpoint is, and how exactly its two views agree."""

import json
from collections.abc import Callable

import torch

from genssm.checkpoint import Checkpoint
from genssm.inspection import inspect
from genssm.pipeline import Pipeline


def test_inspect_counts_what_is_there(make_checkpoint: Callable[[str], Checkpoint]) -> None:
    checkpoint = make_checkpoint("image")
    probe = tuple(checkpoint.codec.encode(torch.zeros(4, 3, 3).byte().numpy()).tolist())
    full = Checkpoint(checkpoint.model, checkpoint.codec, checkpoint.training, {}, probe)
    facts = inspect(Pipeline("x", full))
    assert facts["parameters"] == sum(p.numel() for p in checkpoint.model.parameters())
    assert facts["compared_tokens"] == 37
    assert facts["largest_difference_step"] < 1e-3
    assert facts["refusal"] is None
    assert [layer["name"] for layer in facts["layers"]] == sorted(
        layer["name"] for layer in facts["layers"]
    )
    assert json.loads(json.dumps(facts))["layers"][0]["name"] == facts["layers"][0]["name"]
    state = Pipeline("x", full).recurrent.initial_state(1)
    assert facts["state_bytes"] == sum(t.nbytes for t in state.tensors())


def test_a_model_at_a_rate_is_compared_at_that_rate(
    make_checkpoint: Callable[[str], Checkpoint],
) -> None:
    made = make_checkpoint("audio")
    probe = tuple(made.codec.encode(torch.linspace(-1, 1, 60).numpy()).tolist())
    pipe = Pipeline("x", Checkpoint(made.model, made.codec, {}, {}, probe))
    assert inspect(pipe.at_rate(0.5))["refusal"] is None
