"""Recall: tables of what followed, against a dictionary that reads one token after the other."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from genssm.conversion import to_recurrent
from genssm.model import SequenceModel
from genssm.recall import NOTHING, Recall
from genssm.stepper import CompiledModel, UnsupportedError

ORDERS, N_OUTPUTS = (1, 2, 4), 9


def one_by_one(tokens: list[int], order: int, slots: int) -> list[int]:
    """What is recalled after each token: the definition, in the words of ``Recall``."""

    def key(context: list[int]) -> int:
        result = 0
        for token in context:
            result = (result ^ (token + 1)) * 0x5BD1E995 % 2**31
            result ^= result >> 15
        return result

    table: dict[int, tuple[int, int]] = {}
    recalled = []
    for t, token in enumerate(tokens):
        if t >= order:
            before = key(tokens[t - order : t])
            table[before % slots] = before, token if token < N_OUTPUTS else NOTHING
        if t + 1 < order:
            recalled.append(NOTHING)
            continue
        now = key(tokens[t + 1 - order : t + 1])
        found, following = table.get(now % slots, (NOTHING, NOTHING))
        recalled.append(following if found == now else NOTHING)
    return recalled


def in_pieces(recall: Recall, tokens: Tensor, ends: list[int]) -> tuple[Tensor, Tensor]:
    reach = max(recall.orders) + 1  # more than is needed, as taps may want
    padded = F.pad(tokens, (reach, 0), value=NOTHING)
    tables, parts, start = recall.empty(len(tokens), tokens.device), [], 0
    for end in [*ends, tokens.shape[1]]:
        recalled, tables = recall(padded[:, start : end + reach], end - start, tables)
        parts.append(recalled)
        start = end
    return torch.cat(parts, 1), tables


@given(
    st.lists(st.integers(0, 10), min_size=1, max_size=60),
    st.sampled_from([16, 4096]),
    st.lists(st.integers(0, 60), max_size=4),
)
def test_all_positions_at_once_recall_what_one_by_one_would(
    tokens: list[int], slots: int, cuts: list[int]
) -> None:
    """However a sequence is cut, with tokens that are never predicted, and beside another one."""
    recall = Recall(ORDERS, slots, N_OUTPUTS)
    rows = torch.tensor([tokens, tokens[::-1]])
    ends = sorted(cut for cut in cuts if cut <= len(tokens))
    actual, _ = in_pieces(recall, rows, ends)
    expected = [
        [one_by_one(row, order, slots) for order in ORDERS] for row in (tokens, tokens[::-1])
    ]
    assert actual.tolist() == torch.tensor(expected).mT.tolist()


def test_tables_keep_their_size_and_forget_what_is_written_over() -> None:
    """A thousand contexts in 16 slots: only what came last is known."""
    recall = Recall((1,), 16, 1000)
    tokens = torch.arange(1000)[None]
    _, tables = in_pieces(recall, tokens, [500])
    assert (tables.shape, tables.dtype) == ((1, 1, 16, 2), torch.int32)
    kept = tables[0, 0, :, 1]
    assert int((kept >= 0).sum()) == 16
    assert int(kept.min()) > 800


@torch.no_grad()
def test_a_repeated_text_becomes_likelier_by_its_gate(
    make_model: Callable[..., SequenceModel],
) -> None:
    """A gate of g multiplies the odds of the token that followed by exp(g)."""
    model, gate = make_model("isotropic", recall=(2,)), 3.0
    tokens = torch.tensor([[5, 1, 2, 7, 1, 2]])
    known = []
    for strength in (0.0, gate):
        assert model.head.recall is not None
        model.head.recall.weight.zero_()
        model.head.recall.bias.fill_(strength)
        known.append(model(tokens)[0].softmax(-1))
    odds = [p[-1, 7] / (1 - p[-1, 7]) for p in known]
    assert float(odds[1] / odds[0]) == pytest.approx(torch.e**gate, rel=1e-4)
    assert torch.equal(known[0][:-1], known[1][:-1])  # nothing is repeated before


@torch.no_grad()
def test_every_stepper_remembers_the_same(make_model: Callable[..., SequenceModel]) -> None:
    """The tables are integers: not one may differ."""
    model = to_recurrent(make_model("isotropic", recall=(1, 2, 3), recall_slots=32))
    tokens = torch.randint(0, 23, (3, 200))
    _, state = model.prefill(tokens)
    stepped = model.initial_state(3)
    compiled = CompiledModel(model, "fp32")
    memory = compiled.load(stepped)
    for token in tokens.mT:
        compiled.step(token, memory)
        _, stepped = model.step(token, stepped)
    assert torch.equal(stepped.recall, state.recall)
    assert torch.equal(compiled.save(memory).recall, state.recall)
    assert torch.equal(model.remembered(tokens)[1], state.recall)


def test_more_orders_than_fit_into_a_panel_run_eagerly(
    make_model: Callable[..., SequenceModel],
) -> None:
    model = to_recurrent(make_model("isotropic", recall=tuple(range(1, 34))))
    with pytest.raises(UnsupportedError, match="at most 32 orders of recall fit, got 33"):
        CompiledModel(model)
