"""What is asked of a model: a request, checked in one place, and the plan that it resolves to."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import TypedDict, Unpack

from genssm.sampling import SamplingConfig, check_seed
from genssm.settings import check_types

# Settings that make good samples; the likelihood itself is at temperature 1 without filters.
DEFAULTS = {
    "text": SamplingConfig(temperature=0.8, top_p=0.95),
    "image": SamplingConfig(temperature=0.95),  # at 1, errors add up: noisier than the data
    "audio": SamplingConfig(plausible=0.15, temperature=0.9),
}
GUIDANCE = {"text": 1.0, "image": 5.0, "audio": 5.0}  # by the class, where one is asked for
MOST_SAMPLES = 2**16  # of one request, those that ranking drops included
CRITERIA = ("bits", "class")  # by which ranking chooses


class Settings(TypedDict, total=False):
    """The keyword arguments of ``Pipeline.sample``: the fields of ``Request``."""

    label: str | None
    keep_rows: int | None
    duration: float | None
    count: int
    first: int
    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    plausible: float | None
    repetition_penalty: float | None
    stop: tuple[str, ...] | list[str]
    seed: int | None
    guidance: float | None
    rank: int
    rank_by: str
    trim: float


@dataclass(frozen=True)
class Request:
    """What is asked besides the prompt; None leaves the choice to the model's modality."""

    label: str | None = None  # class of a picture or sound
    keep_rows: int | None = None  # rows of a prompt picture to keep; half of them
    duration: float | None = None  # seconds that a sound is to last; the model draws it
    count: int = 1  # samples
    first: int = 0  # index of the first: samples 4 … 7 of a seed are count=4, first=4
    max_tokens: int | None = None  # drawn: 256 of text, the whole picture, two seconds of sound
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    plausible: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] | list[str] = ()  # strings before which a text ends; kept as a tuple
    seed: int | None = None  # a fresh one
    guidance: float | None = None  # logits are any + guidance·(class - any); 1 is the model itself
    rank: int = 1  # draw so many for each sample and keep the best of them
    rank_by: str = "bits"  # best: fewest bits per token, or "class": most surely of its class
    trim: float = 0.0  # by bits, pass over this part of the likeliest (silence, say)

    def __post_init__(self) -> None:
        check_types(self)
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if self.first < 0:
            raise ValueError(f"first must not be negative, got {self.first}")
        if self.max_tokens is not None and not 0 <= self.max_tokens < 2**31:
            raise ValueError(f"max_tokens must lie in 0 … 2^31 - 1, got {self.max_tokens}")
        if any(not s for s in self.stop):
            raise ValueError("a stop string must not be empty")
        if self.seed is not None:
            check_seed(self.seed)
        check_guidance(1.0 if self.guidance is None else self.guidance)
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 <= self.trim < 1:
            raise ValueError(f"trim must lie in 0 … 1 (1 excluded), got {self.trim}")
        if self.trim > 0 and self.rank == 1:
            raise ValueError("trim passes over some of those that rank draws; set rank, too")
        if self.rank_by not in CRITERIA:
            raise ValueError(f"rank_by must be one of {', '.join(CRITERIA)}; got {self.rank_by!r}")
        if self.rank_by == "class" and self.rank == 1:
            raise ValueError("rank_by chooses among those that rank draws; set rank, too")
        if self.rank_by == "class" and self.trim > 0:
            raise ValueError("trim passes over the likeliest; it goes with rank_by bits")
        if self.count * self.rank > MOST_SAMPLES:
            raise ValueError(
                f"count × rank must be at most {MOST_SAMPLES}, got {self.count} × {self.rank}"
            )

    @classmethod
    def of(cls, **settings: Unpack[Settings]) -> Request:
        """The request of keyword arguments; TypeError names what is no setting."""
        known = Settings.__annotations__
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise TypeError(f"there is no setting {name!r}; {hint}known: {', '.join(known)}")
        return cls(**settings)  # type: ignore[arg-type]

    def sampling(self, modality: str) -> SamplingConfig:
        """How tokens are drawn: the defaults of the modality, with what was asked for."""
        asked = {f.name: getattr(self, f.name) for f in fields(SamplingConfig)}
        return DEFAULTS[modality].changed(**asked)


def check_guidance(guidance: float) -> None:
    """Raise ValueError for a factor out of range."""
    if not -100 <= guidance <= 100:
        raise ValueError(f"guidance must lie in -100 … 100, got {guidance}")


@dataclass(frozen=True)
class Plan:
    """All that decides samples, given the model: a request with nothing left open."""

    tokens: tuple[int, ...]  # the prompt as the model reads it, start token first
    sampling: SamplingConfig
    max_tokens: int
    stop: tuple[str, ...]
    seed: int
    indices: tuple[int, ...]  # of the samples; each has its own random stream
    guidance: float = 1.0
    state: str | None = None  # fingerprint of the state that is continued

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self.seed)
        check_guidance(self.guidance)
        rules = [
            (bool(self.tokens), "a start token"),
            (all(0 <= t < 2**31 for t in self.tokens), "token ids in 0 … 2^31 - 1"),
            (0 <= self.max_tokens < 2**31, "max_tokens in 0 … 2^31 - 1"),
            (all(self.stop), "stop strings that are not empty"),
            (bool(self.indices), "a sample"),
            (all(0 <= i < 2**63 for i in self.indices), "sample indices in 0 … 2^63 - 1"),
        ]
        broken = [rule for holds, rule in rules if not holds]
        if broken:
            raise ValueError(f"samples need {', '.join(broken)}")
