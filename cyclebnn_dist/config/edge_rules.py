"""The rules of narrow edges: where 8-bit stems, classifiers and gates mean something."""

from __future__ import annotations

from cyclebnn_dist.config.errors import RecipeError
from cyclebnn_dist.config.recipe import Recipe


def check_edges(recipe: Recipe) -> None:
    """Refuse narrow edges of a model that is not binary.

    Raises:
        RecipeError: naming the key and the cure.
    """
    binary = recipe.binary
    if binary.edge_bits < 32 and binary.method == "none" and not binary.methods:
        raise RecipeError(
            "binary.edge_bits",
            f"{binary.edge_bits} beside binary.method=none, which leaves the model as it is",
            "set it to 32, or choose a method",
        )
