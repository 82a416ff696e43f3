"""What to say when a model's predictions are no numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from genssm.model import RecurrentModel, State

OVERGROWN = 1e12  # no sound state comes near; squares overflow from 1.8e19


class NotFiniteError(ValueError):
    """A model predicts something that is no number; the message names the layer at fault."""

    def __init__(self, model: RecurrentModel, state: State) -> None:
        """``state``: of the step that predicts so, or of one after it."""
        weights = _first_beyond(math.inf, (*model.named_parameters(), *model.named_buffers()))
        layer = _first_beyond(OVERGROWN, model.named_states(state))
        if weights is not None:
            cause = f"{weights} holds such values"
        elif layer is not None:
            cause = f"its state has grown without bound, first in {layer} or what enters it"
        else:
            cause = "its weights and states are finite, but not what the head makes of them"
        super().__init__(f"the model predicts values that are not finite numbers: {cause}")


def _first_beyond(bound: float, tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor whose magnitudes are not all below the bound, as NaN is not."""
    return next((name for name, tensor in tensors if not bool((tensor.abs() < bound).all())), None)
