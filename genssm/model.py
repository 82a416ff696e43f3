"""The sequence model: stacks of state space layers between an embedding and a head.

Trained by convolution (``SequenceModel``), sampled by recurrence (``RecurrentModel``): one map.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from genssm.blocks import Block, Linear, Pool, Stack, frozen, map_nested, named_states
from genssm.config import ModelConfig
from genssm.heads import HEADS
from genssm.inputs import Inputs, look, window_of
from genssm.layers import TrainedLayer, build_layer
from genssm.recall import NOTHING, Recall
from genssm.recurrence import without_autocast

P = ParamSpec("P")
R = TypeVar("R")


def build_stack(config: ModelConfig, level: int = 0) -> Stack:
    """The stack of a level: the pool that holds the levels below it, then its blocks."""
    d_model, stride = config.d_model[level], math.prod(config.pools[:level])
    layers: list[nn.Module] = []
    if level < len(config.pools):
        inner = build_stack(config, level + 1)
        layers.append(Pool(d_model, config.d_model[level + 1], config.pools[level], inner))
    for _ in range(config.n_layers[level]):
        ssm = build_layer(
            config.layer,
            d_model,
            config.d_state,
            max(1, config.l_max // stride),
            dt_min=config.dt_min,
            dt_max=config.dt_max,
            **config.layer_settings,
        )
        layers.append(Block(ssm, d_model, config.expand, config.dropout))
    return Stack(layers)


class SequenceModel(nn.Module):
    """An autoregressive model of token sequences in the convolutional view.

    The prediction at position t is of the token after ``tokens[:, t]``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.inputs = Inputs(config)
        self.stack = build_stack(config)
        self.norm = nn.LayerNorm(config.d_model[0])
        self.head = HEADS[config.head](config.d_model[0], config.n_outputs, len(config.recall))
        self.recall = Recall(config.recall, config.recall_slots, config.n_outputs)

    def features(self, tokens: Tensor, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """tokens (B, L) → what the head reads: features (B, L, H), and what is known without them.

        That is a linear prediction (B, L, 1), or recalled tokens (B, L, K).
        """
        _check_tokens(tokens, self.config)
        history = self.inputs.history(len(tokens), tokens.device)
        tables = self.recall.empty(len(tokens), tokens.device)
        x, known, _, _ = look(self.inputs, self.recall, tokens, history, tables, 0, rate)
        if tokens.shape[1]:  # a layer needs a position; nothing has no features, only a shape
            x = self.stack(x, rate)
        return self.norm(x), known

    def forward(self, tokens: Tensor, rate: float = 1.0) -> Tensor:
        """tokens (B, L) → logits (B, L, V); ``rate`` scales Δ in every layer."""
        return self.head.logits(*self.features(tokens, rate))

    def log_prob(self, tokens: Tensor, read: Tensor | None = None) -> Tensor:
        """Log-likelihood of tokens[:, 1:] given those before, in nats: (B, L) → (B, L - 1).

        With ``read`` (B, L - 1), given these instead of the tokens before.
        """
        read = tokens[:, :-1] if read is None else read
        return self.head.log_prob(*self.features(read), tokens[:, 1:])

    def parameter_groups(self) -> dict[str, list[Tensor]]:
        """Parameters by how they are trained.

        "dynamics": Λ, Δ and the like, declared by the layers; "matrices": hidden linear maps;
        "others": embeddings, norms, biases, output matrices C and D, the head.
        """
        groups: dict[str, list[Tensor]] = {"dynamics": [], "matrices": [], "others": []}
        seen: set[Tensor] = set()
        for module in self.modules():
            if isinstance(module, TrainedLayer):
                seen.update(own := [getattr(module, name) for name in module.dynamics])
                groups["dynamics"] += own
        for module in self.stack.modules():
            if isinstance(module, Linear):
                seen.add(module.weight)
                groups["matrices"].append(module.weight)
        groups["others"] = [p for p in self.parameters() if p not in seen]
        return groups


def _check_tokens(tokens: Tensor, config: ModelConfig) -> None:
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"tokens must be integers of shape (B, L), got {tuple(tokens.shape)} {tokens.dtype}"
        )
    if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= config.vocab_size):
        raise ValueError(
            f"token ids must lie in 0 … {config.vocab_size - 1}, "
            f"got {int(tokens.min())} … {int(tokens.max())}"
        )


class State(NamedTuple):
    """All that a recurrent model remembers; its size does not depend on the tokens read."""

    position: Tensor  # () int64 on the CPU: tokens read; all else has a row for each sequence
    # (B, kept + reach) int64, the first tokens and the last, for the taps; NOTHING before any
    history: Tensor
    recall: Tensor  # (B, K, slots, 2) int32: what ``Recall`` keeps
    layers: tuple  # nested as the model is

    def tensors(self) -> list[Tensor]:
        """All tensors, depth first."""

        def walk(node: Tensor | tuple) -> list[Tensor]:
            return (
                [node] if isinstance(node, Tensor) else [t for child in node for t in walk(child)]
            )

        return walk(tuple(self))

    def rows(self, index: Tensor) -> "State":
        """The state of the batch rows ``index``: repeat, drop or reorder sequences."""
        return State(self.position, *map_nested(lambda tensor: tensor[index], self[1:]))


