"""The loss of a training step: cross-entropy, distillation, penalties."""

from cyclebnn_dist.losses.kurtosis import kurtosis, kurtosis_penalty
from cyclebnn_dist.losses.objective import Objective, build_objective
from cyclebnn_dist.losses.teachers import Teachers

__all__ = ["Objective", "Teachers", "build_objective", "kurtosis", "kurtosis_penalty"]
