"""Recipes: every one builds its model, and settings are changed by name or refused."""

import math
from typing import Any

import pytest
import torch

from genssm.codec import Audio, Image
from genssm.config import ModelConfig
from genssm.model import SequenceModel
from genssm.preparation import build_codec
from genssm.recipes import RECIPES, Recipe, TrainConfig, parse_settings

recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


def model_config(recipe: Recipe) -> ModelConfig:
    """As training makes it; a tokenizer has as many outputs as tokens."""
    if recipe.modality == "text":
        sizes = {"vocab_size": recipe.codec["vocab_size"], "n_outputs": recipe.codec["vocab_size"]}
    else:
        codec = {"image": Image, "audio": Audio}[recipe.modality](**recipe.codec)
        sizes = {"vocab_size": codec.vocab_size, "n_outputs": codec.n_outputs}
    return ModelConfig(**sizes, l_max=recipe.train.length, **recipe.model)


@recipes
def test_recipe_builds_a_model_of_less_than_eight_million_parameters(recipe: Recipe):
    model = SequenceModel(model_config(recipe))
    assert 500_000 < sum(p.numel() for p in model.parameters()) < 8_000_000


@recipes
@torch.no_grad()
def test_recipe_scores_a_short_sequence(recipe: Recipe):
    model = SequenceModel(model_config(recipe)).eval()
    log_p = model.log_prob(torch.randint(0, model.config.n_outputs, (1, 30)))
    assert bool((log_p < 0).all())


@recipes
def test_widths_fill_the_vectors_of_the_processor(recipe: Recipe):
    """Otherwise a row may round differently in other company, and a sample depends on it."""
    assert all(width % 32 == 0 for width in model_config(recipe).d_model)


def test_image_recipes_train_on_whole_pictures_at_their_positions():
    for recipe in RECIPES.values():
        if recipe.modality == "image":
            image = Image(**recipe.codec)
            assert recipe.train.length == image.length
            assert recipe.model["image_shape"] == image.shape
            assert image.length % model_config(recipe).period == 0


def test_settings_are_changed_by_name_in_their_own_section():
    recipe = RECIPES["wiki"]
    changed = recipe.changed({"vocab_size": 300, "d_state": 8, "layer": "s4", "batch_size": 2})
    assert changed.codec == {"vocab_size": 300}
    assert changed.model == {**recipe.model, "d_state": 8, "layer": "s4"}
    assert changed.train == TrainConfig(batch_size=2, length=recipe.train.length)
    assert changed.modality == "text"
    assert recipe == RECIPES["wiki"]  # the original stays as it is
    assert recipe.codec["vocab_size"] != 300
    assert recipe.changed({}) == recipe


def test_one_number_stands_for_a_tuple_of_one():
    changed = RECIPES["wiki"].changed(parse_settings(["d_model=128", "n_layers=2", "token_taps=2"]))
    assert changed.model["d_model"] == (128,)
    assert model_config(changed).n_layers == (2,)
    assert model_config(changed).token_taps == (2,)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("d_model=0", "every d_model >= 1"),
        ("d_model=wide", r"d_model must be tuple\[int, ...\], got 'wide'"),
        ("n_layers=2,2", "one entry a level"),
        ("pools=4", "one entry a level"),
        ("layer=s5", "layer is one of lssl, s4,"),
        ("d_state=7", "d_state is 2, 4"),
        ("layer_settings={'rnak': 2}", "a layer 's4d' has no setting rnak; it has"),
        ("layer_settings={'decay': 'slow'}", "decay must be one of"),
    ],
)
def test_settings_that_no_model_can_have_are_refused_at_once(pair: str, message: str):
    with pytest.raises(ValueError, match=message):
        RECIPES["wiki"].changed(parse_settings([pair]))


