"""Recipes: what a sample was made from and how, as JSON beside it, so that it can be made again.

A recipe may come from anywhere, so it is bounded and checked like any other input.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from genssm.request import MOST_SAMPLES, Plan
from genssm.sampling import SamplingConfig
from genssm.settings import check_types

FORMAT_VERSION = 1
LARGEST = 2**22  # characters of JSON
MOST_TOKENS = 2**18  # of a prompt


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message says why and what to do."""


@dataclass(frozen=True)
class Recipe:
    """The model, the checkpoint's content hash, the plan of the samples in one file."""

    model: str
    checkpoint: str  # content hash
    rate: float  # by which Δ was scaled
    weights: str  # that the model was stepped with: "fp32", "bf16" or "int8"
    prompt: str | None  # as it was given, for people; the plan holds the tokens
    plan: Plan

    def to_json(self) -> dict[str, Any]:
        """JSON-able facts, from which ``from_json`` makes the recipe again."""
        facts: dict[str, Any] = {"genssm_recipe": FORMAT_VERSION, **asdict(self)}
        plan: dict[str, Any] = facts.pop("plan")
        return facts | plan


def parse(text: str | bytes) -> Recipe:
    """A recipe from JSON. Raises RecipeError for anything else."""
    if len(text) > LARGEST:
        raise RecipeError(f"the recipe is longer than {LARGEST} characters")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError("the recipe is not JSON") from error
    return from_json(facts)


def from_json(facts: Any) -> Recipe:
    """The recipe of ``to_json``. Raises RecipeError for unknown, missing or unfit facts."""
    if not isinstance(facts, dict) or "genssm_recipe" not in facts:
        raise RecipeError("there is no recipe of genssm")
    rest: dict[str, Any] = dict(facts)
    version = rest.pop("genssm_recipe")
    if version != FORMAT_VERSION:
        raise RecipeError(
            f"the recipe has format version {version!r:.40}, this genssm reads {FORMAT_VERSION}"
        )
    ours = {f.name for f in fields(Recipe)} - {"plan"}
    parts = [
        (rest, ours | {f.name for f in fields(Plan)}),
        (rest.get("sampling"), {f.name for f in fields(SamplingConfig)}),
    ]
    for part, known in parts:
        if not isinstance(part, dict) or set(part) != known:
            raise RecipeError(f"the recipe must set exactly {', '.join(sorted(known))}")
    try:
        own = {name: rest.pop(name) for name in ours}
        rest["sampling"] = SamplingConfig(**rest["sampling"])
        plan = Plan(**rest)
        recipe = Recipe(**own, plan=plan)
        check_types(recipe)
    except ValueError as error:
        raise RecipeError(f"the recipe is damaged: {error!s:.200}") from error
    if not 0 < recipe.rate < 1e6:
        raise RecipeError(f"the recipe is damaged: its rate is {recipe.rate}")
    if len(plan.indices) > MOST_SAMPLES or len(plan.tokens) > MOST_TOKENS:
        raise RecipeError(
            f"a recipe makes at most {MOST_SAMPLES} samples from at most {MOST_TOKENS} tokens"
        )
    return recipe


def join(recipes: list[Recipe]) -> Recipe:
    """One recipe for the samples of several that differ in nothing else."""
    if not recipes:
        raise RecipeError("there is no recipe of genssm")
    indices = tuple(i for r in recipes for i in r.plan.indices)
    joined = [replace(r, plan=replace(r.plan, indices=indices)) for r in recipes]
    if any(recipe != joined[0] for recipe in joined):
        raise RecipeError("the recipes differ in more than the samples; give one of them")
    return joined[0]
