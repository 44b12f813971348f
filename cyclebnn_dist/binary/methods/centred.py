"""The sign of centred and standardized filters, with the exact gradient through the standardization (IR-Net, ReCU)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from cyclebnn_dist.binary.functions import hard_sign
from cyclebnn_dist.binary.layouts import at_least_fp32
from cyclebnn_dist.binary.methods.ede import ede_gradient


def inner_dims(weight: Tensor) -> tuple[int, ...]:
    """All dimensions but that of the filters."""
    return tuple(range(1, weight.dim()))


def filter_statistics(
    weight: Tensor, *, epsilon: float = 0.0, unbiased: bool = True
) -> tuple[Tensor, Tensor]:
    """Mean, and root of the variance plus ``epsilon``, of each filter, both [filters, 1, ...], at least in fp32.

    The deviation of a constant filter is 1 where ``epsilon`` is 0, so that nothing is divided by 0.
    """
    weight = at_least_fp32(weight.detach())
    dims = inner_dims(weight)
    mean = weight.mean(dims, keepdim=True)
    numel = max(1, weight[0].numel() - unbiased)
    deviation = ((weight - mean).square().sum(dims, keepdim=True) / numel + epsilon).sqrt()
    if epsilon == 0.0:
        # What is left after subtracting the mean of a constant is rounding error.
        error = weight.abs().amax(dims, keepdim=True) * (4.0 * torch.finfo(weight.dtype).eps)
        deviation = torch.where(deviation > error, deviation, torch.ones_like(deviation))
    return mean, deviation


class CentredSign(torch.autograd.Function):
    """sign(u) times a scale per filter, u = gain (w - mean) / deviation.

    The gradient is that of the surrogate at u and exact from u to w, the unbiased variance in ``deviation`` included; the
    scale counts as a constant. Surrogates: ``ede`` with (t, k) in ``numbers`` [2]; ``box``, which passes where
    |u| <= ``numbers`` [1]. Only the weight itself and numbers per filter are saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        mean: Tensor,
        deviation: Tensor,
        gain: float,
        scale: Tensor | None,
        numbers: Tensor,
        surrogate: Literal["ede", "box"],
    ) -> Tensor:
        ctx.save_for_backward(weight, mean, deviation, scale, numbers.clone())
        ctx.gain, ctx.surrogate = gain, surrogate
        signs = hard_sign(weight - mean).to(weight.dtype)
        return signs if scale is None else signs.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, mean, deviation, scale, numbers = ctx.saved_tensors
        dims = inner_dims(weight)
        centred, factor = at_least_fp32(weight) - mean, ctx.gain / deviation
        if ctx.surrogate == "ede":
            grad = ede_gradient(centred * factor, numbers).mul_(grad)
        else:
            grad = ((centred * factor).abs() <= numbers) * grad
        if scale is not None:
            grad = grad * scale
        numel = max(1, weight[0].numel() - 1)
        pull = (grad * centred).sum(dims, keepdim=True) / (numel * deviation.square())
        result = (grad - grad.mean(dims, keepdim=True)).addcmul_(centred, -pull).mul_(factor)
        return result.to(weight.dtype), None, None, None, None, None, None
