"""`cyclebnn bench mixbin`: choices are compared seed by seed within one budget, and no finished network is trained again."""

import json

import pytest

from cyclebnn_dist.__main__ import main
from cyclebnn_dist.bench.mixbin import bench_mixbin, summarize
from cyclebnn_dist.bench.mixbin_runs import SEARCHED, Settings, choices_of, recipe_of
from cyclebnn_dist.bench.mixbin_text import render_mixbin
from cyclebnn_dist.config import RecipeError, validate
from cyclebnn_dist.search.costs import count_costs


def trained(**accuracies):
    return {name: {"accuracy": value, "cost": 0.39} for name, value in accuracies.items()}


def seeds(number, *, lead):
    """Accuracies of made-up seeds: the search leads random choices by ``lead(seed)`` points."""
    rest = dict.fromkeys(SEARCHED[1:], 50.0)
    return {
        seed: trained(shrink=50.0 + lead(seed), random_0=50.0 - seed, random_1=50.0 + seed, **rest)
        for seed in range(number)
    }


def test_the_search_is_paired_with_the_mean_of_random_choices():
    found = summarize(seeds(5, lead=lambda seed: 2.0 + 0.1 * seed))
    rows = {row["choice"]: row for row in found["choices"]}
    assert [*rows] == [*SEARCHED, "random"]
    assert rows["random"]["accuracy"] == pytest.approx(50.0)
    assert rows["random"]["difference"] == pytest.approx(2.2)
    reach = 2.7764 * 0.158114 / 5**0.5  # t of 4 degrees of freedom, deviation of 0, 0.1 ... 0.4
    assert rows["random"]["interval"]["low"] == pytest.approx(2.2 - reach, abs=1e-4)
    assert rows["shrink"]["difference"] is None
    assert found["claim"] is True


def test_it_claims_nothing_from_few_seeds_or_an_interval_with_zero():
    assert summarize(seeds(4, lead=lambda seed: 2.0 + seed))["claim"] is None
    assert summarize(seeds(1, lead=lambda seed: 2.0))["choices"][-1]["interval"] is None
    assert summarize(seeds(6, lead=lambda seed: 3.0 * (-1) ** seed))["claim"] is False
    assert summarize(seeds(6, lead=lambda seed: -2.0 - 0.1 * seed))["claim"] is False


def test_the_network_leaves_room_to_choose():
    settings = Settings("x", "y", 1, 0.4, 10, 2, 3, SEARCHED, 40, 0.0)
    recipe = recipe_of(settings, 0)
    validate(recipe)
    costs = count_costs(recipe)
    assert len(costs.names) == 8
    assert costs.share(costs.names) < 0.2 < 0.6 < 1 - costs.others / costs.total
    assert [*choices_of(settings)] == [*SEARCHED, "random_0", "random_1", "random_2"]


def test_a_small_one_is_measured_and_told_again(tmp_path, capsys):
    asked = {
        "workers": 1,
        "seeds": 1,
        "budget": 0.97,
        "choices": ["first"],
        "steps": 2,
        "candidate_steps": 1,
        "random_choices": 2,
        "out": tmp_path / "bench",
        "num_train": 200,
        "num_val": 50,
    }
    result = bench_mixbin(**asked)
    assert (result["seeds"], result["stopped"], result["claim"]) == (1, False, None)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "bench").glob("seed_1/*.json")}
    assert len(files) == 2 + 2
    for row in result["choices"]:
        assert result["all_binary_cost"] <= row["cost"] <= 0.97
    assert "no verdict: fewer than 5 seeds" in render_mixbin(result)
    again = bench_mixbin(**asked)
    assert again["choices"] == result["choices"]
    assert {path: path.stat().st_mtime_ns for path in files} == files
    with pytest.raises(RecipeError, match=r"steps 2, not 3"):
        bench_mixbin(**{**asked, "steps": 3})
    pattern = json.loads((tmp_path / "bench" / "seed_1" / "shrink" / "pattern.json").read_text())
    assert pattern["cost"] <= 0.97


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "0.1"], "search.budget: 0.1 is not possible"),
        (["--seeds", "0"], "--seeds: 0 is not possible"),
        (["--random", "0"], "--random: 0 is not possible"),
        (["--choices", "best"], "--choices: there is no choice 'best'"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, words, capsys):
    assert main(["bench", "mixbin", *arguments]) == 2
    assert words in capsys.readouterr().err
