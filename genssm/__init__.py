"""genssm: write, draw and speak with state space models.

Trained by convolution, converted once, sampled by recurrence in constant time per token.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genssm.checkpoint import Checkpoint
    from genssm.config import ModelConfig
    from genssm.conversion import to_recurrent
    from genssm.files import read_recipe, write_samples
    from genssm.folders import CheckpointError
    from genssm.layers import LSSL, S4, S4D
    from genssm.model import SequenceModel
    from genssm.pipeline import Pipeline, load
    from genssm.provenance import RecipeError
    from genssm.session import Sample, Session
    from genssm.states import StateError

__version__ = "0.1.0"

__all__ = [
    "LSSL",
    "S4",
    "S4D",
    "Checkpoint",
    "CheckpointError",
    "ModelConfig",
    "Pipeline",
    "RecipeError",
    "Sample",
    "SequenceModel",
    "Session",
    "StateError",
    "load",
    "read_recipe",
    "to_recurrent",
    "write_samples",
]

# Imported on first use, so that ``genssm --help`` does not wait for torch.
_HOMES = {
    "LSSL": "genssm.layers",
    "S4": "genssm.layers",
    "S4D": "genssm.layers",
    "Checkpoint": "genssm.checkpoint",
    "CheckpointError": "genssm.folders",
    "ModelConfig": "genssm.config",
    "SequenceModel": "genssm.model",
    "to_recurrent": "genssm.conversion",
    "Pipeline": "genssm.pipeline",
    "RecipeError": "genssm.provenance",
    "Sample": "genssm.session",
    "Session": "genssm.session",
    "StateError": "genssm.states",
    "load": "genssm.pipeline",
    "read_recipe": "genssm.files",
    "write_samples": "genssm.files",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    try:
        return import_module(f"genssm.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"genssm.{name}":
            raise
        raise AttributeError(f"module 'genssm' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    """What a notebook completes: the names above and the modules, imported or not."""
    return sorted({*__all__, "__version__", *(module.name for module in iter_modules(__path__))})
