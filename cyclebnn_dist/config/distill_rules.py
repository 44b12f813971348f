"""The rules of distillation: which keys of a recipe need a teacher, and which need labels."""

from __future__ import annotations

from cyclebnn_dist.config.errors import RecipeError
from cyclebnn_dist.config.recipe import Recipe


def check_distill(recipe: Recipe) -> None:
    """Refuse keys of ``distill`` that would have no effect, and of others that distillation leaves without one.

    Raises:
        RecipeError: naming the key, the reason and the cure.
    """
    distill = recipe.distill
    if not distill.teacher:
        for key, wanted in [
            ("distill.assistants", distill.assistants),
            ("distill.weights", distill.weights),
            ("distill.label_loss", distill.label_loss),
        ]:
            if wanted:
                raise RecipeError(
                    key, "is set, but there is no teacher", "set distill.teacher, or leave it out"
                )
        return
    if "" in distill.assistants:
        raise RecipeError("distill.assistants", "holds an empty name", "name a timm model, or leave it out")
    names = list(dict.fromkeys((distill.teacher, *distill.assistants)))
    for name, path in distill.weights.items():
        if name not in names:
            raise RecipeError(
                f"distill.weights.{name}", "is of no teacher", f"the teachers are {', '.join(names)}"
            )
        if not path:
            raise RecipeError(
                f"distill.weights.{name}",
                "is empty",
                "name a file or folder, or leave it out for the published weights",
            )
    if recipe.train.label_smoothing and not distill.label_loss:
        raise RecipeError(
            "train.label_smoothing",
            f"{recipe.train.label_smoothing:g} beside a teacher and distill.label_loss=0, which uses no labels",
            "set it to 0, or distill.label_loss above 0",
        )
