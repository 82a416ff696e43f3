"""The Python face, on small untrained models of each modality."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import genssm
from genssm import pipeline
from genssm.checkpoint import Checkpoint, save
from genssm.codec import Codec
from genssm.model import SequenceModel
from genssm.pipeline import Pipeline

MakeCheckpoint = Callable[[str], Checkpoint]
MODALITIES = ("text", "image", "audio")


@pytest.fixture(scope="module")
def pipes(
    codecs: dict[str, Codec], make_model: Callable[..., SequenceModel]
) -> dict[str, Pipeline]:
    """Models of widths that are multiples of 32, for samples that are exact in any batch."""
    kinds = {"text": "isotropic", "image": "image", "audio": "pooled"}
    widths = {"text": (32,), "image": (32, 32, 32), "audio": (32, 32, 32)}
    result = {}
    for modality, kind in kinds.items():
        codec = codecs[modality]
        model = make_model(
            kind, vocab_size=codec.vocab_size, n_outputs=codec.n_outputs, d_model=widths[modality]
        )
        result[modality] = Pipeline(modality, Checkpoint(model, codec), weights="fp32")
    return result


def test_load_gives_model_codec_and_config(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("image")
    save(checkpoint, tmp_path / "a")
    pipe = genssm.load(tmp_path / "a")
    assert pipe.modality == "image"
    assert pipe.config["metrics"] == checkpoint.metrics
    assert pipe.model.config == checkpoint.model.config
    assert pipe.codec.to_config() == checkpoint.codec.to_config()


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_same_seed_gives_the_same_sample_in_any_batch(
    pipes: dict[str, Pipeline], modality: str
) -> None:
    pipe = pipes[modality]
    batch = pipe.sample(count=4, max_tokens=30, seed=11)
    alone = pipe.start(count=1, first=2, max_tokens=30, seed=11).run()[0]
    assert alone.tokens == batch[2].tokens
    assert alone.token_bits == batch[2].token_bits
    assert pipe.sample(count=1, max_tokens=30, seed=11)[0].tokens == batch[0].tokens
    assert batch[0].tokens != batch[1].tokens


def test_more_samples_than_a_batch_holds(
    pipes: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [s.tokens for s in pipes["audio"].sample(count=5, max_tokens=9, seed=3)]
    monkeypatch.setattr(pipeline, "LARGEST_BATCH", 2)
    samples = pipes["audio"].sample(count=5, max_tokens=9, seed=3)
    assert [s.tokens for s in samples] == expected
    assert [s.index for s in samples] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_bits_of_a_sample_are_its_score(pipes: dict[str, Pipeline], modality: str) -> None:
    pipe = pipes[modality]
    sample = pipe.sample(max_tokens=30, seed=4)[0]
    tokens = torch.tensor([[pipe.codec.boundary, *sample.tokens]])
    with torch.no_grad():
        log_p = pipe.model.log_prob(tokens)
    assert sample.bits == pytest.approx(-float(log_p.sum()) / np.log(2), rel=1e-4)
    if modality != "text":  # text may be tokenised in another way than it was drawn
        drawn = [t for t in sample.tokens if t != pipe.codec.boundary]
        whole = sum(sample.token_bits[: len(drawn)])
        if modality == "audio":
            assert pipe.score(sample.raw) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("modality", MODALITIES)
def test_streamed_pieces_join_to_the_sample(pipes: dict[str, Pipeline], modality: str) -> None:
    pipe = pipes[modality]
    sample = pipe.sample(max_tokens=300, seed=6)[0]
    pieces = list(pipe.stream(max_tokens=300, seed=6))
    if modality == "text":
        assert "".join(pieces) == sample.raw
    else:
        np.testing.assert_array_equal(np.concatenate(pieces), sample.raw)


def test_text_continues_its_prompt(pipes: dict[str, Pipeline]) -> None:
    sample = pipes["text"].sample("The quick", max_tokens=10, seed=1)[0]
    assert sample.raw.startswith("The quick")
    assert str(sample) == sample.raw
    assert len(sample.tokens) <= 10


def test_no_tokens_gives_back_the_prompt(pipes: dict[str, Pipeline]) -> None:
    sample = pipes["text"].sample("The quick", max_tokens=0)[0]
    assert (sample.raw, sample.tokens, sample.finish) == ("The quick", [], "length")


def test_a_stop_string_ends_the_text_before_it(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["text"]
    free = pipe.sample("The", max_tokens=60, seed=2)[0]
    continuation = free.raw.removeprefix("The")
    middle = continuation[len(continuation) // 2]
    stopped = pipe.sample("The", max_tokens=60, seed=2, stop=[middle])[0]
    assert stopped.finish == "stop"
    assert stopped.raw == "The" + continuation[: continuation.index(middle)]


def test_a_picture_is_completed_below_the_kept_rows(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["image"]
    picture = np.random.default_rng(0).integers(0, 256, (4, 3, 3), np.uint8)
    for rows in (0, 1, 3, 4):
        sample = pipe.sample(picture, keep_rows=rows, seed=1)[0]
        np.testing.assert_array_equal(sample.raw[:rows], picture[:rows])
        assert len(sample.tokens) == (4 - rows) * 9
    half = pipe.sample(picture, seed=1)[0]
    assert len(half.tokens) == 18


def test_a_class_name_is_a_start_token(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["image"]
    assert pipe.prompt_tokens("dog").tolist() == [pipe.codec.start("dog")]
    assert pipe.prompt_tokens("any").tolist() == [pipe.codec.boundary]
    assert pipe.prompt_tokens().tolist() == [pipe.codec.boundary]
    assert pipe.sample("cat", seed=1)[0].tokens != pipe.sample("dog", seed=1)[0].tokens


def test_a_clip_is_continued(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["audio"]
    clip = 0.3 * np.sin(np.arange(40) / 3).astype(np.float32)
    sample = pipe.sample(clip, label="two", max_tokens=20, seed=1)[0]
    np.testing.assert_allclose(sample.raw[:40], clip, atol=0.02)
    assert len(sample.raw) <= 60


def test_an_interrupted_session_keeps_what_was_drawn(pipes: dict[str, Pipeline]) -> None:
    session = pipes["image"].start(count=2, seed=1)
    iterator = iter(session)
    row = next(iterator)
    assert row[1].shape == (1, 3, 3)
    for sample in session.samples():
        assert sample.finish == "interrupted"
        assert len(sample.tokens) == 9
        assert not sample.raw[1:].any()


def test_score_of_a_class_differs_from_any(pipes: dict[str, Pipeline]) -> None:
    picture = np.zeros((4, 3, 3), np.uint8)
    assert pipes["image"].score(picture) != pipes["image"].score(picture, "dog")
    assert pipes["text"].score("") == 0.0


@pytest.mark.parametrize(
    ("modality", "settings", "message"),
    [
        ("text", {"count": 0}, "count must be at least 1"),
        ("text", {"max_tokens": -1}, "max_tokens must not be negative"),
        ("text", {"stop": [""]}, "must not be empty"),
        ("text", {"keep_rows": 2}, "keep_rows needs a picture"),
        ("text", {"prompt": 3}, "must be a string"),
        ("text", {"prompt": "\ud800"}, "lone surrogate"),
        ("text", {"seed": -3}, "seed must lie in"),
        ("text", {"label": "cat"}, "unknown class 'cat'"),
        ("image", {"prompt": "bird"}, "unknown class 'bird'; this model knows: cat, dog, any"),
        ("image", {"prompt": "cat", "label": "dog"}, "two classes given"),
        ("image", {"stop": ["a"]}, "does not write text"),
        ("image", {"prompt": np.zeros((4, 3, 3))}, "must be uint8"),
        ("image", {"prompt": np.zeros((4, 3, 3), np.uint8), "keep_rows": 5}, "keep_rows must lie"),
        ("audio", {"prompt": np.array([np.nan])}, "not finite"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    pipes: dict[str, Pipeline], modality: str, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipes[modality].sample(**settings)
