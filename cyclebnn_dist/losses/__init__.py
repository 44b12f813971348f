"""The loss of a training step: cross-entropy, distillation, penalties."""

from cyclebnn_dist.losses.kurtosis import kurtosis, kurtosis_penalty
from cyclebnn_dist.losses.objective import Objective
from cyclebnn_dist.losses.teachers import Teachers, load_teachers

__all__ = ["Objective", "Teachers", "kurtosis", "kurtosis_penalty", "load_teachers"]
