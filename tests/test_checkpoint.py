"""Checkpoints: what is saved is what is loaded, and every damage is one clear sentence."""

import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from genssm import checkpoint as checkpoints
from genssm import folders
from genssm.checkpoint import Checkpoint
from genssm.codec import Image
from genssm.config import ModelConfig
from genssm.folders import CheckpointError
from genssm.model import SequenceModel

MakeCheckpoint = Callable[[str], Checkpoint]
modalities = pytest.mark.parametrize("modality", ["text", "image", "audio"])


@pytest.fixture
def saved(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """The folder of a saved text checkpoint."""
    return checkpoints.save(make_checkpoint("text"), tmp_path / "model")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Saving and loading


@modalities
@torch.no_grad()
def test_loaded_checkpoint_is_the_saved_one(
    modality: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
):
    checkpoint = dataclasses.replace(make_checkpoint(modality), probe=(1, 2, 3))
    folder = checkpoints.save(checkpoint, tmp_path / "deep" / "model")
    loaded = checkpoints.load(folder)
    assert loaded.model.config == checkpoint.model.config
    assert type(loaded.codec) is type(checkpoint.codec)
    assert loaded.codec.to_config() == checkpoint.codec.to_config()
    assert loaded.training == checkpoint.training
    assert loaded.metrics == checkpoint.metrics
    assert loaded.probe == checkpoint.probe
    assert not loaded.model.training
    stored = checkpoints.stored_weights(checkpoint.model)
    weights = loaded.model.state_dict()
    assert set(weights) == set(stored)
    for name, value in weights.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[name].float()), name


@modalities
@torch.no_grad()
def test_loaded_model_computes_the_logits_of_the_stored_weights(
    modality: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
):
    checkpoint = make_checkpoint(modality)
    loaded = checkpoints.load(checkpoints.save(checkpoint, tmp_path / "model"))
    rounded = checkpoints.stored_weights(checkpoint.model)
    checkpoint.model.load_state_dict({name: t.float() for name, t in rounded.items()})
    tokens = torch.randint(0, loaded.codec.n_outputs, (2, 20))
    assert torch.equal(loaded.model(tokens), checkpoint.model(tokens))


@modalities
def test_saving_a_loaded_checkpoint_changes_nothing(
    modality: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
):
    first = checkpoints.save(make_checkpoint(modality), tmp_path / "first")
    second = checkpoints.save(checkpoints.load(first), tmp_path / "second")
    assert contents(first) == contents(second)


def test_matrices_are_halved_and_the_dynamics_are_not(make_checkpoint: MakeCheckpoint):
    weights = checkpoints.stored_weights(make_checkpoint("image").model)
    halved = {name for name, t in weights.items() if t.dtype == torch.bfloat16}
    assert {"inputs.embedding.weight", "head.linear.weight"} <= halved
    assert all(weights[name].dim() == 2 for name in halved)
    read = checkpoints.stored_weights(make_checkpoint("text").model)["inputs.token_taps.0"]
    assert read.dtype == torch.bfloat16
    assert not any(
        word in name for name in halved for word in ("log_dt", "frequency", ".C", ".D", "norm")
    )


@modalities
def test_nothing_in_a_checkpoint_is_a_pickle(
    modality: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
):
    folder = checkpoints.save(make_checkpoint(modality), tmp_path / "model")
    tokenizer = ["tokenizer.model"] if modality == "text" else []
    assert names(folder) == ["config.json", "model.safetensors", *tokenizer]
    json.loads((folder / "config.json").read_text())
    header = (folder / "model.safetensors").read_bytes()
    assert isinstance(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]), dict)
    assert not any(data.startswith((b"\x80", b"PK")) for data in contents(folder).values())


# Names


def test_shipped_names_folders_and_text_paths_are_found(
    saved: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(folders, "shipped_folders", lambda: {"tiny": saved})
    for name in ("tiny", saved, str(saved)):
        assert checkpoints.load(name).model.config.d_model == (12,)


def test_unknown_name_suggests_the_nearest(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folders, "shipped_folders", lambda: {"cifar10": saved, "wiki": saved})
    with pytest.raises(CheckpointError, match="no model 'cifar'; did you mean 'cifar10'") as raised:
        checkpoints.load("cifar")
    assert "known: cifar10, wiki" in str(raised.value)
    with pytest.raises(CheckpointError, match="no model 'qqqq'; known: cifar10, wiki"):
        checkpoints.load("qqqq")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "x" * 300, "a/b/c", "./nowhere"])
def test_name_that_cannot_be_a_folder_is_refused(name: str):
    with pytest.raises(CheckpointError):
        checkpoints.load(name)


def test_checkpoint_whose_save_was_killed_between_its_renames_is_found(saved: Path):
    saved.rename(saved.with_name("model.previous"))
    assert checkpoints.load(saved).model.config.d_model == (12,)
    assert checkpoints.load(str(saved) + "/").model.config.d_model == (12,)


