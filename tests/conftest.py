"""What the tests share: small codecs, models and data, and one way to compare numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from genssm.checkpoint import Checkpoint
from genssm.codec import Audio, Codec, Image, Text
from genssm.config import ModelConfig
from genssm.model import SequenceModel

settings.register_profile(
    "offline", derandomize=True, database=None, deadline=None, max_examples=100
)
settings.load_profile("offline")

DOCUMENTS = (
    "The quick brown fox jumps over the lazy dog, and 1234567890 times again.\n" * 4,
    "Größe, naïve café, œuvre, ça và; žluťoučký kůň.\n" * 4,
    "Съешь же ещё этих мягких французских булок.\n" * 4,
    "日本語の文章と漢字。 中文文本。\n" * 4,
    "مرحبا بالعالم 😀 😂\n\tdef f(x):\r\n\t\treturn x\n" * 4,
)

# Small models that between them use every part: taps of tokens, recall, pools, durations, the
# logistic head with taps and image positions.
MODELS: dict[str, dict[str, Any]] = {
    "isotropic": {
        "vocab_size": 23,
        "n_outputs": 20,
        "d_model": (12,),
        "n_layers": (2,),
        "token_taps": (2, 4),
        "recall": (1, 3),
        "recall_slots": 16,
    },
    "pooled": {
        "vocab_size": 23,
        "n_outputs": 20,
        "d_model": (8, 12, 16),
        "n_layers": (1, 1, 1),
        "pools": (2, 3),
        "conditioned": True,
        "opening": 2,
        "durations": (5, 9, 14),
    },
    "image": {
        "vocab_size": 259,
        "n_outputs": 256,
        "d_model": (8, 12, 16),
        "n_layers": (1, 1, 1),
        "pools": (3, 2),
        "head": "logistics",
        "taps": (1, 3, 9, 10, 12),
        "image_shape": (4, 3, 3),
        "conditioned": True,
    },
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def assert_near() -> Callable[[Tensor, Tensor, float], None]:
    """Same shape, all finite, and max |actual - expected| <= tolerance · max |expected|."""

    def check(actual: Tensor, expected: Tensor, tolerance: float) -> None:
        assert (actual.shape, actual.is_complex()) == (expected.shape, expected.is_complex())
        if actual.is_complex():
            actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
        assert bool(actual.isfinite().all())
        if expected.numel():
            error = float((actual.detach().double() - expected.detach().double()).abs().max())
            scale = float(expected.detach().double().abs().max())
            assert error <= tolerance * scale, f"{error:.3g} against {scale:.3g}"

    return check


@pytest.fixture(scope="session")
def by_scipy() -> Callable[[np.ndarray, np.ndarray, float, str], tuple[np.ndarray, np.ndarray]]:
    """SciPy's discretisation: A (N, N), B (N,), dt, method → Ā (N, N), B̄ (N,)."""

    def discretize(
        A: np.ndarray, B: np.ndarray, dt: float, method: str
    ) -> tuple[np.ndarray, np.ndarray]:
        import scipy.signal

        N = len(B)
        system = (A, B[:, None], np.zeros((1, N)), np.zeros((1, 1)))
        discrete: Any = scipy.signal.cont2discrete(system, dt, method)
        return discrete[0], discrete[1][:, 0]

    return discretize


@pytest.fixture(scope="session")
def make_model() -> Callable[..., SequenceModel]:
    """(a key of MODELS, a key of LAYERS, **other settings) → a model of no zero parameters."""

    def make(kind: str, layer: str = "s4d", **overrides: Any) -> SequenceModel:
        chosen = {"layer": layer, "d_state": 8, "l_max": 24, **MODELS[kind], **overrides}
        torch.manual_seed(0)
        model = SequenceModel(ModelConfig(**chosen)).eval()
        with torch.no_grad():  # some parts start at zero and would hide errors
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    return make


@pytest.fixture(scope="session")
def text_codec() -> Text:
    """A tokenizer of 400 pieces, 256 of them bytes, learned from several scripts."""
    return Text.train(DOCUMENTS, 400)


@pytest.fixture(scope="session")
def codecs(text_codec: Text) -> dict[str, Codec]:
    """A codec of each modality."""
    return {
        "text": text_codec,
        "image": Image(4, 3, 3, labels=("cat", "dog")),
        "audio": Audio(8000, ("one", "two"), (32, 48, 64), (-40, -20)),
    }


@pytest.fixture(scope="session")
def examples() -> dict[str, list[Any]]:
    """Three raw examples of each modality; those of text and sound differ in length."""
    random = np.random.default_rng(0)
    tones = [0.5 * np.sin(np.arange(n) / 5).astype(np.float32) for n in (50, 71, 30)]
    return {
        "text": ["a short one", "Съешь же ещё этих булок. 🦖", "x"],
        "image": list(random.integers(0, 256, (3, 4, 3, 3), np.uint8)),
        "audio": tones,
    }


@pytest.fixture(scope="session")
def make_checkpoint(
    codecs: dict[str, Codec], make_model: Callable[..., SequenceModel]
) -> Callable[[str], Checkpoint]:
    """A modality → an untrained checkpoint of it."""

    def make(modality: str) -> Checkpoint:
        codec = codecs[modality]
        model = make_model(
            {"text": "isotropic", "image": "image", "audio": "pooled"}[modality],
            vocab_size=codec.vocab_size,
            n_outputs=codec.n_outputs,
            opening=codec.opening,
            durations=codec.durations,
        )
        training, metrics = {"steps": 3}, {"test": {"value": 1.5, "unit": codec.unit}}
        return Checkpoint(model, codec, training, metrics)

    return make


@pytest.fixture(scope="session")
def write_sound() -> Callable[..., Path]:
    """(path, wave, rate) → the path of a 16-bit sound file, its folder made."""

    def write(path: Path, wave: np.ndarray, rate: int = 8000) -> Path:
        import soundfile

        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave, rate, subtype="PCM_16")
        return path

    return write


@pytest.fixture(scope="session")
def write_picture() -> Callable[..., Path]:
    """(path, uint8 array (H, W) or (H, W, 3)) → the path of a picture file, its folder made."""

    def write(path: Path, array: np.ndarray) -> Path:
        import PIL.Image

        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(array).save(path)
        return path

    return write
