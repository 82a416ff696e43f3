"""The token cache: written once, mapped, and made again when it is not what was written."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from genssm.token_cache import fingerprint, open_tokens

DOCUMENTS = ([1, 5, 300], [1], [1, 2**15])
EXPECTED = [token for document in DOCUMENTS for token in document]


class Source:
    """Documents that count how often they are read."""

    def __init__(self) -> None:
        self.reads = 0

    def __call__(self) -> Iterator[Tensor]:
        self.reads += 1
        return map(torch.tensor, DOCUMENTS)


@pytest.mark.parametrize(("vocab_size", "kind"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_tokens_are_written_once_and_mapped(vocab_size: int, kind: type, tmp_path: Path):
    source = Source()
    for _ in range(2):
        tokens = open_tokens(tmp_path / "tokens", source, vocab_size)
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == kind
        assert tokens.tolist() == EXPECTED
    assert source.reads == 1
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 2


@pytest.mark.parametrize("damage", ["flip a bit", "cut", "remove", "garble the facts"])
def test_damage_is_found_and_the_stream_made_again(damage: str, tmp_path: Path):
    source, stream = Source(), tmp_path / "tokens.bin"
    open_tokens(tmp_path / "tokens", source, 2**16)
    content = bytearray(stream.read_bytes())
    if damage == "flip a bit":
        content[3] ^= 4
        stream.write_bytes(content)
    elif damage == "cut":
        stream.write_bytes(content[:-2])
    elif damage == "remove":
        stream.unlink()
    else:
        (tmp_path / "tokens.json").write_text("{")
    with pytest.warns(UserWarning, match=r"tokens.bin' is .*; it is made again"):
        assert open_tokens(tmp_path / "tokens", source, 2**16).tolist() == EXPECTED
    assert source.reads == 2
    open_tokens(tmp_path / "tokens", source, 2**16)
    assert source.reads == 2


def test_a_stream_without_its_facts_counts_as_none(tmp_path: Path):
    """The facts are written last: without them the process was killed while it wrote."""
    source = Source()
    (tmp_path / "tokens.bin").write_bytes(b"\1\0\5")
    assert open_tokens(tmp_path / "tokens", source, 2**16).tolist() == EXPECTED
    assert source.reads == 1


def test_no_tokens_are_no_tokens(tmp_path: Path):
    for _ in range(2):
        assert open_tokens(tmp_path / "tokens", lambda: [], 10).tolist() == []


def test_the_name_of_a_cache_depends_on_source_and_tokenizer():
    names = {fingerprint(s, t) for s in (b"a", b"b") for t in (b"x", b"y")}
    assert len(names) == 4
    assert fingerprint(b"a", b"x") in names
