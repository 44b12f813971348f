"""A pattern that is misread, or that does not fit, would train another network than the one that was searched for."""

import json
from dataclasses import replace

import pytest

from cyclebnn_dist.__main__ import main
from cyclebnn_dist.binary import binarize_
from cyclebnn_dist.config import (
    Recipe,
    RecipeError,
    load_recipe,
    load_saved,
    resume_differences,
    save_recipe,
)
from cyclebnn_dist.config.pattern import Pattern, read_pattern, write_pattern
from cyclebnn_dist.config.recipe import BinaryConfig, ModelConfig
from cyclebnn_dist.models import build_model

RECIPE = """\
model: {name: resnet18, num_classes: 10, kwargs: {layers: [1, 1, 1, 1], channels: [8, 8, 8, 8]}}
data: {image_size: 32}
"""
BINARY = tuple(f"layer{stage}.0.conv1" for stage in (1, 2, 3, 4))
REAL = tuple(f"layer{stage}.0.conv2" for stage in (1, 2, 3, 4))


@pytest.fixture
def files(tmp_path):
    recipe, pattern = tmp_path / "recipe.yaml", tmp_path / "pattern.json"
    recipe.write_text(RECIPE)
    write_pattern(Pattern(model="resnet18", budget=0.5, cost=0.4, real=REAL, binary=BINARY), pattern)
    return recipe, pattern


def swapped(recipe):
    _, swap = build_model(recipe.model, recipe.binary, image_size=recipe.data.image_size)
    return {row.name: row.reason for row in swap.rows}


def test_a_recipe_that_names_a_pattern_makes_its_layers_binary_and_no_others(files):
    recipe, pattern = files
    reasons = swapped(load_recipe(recipe, [f"binary.pattern={pattern}"]))
    assert {name for name, reason in reasons.items() if not reason} == set(BINARY)
    assert {name for name, reason in reasons.items() if reason == "real by pattern"} == set(REAL)
    assert reasons["conv1"] == "stem"


@pytest.mark.parametrize(
    "changes",
    [
        ("model.num_classes=37", "data.image_size=48"),
        ("binary.method=reactnet", "binary.activation=rprelu"),
        ("model.kwargs.channels=[16, 16, 32, 32]",),
    ],
)
def test_it_holds_for_other_data_methods_and_widths(files, changes):
    recipe, pattern = files
    reasons = swapped(load_recipe(recipe, [f"binary.pattern={pattern}", *changes]))
    assert {name for name, reason in reasons.items() if not reason} == set(BINARY)


def test_what_was_made_with_a_pattern_needs_its_file_no_more(files, tmp_path):
    recipe, pattern = files
    loaded = load_recipe(recipe, [f"binary.pattern={pattern}"])
    save_recipe(loaded, tmp_path / "saved.yaml")
    other = tmp_path / "moved.json"
    pattern.rename(other)
    assert load_saved(tmp_path / "saved.yaml") == loaded == load_recipe(tmp_path / "saved.yaml")
    assert resume_differences(loaded, load_recipe(recipe, [f"binary.pattern={other}"])) == {}


def test_a_run_does_not_go_on_with_another_pattern(files):
    recipe, pattern = files
    first = load_recipe(recipe, [f"binary.pattern={pattern}"])
    write_pattern(replace(read_pattern(pattern), real=REAL[:3], binary=(*BINARY, REAL[3])), pattern)
    with pytest.raises(RecipeError, match=r"binary\.layers"):
        resume_differences(first, load_recipe(recipe, [f"binary.pattern={pattern}"]))


def test_layers_the_model_lacks_are_named(files, capsys):
    recipe, pattern = files
    write_pattern(replace(read_pattern(pattern), real=(*REAL, "layer1.1.conv1", "stages.0")), pattern)
    assert main(["summary", str(recipe), f"binary.pattern={pattern}"]) == 2
    error = capsys.readouterr().err
    assert "binary.pattern: names layers this model lacks: layer1.1.conv1, stages.0" in error
    assert "near layer1.1.conv1: layer1.0.conv1" in error


def test_a_layer_that_another_rule_keeps_real_is_refused_rather_than_left(files):
    recipe, pattern = files
    loaded = load_recipe(recipe, [f"binary.pattern={pattern}", "binary.exclude=[layer2.*]"])
    with pytest.raises(RecipeError, match=r"wants layer2\.0\.conv1 binary.*excluded by layer2\.\*"):
        swapped(loaded)
    with pytest.raises(RecipeError, match=r"binary\.method is none"):
        swapped(load_recipe(recipe, [f"binary.pattern={pattern}", "binary.method=none"]))


def test_layers_a_pattern_does_not_name_follow_the_rules(files):
    recipe, pattern = files
    write_pattern(replace(read_pattern(pattern), binary=()), pattern)
    assert {
        name
        for name, reason in swapped(load_recipe(recipe, [f"binary.pattern={pattern}"])).items()
        if not reason
    } == set(BINARY)


def test_a_network_all_real_by_its_pattern_has_the_activations_of_the_others():
    """A search compares networks that differ in nothing but which layers are binary."""
    config = ModelConfig(num_classes=10, kwargs={"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]})
    rules = BinaryConfig(activation="prelu", layers=dict.fromkeys((*REAL, *BINARY), "real"))
    network, swap = build_model(config, rules, image_size=32)
    assert swap.num_swapped == 0
    mixed, _ = build_model(config, replace(rules, layers={}), image_size=32)
    own = {name for name, _ in mixed.named_parameters() if ".binarizer." not in name}
    assert {name for name, _ in network.named_parameters()} == own
    with pytest.raises(RecipeError, match=r"binary\.include"):
        binarize_(
            build_model(config, BinaryConfig(method="none"), image_size=32)[0],
            BinaryConfig(exclude=("*",)),
            input_size=(3, 32, 32),
        )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a mapping"),
        ('{"format": 2, "real": [], "binary": ["a"]}', "its format is 2"),
        ('{"format": 1, "real": ["a"]}', "'binary' is no list"),
        ('{"format": 1, "real": ["a"], "binary": ["a", "b"]}', "a stands there twice"),
        ('{"format": 1, "real": [], "binary": []}', "names no layer"),
        ('{"format": 1, "real": [1], "binary": []}', "'real' is no list"),
        ('{"format": 1, "real": ["a"], "binary": ["b"], "budget": null}', "'budget' is no number"),
        ('{"format": 1, "real": ["a"], "binary": ["b"], "cost": "0.2 or so"}', "'cost' is no number"),
    ],
)
def test_what_is_no_pattern_is_refused(files, text, words):
    recipe, pattern = files
    pattern.write_text(text)
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(recipe, [f"binary.pattern={pattern}"])
    assert caught.value.key == "binary.pattern"


def test_a_pattern_that_is_not_there_or_stands_beside_layers_is_refused(files):
    recipe, pattern = files
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(recipe, [f"binary.pattern={pattern}x"])
    with pytest.raises(RecipeError, match=r"stands beside binary\.layers"):
        load_recipe(recipe, [f"binary.pattern={pattern}", "binary.layers={conv1: real}"])


def test_a_pattern_can_be_written_by_hand(files, capsys):
    recipe, pattern = files
    pattern.write_text(json.dumps({"format": 1, "real": list(REAL), "binary": list(BINARY)}))
    assert main(["summary", str(recipe), f"binary.pattern={pattern}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_swapped"] == 4


def test_saved_recipes_of_before_have_no_pattern():
    assert Recipe().binary.layers == {}
    assert Recipe().binary.pattern == ""
