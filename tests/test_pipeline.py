"""The Python face, on small untrained models of each modality."""

import copy
import gc
import json
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import genssm
from genssm import engine as loops
from genssm import pipeline
from genssm.checkpoint import Checkpoint, save
from genssm.codec import Audio, Codec
from genssm.data import Example
from genssm.engine import Drawn, read, result_of
from genssm.evaluate import token_bits
from genssm.model import SequenceModel
from genssm.pipeline import Pipeline
from genssm.provenance import RecipeError, parse
from genssm.request import GUIDANCE, Plan, Request
from genssm.sampling import SamplingConfig
from genssm.session import Sample
from genssm.stepper import CompiledModel, load_kernels

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
    told = {"duration": 0.004} if modality == "audio" else {}  # 32 samples
    sample = pipe.sample(max_tokens=30, seed=219, **told)[0]
    tokens = torch.tensor([[*sample.plan.tokens, *sample.tokens]])
    with torch.no_grad():
        log_p = pipe.model.log_prob(tokens)[:, len(sample.plan.tokens) - 1 :]
    assert sample.bits == pytest.approx(-float(log_p.sum()) / np.log(2), rel=1e-4)
    if modality != "text":  # text may be tokenised in another way than it was drawn
        drawn = [t for t in sample.tokens if t != pipe.codec.boundary]
        whole = sum(sample.token_bits[: len(drawn)])
        if modality == "audio":
            assert len(sample.raw) == 29  # behind the level, in which this seed is lucky
            level = sample.tokens[0]  # drawn, perhaps not that of what followed
            encoded = pipe.codec.encode(sample.raw)
            encoded[2] = level
            bits = token_bits(pipe.model, encoded[None])[0, 1:]
            assert float(bits.sum()) == pytest.approx(whole, rel=1e-4)


