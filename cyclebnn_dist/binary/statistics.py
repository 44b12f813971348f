"""Statistics of the rows of a tensor: what standardizing (ReCU, CycleBNN) needs."""

from __future__ import annotations

import torch
from torch import Tensor

from cyclebnn_dist.binary import cpu_kernels
from cyclebnn_dist.binary.layouts import as_rows, at_least_fp32

EPSILON = 1e-5
"""Added to variances before their root is taken (ReCU, CycleBNN)."""


def row_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, root of the unbiased variance plus epsilon, lowest and highest value of each row of ``x`` [n, ...]; all [n]."""
    rows = at_least_fp32(as_rows(x.detach()))
    if cpu_kernels.usable(rows):
        statistics = torch.empty(4, len(x))
        arguments = cpu_kernels.arrays(
            rows, rows.view(torch.int32), EPSILON, statistics, statistics.view(torch.int32)
        )
        cpu_kernels.row_statistics(0, len(x), *arguments)
        mean, deviation, low, high = statistics.unbind(0)
        return mean, deviation, low, high
    variance, mean = torch.var_mean(rows, 1, correction=min(1, rows.shape[1] - 1))
    return mean, (variance + EPSILON).sqrt(), rows.amin(1), rows.amax(1)
