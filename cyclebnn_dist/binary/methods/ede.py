"""EDE, IR-Net's error decay estimator: a gradient for sign that sharpens over the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cyclebnn_dist.binary.functions import hard_sign
from cyclebnn_dist.binary.layouts import at_least_fp32

HIGHEST_T = 10.0


def ede_at(progress: float, *, lowest_t: float) -> tuple[float, float]:
    """(t, k) of EDE: t = t_min (t_max / t_min)^progress, k = max(1 / t, 1), with t_max = 10.

    Source: Qin et al., IR-Net (CVPR 2020), with the epoch i of N replaced by the run's progress.
    """
    t = lowest_t * (HIGHEST_T / lowest_t) ** progress
    return t, max(1.0 / t, 1.0)


def ede_gradient(x: Tensor, phase: Tensor) -> Tensor:
    """Derivative of k tanh(t x), which stands for that of sign: k t (1 - tanh(t x)^2); ``phase`` holds t and k."""
    t, k = phase.unbind(0)
    return (x * t).tanh_().square_().mul_(-1.0).add_(1.0).mul_(k * t)


class EDESign(torch.autograd.Function):
    """sign(x) with EDE's gradient at the (t, k) in ``phase`` [2]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, phase: Tensor) -> Tensor:
        # A copy, for the buffer is overwritten at the next step.
        ctx.save_for_backward(x, phase.clone())
        return hard_sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, phase = ctx.saved_tensors
        return ede_gradient(at_least_fp32(x), phase).mul_(grad).to(x.dtype), None


NEGLIGIBLE = 1e-3
"""EDE's gradient is 0 nowhere: below this part of its value at 0 it counts as saturated."""


def ede_saturation(x: Tensor, phase: Tensor) -> Tensor:
    """Share of the elements of ``x`` at which EDE's gradient is negligible; ``phase`` holds t and k."""
    return (ede_gradient(at_least_fp32(x), phase) < NEGLIGIBLE * phase.prod()).mean(dtype=torch.float32)
