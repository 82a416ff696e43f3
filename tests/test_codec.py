"""Codecs: raw to tokens and back without loss, and the same piece by piece."""

import importlib.abc
import io
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st

from genssm.codec import Audio, Codec, Image, Text, codec_from_config

STRINGS = {
    "empty": "",
    "letter": "x",
    "emoji": "😀 and 👩‍👩‍👧‍👦",
    "emoji of single bytes": "🦖🦕",
    "NUL": "a\0b\0\0",
    "only NUL": "\0",
    "SentencePiece's blank": "a\u2581b \u2581\u2581 ",
    "newlines": "\n\none\n",
    "tabs": "\tdef f():\n\t\tpass",
    "CRLF": "one\r\ntwo\r\n",
    "outer blanks": "  both sides   ",
    "many blanks": "a    b",
    "one blank": " ",
    "names of pieces": "<s> </s> <unk> <0x41> <|endoftext|>",
    "replacement character": "\ufffd",
    "replacement character and emoji": "\ufffd🦖",
    "combining and bidi marks": "e\u0301 \u200b\u200f\ufeff مرحبا",
    "compatibility characters": "ﬁ ² Å ｆｕｌｌ",
    "private and unassigned": "\ue000\U000f0000\u0378",
    "scripts": "Größe Съешь 日本語 हिन्दी ภาษาไทย",
}


def streamed(codec: Codec, tokens: list[int]) -> list[Any]:
    decoder = codec.decoder()
    pieces = [*(decoder.push(token) for token in tokens), decoder.flush()]
    return [piece for piece in pieces if piece is not None]


# Text


@pytest.mark.parametrize("text", STRINGS.values(), ids=STRINGS.keys())
def test_text_round_trips(text: str, text_codec: Text):
    tokens = text_codec.encode(text)
    assert tokens.dtype == torch.int64
    assert tokens.dim() == 1
    assert int(tokens[0]) == text_codec.boundary
    assert text_codec.boundary not in tokens[1:]
    assert text_codec.decode(tokens) == text
    assert text_codec.units(text) == len(text.encode())


@given(text=st.text())
def test_any_text_round_trips(text_codec: Text, text: str):
    assert text_codec.decode(text_codec.encode(text)) == text


@pytest.mark.parametrize("text", STRINGS.values(), ids=STRINGS.keys())
def test_streamed_text_joins_to_the_whole(text: str, text_codec: Text):
    tokens = text_codec.encode(text).tolist()
    assert "".join(streamed(text_codec, tokens)) == text


@given(text=st.text())
def test_any_streamed_text_joins_to_the_whole(text_codec: Text, text: str):
    assert "".join(streamed(text_codec, text_codec.encode(text).tolist())) == text


@given(data=st.data())
def test_any_streamed_tokens_join_to_the_whole(text_codec: Text, data: st.DataObject):
    """Models may write bytes that are no characters."""
    characters = text_codec.encode("🦖ǟ\ufffd a").tolist()
    tokens = data.draw(st.lists(st.sampled_from(characters), max_size=12))
    assert "".join(streamed(text_codec, tokens)) == text_codec.decode(tokens)


def test_streamed_text_withholds_a_character_until_its_last_byte(text_codec: Text):
    tokens = text_codec.encode("🦖").tolist()
    assert len(tokens) == 5  # the start and four bytes
    decoder = text_codec.decoder()
    assert [decoder.push(token) for token in tokens] == [None, None, None, None, "🦖"]
    assert decoder.flush() is None


def test_streamed_text_ends_with_what_is_left_of_a_broken_character(text_codec: Text):
    tokens = text_codec.encode("a🦖").tolist()[:-1]
    assert streamed(text_codec, tokens)[0] == "a"
    assert "".join(streamed(text_codec, tokens)) == text_codec.decode(tokens)


def test_text_decodes_tensors_arrays_and_lists_alike(text_codec: Text):
    tokens = text_codec.encode("one two")
    assert text_codec.decode(tokens.numpy()) == text_codec.decode(tokens.tolist()) == "one two"


@pytest.mark.parametrize("text", ["The quick brown fox", "Съешь ещё этих мягких", "日本語の文章"])
def test_text_needs_fewer_tokens_than_bytes(text: str, text_codec: Text):
    assert len(text_codec.encode(text)) - 1 < text_codec.units(text)


