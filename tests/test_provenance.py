"""Recipes: JSON there and back, and nothing taken on trust."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from genssm.files import png, read_recipe, sound
from genssm.notes import add
from genssm.provenance import LARGEST, Recipe, RecipeError, from_json, join, parse
from genssm.request import Plan
from genssm.sampling import SamplingConfig

PLAN = Plan((1, 5), SamplingConfig(temperature=0.5), 10, ("stop",), 7, (0, 3))
RECIPE = Recipe("wiki", "00ff", 1.0, "bf16", "a prompt", PLAN)
PART = replace(PLAN, indices=(0,))
ROW = replace(
    RECIPE, plan=PART, then=(replace(PART, tokens=(2,)), replace(PART, seed=8)), pause=0.12
)


def changed(**facts: Any) -> str:
    return json.dumps(RECIPE.to_json() | facts)


def test_a_recipe_survives_json() -> None:
    assert parse(changed()) == RECIPE
    assert parse(changed().encode()) == RECIPE
    assert parse(json.dumps(ROW.to_json())) == ROW
    assert [plan.seed for plan in ROW.plans] == [7, 7, 8]


def row(**facts: Any) -> str:
    return json.dumps(ROW.to_json() | facts)


PARTS = ROW.to_json()["then"]


def without(key: str) -> str:
    return json.dumps({k: v for k, v in RECIPE.to_json().items() if k != key})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("9" * 5000, "is not JSON"),
        (" " * (LARGEST + 1), "is longer than"),
        ("[]", "no recipe of genssm"),
        ("null", "no recipe of genssm"),
        ("{}", "no recipe of genssm"),
        (changed(genssm_recipe=2), "has format version 2"),
        (changed(genssm_recipe="x" * 1000), "has format version"),
        (changed(surprise=1), "must set exactly"),
        (without("seed"), "must set exactly"),
        (without("model"), "must set exactly"),
        (without("sampling"), "must set exactly"),
        (changed(sampling=[]), "must set exactly"),
        (changed(sampling={}), "must set exactly"),
        (changed(model=1), "is damaged: model must be str"),
        (changed(rate="1"), "is damaged: rate must be float"),
        (changed(rate=0), "is damaged: its rate is 0"),
        (changed(rate=float("nan")), "is damaged: its rate is nan"),
        (changed(tokens=[]), "is damaged: samples need a start token"),
        (changed(tokens="12"), "is damaged: tokens must be"),
        (changed(tokens=[1.5]), "is damaged: tokens must be"),
        (changed(tokens=[[1]]), "is damaged: tokens must be"),
        (changed(tokens=[-1]), "is damaged: samples need token ids"),
        (changed(tokens=[2**70]), "is damaged: samples need token ids"),
        (changed(max_tokens=-1), "is damaged: samples need max_tokens"),
        (changed(max_tokens=10**30), "is damaged: samples need max_tokens"),
        (changed(stop=[""]), "is damaged: samples need stop strings"),
        (changed(seed=-1), "is damaged: the seed must lie"),
        (changed(seed=True), "is damaged: seed must be int"),
        (changed(indices=[]), "is damaged: samples need a sample"),
        (changed(indices=[-1]), "is damaged: samples need sample indices"),
        (changed(indices=[0] * 70_000), "at most 65536 samples"),
        (changed(tokens=[1] * 300_000), "at most 262144 tokens"),
        (changed(guidance=1e9), "is damaged: guidance must lie"),
        (changed(state=3), "is damaged: state must be"),
        (changed(pause=1), "several parts needs a pause and 1 … 63 plans"),
        (row(then=[]), "several parts needs"),
        (row(then=3), "several parts needs"),
        (row(then=PARTS * 40), "several parts needs"),
        (row(then=[3]), "must set exactly"),
        (row(then=[PARTS[0] | {"sampling": None}]), "must set exactly"),
        (row(then=[PARTS[0] | {"then": []}]), "must set exactly"),
        (row(then=[PARTS[0] | {"seed": -1}]), "is damaged: the seed must lie"),
        (row(then=[PARTS[0] | {"indices": [0, 1]}]), "every part of a sound is one sample"),
        (row(then=[PARTS[0] | {"tokens": [1] * 300_000}]), "at most 262144 tokens"),
        (row(pause=None), "is damaged: pause must be float"),
        (row(pause=-1), "is damaged: its pause is -1"),
        (row(pause=1e9), "is damaged: its pause is"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse(text)
    assert len(str(caught.value)) < 400


def test_bad_sampling_settings_are_refused() -> None:
    facts = RECIPE.to_json()
    for name, value in (("temperature", float("nan")), ("top_k", "many"), ("top_p", 7)):
        with pytest.raises(RecipeError, match="is damaged"):
            from_json(facts | {"sampling": facts["sampling"] | {name: value}})


def test_recipes_that_differ_in_the_samples_alone_are_joined() -> None:
    other = replace(RECIPE, plan=replace(PLAN, indices=(8,)))
    assert join([RECIPE, other]).plan.indices == (0, 3, 8)
    with pytest.raises(RecipeError, match="differ in more than the samples"):
        join([RECIPE, replace(other, checkpoint="00aa")])
    with pytest.raises(RecipeError, match="no recipe"):
        join([])


def test_files_carry_recipes(tmp_path: Path) -> None:
    import numpy as np

    note = changed()
    line = json.dumps({"text": "…", "recipe": RECIPE.to_json()})
    contents = {
        "a.png": add(png(np.zeros((2, 2, 3), np.uint8)), note),
        "a.wav": add(sound(np.zeros(9, np.float32), 8000, "wav"), note),
        "a.json": f"{line}\n".encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert read_recipe(tmp_path / name) == RECIPE
    (tmp_path / "b.json").write_text(f"{line}\n{line}\n")
    assert read_recipe(tmp_path / "b.json").plan.indices == (0, 3, 0, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"\x89PNG\r\n\x1a\n", "has no recipe"),
        ("a.txt", b"text", "has no recipe"),
        ("a.json", b"", "no recipe"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b"\xff", "not JSON"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.json", b'{"text": "x"}', "no recipe"),
        ("a.json", b"3\n", "no recipe"),
    ],
)
def test_files_without_a_recipe_are_refused(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        read_recipe(tmp_path / name)
    assert name in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read '.*a\.png'"):
        read_recipe(tmp_path / "a.png")
