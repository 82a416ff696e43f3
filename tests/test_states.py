"""State files: small, exact, tied to their checkpoint, and checked when read."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import genssm
from genssm import states
from genssm.checkpoint import Checkpoint, content_hash, save
from genssm.codec import Audio, Codec, Image, Text
from genssm.engine import Reading, read
from genssm.model import SequenceModel
from genssm.pipeline import Pipeline
from genssm.states import StateError

MakeModel = Callable[..., SequenceModel]
FACTS = {"genssm": "state", "format_version": "1", "rate": "1.0", "position": "1"}


@pytest.fixture(scope="module")
def pipe(codecs: dict[str, Codec], make_model: MakeModel) -> Pipeline:
    codec = codecs["audio"]
    model = make_model("pooled", **sizes(codec), d_model=(32, 32, 32))
    return Pipeline("audio", Checkpoint(model, codec))


def sizes(codec: Codec) -> dict[str, Any]:
    names = ("vocab_size", "n_outputs", "opening", "durations")
    return {name: getattr(codec, name) for name in names}


def same(a: Reading, b: Reading) -> bool:
    pairs = zip(a.state.tensors(), b.state.tensors(), strict=True)
    tensors = [(a.tokens, b.tokens), (a.logits, b.logits), *pairs]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize("layer", ["s4", "s4d", "lssl"])
@pytest.mark.parametrize("kind", ["isotropic", "pooled", "image"])
def test_a_loaded_state_is_the_saved_one(
    kind: str, layer: str, codecs: dict[str, Codec], make_model: MakeModel, tmp_path: Path
) -> None:
    codec = codecs["image" if kind == "image" else "audio"]
    settings = sizes(codec) if kind == "pooled" else sizes(codec) | {"opening": 0, "durations": ()}
    pipe = Pipeline("any", Checkpoint(make_model(kind, layer, **settings), codec), engine="eager")
    for tokens in ([258], [258, 3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]):
        session = pipe.start(codec.labels[1], max_tokens=len(tokens), seed=0)
        session.run()
        reading = session.reading()
        pipe.save_state(reading, tmp_path / "a.state")
        loaded = pipe.load_state(tmp_path / "a.state")
        assert same(loaded, reading)
        assert states.fingerprint(loaded) == states.fingerprint(reading)
    assert (tmp_path / "a.state").stat().st_size < 64 * 1024
    assert [p.name for p in tmp_path.iterdir()] == ["a.state"]


def test_a_state_longer_than_a_picture_is_damaged(
    codecs: dict[str, Codec], make_model: MakeModel, tmp_path: Path
) -> None:
    codec = codecs["image"]
    settings = sizes(codec) | {"opening": 0, "durations": ()}
    pipe = Pipeline("any", Checkpoint(make_model("image", **settings), codec), engine="eager")
    assert isinstance(codec, Image)
    long = read(pipe.recurrent, torch.zeros(codec.length + 2, dtype=torch.int64))
    pipe.save_state(long, tmp_path / "a.state")
    with pytest.raises(StateError, match=r"a.state' is damaged: it is longer than a picture"):
        pipe.load_state(tmp_path / "a.state")


def test_another_process_continues_token_for_token(pipe: Pipeline, tmp_path: Path) -> None:
    stored = genssm.load(save(pipe.checkpoint, tmp_path / "model"))
    stored.save_state(stored.read("two"), tmp_path / "a.state")
    code = (
        "import sys, genssm\n"
        "pipe = genssm.load(sys.argv[1])\n"
        "state = pipe.load_state(sys.argv[2])\n"
        "print([s.tokens for s in pipe.sample(state=state, count=2, max_tokens=40, seed=4)])"
    )
    arguments = [str(tmp_path / "model"), str(tmp_path / "a.state")]
    restarted = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    ).stdout
    expected = stored.sample("two", guidance=1.0, count=2, max_tokens=40, seed=4)
    assert restarted == f"{[s.tokens for s in expected]}\n"


def test_a_state_of_another_checkpoint_is_refused(
    pipe: Pipeline, make_model: MakeModel, tmp_path: Path
) -> None:
    pipe.save_state(pipe.read("two"), tmp_path / "a.state")
    weights = {k: v.clone() for k, v in pipe.model.state_dict().items()}
    weights["norm.bias"][0] += 1
    other = make_model("pooled", **sizes(pipe.codec), d_model=(32, 32, 32))
    other.load_state_dict(weights)
    changed = Pipeline("audio", Checkpoint(other, pipe.codec))
    with pytest.raises(StateError, match="the state of another checkpoint"):
        changed.load_state(tmp_path / "a.state")
    with pytest.raises(StateError, match=r"was made at the rate '1\.0', not 0\.5"):
        pipe.at_rate(0.5).load_state(tmp_path / "a.state")


def test_the_content_hash_is_that_of_what_decides_samples(pipe: Pipeline) -> None:
    checkpoint = pipe.checkpoint
    measured = Checkpoint(checkpoint.model, checkpoint.codec, {"steps": 1}, {"a": {}}, (1, 2))
    assert content_hash(measured) == content_hash(checkpoint)
    relabelled = Checkpoint(checkpoint.model, Audio(8000, labels=("two", "one")))
    assert content_hash(relabelled) != content_hash(checkpoint)
    finer = copy.deepcopy(checkpoint.model)
    with torch.no_grad():  # by less than a checkpoint keeps
        next(p for n, p in finer.named_parameters() if n.endswith("up.weight")).mul_(1 + 1e-4)
    assert content_hash(Checkpoint(finer, checkpoint.codec)) != content_hash(checkpoint)


def test_the_content_hash_tells_tokenizers_apart(
    make_checkpoint: Callable[[str], Checkpoint], text_codec: Text
) -> None:
    checkpoint = make_checkpoint("text")
    other = Text.train(Path(states.__file__).read_text().splitlines(), 400)
    assert other.vocab_size == text_codec.vocab_size
    assert content_hash(Checkpoint(checkpoint.model, other)) != content_hash(checkpoint)


def test_states_of_other_models_are_refused(
    pipe: Pipeline, make_checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    own, half = pipe.read("two"), pipe.at_rate(0.5)
    foreign = Pipeline("image", make_checkpoint("image")).read()
    session = pipe.start("two", max_tokens=3, seed=0)
    session.run()
    for state in (own, session.reading(), foreign):
        with pytest.raises(StateError, match="continue it there"):
            half.sample(state=state)
        with pytest.raises(StateError, match="continue it there"):
            half.save_state(state, tmp_path / "a.state")
    with pytest.raises(StateError, match="the state is of another model"):
        pipe.start(state=foreign)
    assert not (tmp_path / "a.state").exists()
    assert pipe.sample(state=session.reading(), max_tokens=2, seed=0)


def test_damaged_and_foreign_files_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "a.state"
    pipe.save_state(pipe.read("two"), file)
    whole, tensors = file.read_bytes(), {k: v.clone() for k, v in load_file(file).items()}
    facts = FACTS | {"checkpoint": pipe.content_hash}

    def refused(message: str) -> None:
        with pytest.raises(StateError, match=message):
            pipe.load_state(file)

    for content in (b"", b"no state", whole[:40], whole[:-7], b"\xff" * 64):
        file.write_bytes(content)
        refused("is not a readable state file")
    file.unlink()
    refused(r"there is no state file .*; save_state \(--save-state\) writes one")
    for metadata in (None, {}, {"genssm": "weights"}):
        save_file(tensors, file, metadata)
        refused("is not a state file of genssm")
    save_file(tensors, file, facts | {"format_version": "2"})
    refused("has format version '2', this genssm reads 1")

    changes: list[dict[str, torch.Tensor]] = [
        {"tokens": torch.zeros(0, dtype=torch.int32)},
        {"tokens": torch.tensor([300], dtype=torch.int32)},
        {"tokens": torch.tensor([-1], dtype=torch.int32)},
        {"tokens": torch.tensor([258.0])},
        {"tokens": torch.tensor([[258]], dtype=torch.int32)},
        {"logits": tensors["logits"][:, :-1].contiguous()},
        {"logits": tensors["logits"] * torch.nan},
        {"logits": tensors["logits"].double()},
        {"state.000": tensors["state.000"] * torch.inf},
        {"state.000": tensors["state.000"][:0]},
        {"state.000": tensors["state.000"].to(torch.float16)},
        {"surprise": torch.zeros(1)},
    ]
    for change in changes:
        save_file(tensors | change, file, facts)
        refused("is damaged")
    for missing in ("tokens", "logits", "state.001"):
        save_file({k: v for k, v in tensors.items() if k != missing}, file, facts)
        refused("is damaged")
    save_file(tensors, file, facts)
    assert same(pipe.load_state(file), pipe.read("two"))
