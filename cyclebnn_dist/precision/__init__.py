"""Precision: which widths a step uses, and what they cost."""

from cyclebnn_dist.precision.cost import (
    TrainingSaving,
    mean_training_cost,
    training_cost_fraction,
    training_saving,
)
from cyclebnn_dist.precision.schedule import Schedule, Widths, build_schedule

__all__ = [
    "Schedule",
    "TrainingSaving",
    "Widths",
    "build_schedule",
    "mean_training_cost",
    "training_cost_fraction",
    "training_saving",
]