@pytest.mark.parametrize("name", ["d_sate", "n_outputs", "l_max", "rate", "modality"])
def test_unknown_settings_are_refused_and_the_known_ones_named(name: str):
    with pytest.raises(ValueError, match=f"unknown setting {name!r}; known: .*d_state") as raised:
        RECIPES["wiki"].changed({name: 1})
    assert "batch_size" in str(raised.value)
    assert "vocab_size" in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"length": -1}, "length must be positive"),
        ({"steps": 0}, "steps must be positive"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"matrix_lr": -0.1}, "matrix_lr must be positive"),
        ({"clip": 0}, "clip must be positive"),
        ({"decay": 0}, "decay must be positive"),
        ({"decay": 1.5}, "decay must be at most 1, got 1.5"),
        ({"batch_size": "four"}, "batch_size"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"warmup": -1}, "warmup must not be negative, got -1"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"flip": True}, "flip is for image, the recipe is for text"),
        ({"noise": 1.0}, "noise is for audio, the recipe is for text"),
        ({"noise": -1.0}, "noise must not be negative"),
        ({"lr": math.nan}, "lr must be a finite number, got nan"),
        ({"matrix_lr": math.inf}, "matrix_lr must be a finite number, got inf"),
        ({"clip": math.nan}, "clip must be positive, got nan"),
        ({"ema": math.nan}, "ema must lie in 0 … 1"),
        ({"warmup": math.nan}, "warmup must be int"),
        ({"length": 2**63}, "length must be at most 2147483648"),
        ({"seed": 2**64}, "seed must be at most 18446744073709551615"),
    ],
)
def test_impossible_training_settings_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RECIPES["wiki"].changed(settings)


@pytest.mark.parametrize("name", ["length", "first_length"])
def test_lengths_reach_the_innermost_layers(name: str):
    stride = math.prod(RECIPES["digits"].model["pools"])
    with pytest.raises(ValueError, match=f"^{name} must be at least {stride}, the product of"):
        RECIPES["digits"].changed({name: stride - 1})


def test_a_sequence_is_longer_than_its_opening():
    level = {"d_model": (32,), "n_layers": (1,), "pools": ()}
    recipe = RECIPES["digits"].changed({**level, "length": 2})
    with pytest.raises(ValueError, match="length must be more than the 2 tokens of an opening"):
        recipe.model_config(build_codec(recipe))


def test_more_layers_than_any_model_has_are_refused():
    with pytest.raises(ValueError, match="n_layers must be at most 1000 in all, got 1001"):
        RECIPES["cifar10"].changed({"n_layers": (1, 1000, 0)})


def test_positions_are_those_of_the_pictures():
    recipe = RECIPES["cifar10"].changed({"height": 16, "width": 16})
    with pytest.raises(ValueError, match="that of the pictures, 16,16,3; got 32,32,3"):
        recipe.model_config(build_codec(recipe))


def test_settings_of_another_modality_are_refused():
    with pytest.raises(ValueError, match="cut_documents is for text, the recipe is for audio"):
        RECIPES["digits"].changed({"cut_documents": True})
    assert RECIPES["wiki"].changed({"cut_documents": True}).train.cut_documents
    assert RECIPES["mnist"].changed({"flip": True}).train.flip


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("digits", {"labels": "cat,dog"}),  # no list: its characters would be the classes
        ("digits", {"rate": "fast"}),
        ("cifar10", {"height": 32.5}),
        ("mnist", {"labels": 3}),
    ],
)
def test_settings_of_a_codec_have_their_types(name: str, settings: dict[str, Any]):
    (setting,) = settings
    with pytest.raises(ValueError, match=f"{setting} must be .*, got {settings[setting]!r}"):
        build_codec(RECIPES[name].changed(settings))
    assert build_codec(RECIPES[name].changed({"labels": ["a", "b"]})).labels == ("a", "b")


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("x=64", 64),
        ("x=3e-3", 0.003),
        ("x=3,4", (3, 4)),
        ("x=(64,)", (64,)),
        ("x=s4", "s4"),
        ("x=s4d-inv", "s4d-inv"),
        ("x=True", True),
        ("x=None", None),
        ("x=a=b", "a=b"),
        ("x=", ""),
        ("x=[1, 2]", [1, 2]),
        ("x=('cat', 'dog')", ("cat", "dog")),
        (" x =5", 5),
        ("x=__import__('os')", "__import__('os')"),
    ],
)
def test_settings_are_read_as_python_literals_or_words(pair: str, value: Any):
    parsed = parse_settings([pair])
    assert parsed == {"x": value}
    assert type(parsed["x"]) is type(value)


def test_later_settings_win():
    assert parse_settings(["x=1", "y=2", "x=3"]) == {"x": 3, "y": 2}
    assert parse_settings([]) == {}


@pytest.mark.parametrize("pair", ["x", "=3", "", "x:3"])
def test_what_is_no_setting_is_refused(pair: str):
    with pytest.raises(ValueError, match=f"must read key=value, got {pair!r}"):
        parse_settings([pair])
