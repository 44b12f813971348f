"""Losses beside the cross-entropy."""

from cyclebnn_dist.losses.kurtosis import kurtosis, kurtosis_penalty

__all__ = ["kurtosis", "kurtosis_penalty"]