@pytest.mark.parametrize("surrogate", ["\ud800", "a\udfffb", "\ud83e "])
def test_text_refuses_lone_surrogates(surrogate: str, text_codec: Text):
    with pytest.raises(ValueError, match="lone surrogate"):
        text_codec.encode(surrogate)


@pytest.mark.parametrize("raw", [None, b"bytes", 3, ["a"]])
def test_text_refuses_what_is_no_string(raw: Any, text_codec: Text):
    with pytest.raises(ValueError, match=f"must be a string, got {type(raw).__name__}"):
        text_codec.encode(raw)


def test_text_keeps_its_tokenizer(text_codec: Text):
    again = Text(text_codec.tokenizer)
    assert (again.vocab_size, again.n_outputs, again.boundary) == (400, 400, 1)
    assert torch.equal(again.encode("Größe 123"), text_codec.encode("Größe 123"))


def test_text_splits_numbers_into_digits(text_codec: Text):
    assert len(text_codec.encode("1234567890")) == 11


def test_text_refuses_a_tokenizer_that_is_none(text_codec: Text):
    for damaged in (b"no tokenizer", text_codec.tokenizer[: len(text_codec.tokenizer) // 2]):
        with pytest.raises(ValueError, match="not a readable SentencePiece model"):
            Text(damaged)


def test_text_refuses_a_tokenizer_without_byte_fallback():
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 9), model_writer=model, vocab_size=12,
        model_type="bpe", minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="byte fallback"):
        Text(model.getvalue())


@pytest.mark.parametrize(
    ("documents", "vocab_size"), [(["too little text"], 4096), (["any text"], 100), ([], 400)]
)
def test_text_refuses_to_train_on_what_does_not_suffice(documents: list[str], vocab_size: int):
    with pytest.raises(ValueError, match=r"vocabulary|vocab_size|text"):
        Text.train(documents, vocab_size)


# Pictures


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 1, 1), (28, 28, 1), (2, 3, 3)])
def test_picture_round_trips(shape: tuple[int, int, int]):
    codec = Image(*shape)
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    tokens = codec.encode(picture)
    assert tokens.shape == (codec.length + 1,)
    assert int(tokens[0]) == codec.boundary == 256
    assert tokens[1:].tolist() == picture.reshape(-1).tolist()
    decoded = codec.decode(tokens)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, picture)
    assert codec.units(picture) == picture.size


def test_grey_picture_needs_no_channel_axis():
    codec = Image(4, 5, 1)
    picture = np.arange(20, dtype=np.uint8).reshape(4, 5)
    np.testing.assert_array_equal(codec.decode(codec.encode(picture))[..., 0], picture)


def test_streamed_picture_comes_by_rows():
    codec = Image(3, 2, 3, labels=("cat",))
    picture = np.random.default_rng(0).integers(0, 256, (3, 2, 3), np.uint8)
    rows = streamed(codec, codec.encode(picture, "cat").tolist())
    assert [row.shape for row in rows] == [(1, 2, 3)] * 3
    np.testing.assert_array_equal(np.concatenate(rows), picture)


def test_picture_that_ends_early_is_black_from_there_on():
    codec = Image(2, 2, 1)
    assert codec.decode([256, 7, 8, 9]).reshape(-1).tolist() == [7, 8, 9, 0]
    assert len(streamed(codec, [256, 7, 8, 9])) == 1


@pytest.mark.parametrize(
    "raw",
    [
        np.zeros((2, 2, 1), np.uint8),
        np.zeros((3, 2, 3), np.uint8),
        np.zeros((2, 3), np.uint8),
        np.zeros((2, 3, 3), np.float32),
        np.zeros((2, 3, 3), np.int64),
        np.zeros((), np.uint8),
        "picture.png",
        None,
    ],
)
def test_picture_of_another_shape_or_dtype_is_refused(raw: Any):
    with pytest.raises(ValueError, match=r"must be uint8 of shape \(2, 3, 3\), got"):
        Image(2, 3, 3).encode(raw)


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, 0, 1), (1, 1, 2), (1, 1, 4)])
def test_image_codec_refuses_impossible_shapes(shape: tuple[int, int, int]):
    with pytest.raises(ValueError, match="a picture needs"):
        Image(*shape)


