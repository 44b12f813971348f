"""Without these a recipe in the repository could be refused on the cluster it was queued for."""

from dataclasses import replace
from pathlib import Path

import pytest

from cyclebnn_dist.__main__ import main
from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.config.header import read_header, render_headers
from cyclebnn_dist.models.summary import describe_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds_its_model_and_says_what_to_expect(path):
    recipe = load_recipe(path)
    described = describe_recipe(recipe)
    assert described["num_swapped"] > 0
    assert described["one_sided_inputs"] == []
    assert recipe.run.dir == f"runs/{path.stem}"
    read_header(path)


def test_the_readme_shows_what_the_headers_say():
    """A table kept by hand would promise what a recipe no longer does."""
    paths = [path.relative_to(ROOT) for path in RECIPES]
    table = render_headers([replace(read_header(ROOT / path), path=path) for path in paths], markdown=True)
    assert table in (ROOT / "README.md").read_text(), "put the output of `cyclebnn recipes --markdown` there"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("run: {}\n", "has no header"),
        ("# A title.\n#\n#   published  60 %\n", "does not say measured, needs, takes"),
    ],
)
def test_a_header_that_lacks_something_is_named(text, problem, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=problem):
        read_header(tmp_path / "mine.yaml")


def test_a_field_goes_on_in_indented_lines(tmp_path, capsys):
    lines = ["# A net", "# of ours.", "#", "#   published  60 %,", "#              at last"]
    lines += [f"#   {name}  x" for name in ("measured", "needs", "takes")]
    (tmp_path / "mine.yaml").write_text("\n".join([*lines, "#", "#   takes no part", "", "run: {}"]))
    header = read_header(tmp_path / "mine.yaml")
    assert (header.title, header.published, header.takes) == ("A net of ours.", "60 %, at last", "x")
    (tmp_path / "other.yaml").write_text("run: {}\n")
    assert main(["recipes", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "60 %, at last" in shown.out
    assert "other.yaml" in shown.err
    assert main(["recipes", str(tmp_path / "none")]) == 2
