"""Token streams on disk: written once, memory-mapped, and known by a checksum to be whole.

``<name>.bin`` holds the tokens, ``<name>.json`` their type, number and SHA-256. The second is
written last, so a stream that was cut off while it was written counts as none.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from genssm.disk import replace_file

_BLOCK = 2**24  # bytes read at once


def open_tokens(
    path: Path, documents: Callable[[], Iterable[Tensor]], vocab_size: int
) -> np.ndarray:
    """The tokens of all documents in one row, (n,) uint16 (or uint32), mapped read-only.

    Made by ``documents`` where there is no such stream, or a damaged one, of which a warning tells.
    """
    stream, facts_file = path.with_name(f"{path.name}.bin"), path.with_name(f"{path.name}.json")
    if facts_file.exists():
        problem = _problem(stream, facts_file)
        if problem is None:
            return _map(stream, json.loads(facts_file.read_text()))
        warnings.warn(f"the token cache {str(stream)!r} {problem}; it is made again", stacklevel=2)
        facts_file.unlink()
    kind, facts = "<u2" if vocab_size <= 2**16 else "<u4", {}
    replace_file(stream, lambda file: facts.update(_write(file, documents(), kind)))
    replace_file(facts_file, lambda file: file.write_text(json.dumps(facts) + "\n"))
    return _map(stream, facts)


def _write(path: Path, documents: Iterable[Tensor], kind: str) -> dict[str, Any]:
    count = 0
    with path.open("wb") as file:
        for tokens in documents:
            file.write(tokens.numpy().astype(kind).tobytes())
            count += len(tokens)
    with path.open("rb") as file:
        return {"dtype": kind, "tokens": count, "sha256": _checksum(file)}


def _map(stream: Path, facts: dict[str, Any]) -> np.ndarray:
    if not facts["tokens"]:
        return np.empty(0, facts["dtype"])
    return np.memmap(stream, facts["dtype"], "r")


def _problem(stream: Path, facts_file: Path) -> str | None:
    """What is wrong with a stream on disk, None if nothing is."""
    try:
        facts = json.loads(facts_file.read_text())
        with stream.open("rb") as file:
            if _checksum(file) != facts["sha256"]:
                return "is damaged: its checksum differs"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"is not readable ({type(error).__name__})"
    return None


def _checksum(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def fingerprint(source: bytes, tokenizer: bytes) -> str:
    """Changes with what identifies the source, and with the tokenizer."""
    return hashlib.sha256(hashlib.sha256(tokenizer).digest() + source).hexdigest()[:16]