def test_a_duration_is_drawn_or_told(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["audio"]
    first = pipe.codec.n_outputs - 3  # of 32, 48 and 64 samples: 4, 6 and 8 ms
    assert pipe.prompt_tokens("two").tolist() == [pipe.codec.start("two")]
    for seconds, token in ((0.004, first), (0.0045, first), (0.006, first + 1), (0.008, first + 2)):
        told = pipe.prompt_tokens("two", duration=seconds).tolist()
        assert told == [pipe.codec.start("two"), token]
    clip = np.zeros(9, np.float32)
    start = pipe.codec.boundary
    assert pipe.prompt_tokens(clip)[:3].tolist() == [start, start, start]  # it may go on for long
    assert pipe.prompt_tokens(clip, duration=0.006)[:3].tolist() == [start, first + 1, start]
    assert pipe.sample("two", duration=0.006, seed=1)[0].plan.tokens[1] == first + 1
    slow = pipe.at_rate(0.5)  # the same seconds are twice as many samples
    assert slow.codec.durations == (64, 96, 128)
    assert slow.prompt_tokens("two", duration=0.006).tolist()[1] == first + 1
    tokens = torch.tensor([[*pipe.prompt_tokens("two", duration=0.006), *range(100, 190)]])
    _, state = slow.recurrent.prefill(tokens[:, :-1])
    by_convolution = pipe.model(tokens, 0.5)[:, -1]
    torch.testing.assert_close(slow.recurrent.step(tokens[:, -1], state)[0], by_convolution)


@pytest.mark.parametrize("modality", MODALITIES)
def test_streamed_pieces_join_to_the_sample(pipes: dict[str, Pipeline], modality: str) -> None:
    pipe = pipes[modality]
    sample = pipe.sample(max_tokens=300, seed=6)[0]
    pieces = list(pipe.stream(max_tokens=300, seed=6))
    if modality == "text":
        assert "".join(pieces) == sample.raw
    else:
        np.testing.assert_array_equal(np.concatenate(pieces), sample.raw)


def test_a_notebook_shows_a_line(pipes: dict[str, Pipeline]) -> None:
    for modality, pipe in pipes.items():
        assert repr(pipe).startswith(f"<Pipeline {pipe.name!r}: {modality}, ")
        shown = repr(pipe.sample(max_tokens=20, seed=6))
        assert f"{modality} tokens" in shown
        assert "seed 6, index 0>" in shown
        assert len(shown) < 200
    assert repr(pipes["text"].sample("The", max_tokens=0)[0]).startswith("<Sample: 'The', 0 text")


def test_text_continues_its_prompt(pipes: dict[str, Pipeline]) -> None:
    sample = pipes["text"].sample("The quick", max_tokens=10, seed=1)[0]
    assert sample.raw.startswith("The quick")
    assert str(sample) == sample.raw
    assert len(sample.tokens) <= 10


def test_a_sample_says_how_it_ended(pipes: dict[str, Pipeline]) -> None:
    pipe = copy.deepcopy(pipes["text"])
    bias = pipe.model.get_parameter("head.linear.bias").data
    for shift, finish in ((1e4, "end"), (-2e4, "length")):
        bias[pipe.codec.boundary] += shift
        sample = Pipeline("text", pipe.checkpoint, engine="eager").sample(max_tokens=5, seed=1)[0]
        assert (sample.finish, len(sample.tokens)) == (finish, {"end": 1, "length": 5}[finish])


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


def test_what_is_streamed_ends_before_the_stop_string(pipes: dict[str, Pipeline]) -> None:
    """Also one of many tokens, of which none is told before it is known to be no part of it."""
    pipe = pipes["text"]
    text = pipe.sample(max_tokens=60, seed=2)[0].raw
    middle, no_stop = len(text) // 2, "\0no such text"
    for stop in ([text[middle : middle + 9], text[-3:]], [text[middle : middle + 5] + no_stop]):
        sample = pipe.sample(max_tokens=60, seed=2, stop=stop)[0]
        assert (sample.finish == "stop") == (no_stop not in stop[0])
        assert (
            sample.raw
            == text[: min(text.find(s) for s in stop) if sample.finish == "stop" else None]
        )
        assert "".join(pipe.stream(max_tokens=60, seed=2, stop=stop)) == sample.raw


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


def tokens_of(samples: list[Sample]) -> list[list[int]]:
    return [sample.tokens for sample in samples]


@pytest.mark.parametrize(("modality", "prompt"), [("text", "The fox"), ("image", "dog")])
def test_a_state_is_continued_as_its_prompt(
    pipes: dict[str, Pipeline], modality: str, prompt: str, tmp_path: Path
) -> None:
    """A state is never guided, so neither is the prompt here."""
    pipe = pipes[modality]
    state = pipe.read(prompt)
    expected = pipe.sample(prompt, count=3, max_tokens=20, seed=8, guidance=1.0)
    forked = pipe.sample(state=state, count=3, max_tokens=20, seed=8)
    assert tokens_of(forked) == tokens_of(expected)
    assert [s.token_bits for s in forked] == [s.token_bits for s in expected]
    np.testing.assert_array_equal(forked[2].raw, expected[2].raw)
    pipe.save_state(state, tmp_path / "a.state")
    loaded = pipe.load_state(tmp_path / "a.state")
    assert tokens_of(pipe.sample(state=loaded, count=3, max_tokens=20, seed=8)) == tokens_of(
        expected
    )
    assert list(pipe.stream(state=loaded, max_tokens=9, seed=8))


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("every", [0, 1, 7])
def test_rewinding_equals_reading_again(
    pipes: dict[str, Pipeline], modality: str, every: int
) -> None:
    pipe = pipes[modality]
    session = pipe.start(count=2, max_tokens=30, seed=12, snapshot_every=every)
    session.run()
    for sample in range(2):
        drawn = [t for t in session.tokens[sample] if t != pipe.codec.boundary]
        for position in (0, 1, 6, 7, 8, 29, None):
            if position is not None and position > len(drawn):
                continue
            rewound = session.reading(sample, position)
            kept = drawn if position is None else drawn[:position]
            again = read(pipe.recurrent, torch.tensor([pipe.codec.boundary, *kept]))
            assert torch.equal(rewound.tokens, again.tokens)
            torch.testing.assert_close(rewound.logits, again.logits, rtol=1e-4, atol=1e-4)
            continued = pipe.sample(state=rewound, max_tokens=5, seed=1)
            assert tokens_of(continued) == tokens_of(pipe.sample(state=again, max_tokens=5, seed=1))
    with pytest.raises(ValueError, match="the position must lie in"):
        session.reading(0, 31)


def test_the_last_state_is_handed_out_and_not_read_again(
    pipes: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipes["text"]
    stepper = pipe.stepper
    assert isinstance(stepper, CompiledModel)
    whole = pipe.sample("The", max_tokens=55, temperature=0.0)[0].tokens
    session = pipe.start("The", max_tokens=50, temperature=0.0, snapshot_every=1000)
    session.run()
    monkeypatch.delattr(type(stepper), "read")
    state = session.reading()
    assert pipe.sample(state=state, max_tokens=5, temperature=0.0)[0].tokens == whole[50:]


def test_a_sample_stays_as_it_was_while_its_session_goes_on(pipes: dict[str, Pipeline]) -> None:
    session = pipes["audio"].start("one", max_tokens=60, seed=1)
    session.ready()
    (early,) = session.samples()
    assert len(early.tokens) == len(early.token_bits) == 1
    assert len(session.run()[0].tokens) > 1
    assert len(early.tokens) == len(early.token_bits) == len(early.raw) == 1


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_an_interruption_harms_no_state(
    pipes: dict[str, Pipeline], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes when a block is drawn but not yet handed out, or when a token is read."""
    pipe = Pipeline("audio", pipes["audio"].checkpoint, engine=engine, weights="fp32")
    session = pipe.start("one", max_tokens=60, seed=1, snapshot_every=8)
    for _ in range(4):
        session.ready()
    place, name = (loops, "probabilities") if engine == "eager" else (load_kernels(), "run")
    work = getattr(place, name)

    def interrupted(*arguments: Any) -> None:
        work(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.ready()
    reading = session.reading()
    expected = pipe.read("one")
    expected = read(pipe.recurrent, torch.tensor(session.tokens[0]), expected)
    assert torch.equal(reading.tokens, expected.tokens)
    torch.testing.assert_close(reading.logits, expected.logits, rtol=1e-4, atol=1e-4)
    if engine == "eager":
        assert session.run()[0].tokens == pipe.sample("one", max_tokens=60, seed=1)[0].tokens
    else:
        with pytest.raises(RuntimeError, match=r"interrupted.*session\.reading"):
            session.run()


def test_a_state_can_be_taken_while_its_request_is_drawn(
    pipes: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another thread, say, that wants to go on from there."""
    pipe = pipes["audio"]
    session = pipe.start("one", max_tokens=60, seed=1, snapshot_every=8)
    simd, readings = load_kernels(), []
    work = simd.run

    def watched(*arguments: Any) -> None:
        work(*arguments)
        readings.append(session.reading())

    monkeypatch.setattr(simd, "run", watched)
    session.run()
    assert len(readings) > 4
    for reading in readings:
        expected = read(pipe.recurrent, reading.tokens)
        torch.testing.assert_close(reading.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_rank_keeps_the_fewest_bits_per_token(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["audio"]
    drawn = pipe.sample(count=6, max_tokens=20, seed=5)
    ranked = pipe.sample(count=2, rank=3, max_tokens=20, seed=5)
    for kept, group in zip(ranked, (drawn[:3], drawn[3:]), strict=True):
        assert kept.bits_per_token == min(s.bits_per_token for s in group)
        assert kept.tokens in tokens_of(group)
        assert tokens_of(pipe.start(first=kept.index, max_tokens=20, seed=5).run()) == [kept.tokens]
    trimmed = pipe.sample(rank=3, trim=0.4, max_tokens=20, seed=5)[0]
    assert trimmed.bits_per_token == sorted(s.bits_per_token for s in drawn[:3])[1]
    with pytest.raises(ValueError, match="use sample"):
        pipe.start(rank=2)


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_rank_by_class_keeps_the_surest(pipes: dict[str, Pipeline], modality: str) -> None:
    pipe = pipes[modality]
    label = pipe.codec.labels[1]
    drawn = pipe.sample(label, count=6, max_tokens=20, seed=7)
    ranked = pipe.sample(label, count=2, rank=3, rank_by="class", max_tokens=20, seed=7)
    by_bits = pipe.sample(label, count=2, rank=3, max_tokens=20, seed=7)
    assert tokens_of(ranked) != tokens_of(by_bits)
    for kept, group in zip(ranked, (drawn[:3], drawn[3:]), strict=True):
        odds = []
        for sample in group:
            nats = []
            for name in pipe.codec.classes:
                tokens = torch.tensor([[pipe.codec.start(name), *sample.tokens]])
                nats.append(float(pipe.model.log_prob(tokens).detach().double().sum()))
            odds.append(nats[1] - nats[0])
        assert kept.tokens == group[int(np.argmax(odds))].tokens
    recipe = pipe.recipe(ranked)
    assert recipe is not None
    assert tokens_of(pipe.repeat(parse(json.dumps(recipe.to_json())))) == tokens_of(ranked)


def test_a_label_within_a_class_is_ranked_by_its_class(
    make_model: Callable[..., SequenceModel],
) -> None:
    codec = Audio(8000, labels=("1", "2", "2_low", "2_low_hum"))
    settings = {"vocab_size": codec.vocab_size, "n_outputs": codec.n_outputs}
    pipe = Pipeline("sound", Checkpoint(make_model("pooled", **settings), codec))
    for label in ("2", "2_low", "2_low_hum"):
        plan = pipe.plan(label, Request(rank=2, rank_by="class"))
        assert codec.classes[pipe._class_of(plan)] == "2"
        drawn = pipe.sample(label, count=5, max_tokens=20, seed=1)
        surest = max(drawn, key=lambda sample: _odds_of_two(pipe, sample.tokens))
        ranked = pipe.sample(label, rank=5, rank_by="class", max_tokens=20, seed=1)
        assert tokens_of(ranked) == [surest.tokens]


def _odds_of_two(pipe: Pipeline, tokens: list[int]) -> float:
    one, two = (
        float(
            pipe.model.log_prob(torch.tensor([[pipe.codec.start(label), *tokens]])).detach().sum()
        )
        for label in ("1", "2")
    )
    return two - one


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_class_probabilities_agree_with_separate_scores(
    pipes: dict[str, Pipeline], modality: str
) -> None:
    pipe = pipes[modality]
    raw = pipe.sample(max_tokens=60, seed=2)[0].raw
    probabilities = pipe.classify(raw)
    assert list(probabilities) == list(pipe.codec.labels)
    assert sum(probabilities.values()) == pytest.approx(1)
    bits = np.array([pipe.score(raw, label) for label in pipe.codec.labels])
    expected = np.exp2(bits.min() - bits)
    np.testing.assert_allclose(
        list(probabilities.values()), expected / expected.sum(), rtol=0, atol=1e-3
    )


def test_token_bits_add_up_to_the_score(pipes: dict[str, Pipeline]) -> None:
    bits = pipes["text"].token_bits("The quick brown fox")
    assert len(bits) == len(pipes["text"].codec.encode("The quick brown fox")) - 1
    assert float(bits.sum()) == pytest.approx(pipes["text"].score("The quick brown fox"))


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_guidance_spans_from_any_to_the_class(pipes: dict[str, Pipeline], modality: str) -> None:
    pipe = pipes[modality]
    label = pipe.codec.labels[1]

    def drawn(prompt: str, **settings: float) -> list[list[int]]:
        return tokens_of(pipe.sample(prompt, count=3, max_tokens=25, seed=7, **settings))  # type: ignore[arg-type]

    own = drawn(label, guidance=1.0)
    assert drawn(label) == drawn(label, guidance=GUIDANCE[modality])
    unguided: Any = {"state": result_of(pipe._unconditional([pipe.codec.boundary]))}
    open_ = tokens_of(pipe.sample(**unguided, count=3, max_tokens=25, seed=7))
    assert drawn(label, guidance=0.0) == open_ != own
    assert (drawn("any") == open_) == (modality == "image")  # it has no opening to be left open
    assert drawn(label, guidance=0.9999999) == own  # by two streams


def test_what_has_no_class_is_not_guided(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["audio"]
    assert pipe.plan("any").guidance == pipe.plan().guidance == 1
    label = pipe.codec.labels[0]
    assert pipe.plan(label).guidance == GUIDANCE["audio"] != 1
    assert pipe.plan(state=pipe.read(label)).guidance == 1


def test_guidance_moves_the_logits_by_the_difference(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["image"]
    sample = pipe.sample("dog", guidance=3.0, temperature=0, seed=1)[0]
    streams = [
        torch.tensor([[pipe.codec.start(label), *sample.tokens[:-1]]]) for label in ("dog", None)
    ]
    with torch.no_grad():
        own, unconditional = (pipe.model(tokens)[0] for tokens in streams)
    guided = unconditional + 3 * (own - unconditional)
    chosen = guided.gather(-1, torch.tensor(sample.tokens)[:, None])[:, 0]
    assert bool((chosen >= guided.amax(-1) - 1e-3).all())
    bits = -own.log_softmax(-1).gather(-1, torch.tensor(sample.tokens)[:, None]).sum() / np.log(2)
    assert sample.bits == pytest.approx(float(bits), rel=1e-4)  # of the model itself


def test_guided_samples_do_not_depend_on_their_company(pipes: dict[str, Pipeline]) -> None:
    for modality in ("image", "audio"):
        pipe = pipes[modality]
        label = pipe.codec.labels[0]
        together = pipe.sample(label, count=4, guidance=2.0, max_tokens=30, seed=3)
        for i, sample in enumerate(together):
            alone = pipe.start(label, first=i, guidance=2.0, max_tokens=30, seed=3).run()[0]
            assert alone.tokens == sample.tokens
            assert alone.token_bits == sample.token_bits


def test_sound_at_another_rate(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["audio"]
    fast, slow = pipe.at_rate(0.5), pipe.at_rate(2.0)
    assert (fast.codec.rate, slow.codec.rate) == (16000, 4000)
    assert fast.at_rate(1.0) is pipe
    assert pipe.at_rate(0.5) is fast
    assert fast.plan().max_tokens == 2 * 16000
    assert (
        fast.sample(max_tokens=30, seed=1)[0].tokens != pipe.sample(max_tokens=30, seed=1)[0].tokens
    )
    clip = 0.3 * np.sin(np.arange(50) / 3).astype(np.float32)
    assert fast.evaluate([Example(clip)]).bits == pytest.approx(fast.score(clip))
    assert fast.score(clip) != pytest.approx(pipe.score(clip))


@pytest.mark.parametrize("rate", [0.5, 2.0, 0.7])
@pytest.mark.parametrize("layer", ["s4", "s4d"])
def test_stepping_at_a_rate_equals_convolving_at_it(
    rate: float, layer: str, codecs: dict[str, Codec], make_model: Callable[..., SequenceModel]
) -> None:
    codec = codecs["audio"]
    model = make_model("pooled", layer, vocab_size=codec.vocab_size, n_outputs=codec.n_outputs)
    pipe = Pipeline("audio", Checkpoint(model, codec), weights="fp32").at_rate(rate)
    sample = pipe.sample("two", max_tokens=40, seed=1)[0]
    tokens = torch.tensor([[codec.start("two"), *sample.tokens]])
    with torch.no_grad():
        convolved = pipe.model(tokens[:, :-1], rate)[0].log_softmax(-1)
    bits = -convolved.gather(-1, tokens[0, 1:, None])[:, 0] / np.log(2)
    np.testing.assert_allclose(sample.token_bits, bits, atol=1e-3)


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_recipe_makes_the_samples_again(pipes: dict[str, Pipeline], modality: str) -> None:
    pipe = pipes[modality]
    prompt = {"text": "The", "image": "cat", "audio": "one"}[modality]
    if modality == "audio":
        pipe = pipe.at_rate(0.5)
    settings = {"text": {"repetition_penalty": 1.2, "stop": ["q"]}, "image": {"guidance": 2.0}}
    samples = pipe.sample(
        prompt, count=2, rank=2, max_tokens=20, seed=5, **settings.get(modality, {})
    )
    recipe = pipe.recipe(samples, prompt)
    assert recipe is not None
    again = pipes[modality].repeat(parse(json.dumps(recipe.to_json())))
    assert [(s.tokens, s.token_bits, s.index) for s in again] == [
        (s.tokens, s.token_bits, s.index) for s in samples
    ]
    for a, b in zip(again, samples, strict=True):
        np.testing.assert_array_equal(a.raw, b.raw)


def test_a_recipe_names_the_eager_engine(pipes: dict[str, Pipeline]) -> None:
    """Its last digits are its own, so that it alone repeats its samples exactly."""
    eager = Pipeline("text", pipes["text"].checkpoint, engine="eager")
    samples = eager.sample("The", count=2, max_tokens=20, seed=5)
    recipe = eager.recipe(samples)
    assert recipe is not None
    assert recipe.weights == "eager fp32"
    assert pipes["text"].at_recipe(recipe).engine_name == "eager"
    again = pipes["text"].repeat(recipe)
    assert [s.token_bits for s in again] == [s.token_bits for s in samples]


def test_a_recipe_names_the_arithmetic_of_int8(pipes: dict[str, Pipeline]) -> None:
    """What is fastest on one processor may not be on another, and draws other tokens at times."""
    pipe = Pipeline("text", pipes["text"].checkpoint, weights="int8")
    stepper = pipe.stepper
    assert isinstance(stepper, CompiledModel)
    samples = pipe.sample("The", count=2, max_tokens=20, seed=5)
    recipe = pipe.recipe(samples)
    assert recipe is not None
    assert recipe.weights == stepper.stepped_weights in ("int8-24", "int8-16")
    assert tokens_of(pipes["text"].repeat(recipe)) == tokens_of(samples)
    former = parse(json.dumps({**recipe.to_json(), "weights": "int8"}))
    assert former.weights == "int8-24"
    assert pipe.at_recipe(former).stepped_weights == "int8-24"
    with pytest.raises(RecipeError, match="int8-8"):
        pipe.at_recipe(replace(recipe, weights="int8-8"))


def test_a_recipe_of_a_state_needs_no_state_that_its_tokens_give(
    pipes: dict[str, Pipeline],
) -> None:
    pipe = pipes["text"]
    sample = pipe.sample(state=pipe.read("The fox"), max_tokens=5, seed=1)
    recipe = pipe.recipe(sample)
    assert recipe is not None
    assert tokens_of(pipe.repeat(recipe)) == tokens_of(sample)
    with pytest.raises(ValueError, match="a state file that is not this one"):
        pipe.repeat(recipe, state=pipe.read("The dog"))


def test_an_interrupted_sample_is_repeated_as_far_as_it_came(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["image"]
    session = pipe.start(count=2, seed=1)
    next(iter(session))
    samples = session.samples()
    recipe = pipe.recipe(samples)
    assert recipe is not None
    assert tokens_of(pipe.repeat(recipe)) == tokens_of(samples)
    assert pipe.recipe([*samples, *pipe.sample(seed=1)]) is None


def test_a_recipe_of_another_checkpoint_is_refused(pipes: dict[str, Pipeline]) -> None:
    recipe = pipes["image"].recipe(pipes["image"].sample(max_tokens=1, seed=1))
    assert recipe is not None
    with pytest.raises(ValueError, match="made by another checkpoint than 'audio'"):
        pipes["audio"].repeat(recipe)
    for plan in (
        replace(recipe.plan, tokens=(5000,)),
        replace(recipe.plan, max_tokens=10**6),
        replace(recipe.plan, guidance=2.0),
        replace(recipe.plan, stop=("a",)),
    ):
        with pytest.raises(ValueError, match="the recipe is damaged"):
            pipes["image"].repeat(replace(recipe, plan=plan))
    with pytest.raises(ValueError, match="the recipe is damaged: the rate"):
        pipes["image"].repeat(replace(recipe, rate=0.5))


@pytest.mark.parametrize(
    ("modality", "settings", "message"),
    [
        ("text", {"count": 0}, "count must be at least 1"),
        ("text", {"max_tokens": -1}, "max_tokens must lie in"),
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
        ("audio", {"duration": 0.003}, r"must lie in 0.004 … 0.008 seconds, got 0.003"),
        ("audio", {"duration": float("nan")}, "must lie in"),
        ("image", {"duration": 1.0}, "knows no durations"),
        ("text", {"guidance": 2.0}, "guidance needs a model with classes"),
        ("image", {"guidance": 2.0}, "guidance needs a class"),
        ("image", {"prompt": "cat", "guidance": np.nan}, "guidance must lie in"),
        ("image", {"rank": 0}, "rank must be at least 1"),
        ("image", {"rank": 2, "rank_by": "size"}, "rank_by must be one of bits, class; got 'size'"),
        ("image", {"prompt": "cat", "rank_by": "class"}, "set rank, too"),
        ("image", {"rank": 2, "rank_by": "class"}, "to rank by class needs a class"),
        ("text", {"rank": 2, "rank_by": "class"}, "to rank by class needs a class"),
        ("image", {"prompt": "cat", "rank": 2, "rank_by": "class", "trim": 0.5}, "trim passes"),
        ("image", {"trim": 1.0}, "trim must lie in"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    pipes: dict[str, Pipeline], modality: str, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipes[modality].sample(**settings)


def test_a_setting_that_is_misspelt_is_named(pipes: dict[str, Pipeline]) -> None:
    wrong: Any = {"temprature": 1.0}
    for use in (pipes["text"].sample, pipes["text"].start):
        with pytest.raises(TypeError, match="no setting 'temprature'; did you mean 'temperature'"):
            use(**wrong)


def test_what_is_no_state_is_refused(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["text"]
    state: Any = pipe.recurrent.initial_state(1)
    with pytest.raises(ValueError, match=r"what read, load_state and .* return, not State"):
        pipe.sample(state=state)
    session = pipe.start(count=2, max_tokens=3)
    for sample in (-1, 2):
        with pytest.raises(ValueError, match=rf"sample must lie in 0 … 1, got {sample}"):
            session.reading(sample)


def test_a_rate_that_no_sound_has_is_named(pipes: dict[str, Pipeline]) -> None:
    with pytest.raises(ValueError, match=r"at the rate 9, of 8000 Hz, the sampling rate must lie"):
        pipes["audio"].at_rate(9.0)
    assert "at the rate 0.5" in repr(pipes["audio"].at_rate(0.5))


def test_a_state_stands_alone(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["image"]
    state = pipe.read("cat")
    with pytest.raises(ValueError, match="give the state alone"):
        pipe.sample("cat", state=state)
    with pytest.raises(ValueError, match="give the state alone"):
        pipe.sample(state=state, label="cat")
    with pytest.raises(ValueError, match="give the state alone"):
        pipe.sample(state=state, duration=0.006)
    with pytest.raises(ValueError, match="guidance needs the prompt itself"):
        pipe.sample(state=state, guidance=2.0)


def test_plans_that_are_of_another_model_say_why(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["image"]
    recipe = pipe.recipe(pipe.sample(max_tokens=3, seed=1))
    assert recipe is not None
    long = "longer than a picture, 37 tokens with its start; got"
    for change, message in (
        ({"tokens": (256, 259)}, "token ids must lie in 0 … 258, got 259"),
        ({"max_tokens": 37}, f"{long} 1 and 37 more"),
        ({"tokens": (256,) * 38, "max_tokens": 0}, f"{long} 38 and 0 more"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.at_recipe(replace(recipe, plan=replace(recipe.plan, **change)))


def test_a_stream_is_of_one_sample(pipes: dict[str, Pipeline]) -> None:
    with pytest.raises(ValueError, match=r"got count=2; iterate over start"):
        next(pipes["text"].stream(count=2))


def test_what_needs_classes_or_sound_says_so(pipes: dict[str, Pipeline]) -> None:
    with pytest.raises(ValueError, match="needs a model with classes"):
        pipes["text"].classify("The")
    with pytest.raises(ValueError, match="for sound only; this model makes image"):
        pipes["image"].at_rate(0.5)
    for rate in (0.0, -1.0, 1e-320, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the rate must be a positive number"):
            pipes["audio"].at_rate(rate)
    with pytest.raises(ValueError, match="must lie in 1000 … 192000 Hz"):
        pipes["audio"].at_rate(100.0)


@pytest.mark.parametrize("stop", [(), ("§",)])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_state_may_end_within_a_character(
    pipes: dict[str, Pipeline], cut: int, stop: tuple[str, ...]
) -> None:
    """What is drawn then completes it, as if all had been one prompt."""
    pipe = pipes["text"]
    codec, tokens = pipe.codec, pipe.prompt_tokens("The 🦖").tolist()
    rest = [*tokens[-cut:], *codec.encode("§ of")[1:].tolist()]
    begun = Plan(tuple(tokens[:-cut]), SamplingConfig(), len(rest), stop, 0, (0,))
    session = next(pipe.batches(begun))
    pieces: list[str] = []
    for token in rest:  # as if these were drawn
        done: dict[int, str] = {}
        pieces += [piece for _, piece in session._piece(Drawn(0, token, 1.0), done)]
        if done:
            break
    whole = codec.decode(begun.tokens[: codec.whole(begun.tokens)])
    assert whole + "".join(pieces) == session.samples()[0].raw
    assert session.samples()[0].raw == ("The 🦖" if stop else "The 🦖§ of")


def test_copies_sample_the_same(pipes: dict[str, Pipeline]) -> None:
    pipe = pipes["audio"]
    expected = pipe.at_rate(0.5).sample("two", max_tokens=20, seed=1)[0].tokens
    for twin in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
        assert twin.at_rate(0.5).sample("two", max_tokens=20, seed=1)[0].tokens == expected
        assert twin.at_rate(0.5).at_rate(1.0) is twin


def test_a_model_is_freed_with_its_pipeline(make_checkpoint: Callable[[str], Checkpoint]) -> None:
    pipe = Pipeline("small", make_checkpoint("audio"))
    kept = weakref.ref(pipe)
    half = pipe.at_rate(0.5)
    pipe.sample("two", max_tokens=2)
    gc.collect()
    gc.disable()
    try:
        del pipe
        assert kept() is None
    finally:
        gc.enable()
    assert half.at_rate(0.5) is half
    assert half.at_rate(1.0).sample("two", max_tokens=2)


@pytest.mark.parametrize("modality", ["text", "image", "audio"])
def test_autocast_changes_neither_samples_nor_scores(
    modality: str, pipes: dict[str, Pipeline], examples: dict[str, list[Any]]
) -> None:
    pipe, raw = pipes[modality], examples[modality][0]
    for engine in ("eager", "cpu"):
        pipe = Pipeline("small", pipe.checkpoint, engine=engine)
        sample, score = pipe.sample(raw, max_tokens=8, seed=1)[0], pipe.score(raw)
        with torch.autocast("cpu", torch.bfloat16):
            again = pipe.sample(raw, max_tokens=8, seed=1)[0]
            assert (again.tokens, again.token_bits) == (sample.tokens, sample.token_bits)
            assert pipe.score(raw) == score


def test_samples_are_compared_as_what_they_are(pipes: dict[str, Pipeline]) -> None:
    first, second = (pipes["image"].sample("cat", max_tokens=2, seed=1)[0] for _ in range(2))
    assert first != second
    assert first in [second, first]
    assert len({first, second}) == 2


def test_ranking_begins_at_the_first(pipes: dict[str, Pipeline]) -> None:
    settings: dict[str, Any] = {"max_tokens": 6, "seed": 3, "rank": 3}
    together = pipes["text"].sample("a", count=4, **settings)
    apart = pipes["text"].sample("a", count=2, first=2, **settings)
    assert [s.index for s in apart] == [s.index for s in together[2:]]


def test_numbers_of_numpy_are_numbers(pipes: dict[str, Pipeline]) -> None:
    sample = pipes["text"].sample(
        "a", seed=np.int64(1), max_tokens=np.int32(3), temperature=np.float32(0.5)
    )[0]
    assert (
        sample.tokens == pipes["text"].sample("a", seed=1, max_tokens=3, temperature=0.5)[0].tokens
    )
    json.dumps(pipes["text"].recipe([sample]).to_json())  # type: ignore[union-attr]


def test_whoever_stops_within_a_step_loses_no_piece(pipes: dict[str, Pipeline]) -> None:
    settings: dict[str, Any] = {"count": 3, "max_tokens": 12, "seed": 3}
    whole = list(pipes["image"].start("cat", **settings))
    session, pieces = pipes["image"].start("cat", **settings), []
    while piece := next(iter(session), None):  # begun anew for every piece
        pieces.append(piece)
    assert [sample for sample, _ in pieces] == [sample for sample, _ in whole]
    for (_, row), (_, expected) in zip(pieces, whole, strict=True):
        np.testing.assert_array_equal(row, expected)