def test_picture_with_too_many_values_is_refused():
    with pytest.raises(ValueError, match="has 4 values, got 5"):
        Image(2, 2, 1).decode([0] * 5)


def test_pictures_are_fitted_by_cropping_their_centre_and_scaling():
    wide = np.zeros((4, 10, 1), np.uint8)
    wide[:, 3:7] = 200
    np.testing.assert_allclose(Image(2, 2, 1).fit(wide), 200, atol=10)  # the edges blur a little
    small = Image(6, 9, 3).fit(np.full((2, 3, 3), 7, np.uint8))
    np.testing.assert_array_equal(small, np.full((6, 9, 3), 7, np.uint8))
    fitting = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
    np.testing.assert_array_equal(Image(2, 3, 3).fit(fitting), fitting)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1), (4, 4, 4), (0, 4, 3)])
def test_pictures_that_cannot_be_fitted_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"a picture must be \(h, w, 3\), got"):
        Image(2, 2, 3).fit(np.zeros(shape, np.uint8))


# Sound


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.001])
def test_sound_round_trips_within_the_error_of_mu_law(scale: float):
    codec = Audio(8000)
    wave = scale * np.linspace(-1, 1, 5001, dtype=np.float32)
    decoded = codec.decode(codec.encode(wave))
    assert decoded.dtype == np.float32
    assert decoded.shape == wave.shape
    error = np.abs(decoded - wave)
    assert float(error.max()) <= 0.03
    # a step of mu-law is ln(256)/127.5 of (|x| + 1/255); half of it is the rounding error
    assert bool((error <= 0.5 * np.log(256) / 127.5 * (np.abs(wave) + 1 / 255) * 1.1).all())


def test_silence_stays_nearly_silent():
    codec = Audio(8000)
    tokens = codec.encode(np.zeros(100, np.float32))
    assert tokens.tolist() == [256] + [128] * 100
    assert float(np.abs(codec.decode(tokens)).max()) < 1e-3


def test_loud_sound_is_clipped():
    codec = Audio(8000)
    decoded = codec.decode(codec.encode(np.array([3.0, -3.0, 1e30], np.float64)))
    np.testing.assert_allclose(decoded, [1, -1, 1], atol=1e-6)


def test_channels_are_averaged():
    stereo = np.array([[0.5, 0.1], [-0.2, 0.2]])
    np.testing.assert_allclose(Audio(8000).waveform(stereo), [0.3, 0.0], atol=1e-7)


def test_int16_is_scaled_to_one():
    wave = Audio(8000).waveform(np.array([-32768, 0, 16384], np.int16))
    assert wave.dtype == np.float32
    assert wave.tolist() == [-1.0, 0.0, 0.5]


def test_empty_sound_is_only_its_start():
    codec = Audio(8000, labels=("one",))
    tokens = codec.encode(np.zeros(0, np.float32), "one")
    assert tokens.tolist() == [257]
    assert codec.decode(tokens).shape == (0,)
    assert codec.units(np.zeros(0, np.float32)) == 0
    assert codec.waveform(np.zeros(0, np.float32), 44_100).shape == (0,)


@pytest.mark.parametrize("rate", [4000, 8000, 16_000, 44_100])
def test_resampling_changes_the_length_by_the_ratio_and_keeps_the_tone(rate: int):
    seconds, hertz = 0.2, 440
    tone = np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    wave = Audio(8000).waveform(tone, rate)
    assert len(wave) == pytest.approx(8000 * seconds, abs=1)
    expected = np.sin(2 * np.pi * hertz * np.arange(len(wave)) / 8000)
    np.testing.assert_allclose(wave[100:-100], expected[100:-100], atol=0.02)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_sound_that_is_not_finite_is_refused(value: float):
    with pytest.raises(ValueError, match="not finite"), np.errstate(over="ignore"):
        Audio(8000).encode(np.array([0.0, value]))


@pytest.mark.parametrize(
    "raw", [np.zeros(3, np.uint8), np.zeros(3, np.int32), np.zeros((2, 2, 2)), np.zeros(()), "a"]
)
def test_sound_of_another_shape_or_dtype_is_refused(raw: Any):
    with pytest.raises(ValueError, match="sound must be floats or int16"):
        Audio(8000).encode(raw)


