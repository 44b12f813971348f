"""The costs of a network by which of its layers are binary, in exact numbers, and what fits into a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from cyclebnn_dist.binary import CONVENTIONS, count
from cyclebnn_dist.config import Recipe, RecipeError
from cyclebnn_dist.models import build_model

PER_MAC = round(1 / CONVENTIONS["bireal"].binary_share)
"""Binary multiply-accumulates that cost as much as a real one: 64."""


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs, in binary multiply-accumulates: whole numbers, so that nothing is rounded."""

    real: int
    binary: int

    @property
    def saving(self) -> int:
        """What its becoming binary saves."""
        return self.real - self.binary


@dataclass(frozen=True)
class Costs:
    """Of a whole network. Sets of layers are sets of those that are binary."""

    layers: Mapping[str, LayerCost]
    """Of the candidates, in the model's order."""
    others: int
    """Of all that is real whatever is chosen: stem, classifier, and what the rules of the recipe keep."""

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates, in the model's order."""
        return tuple(self.layers)

    @property
    def total(self) -> int:
        """Of the network with all layers real."""
        return self.others + sum(layer.real for layer in self.layers.values())

    def spent(self, binary: Iterable[str]) -> int:
        """Of the network with these layers binary."""
        return self.total - sum(self.layers[name].saving for name in set(binary))

    def share(self, binary: Iterable[str]) -> float:
        """Of the real network's cost: (sum of MAC / 64 over binary layers + sum of MAC over the rest) / sum of MAC."""
        return self.spent(binary) / self.total

    def limit(self, budget: float) -> int:
        """The most that may be spent within ``budget``, a share of the real network's cost, as the decimal it prints as.

        Raises:
            RecipeError: not even the network with all layers binary costs so little; the message says what it does cost.
        """
        least = self.spent(self.layers)
        limit = math.floor(Fraction(str(budget)) * self.total)
        if limit < least:
            possible = math.ceil(Fraction(least, self.total) * 10**4) / 10**4
            raise RecipeError(
                "search.budget",
                f"{budget:g} is not possible: with every layer binary that may be, this network costs "
                f"{least / self.total:.4f} of the real one",
                f"choose from {possible:g} to 1; what stays real whatever is chosen, stem and classifier among it, costs "
                f"{self.others / self.total:.4f}",
            )
        return limit


def fill(costs: Costs, limit: int, order: Sequence[str]) -> frozenset[str]:
    """All layers binary but those that can be real within ``limit``, tried in this order."""
    binary = set(costs.layers)
    for name in order:
        if costs.spent(binary - {name}) <= limit:
            binary.remove(name)
    return frozenset(binary)


def count_costs(recipe: Recipe) -> Costs:
    """Costs of the recipe's model, counted by ``binary.count``: normalizations, activations and additions cost nothing.

    Candidates are the layers that the recipe's rules would make binary.

    Raises:
        RecipeError: as ``build_model``, or a layer would save nothing by becoming binary.
    """
    side = recipe.data.image_size
    start = replace(recipe.model, pretrained=False, weights="")
    model, swap = build_model(start, recipe.binary, image_size=side)
    counts = count(model, input_size=(3, side, side))
    candidates = {row.name for row in swap.rows if row.swapped}
    layers = {
        row.name: LayerCost(real=PER_MAC * row.macs, binary=row.macs + PER_MAC * row.magnitudes)
        for row in counts.layers
        if row.name in candidates
    }
    useless = [name for name, layer in layers.items() if layer.saving <= 0]
    if useless:
        more = f" and {len(useless) - 4} more" if len(useless) > 4 else ""
        raise RecipeError(
            "binary.exclude",
            f"method {recipe.binary.method} makes these layers no cheaper: {', '.join(useless[:4])}{more} "
            "(magnitudes of inputs count, too)",
            "exclude them, keep depthwise convolutions real, or choose another method",
        )
    spent = counts.bops + PER_MAC * counts.flops
    return Costs(layers=layers, others=spent - sum(layer.binary for layer in layers.values()))
