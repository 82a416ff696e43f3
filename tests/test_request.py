"""Requests: typed, checked in one place, and spelled the same as keyword arguments."""

import math
import typing
from dataclasses import fields

import pytest

from genssm.request import DEFAULTS, Request, Settings


def test_the_keyword_arguments_are_the_fields_of_a_request() -> None:
    assert list(typing.get_type_hints(Settings)) == [f.name for f in fields(Request)]


def test_what_is_not_asked_for_is_the_modality_s_default() -> None:
    assert Request().sampling("text") == DEFAULTS["text"]
    assert Request(temperature=0.5).sampling("image").temperature == 0.5
    assert Request(top_k=0).sampling("text").top_p == DEFAULTS["text"].top_p


def test_a_list_of_stop_strings_will_do() -> None:
    assert Request(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 1.5}, "count must be int, got 1.5"),
        ({"first": -1}, "first must not be negative"),
        ({"max_tokens": -1}, "max_tokens must lie in 0 … 2.31 - 1, got -1"),
        ({"max_tokens": 2**31}, f"max_tokens must lie in .*, got {2**31}"),
        ({"stop": [""]}, "must not be empty"),
        ({"stop": "ab"}, "stop must be tuple"),
        ({"seed": -3}, "seed must lie in"),
        ({"seed": 2**63}, "seed must lie in"),
        ({"count": 10**9}, "count × rank must be at most"),
        ({"count": 1000, "rank": 1000}, "count × rank must be at most"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 2, "trim": -0.1}, "trim must lie in"),
        ({"trim": 0.1}, "set rank, too"),
        ({"guidance": math.nan}, "guidance must lie in"),
        ({"temperature": "hot"}, "temperature must be float"),
    ],
)
def test_a_bad_request_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**settings)


def test_a_temperature_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        Request(temperature=math.nan).sampling("text")
