"""The selection: which layer is made binary or real next, and when a search ends. Pure but for what measures candidates.

Budgeted greedy mixing, after MixBin (arXiv 2211.06739), whose authors published no code that could be found. From the
paper: the budget is a share of the real network's FLOPs, and the search is iterative. From secondary notes: its two
variants, from all binary (grow) and from all real (shrink). Reconstructed here, and by no means sure to be theirs: the
short identical training of each candidate, the score (change per change of cost, and what is done where it has the other
sign), its ties, the fine-tuning between rounds, and what becomes of the rest of the budget.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cyclebnn_dist.search.costs import Costs, fill

Strategy = Literal["grow", "shrink", "iterative", "sensitivity", "random", "first", "last"]
Metric = Literal["accuracy", "loss"]

UNMEASURED: tuple[Strategy, ...] = ("random", "first", "last")
"""Strategies that look at no candidate."""


@dataclass(frozen=True)
class Outcome:
    """What a network reached after its short training: top-1 in percent, and mean loss, on held-out images."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Round:
    """One choice."""

    number: int
    """From 1 on."""
    layer: str
    to: Literal["real", "binary"]
    outcome: Outcome
    """Of the network with this choice."""
    unchanged: Outcome
    """Of the network without it, trained as long."""
    candidates: int
    share: float
    """What the network costs with this choice."""


Measure = Callable[[int, frozenset[str], Sequence[str]], tuple[Outcome, Mapping[str, Outcome]]]
"""``measure(number, binary, layers)``: outcomes of a round's network as it is, and with each of ``layers`` changed to the
other kind: all trained alike, from the weights of that round."""


def select(
    costs: Costs,
    *,
    budget: float,
    strategy: Strategy,
    metric: Metric,
    random_seed: int,
    measure: Measure,
    chose: Callable[[Round], None] = lambda choice: None,
) -> tuple[frozenset[str], list[Round]]:
    """The layers to make binary, and the choices that led there; the network with them costs no more than ``budget``.

    Args:
        chose: told of every round when it ends.

    Raises:
        RecipeError: no choice costs so little.
    """
    limit = costs.limit(budget)
    if strategy in (*UNMEASURED, "sensitivity"):
        return fill(costs, limit, _order(costs, strategy, metric, random_seed, measure)), []
    plain = strategy == "iterative"
    rounds: list[Round] = []
    binary = frozenset(costs.names if strategy == "grow" else ())
    while costs.spent(binary) > limit:
        candidates = [name for name in costs.names if name not in binary]
        binary = _choose(costs, binary, candidates, rounds, measure, metric=metric, plain=plain)
        chose(rounds[-1])
    # The last layer of shrinking may have saved more than was wanted.
    while candidates := [
        name for name in costs.names if name in binary and _fits(costs, binary, name, limit)
    ]:
        binary = _choose(costs, binary, candidates, rounds, measure, metric=metric, plain=plain)
        chose(rounds[-1])
    return binary, rounds


def _fits(costs: Costs, binary: frozenset[str], name: str, limit: int) -> bool:
    return costs.spent(binary - {name}) <= limit


def _choose(
    costs: Costs,
    binary: frozenset[str],
    candidates: Sequence[str],
    rounds: list[Round],
    measure: Measure,
    *,
    metric: Metric,
    plain: bool,
) -> frozenset[str]:
    """The layers that are binary after one more round, which is added to ``rounds``."""
    number = len(rounds) + 1
    unchanged, outcomes = measure(number, binary, candidates)
    to: Literal["real", "binary"] = "real" if candidates[0] in binary else "binary"
    layer = _ranked(costs, candidates, unchanged, outcomes, to=to, metric=metric, plain=plain)[0]
    after = binary ^ {layer}
    rounds.append(
        Round(
            number=number,
            layer=layer,
            to=to,
            outcome=outcomes[layer],
            unchanged=unchanged,
            candidates=len(candidates),
            share=costs.share(after),
        )
    )
    return after


def _ranked(
    costs: Costs,
    candidates: Sequence[str],
    unchanged: Outcome,
    outcomes: Mapping[str, Outcome],
    *,
    to: Literal["real", "binary"],
    metric: Metric,
    plain: bool,
) -> list[str]:
    """Candidates from the best on; of equal ones that with the better other metric first, then that nearest the input."""

    def key(name: str) -> tuple[float, float, int]:
        gains = improvement(outcomes[name], unchanged)
        first, second = gains[metric], gains["loss" if metric == "accuracy" else "accuracy"]
        if not plain:
            first = per_cost(first, costs.layers[name].saving / costs.total, to=to)
        return -first, -second, costs.names.index(name)

    return sorted(candidates, key=key)


def improvement(outcome: Outcome, unchanged: Outcome) -> dict[Metric, float]:
    """How much better a network does than another: percentage points of accuracy, and how much less loss.

    A loss that is no number is the worst there is.
    """
    worse = math.inf if math.isnan(outcome.loss) else outcome.loss
    less = unchanged.loss - worse
    return {
        "accuracy": outcome.accuracy - unchanged.accuracy,
        "loss": -math.inf if math.isnan(less) else less,
    }


def per_cost(gain: float, cost: float, *, to: Literal["real", "binary"]) -> float:
    """What a change is worth: its gain per cost that a real layer adds, or its harm per cost that a binary layer saves.

    More is better. Both are ``gain / cost``. Where the sign is the other one (a layer that does better binary, or worse
    real, often by chance) dividing would favour the layers that matter least to the cost: there it is ``gain * cost``.

    Args:
        gain: positive for the better.
        cost: positive; share of the real network's.
    """
    expected = gain > 0 if to == "real" else gain < 0
    return gain / cost if expected else gain * cost


def _order(
    costs: Costs, strategy: Strategy, metric: Metric, random_seed: int, measure: Measure
) -> Sequence[str]:
    """The order in which a baseline makes layers real."""
    names = list(costs.names)
    if strategy == "random":
        random.Random(random_seed).shuffle(names)
    elif strategy == "last":
        names.reverse()
    elif strategy == "sensitivity":
        unchanged, outcomes = measure(1, frozenset(), names)
        names = _ranked(costs, names, unchanged, outcomes, to="binary", metric=metric, plain=False)[::-1]
    return names
