"""The kurtosis penalty: it drives the distribution of latent binary weights towards two well separated humps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cyclebnn_dist.binary import binary_modules


class Kurtosis(torch.autograd.Function):
    """m4 / m2^2 of all elements, of their moments about the mean; a constant tensor has kurtosis 0.

    Saves the tensor and three numbers: the gradient is 4 / (n m2^2) (c^3 - m3 - m4 / m2 c), c = w - mean.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        mean = weight.mean()
        square = (weight - mean).square_()
        variance, fourth = square.mean(), square.square().mean()
        variance = torch.where(variance > 0.0, variance, torch.ones_like(variance))
        ctx.save_for_backward(weight, mean, variance, fourth)
        return fourth / variance.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        weight, mean, variance, fourth = ctx.saved_tensors
        centred = weight - mean
        cube = centred * centred * centred
        result = (cube - cube.mean()).sub_(centred * (fourth / variance))
        return result.mul_(grad * 4.0 / (weight.numel() * variance.square()))


def kurtosis(weight: Tensor) -> Tensor:
    """Fourth moment over the squared second one, about the mean, of all elements; 3 for a normal, 1.8 for a uniform distribution."""
    return Kurtosis.apply(weight)


def kurtosis_penalty(model: nn.Module, *, weight: float, target: float) -> Tensor:
    """``weight`` times the mean over binary layers of (kurtosis of the latent weights - ``target``)^2; 0 where weight is 0.

    A function of the weights alone, so equal on all ranks.

    Source: Rozen et al., Bimodal Distributed Binarized Neural Networks (2204.02004), its term for weight kurtosis, with
    the population moments of the definition (the authors' code takes the unbiased deviation, which makes a layer of n
    weights differ by the factor (1 - 1/n)^2).
    """
    latent = [module.weight for _, module in binary_modules(model)] if weight else []
    if not latent:
        return torch.zeros((), device=next(model.parameters()).device)
    return weight * torch.stack([(kurtosis(each.float()) - target).square() for each in latent]).mean()
