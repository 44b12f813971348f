"""Bytes foretold for DeepSpeed. Without these a user would size a network by bytes that ranks then do not send."""

import json

import pytest
from launching import TINY_RECIPE
from test_deepspeed import run, under

from cyclebnn_dist.config import load_recipe
from cyclebnn_dist.preview import Length, preview
from cyclebnn_dist.preview.cluster import parse_clusters
from cyclebnn_dist.preview.scaling import plan_scaling
from cyclebnn_dist.preview.scaling_text import render_scaling
from cyclebnn_dist.preview.text import render_preview

LENGTH = Length(10, 5, "given")


@pytest.fixture
def recipe_file(tmp_path, tiny_data):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data))
    return path


@pytest.mark.parametrize(("stage", "scatter"), [(0, True), (1, True), (2, True), (2, False)])
def test_bytes_foretold_are_those_that_a_run_counts(ranks, recipe_file, stage, scatter):
    overrides = [*under(stage, scatter=scatter), "train.accumulation=2"]
    assert ranks(2, run, recipe_file, overrides) == [0, 0]
    counted = json.loads((recipe_file.parent / "run" / "summary.json").read_text())
    _, foretold = preview(load_recipe(recipe_file, overrides), length=LENGTH, ranks=2)
    assert counted["steps"] == LENGTH.total_steps
    for key in ("sent_bytes", "fp32_bytes", "bf16_bytes"):
        assert counted[key] == pytest.approx(foretold[key], rel=1e-12)
    assert counted["sent_bytes"] == foretold["sent_bytes"]


def test_sharing_out_sends_half_the_gradients_and_all_the_weights(recipe_file):
    """The other half of an fp32 all-reduce is the weights'; rounding to equal parts adds a few elements."""
    told = {}
    for stage in (0, 1, 2):
        schedule, told[stage] = preview(
            load_recipe(recipe_file, under(stage, scatter=True)), length=LENGTH, ranks=4
        )
        assert ("weight bytes" in render_preview(schedule, told[stage])) == (stage > 0)
    assert told[0]["weight_bytes"] == 0
    assert told[1]["fp32_bytes"] == pytest.approx(told[0]["fp32_bytes"] / 2)
    assert told[1]["weight_bytes"] == pytest.approx(told[0]["fp32_bytes"] / 2, rel=1e-3)
    assert {key: told[1][key] for key in told[1] if key != "zero_stage"} == {
        key: told[2][key] for key in told[2] if key != "zero_stage"
    }


@pytest.mark.parametrize("stage", [0, 2])
def test_a_plan_counts_what_the_schedule_command_counts(recipe_file, stage):
    recipe = load_recipe(recipe_file, under(stage, scatter=True))
    clusters = parse_clusters(nodes="1,3", gpus_per_node=1, network="1gbit", intra="pcie", message_us=1.0)
    given = {"length": LENGTH, "compute_seconds": 0.1, "codec_gb_per_second": 1.0}
    described = plan_scaling(recipe, clusters, **given)
    alone, three = (row["modes"]["schedule"] for row in described["rows"])
    assert alone["weight_bytes_per_step"] == alone["sent_bytes"] == 0
    _, told = preview(recipe, length=LENGTH, ranks=3)
    assert three["sent_bytes"] == pytest.approx(told["sent_bytes"], rel=1e-9)
    assert LENGTH.total_steps * three["weight_bytes_per_step"] == told["weight_bytes"]
    assert ("of weights" in render_scaling(described)) == (stage > 0)
    if stage:
        assert three["exposed_seconds"] >= three["weight_bytes_per_step"] / 125e6