def test_hub_id_is_fetched_without_pickles(saved: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def fetch(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, sorted(allow_patterns)))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert checkpoints.load("someone/some-model").model.config.d_model == (12,)
    assert asked == [
        ("someone/some-model", ["config.json", "model.safetensors", "tokenizer.model"])
    ]


@pytest.mark.parametrize("error", ["LocalEntryNotFoundError", "OfflineModeIsEnabled", "OSError"])
def test_hub_out_of_reach_is_one_clear_error(error: str, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import errors

    def fetch(repository: str, allow_patterns: list[str]) -> str:
        raise getattr(errors, error, OSError)("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(CheckpointError, match="could not fetch 'someone/some-model'"):
        checkpoints.load("someone/some-model")


# Damage


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A damage to config.json."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return damage


def reweighted(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """A damage to model.safetensors that leaves it a readable file."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path)

    return damage


def written(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def removed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def foreign_tokenizer(folder: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 9), model_writer=model, vocab_size=300,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def linked_to_a_device(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.model").symlink_to("/dev/zero")


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"][3] = torch.nan


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (removed("config.json"), "has no config.json"),
    "no weights": (removed("model.safetensors"), "has no model.safetensors"),
    "no tokenizer": (removed("tokenizer.model"), "tokenizer.model"),
    "config is not JSON": (written("config.json", b"{oops"), "not readable JSON"),
    "config is not text": (written("config.json", b"\xff\xfe"), "not readable JSON"),
    "config is empty": (written("config.json", b""), "not readable JSON"),
    "config is a list": (written("config.json", b"[1]"), "not in genssm's format"),
    "config of another program": (written("config.json", b'{"a": 1}'), "not in genssm's format"),
    "weights are empty": (written("model.safetensors", b""), "truncated or no safetensors"),
    "weights are garbage": (written("model.safetensors", b"x" * 500), "no safetensors"),
    "weights end early": (cut("model.safetensors", 0.9), "truncated or no safetensors"),
    "header ends early": (cut("model.safetensors", 0.01), "truncated or no safetensors"),
    "tokenizer is garbage": (written("tokenizer.model", b"x" * 99), "SentencePiece"),
    "tokenizer ends early": (cut("tokenizer.model", 0.5), "SentencePiece"),
    "foreign tokenizer": (foreign_tokenizer, "a codec that does not fit its model"),
    "tokenizer is a device": (linked_to_a_device, "no regular file"),
    "newer version": (edited(lambda c: c.update(format_version=2)), "upgrade genssm"),
    "older version": (edited(lambda c: c.update(format_version=0)), "convert or retrain"),
    "section missing": (edited(lambda c: c.pop("metrics")), "exactly the sections"),
    "section unknown": (edited(lambda c: c.update(extra={})), "exactly the sections"),
    "section is no object": (edited(lambda c: c.update(training=[])), "damaged section 'training'"),
    "probe of other tokens": (edited(lambda c: c.update(probe=[10**6])), "section 'probe'"),
    "probe without end": (edited(lambda c: c.update(probe=[1] * 20_000)), "section 'probe'"),
    "probe of words": (edited(lambda c: c.update(probe=["a"])), "section 'probe'"),
    "setting missing": (edited(lambda c: c["model"].pop("d_state")), "must set exactly"),
    "setting unknown": (edited(lambda c: c["model"].update(heads=4)), "must set exactly"),
    "setting impossible": (edited(lambda c: c["model"].update(d_state=3)), "d_state is 2, 4"),
    "setting of another type": (edited(lambda c: c["model"].update(d_model="12")), "not usable"),
    **{
        f"{name} too large": (edited(lambda c, s=s: c["model"].update(s)), "fewer weights than")
        for name, s in {
            "width": {"d_model": [2**40]},
            "number of blocks": {"n_layers": [2**20]},
            "state": {"d_model": [2**10], "d_state": 2048},
            "vocabulary": {"vocab_size": 2**30},
            "feed-forward part": {"expand": 2**20},
            "pool": {"d_model": [12, 12], "n_layers": [1, 1], "pools": [2**20]},
            "picture": {"image_shape": [2**30, 1, 1]},
            "number of outputs": {"layer_settings": {"channels": 2**20}},
            "number of taps": {"taps": [1] * 2**15},
            "channels of a tap": {"taps": [1] * 2**8, "image_shape": [1, 1, 2**12]},
            "state of a dense layer": {"layer": "lssl", "d_state": 2048},
        }.items()
    },
    "codec unknown": (edited(lambda c: c["codec"].update(kind="video")), "unknown codec"),
    "codec of another kind": (
        edited(lambda c: c.update(codec={"kind": "audio", "rate": 8000, "labels": []})),
        "a codec that does not fit its model",
    ),
    "weight missing": (reweighted(lambda t: t.pop("norm.weight")), "norm.weight"),
    "weight unknown": (reweighted(lambda t: t.update(x=torch.zeros(1))), "'x'"),
    "weight of another shape": (
        reweighted(lambda t: t.update({"norm.weight": torch.zeros(13)})),
        "norm.weight",
    ),
    "weights of another width": (edited(lambda c: c["model"].update(d_model=[16])), "do not fit"),
    "weights not finite": (reweighted(poison), "not finite"),
    "weights complex": (
        reweighted(lambda t: t.update({"norm.weight": t["norm.weight"] + 0j})),
        "not finite",
    ),
    "config too deep": (
        lambda folder: (folder / "config.json").write_text("[" * 200_000),
        "not readable JSON",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_one_clear_sentence(damage: Callable[[Path], Any], reason: str, saved: Path):
    damage(saved)
    with pytest.raises(CheckpointError, match=reason) as raised:
        checkpoints.load(saved)
    message = str(raised.value)
    assert str(saved) in message
    assert "\n" not in message
    assert len(message) < len(str(saved)) + 500


# Atomic writing


def test_failed_save_leaves_the_old_checkpoint_and_nothing_else(
    saved: Path, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
):
    before = contents(saved)

    def fail(tensors: object, path: Path) -> None:
        path.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.save(make_checkpoint("text"), saved)
    assert names(saved.parent) == ["model"]
    assert contents(saved) == before


def test_new_checkpoint_replaces_the_old_one_whole(saved: Path, make_checkpoint: MakeCheckpoint):
    (saved / "tokenizer.model").write_text("of the old one")
    (saved.parent / "model.previous").mkdir()  # left by a save that was killed
    checkpoints.save(make_checkpoint("image"), saved)
    assert names(saved.parent) == ["model"]
    assert names(saved) == ["config.json", "model.safetensors"]
    assert isinstance(checkpoints.load(saved).codec, Image)


@pytest.mark.parametrize("place", ["model", "model.previous"])
def test_a_save_takes_the_place_of_nothing_else(
    place: str, saved: Path, make_checkpoint: MakeCheckpoint
):
    (saved.parent / place).mkdir(exist_ok=True)
    (saved.parent / place / "thesis.tex").write_text("years of work")
    before = contents(saved)
    with pytest.raises(FileExistsError, match=r"first 'thesis\.tex', which would be lost"):
        checkpoints.save(make_checkpoint("image"), saved)
    assert (saved.parent / place / "thesis.tex").read_text() == "years of work"
    assert contents(saved) == before
    (saved.parent / "file").write_text("years of work")
    with pytest.raises(FileExistsError, match="is no folder"):
        checkpoints.save(make_checkpoint("image"), saved.parent / "file")


def test_a_save_through_a_link_goes_where_it_leads(saved: Path, make_checkpoint: MakeCheckpoint):
    link = saved.parent / "link"
    link.symlink_to(saved)
    for _ in range(2):
        assert checkpoints.save(make_checkpoint("image"), link) == link
    assert link.is_symlink()
    assert names(saved.parent) == ["link", "model"]
    assert isinstance(checkpoints.load(saved).codec, Image)


def test_a_path_is_a_folder_whatever_is_shipped(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint folder 'wiki'"):
        checkpoints.load(Path("wiki"))
    checkpoints.save(make_checkpoint("image"), Path("wiki"))
    assert isinstance(checkpoints.load(Path("wiki")).codec, Image)
    assert not isinstance(checkpoints.load("wiki").codec, Image)


def test_files_are_as_private_as_the_user_wants(make_checkpoint: MakeCheckpoint, tmp_path: Path):
    before = os.umask(0o077)
    try:
        checkpoints.save(make_checkpoint("image"), tmp_path / "own")
    finally:
        os.umask(before)
    modes = [p.stat().st_mode & 0o777 for p in ((tmp_path / "own"), *(tmp_path / "own").iterdir())]
    assert modes == [0o700, 0o600, 0o600]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loading_heeds_neither_default_dtype_nor_device_nor_changes_the_seed(
    dtype: torch.dtype, saved: Path
):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        loaded = checkpoints.load(saved)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    kinds = {(p.dtype, p.device.type) for p in loaded.model.parameters()}
    assert kinds == {(torch.float32, "cpu")}
    assert torch.equal(torch.rand(1), expected)


def test_saving_reads_but_does_not_change_the_model(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
):
    checkpoint = make_checkpoint("audio")
    model: SequenceModel = checkpoint.model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    checkpoints.save(checkpoint, tmp_path / "model")
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_checkpoint_has_the_hash_that_it_has_always_had():
    """The one in the recipes and state files that were made of it."""
    codec = Image(2, 2, 1, labels=("a",))
    config = ModelConfig(codec.vocab_size, codec.n_outputs, (8,), (1,), d_state=4, l_max=5)
    model = SequenceModel(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            exact = torch.arange(tensor.numel()) % 64 / 64
            tensor.copy_(exact.view_as(tensor))
    found = checkpoints.content_hash(Checkpoint(model, codec))
    assert found == "fbdd9b432901d6ad416caeb4da0d4daa90b54fc097e81f5681c3edaa0d5ac06a"
