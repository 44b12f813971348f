"""Models: building one from a recipe, and summing it up."""

from cyclebnn_dist.models.build import build_model
from cyclebnn_dist.models.summary import describe_recipe, summarize_recipe

__all__ = ["build_model", "describe_recipe", "summarize_recipe"]