def _as_trained(
    method: Callable[Concatenate["RecurrentModel", P], R],
) -> Callable[Concatenate["RecurrentModel", P], R]:
    """Without gradients, and in the weights' own precision whatever the autocast around."""

    @functools.wraps(method)
    def exact(self: "RecurrentModel", *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), without_autocast(self.norm.weight):
            return method(self, *args, **kwargs)

    return exact


class RecurrentModel(nn.Module):
    """A ``SequenceModel`` as a recurrence: constant time and memory per token."""

    def __init__(self, model: SequenceModel, rate: float = 1.0) -> None:
        super().__init__()
        self.config = model.config
        self.rate = rate
        self.inputs = frozen(model.inputs)
        self.stack = model.stack.to_recurrent(rate)
        self.norm = frozen(model.norm)
        self.head = frozen(model.head)
        self.recall = model.recall

    def initial_state(self, batch: int = 1) -> State:
        """The state before any token."""
        device = self.norm.weight.device
        history = self.inputs.history(batch, device)
        recall = self.recall.empty(batch, device)
        return State(torch.tensor(0), history, recall, self.stack.initial_state(batch))

    def foretold(self, state: State, token: int) -> State:
        """The state in which the rest of the opening is this token, whatever will be read.

        So a stream reads it as open while another one, drawn together with it, is told.
        """
        kept, history = self.config.kept, state.history.clone()
        first = history[:, :kept]
        first[first == NOTHING] = token
        return state._replace(history=history)

    def state_bytes(self) -> int:
        """Bytes of the state of one sequence, whatever its length."""
        return sum(t.nbytes for t in self.initial_state(1).tensors())

    def remembered(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``State.history`` and ``State.recall`` after tokens (B, L) from the beginning, L >= 1."""
        history = self.inputs.history(len(tokens), tokens.device)
        first, window = window_of(tokens, history, self.config.kept, 0)
        recall = self.recall.empty(len(tokens), tokens.device)
        _, recall = self.recall(window, tokens.shape[1], recall)
        return torch.cat([first, window[:, tokens.shape[1] :]], 1), recall

    def named_states(self, state: State) -> Iterator[tuple[str, Tensor]]:
        """The layers' states by the modules that compute them, in the order of a step."""
        return named_states(self.stack, state.layers, "stack")

    def look(
        self, tokens: Tensor, history: Tensor, recall: Tensor, position: int | Tensor,
        rate: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """``inputs.look`` with the rate that the model was converted at."""
        rate *= self.rate
        return look(self.inputs, self.recall, tokens, history, recall, position, rate)

    @_as_trained
    def prefill(
        self, tokens: Tensor, state: State | None = None, rate: float = 1.0
    ) -> tuple[Tensor, State]:
        """Read tokens (B, L) in parallel, from any state → logits (B, L, V) and the state after.

        ``rate`` scales Δ in every layer, from what the model was converted at.
        """
        features, known, state = self._features(tokens, state, rate)
        return self.head.logits(features, known), state

    @_as_trained
    def read(
        self, tokens: Tensor, state: State | None = None, rate: float = 1.0
    ) -> tuple[Tensor, State]:
        """``prefill`` that predicts only what comes after all tokens, L >= 1: logits (B, V)."""
        features, known, state = self._features(tokens, state, rate)
        if not features.shape[1]:
            raise ValueError("a reading needs at least one token, L >= 1; got none")
        return self.head.logits(features[:, -1], known[:, -1]), state

    def _features(
        self, tokens: Tensor, state: State | None, rate: float
    ) -> tuple[Tensor, Tensor, State]:
        """What the head reads after each token, and the state after all."""
        _check_tokens(tokens, self.config)
        state = self.initial_state(tokens.shape[0]) if state is None else state
        if len(tokens) != len(state.history):
            raise ValueError(
                f"the state is of {len(state.history)} sequences, the tokens are of {len(tokens)}"
            )
        x, known, history, recall = self.look(
            tokens, state.history, state.recall, int(state.position), rate
        )
        x, layers = self.stack.prefill(x, state.layers, int(state.position), rate)
        after = State(state.position + tokens.shape[1], history, recall, layers)
        return self.norm(x), known, after

    @_as_trained
    def step(self, token: Tensor, state: State, rate: float = 1.0) -> tuple[Tensor, State]:
        """Read one token (B,) → logits (B, V) of the next, and the state after; rate as above."""
        if token.shape != (len(state.history),):
            raise ValueError(
                f"token must be of shape (B,) with B = {len(state.history)} as the state; got "
                f"{tuple(token.shape)}"
            )
        _check_tokens(token[:, None], self.config)
        x, known, history, recall = self.look(
            token[:, None], state.history, state.recall, int(state.position), rate
        )
        x, layers = self.stack.step(x[:, 0], state.layers, int(state.position), rate)
        return (
            self.head.logits(self.norm(x), known[:, 0]),
            State(state.position + 1, history, recall, layers),
        )