@pytest.mark.parametrize("rate", [1009, 7999, 47_999, 191_999])
def test_rates_without_a_common_factor_take_no_large_filter(
    rate: int, monkeypatch: pytest.MonkeyPatch
):
    """The filter from 47,999 to 8,000 Hz would have 8,000 × 48,073 numbers."""
    resample = torchaudio.functional.resample

    def bounded(wave: torch.Tensor, old: int, new: int) -> torch.Tensor:
        assert max(old, new) <= 1000
        return resample(wave, old, new)

    monkeypatch.setattr(torchaudio.functional, "resample", bounded)
    tone = np.sin(2 * np.pi * 200 * np.arange(rate // 4) / rate)
    wave = Audio(8000).waveform(tone, rate)
    assert len(wave) == pytest.approx(2000, rel=2e-3)
    ideal = np.sin(2 * np.pi * 200 * np.arange(2000) / 8000)
    assert np.abs(wave[500:1500] - ideal[500:1500]).max() < 0.1


@pytest.mark.parametrize(("rate", "own"), [(44_100, 8000), (11_025, 16_000), (22_050, 8000)])
def test_common_rates_are_resampled_exactly(rate: int, own: int):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 3000).astype(np.float32)
    expected = torchaudio.functional.resample(torch.from_numpy(wave), rate, own)
    assert np.array_equal(Audio(own).waveform(wave, rate), expected.clamp(-1, 1).numpy())


@pytest.mark.parametrize("rate", [1, 999, 192_001, 2**31 - 1])
def test_sound_at_a_rate_that_none_has_is_refused(rate: int):
    with pytest.raises(ValueError, match=f"1000 … 192000 Hz, got {rate}"):
        Audio(8000).waveform(np.zeros(10, np.float32), rate)


@pytest.mark.parametrize("rate", [0, 999, 192_001, -8000])
def test_audio_codec_refuses_impossible_rates(rate: int):
    with pytest.raises(ValueError, match=f"1000 … 192000 Hz, got {rate}"):
        Audio(rate)


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 600])
def test_streamed_sound_joins_to_the_whole(length: int):
    codec = Audio(8000)
    tokens = codec.encode(np.sin(np.arange(length) / 9).astype(np.float32))
    pieces = streamed(codec, tokens.tolist())
    whole = codec.decode(tokens)
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, np.float32), *pieces]), whole)


def test_sound_tells_its_duration_after_the_label():
    codec = Audio(8000, ("one",), durations=(32, 48, 64))
    assert (codec.n_outputs, codec.vocab_size) == (260, 261)
    # The nearest by ratio: between 32 and 48 the limit is their geometric mean, 39.2.
    for length, token in ((0, 257), (1, 257), (39, 257), (40, 258), (56, 259), (900, 259)):
        wave = np.zeros(length, np.float32)
        tokens = codec.encode(wave, "one")
        assert tokens[:2].tolist() == [260, token]
        assert len(codec.decode(tokens)) == length
        assert codec.prompt(wave, "one").tolist() == [260, 256, *tokens[2:].tolist()]
    plain = Audio(8000, ("one",))
    assert plain.prompt(np.zeros(9), "one").tolist() == plain.encode(np.zeros(9), "one").tolist()


def test_sound_tells_its_level_after_its_duration():
    codec = Audio(8000, ("one",), (32, 48), levels=(-60, -40, -20))
    assert (codec.opening, codec.n_outputs, codec.vocab_size) == (2, 262, 263)
    # Levels are 257 … 259, durations 260 and 261.
    for amplitude, token in ((0.0, 257), (0.003, 257), (0.004, 258), (0.03, 258), (0.04, 259)):
        wave = amplitude * np.array([1, -1] * 16, np.float32)
        tokens = codec.encode(wave, "one")
        assert tokens[:3].tolist() == [262, 260, token]
        assert codec.prompt(wave, "one")[:3].tolist() == [262, 256, 256]
        assert len(codec.decode(tokens)) == 32
    assert codec.encode(np.zeros(0, np.float32)).tolist() == [256, 260, 257]
    assert Audio(8000, levels=(-60, -20)).encode(np.ones(3, np.float32))[:2].tolist() == [256, 258]


@pytest.mark.parametrize("levels", [(5,), (-300,), (-20, -20), (-10, -20)])
def test_audio_codec_refuses_levels_that_are_none(levels: tuple[int, ...]):
    with pytest.raises(ValueError, match="the lowest first"):
        Audio(8000, (), (), levels)


