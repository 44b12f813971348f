"""XNOR-Net: signs of weights and inputs, each scaled by the magnitudes they replace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cyclebnn_dist.binary.binarizer import Binarizer, method
from cyclebnn_dist.binary.functions import BoxSign, surrogate_gradient
from cyclebnn_dist.binary.layouts import as_rows, per_filter
from cyclebnn_dist.binary.product import Operands


class XNORWeight(torch.autograd.Function):
    """mean|w| sign(w) per filter of n weights; gradient 1/n + mean|w| where |w| <= 1, else 1/n.

    A filter of zeros alone counts as one of magnitude 1.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        scale = per_filter(as_rows(weight).abs().mean(1), weight)
        scale = torch.where(scale > 0.0, scale, torch.ones_like(scale))
        ctx.save_for_backward(weight, scale)
        return torch.copysign(scale, weight + 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        weight, scale = ctx.saved_tensors
        return (surrogate_gradient(weight, "clip") * scale + 1.0 / weight[0].numel()).mul_(grad)


@method("xnor")
class XNORNet(Binarizer):
    """XNOR-Net: (sign(a) * sign(w)) times alpha = mean|w| per filter and K, the mean of |a| over each window.

    dw_b/dw = 1/n + mean|w| where |w| <= 1, else 1/n, n weights a filter; da_b/da = 1 where |a| <= 1. K is the mean of |a|
    over channels, then over the kernel's window with zeros beyond the border; the paper gives no gradient for it, and
    it counts as a constant here.

    Source: Rastegari et al., XNOR-Net (ECCV 2016); the weight's gradient is the one printed there, element by
    element.
    """

    def __init__(self, weight: Tensor, *, channel_dim: int, groups: int = 1) -> None:
        super().__init__(weight, channel_dim=channel_dim, groups=groups)
        self.groups = groups

    @classmethod
    def operands_at(cls, progress: float) -> Operands:
        return "scaled_signs"

    def binarize_weight(self, weight: Tensor) -> Tensor:
        return XNORWeight.apply(weight)

    def binarize_input(self, x: Tensor) -> Tensor:
        return BoxSign.apply(x, 1.0)

    def input_magnitude(self, x: Tensor) -> Tensor | None:
        magnitude = x.detach().abs()
        if self.channel_dim == -1:
            return magnitude.mean(-1, keepdim=True)
        return magnitude.unflatten(1, (self.groups, -1)).mean(2)

    def input_saturation(self, x: Tensor) -> Tensor:
        return (x.abs() > 1.0).mean(dtype=torch.float32)
