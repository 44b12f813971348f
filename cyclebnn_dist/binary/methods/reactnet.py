"""ReActNet: signs with a learned threshold per channel, and weights scaled by their magnitude."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cyclebnn_dist.binary.binarizer import Binarizer, method
from cyclebnn_dist.binary.functions import ScaledSign, hard_sign, surrogate_times
from cyclebnn_dist.binary.layouts import all_but, along_channels
from cyclebnn_dist.binary.product import Operands


class ShiftedSign(torch.autograd.Function):
    """sign(x + bias) with a bias per channel; both get Bi-Real's polynomial gradient at x + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, channel_dim: int) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.channel_dim = channel_dim
        return hard_sign(x, along_channels(bias, x, channel_dim))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, bias = ctx.saved_tensors
        shifted = x + along_channels(bias, x, ctx.channel_dim)
        shifted_grad = surrogate_times(shifted, "polynomial", grad)
        dims = all_but(ctx.channel_dim, x)
        return shifted_grad.to(x.dtype), shifted_grad.sum(dims, dtype=bias.dtype), None


@method("reactnet")
class ReActNet(Binarizer):
    """ReActNet: a_b = sign(a + b) with a learned b per channel (RSign), w_b = mean|w| sign(w) per filter.

    da_b/da = da_b/db is Bi-Real's polynomial at a + b; dw_b/dw = mean|w| where |w| <= 1. RSign's b is the negative
    threshold of the paper and starts at 0. The other half of the method, RPReLU, is ``binary.activation=rprelu``.

    Source: Liu et al., ReActNet (ECCV 2020). The authors' released code leaves the factor mean|w| out
    of the weight's gradient; ``reactnet_released`` is that.
    """

    magnitude_aware: ClassVar[bool] = True

    def __init__(self, weight: Tensor, *, channel_dim: int, groups: int = 1) -> None:
        super().__init__(weight, channel_dim=channel_dim, groups=groups)
        self.bias = nn.Parameter(torch.zeros(self.num_channels, device=weight.device))

    @classmethod
    def operands_at(cls, progress: float) -> Operands:
        return "scaled_signs"

    def binarize_weight(self, weight: Tensor) -> Tensor:
        return ScaledSign.apply(weight, self.magnitude_aware)

    def binarize_input(self, x: Tensor) -> Tensor:
        return ShiftedSign.apply(x, self.bias, self.channel_dim)

    def input_saturation(self, x: Tensor) -> Tensor:
        shifted = x + along_channels(self.bias, x, self.channel_dim)
        return (shifted.abs() >= 1.0).mean(dtype=torch.float32)

    def weight_saturation(self, weight: Tensor) -> Tensor:
        return (weight.abs() > 1.0).mean(dtype=torch.float32)


@method("reactnet_released")
class ReActNetReleased(ReActNet):
    """ReActNet as its authors released it: dw_b/dw = 1 where |w| <= 1."""

    magnitude_aware: ClassVar[bool] = False
