"""A wrong choice costs accuracy, or more operations than were allowed; neither shows in a search's output."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cyclebnn_dist.binary import count
from cyclebnn_dist.config import Recipe, RecipeError
from cyclebnn_dist.config.recipe import BinaryConfig, DataConfig, ModelConfig
from cyclebnn_dist.models import build_model
from cyclebnn_dist.search.costs import Costs, LayerCost, count_costs
from cyclebnn_dist.search.selection import Outcome, improvement, per_cost, select

STRATEGIES = ("grow", "shrink", "iterative", "sensitivity", "random", "first", "last")


@st.composite
def networks(draw):
    """Costs of a network, and a table of outcomes for every set of binary layers (the same whatever the round)."""
    number = draw(st.integers(1, 5))
    macs = draw(st.lists(st.integers(1, 10**6), min_size=number, max_size=number))
    layers = {f"layer{i}": LayerCost(real=64 * each, binary=each) for i, each in enumerate(macs)}
    costs = Costs(layers=layers, others=64 * draw(st.integers(1, 10**6)))
    values = st.tuples(st.integers(0, 8), st.integers(0, 3))  # few values, so that there are ties
    table = {
        frozenset(each): Outcome(*map(float, draw(values)))
        for size in range(number + 1)
        for each in itertools.combinations(layers, size)
    }
    return costs, table


def measure_in(table, asked=None):
    def measure(number, binary, layers):
        if asked is not None:
            asked.append((number, binary, tuple(layers)))
        return table[binary], {name: table[binary ^ {name}] for name in layers}

    return measure


@settings(max_examples=150, deadline=None)
@given(
    networks(),
    st.floats(0.01, 1.0),
    st.sampled_from(STRATEGIES),
    st.sampled_from(["accuracy", "loss"]),
    st.integers(0, 9),
)
def test_no_choice_exceeds_its_budget_or_leaves_room_for_a_layer(network, budget, strategy, metric, seed):
    costs, table = network
    how = {"budget": budget, "strategy": strategy, "metric": metric, "random_seed": seed}
    total = sum(layer.real for layer in costs.layers.values()) + costs.others
    least = sum(layer.binary for layer in costs.layers.values()) + costs.others
    if least > budget * total * (1 + 1e-12):
        with pytest.raises(RecipeError, match=r"search\.budget.*is not possible"):
            select(costs, measure=measure_in(table), **how)
        return
    if least > budget * total:
        return  # equal but for the last bit
    binary, rounds = select(costs, measure=measure_in(table), **how)
    spent = costs.others + sum(
        layer.binary if name in binary else layer.real for name, layer in costs.layers.items()
    )
    assert spent <= budget * total
    assert costs.share(binary) == pytest.approx(spent / total)
    for name in binary:
        assert spent + costs.layers[name].saving > budget * total * (1 - 1e-12)
    if rounds:
        assert rounds[-1].share == costs.share(binary)


def greedy(costs, table, budget, *, grow):
    """The rule once more, by comparing candidates two by two in words of the docstring; accuracy, per cost."""
    names = list(costs.layers)
    total = costs.total

    def better(one, other, binary, to):
        """Whether ``one`` is to be preferred, ``other`` being nearer the input."""
        values = []
        for name in (one, other):
            gain = table[binary ^ {name}].accuracy - table[binary].accuracy
            cost = (costs.layers[name].real - costs.layers[name].binary) / total
            helps = gain > 0
            divided = helps if to == "real" else gain < 0
            values.append((gain / cost if divided else gain * cost, -table[binary ^ {name}].loss))
        return values[0] > values[1]

    def best(candidates, binary, to):
        chosen = candidates[0]
        for name in candidates[1:]:
            if better(name, chosen, binary, to):
                chosen = name
        return chosen

    def cost_of(binary):
        return sum(c.binary if n in binary else c.real for n, c in costs.layers.items()) + costs.others

    binary = frozenset(names) if grow else frozenset()
    history = []
    while cost_of(binary) > budget * total:
        history.append((best([n for n in names if n not in binary], binary, "binary"), "binary"))
        binary |= {history[-1][0]}
    while True:
        fitting = [n for n in names if n in binary and cost_of(binary - {n}) <= budget * total]
        if not fitting:
            return binary, history
        history.append((best(fitting, binary, "real"), "real"))
        binary -= {history[-1][0]}


@settings(max_examples=150, deadline=None)
@given(networks(), st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.booleans())
def test_grow_and_shrink_follow_the_rule(network, budget, grow):
    costs, table = network
    if costs.spent(costs.layers) > budget * costs.total:
        return
    asked = []
    binary, rounds = select(
        costs,
        budget=budget,
        strategy="grow" if grow else "shrink",
        metric="accuracy",
        random_seed=0,
        measure=measure_in(table, asked),
    )
    expected, history = greedy(costs, table, budget, grow=grow)
    assert binary == expected
    assert [(each.layer, each.to) for each in rounds] == history
    assert [number for number, _, _ in asked] == list(range(1, len(rounds) + 1))
    for each, (_, before, layers) in zip(rounds, asked, strict=True):
        assert each.candidates == len(layers)
        assert each.outcome == table[before ^ {each.layer}]


def three(*macs, others=0):
    return Costs(
        layers={name: LayerCost(64 * each, each) for name, each in zip("abc", macs, strict=True)},
        others=64 * others,
    )


def by_real(costs, **accuracy):
    """Outcomes that add up: each real layer brings its own points."""
    return {
        frozenset(binary): Outcome(sum(accuracy[n] for n in costs.layers if n not in binary), 0.0)
        for size in range(len(costs.layers) + 1)
        for binary in itertools.combinations(costs.layers, size)
    }


def test_cost_counts_for_the_search_and_not_for_the_iterative_baseline():
    costs = three(100, 20, 20, others=10)
    table = by_real(costs, a=5.0, b=4.0, c=3.0)
    how = {"budget": 0.75, "metric": "accuracy", "random_seed": 0, "measure": measure_in(table)}
    assert select(costs, strategy="shrink", **how)[0] == {"a"}
    assert select(costs, strategy="grow", **how)[0] == {"a"}
    # The least harm comes first, and in the end more of it is done.
    binary, rounds = select(costs, strategy="iterative", **how)
    assert [each.layer for each in rounds] == ["c", "b"]
    assert binary == {"b", "c"}


def test_baselines_take_the_layers_of_their_names():
    costs = three(10, 10, 10, others=5)
    table = by_real(costs, a=1.0, b=3.0, c=2.0)
    how = {"budget": 0.5, "metric": "accuracy", "measure": measure_in(table)}
    assert select(costs, strategy="first", random_seed=0, **how)[0] == {"b", "c"}
    assert select(costs, strategy="last", random_seed=0, **how)[0] == {"a", "b"}
    assert select(costs, strategy="sensitivity", random_seed=0, **how)[0] == {"a", "c"}
    drawn = {select(costs, strategy="random", random_seed=seed, **how)[0] for seed in range(30)}
    assert drawn == {frozenset(two) for two in itertools.combinations("abc", 2)}


def test_sensitivity_scores_once_and_random_layers_never():
    costs = three(10, 10, 10, others=5)
    table = by_real(costs, a=1.0, b=3.0, c=2.0)
    for strategy, times in (("sensitivity", 1), ("random", 0), ("first", 0), ("last", 0)):
        asked = []
        select(
            costs,
            budget=0.9,
            strategy=strategy,
            metric="loss",
            random_seed=1,
            measure=measure_in(table, asked),
        )
        assert len(asked) == times


def test_chance_does_not_favour_cheap_layers():
    """A layer that seems to do better binary is the better to have binary the more it saves, and worse real the less."""
    assert per_cost(0.1, 0.2, to="binary") > per_cost(0.1, 0.01, to="binary")
    assert per_cost(-0.1, 0.2, to="real") < per_cost(-0.1, 0.01, to="real")
    assert per_cost(0.1, 0.2, to="real") < per_cost(0.1, 0.01, to="real")
    assert per_cost(-0.1, 0.2, to="binary") > per_cost(-0.1, 0.01, to="binary")


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(1e-4, 1), st.sampled_from(["real", "binary"]))
def test_more_gain_is_never_worth_less(one, other, cost, to):
    low, high = sorted((one, other))
    assert per_cost(low, cost, to=to) <= per_cost(high, cost, to=to)


def test_a_candidate_that_diverged_is_the_worst():
    good, bad = Outcome(50.0, 1.0), Outcome(50.0, math.nan)
    assert improvement(bad, good)["loss"] == -math.inf
    assert improvement(bad, bad)["loss"] == -math.inf
    costs = three(10, 10, 10)
    outcomes = {"a": bad, "b": good, "c": Outcome(50.0, math.inf)}
    _, rounds = select(
        costs,
        budget=0.7,
        strategy="shrink",
        metric="accuracy",
        random_seed=0,
        measure=lambda number, binary, layers: (good, {name: outcomes[name] for name in layers}),
    )
    assert rounds[0].layer == "b"


@pytest.mark.parametrize("method", ["cyclebnn", "xnor"])
def test_costs_are_those_of_networks_that_are_really_swapped(method):
    recipe = Recipe(
        model=ModelConfig(
            name="resnet18", num_classes=10, kwargs={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24]}
        ),
        binary=BinaryConfig(method=method, activation="prelu"),
        data=DataConfig(image_size=32),
    )
    costs = count_costs(recipe)
    assert costs.names == tuple(f"layer{stage}.0.conv{n}" for stage in (1, 2, 3, 4) for n in (1, 2))
    real = None
    for binary in ((), costs.names[:3], costs.names[::2], costs.names):
        layers = {name: "binary" if name in binary else "real" for name in costs.names}
        rules = BinaryConfig(method=method, activation="prelu", layers=layers)
        model, _ = build_model(recipe.model, rules, image_size=32)
        counts = count(model, input_size=(3, 32, 32))
        real = real or counts.ops
        assert costs.spent(binary) == 64 * counts.flops + counts.bops
        assert costs.share(binary) == pytest.approx(counts.ops / real, rel=1e-12)


def test_an_impossible_budget_is_refused_with_those_that_are_possible():
    costs = three(100, 100, 100, others=20)
    least = (300 / 64 + 20) / 320
    with pytest.raises(RecipeError, match=r"choose from 0\.0772 to 1") as caught:
        costs.limit(0.05)
    assert f"costs {least:.4f} of the real one" in caught.value.problem
    assert costs.spent(costs.names) <= costs.limit(0.0772)
    assert costs.limit(1.0) == costs.total


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 9999), st.integers(1, 10**6))
def test_the_least_budget_that_is_named_is_possible_and_the_next_smaller_one_is_not(ten_thousandths, scale):
    """Also where it is exact: 0.0772 as a binary fraction is a little less than 772 of 10000."""
    saving, others = (10000 - ten_thousandths) * scale, ten_thousandths * scale - 1
    costs = Costs(layers={"a": LayerCost(real=saving + 1, binary=1)}, others=others)
    with pytest.raises(RecipeError) as refused:
        costs.limit(ten_thousandths / 10**4 - 1e-4)
    named = float(refused.value.cure.split()[2])
    assert named == ten_thousandths / 10**4
    assert costs.limit(named) == costs.spent(["a"])
    assert costs.limit(1.0) == costs.total


def test_layers_that_would_save_nothing_are_refused():
    """XNOR-Net's magnitudes of a depthwise convolution's inputs cost more than its products."""
    recipe = Recipe(
        model=ModelConfig(name="mobilenetv2_035", num_classes=10),
        binary=BinaryConfig(method="xnor", keep_depthwise=False, activation="prelu"),
        data=DataConfig(image_size=32),
    )
    with pytest.raises(RecipeError, match=r"blocks\.0\.0\.conv_dw, .* and \d+ more") as refused:
        count_costs(recipe)
    assert refused.value.key == "binary.exclude"
    kept = replace(recipe, binary=replace(recipe.binary, keep_depthwise=True))
    assert min(layer.saving for layer in count_costs(kept).layers.values()) > 0
