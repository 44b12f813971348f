"""Without these a recipe in the repository could be refused on the cluster it was queued for, or learn nothing there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from launching import Launched
from test_train import newest, run

from cyclebnn_dist.__main__ import main
from cyclebnn_dist.binary import parameter_kinds
from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.config.header import read_header, render_headers
from cyclebnn_dist.data.sample import generate_sample
from cyclebnn_dist.models import build_model
from cyclebnn_dist.models.summary import describe_recipe
from cyclebnn_dist.optimizer import DECAYS, build_optimizer

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NARROW = ("bnext_s", "bnext_m", "bnext_l")
"""Models that take long to build; narrow ones have parameters of the same names."""


def quick(recipe):
    """The recipe with smaller images, and a narrow model in the place of a large one."""
    model = recipe.model
    if model.name in NARROW:
        model = replace(model, kwargs={"channels": [16, 32, 64, 64]})
    return replace(recipe, model=model, data=replace(recipe.data, image_size=min(recipe.data.image_size, 64)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds_its_model_and_says_what_to_expect(path):
    recipe = load_recipe(path)
    described = describe_recipe(quick(recipe))
    assert described["num_swapped"] > 0
    assert described["one_sided_inputs"] == []
    assert recipe.run.dir == f"runs/{path.stem}"
    read_header(path)


@pytest.mark.long
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_summary_at_its_full_size(path, capsys):
    assert main(["summary", str(path)]) == 0
    assert f"{load_recipe(path).data.image_size} px" in capsys.readouterr().out


def decays_of(path):
    """(shape, name) -> (weight decay of the first phase, of the second) of every parameter of a recipe's model."""
    recipe = quick(load_recipe(path))
    model, _ = build_model(recipe.model, recipe.binary, image_size=recipe.data.image_size)
    optimizer = build_optimizer(
        model, recipe.optim, kinds=parameter_kinds(model), first_phase=recipe.first_phase
    )
    by_name = {
        name: group.get(DECAYS, (group["weight_decay"],) * 2)
        for group in optimizer.param_groups
        for name in group["names"]
    }
    return {name: (parameter.dim(), *by_name[name]) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("path", [path for path in RECIPES if "_bnext_" in path.stem], ids=lambda p: p.stem)
def test_bnext_decays_as_its_authors_have_it(path):
    """1e-8 for tensors that have four dimensions in their code, 1e-3 for all others."""
    for name, (dims, _, decay) in decays_of(path).items():
        four = dims == 4 or name.endswith((".shift", ".share"))
        assert decay == (1e-8 if four else 1e-3), name


def test_reactnet_decays_convolutions_in_the_first_phase_alone():
    for name, (dims, first, second) in decays_of(ROOT / "recipes/imagenet_reactnet_a.yaml").items():
        assert (first, second) == (1e-5 if dims == 4 else 0.0, 0.0), name


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "small"
    generate_sample(path, num_train=1500, num_val=300, image_size=56)
    return path


SHORT = ("train.epochs=4", "train.global_batch_size=32", "eval.every_epochs=4")


@pytest.mark.parametrize(
    ("name", "overrides", "least"),
    [
        ("sample_bnext", ["data.image_size=32"], 70.0),
        ("sample_reactnet", ["data.image_size=32", "first_phase.epochs=2"], 60.0),
        ("sample_adabin", ["model.kwargs.channels=[16, 32, 64, 128]", "optim.lr=0.05"], 45.0),
        ("sample_bireal", ["data.image_size=32"], 35.0),
    ],
)
def test_a_short_run_of_a_small_recipe_learns(ranks, tmp_path, small_data, name, overrides, least):
    """188 steps of 32 images by 2 ranks at cyclic widths; a guess among 10 classes is right for 10 %."""
    settings = [*SHORT, *overrides, f"data.path={small_data}", f"run.dir={tmp_path / 'run'}"]
    assert ranks(2, run, ROOT / f"recipes/{name}.yaml", settings, timeout_seconds=600) == [0, 0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    widths = summary["bits"]["communication"]
    assert (widths["min"], widths["max"]) == (2, 8)
    assert summary["eval_top1"] >= least


@pytest.mark.long
def test_small_recipes_reach_what_their_headers_say(tmp_path):
    """The network that Bi-Real Net's trains stands in for the quickstart's, as a teacher."""
    generate_sample(tmp_path / "data")
    reached = {}
    for name in ("sample_bireal", "sample_adabin", "sample_bnext", "sample_reactnet", "sample_distilled"):
        run_dir = tmp_path / name
        overrides = [f"data.path={tmp_path / 'data'}", f"run.dir={run_dir}"]
        if name == "sample_distilled":
            overrides.append(f"distill.weights={{resnet18: {newest(tmp_path / 'sample_bireal')}}}")
        launched = Launched(ROOT / f"recipes/{name}.yaml", run_dir, ranks=2, overrides=tuple(overrides))
        status, output = launched.wait(seconds=900)
        assert status == 0, output
        reached[name] = json.loads((run_dir / "summary.json").read_text())["eval_top1"]
    assert min(reached.values()) >= 90.0, reached


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
