"""Models: building one from a recipe, and summing it up."""

from cyclebnn_dist.models.build import build_model
from cyclebnn_dist.models.summary import describe_recipe, summarize_recipe
from cyclebnn_dist.models.teacher import Teacher, load_teachers

__all__ = ["Teacher", "build_model", "describe_recipe", "load_teachers", "summarize_recipe"]
