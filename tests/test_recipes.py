"""Without these a recipe in the repository could be refused on the cluster it was queued for."""

from pathlib import Path

import pytest

from cyclebnn_dist.config import load_recipe
from cyclebnn_dist.models.summary import describe_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds_its_model_and_says_what_to_expect(path):
    recipe = load_recipe(path)
    described = describe_recipe(recipe)
    assert described["num_swapped"] > 0
    assert described["one_sided_inputs"] == []
    assert recipe.run.dir == f"runs/{path.stem}"
    header = path.read_text().split("\n\n")[0]
    assert all(f"#   {word} " in header for word in ("reaches", "needs", "takes")), header
