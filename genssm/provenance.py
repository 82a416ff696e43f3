"""Where a sample comes from: its recipe, as JSON in or beside its file, by which it is made again.

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
MOST_TOKENS = 2**18  # of all prompts
MOST_PARTS = 64  # of a sound
LONGEST_PAUSE = 10.0  # seconds


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message says why and what to do."""


@dataclass(frozen=True)
class Recipe:
    """The model, the checkpoint's content hash, the plan of the samples in one file.

    A sound may consist of several samples: the first plan's, then one of each in ``then``, with
    ``pause`` seconds of silence between them.
    """

    model: str
    checkpoint: str  # content hash
    rate: float  # by which Δ was scaled
    weights: str  # that the model was stepped with: "bf16", "int8-16", …, "eager fp32", …
    prompt: str | None  # as it was given, for people; the plan holds the tokens
    plan: Plan
    then: tuple[Plan, ...] = ()
    pause: float = 0.0

    @property
    def plans(self) -> tuple[Plan, ...]:
        """All of them, in the order of the file."""
        return (self.plan, *self.then)

    def to_json(self) -> dict[str, Any]:
        """JSON-able facts, from which ``from_json`` makes the recipe again."""
        facts: dict[str, Any] = {"genssm_recipe": FORMAT_VERSION, **asdict(self)}
        plan: dict[str, Any] = facts.pop("plan")
        if not self.then:
            del facts["then"], facts["pause"]
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
    row = {name: rest.pop(name) for name in ("then", "pause") if name in rest}
    plans, ours = {f.name for f in fields(Plan)}, {f.name for f in fields(Recipe)}
    ours -= {"plan", "then", "pause"}
    _check_keys(rest, ours | plans)
    own = {name: rest.pop(name) for name in ours}
    if own["weights"] == "int8":  # which had activations of 24 bits before there were others
        own["weights"] = "int8-24"
    try:
        then = tuple(_plan(part) for part in _parts(row))
        recipe = Recipe(**own, plan=_plan(rest), then=then, pause=row.get("pause", 0.0))
        check_types(recipe)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"the recipe is damaged: {error!s:.200}") from error
    _check_sizes(recipe)
    return recipe


def _check_keys(facts: Any, known: set[str]) -> None:
    if not isinstance(facts, dict) or set(facts) != known:
        raise RecipeError(f"the recipe must set exactly {', '.join(sorted(known))}")


def _plan(facts: Any) -> Plan:
    _check_keys(facts, {f.name for f in fields(Plan)})
    _check_keys(facts["sampling"], {f.name for f in fields(SamplingConfig)})
    return Plan(**{**facts, "sampling": SamplingConfig(**facts["sampling"])})


def _parts(row: dict[str, Any]) -> list[Any]:
    """The plans after the first, not yet looked at."""
    if not row:
        return []
    parts = row.get("then")
    if len(row) != 2 or not isinstance(parts, list) or not 0 < len(parts) < MOST_PARTS:
        raise RecipeError(
            f"a recipe of several parts needs a pause and 1 … {MOST_PARTS - 1} plans in then"
        )
    return parts


def _check_sizes(recipe: Recipe) -> None:
    if not 0 < recipe.rate < 1e6:
        raise RecipeError(f"the recipe is damaged: its rate is {recipe.rate}")
    if not 0 <= recipe.pause <= LONGEST_PAUSE:
        raise RecipeError(f"the recipe is damaged: its pause is {recipe.pause}")
    if recipe.then and any(len(plan.indices) > 1 for plan in recipe.plans):
        raise RecipeError("the recipe is damaged: every part of a sound is one sample")
    samples = sum(len(plan.indices) for plan in recipe.plans)
    if samples > MOST_SAMPLES or sum(len(plan.tokens) for plan in recipe.plans) > MOST_TOKENS:
        raise RecipeError(
            f"a recipe makes at most {MOST_SAMPLES} samples from at most {MOST_TOKENS} tokens"
        )


def join(recipes: list[Recipe]) -> Recipe:
    """One recipe for the samples of several that differ in nothing else."""
    if not recipes:
        raise RecipeError("there is no recipe of genssm")
    indices = tuple(i for r in recipes for i in r.plan.indices)
    joined = [replace(r, plan=replace(r.plan, indices=indices)) for r in recipes]
    if any(recipe != joined[0] for recipe in joined):
        raise RecipeError("the recipes differ in more than the samples; give one of them")
    return joined[0]