@pytest.mark.parametrize("durations", [(0, 5), (-1,), (5, 5), (9, 5)])
def test_audio_codec_refuses_durations_that_are_none(durations: tuple[int, ...]):
    with pytest.raises(ValueError, match="the shortest first"):
        Audio(8000, (), durations)


def test_sound_drops_the_boundary_that_ends_it():
    codec = Audio(8000)
    assert codec.decode([256, 128, 200, 256]).shape == (2,)
    assert codec.n_outputs == 257  # the end is predicted


# All


def test_labels_start_a_sequence(codecs: dict[str, Codec], examples: dict[str, list[Any]]):
    for modality in ("image", "audio"):
        codec, raw = codecs[modality], examples[modality][0]
        starts = [int(codec.encode(raw, label)[0]) for label in codec.labels]
        assert starts == [codec.vocab_size - 2, codec.vocab_size - 1]
        assert min(starts) > max(codec.boundary, codec.n_outputs - 1)
        for label in (None, "any"):
            assert int(codec.encode(raw, label)[0]) == codec.boundary
        np.testing.assert_array_equal(
            codec.decode(codec.encode(raw, codec.labels[1])), codec.decode(codec.encode(raw))
        )


def test_unknown_labels_are_refused_and_the_known_ones_named(codecs: dict[str, Codec]):
    with pytest.raises(ValueError, match="unknown class 'cow'; this model knows: cat, dog, any"):
        codecs["image"].start("cow")
    with pytest.raises(ValueError, match="unknown class 'cow'; this model knows: none"):
        codecs["text"].start("cow")


@pytest.mark.parametrize("modality", ["text", "image", "audio"])
def test_tokens_out_of_range_are_refused(modality: str, codecs: dict[str, Codec]):
    codec = codecs[modality]
    for token in (-1, codec.vocab_size):
        with pytest.raises(ValueError, match=f"0 … {codec.vocab_size - 1}, got"):
            codec.decode([token])


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_codec_is_built_again_from_its_config(modality: str, codecs: dict[str, Codec]):
    import json

    codec = codecs[modality]
    again = codec_from_config(json.loads(json.dumps(codec.to_config())))
    assert type(again) is type(codec)
    assert vars(again) == vars(codec)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"kind": "video"},
        {"kind": "text"},
        {"kind": "text", "rate": 8000},
        {"kind": "image", "height": 2},
        {"kind": "image", "height": "2", "width": 2, "channels": 1},
        {"kind": "audio", "rate": 8000, "labels": [], "bits": 8},
        {"kind": "audio", "rate": 8000, "labels": [], "durations": ["9"]},
        {"kind": "audio", "rate": 8000, "labels": [], "durations": 9},
    ],
)
def test_codec_config_that_fits_no_codec_is_refused(config: dict[str, Any]):
    with pytest.raises(ValueError, match="codec"):
        codec_from_config(config)


@pytest.mark.parametrize(
    "make", [lambda labels: Image(1, 1, 1, labels), lambda labels: Audio(8000, labels)]
)
def test_labels_count_into_the_vocabulary(make: Callable[[tuple[str, ...]], Codec]):
    assert make(("a", "b", "c")).vocab_size == make(()).vocab_size + 3 == 260


@pytest.mark.parametrize("label", ["\x1b[31mred", "two\nlines", "\x9b1m"])
def test_labels_that_a_terminal_would_obey_are_refused(label: str):
    with pytest.raises(ValueError, match="labels must have no control characters"):
        Audio(8000, labels=(label,))
    assert Audio(8000, labels=("می‌خواهم", "a b", "\u00a0")).labels  # others are names


@pytest.mark.parametrize("error", [OSError("undefined symbol"), RuntimeError("other CUDA")])
def test_a_torchaudio_of_another_torch_is_told_with_what_belongs_together(
    error: Exception, monkeypatch: pytest.MonkeyPatch
):
    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname: str, path: object, target: object = None) -> None:
            if fullname == "torchaudio":
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(OSError, match="does not load beside torch") as told:
        Audio(8000).encode(np.zeros(3, np.float32))
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    pins = [p for p in project["dependencies"] if p.startswith("torch")]
    assert len(pins) == 2
    assert all(f'"{pin}"' in str(told.value) for pin in pins)
