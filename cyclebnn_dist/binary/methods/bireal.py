"""Bi-Real Net: a gradient for sign that is a triangle, and weights scaled by their magnitude."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cyclebnn_dist.binary.binarizer import Binarizer, method
from cyclebnn_dist.binary.functions import ScaledSign, SignWithSurrogate
from cyclebnn_dist.binary.product import Operands


@method("bireal")
class BiReal(Binarizer):
    """Bi-Real Net: w_b = mean|w| sign(w) per filter, a_b = sign(a) with a piecewise-polynomial gradient.

    da_b/da = 2 + 2a on [-1, 0), 2 - 2a on [0, 1], else 0; dw_b/dw = mean|w| where |w| <= 1 (the magnitude-aware
    gradient; the mean itself counts as a constant).

    Source: Liu et al., Bi-Real Net (ECCV 2018), sections 3.3 and 3.4. The authors' released code leaves the factor
    mean|w| out of the gradient; ``bireal_released`` is that. Both keep the scale in evaluation, where batch
    normalization takes it up.
    """

    magnitude_aware: ClassVar[bool] = True

    @classmethod
    def operands_at(cls, progress: float) -> Operands:
        return "scaled_signs"

    def binarize_weight(self, weight: Tensor) -> Tensor:
        return ScaledSign.apply(weight, self.magnitude_aware)

    def binarize_input(self, x: Tensor) -> Tensor:
        return SignWithSurrogate.apply(x, "polynomial")

    def input_saturation(self, x: Tensor) -> Tensor:
        return (x.abs() >= 1.0).mean(dtype=torch.float32)

    def weight_saturation(self, weight: Tensor) -> Tensor:
        return (weight.abs() > 1.0).mean(dtype=torch.float32)


@method("bireal_released")
class BiRealReleased(BiReal):
    """Bi-Real Net as its authors released it: dw_b/dw = 1 where |w| <= 1."""

    magnitude_aware: ClassVar[bool] = False
