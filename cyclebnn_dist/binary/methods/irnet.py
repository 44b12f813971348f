"""IR-Net: balanced, standardized weights with a power-of-two scale, and gradients that sharpen over the run."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cyclebnn_dist.binary.binarizer import Binarizer, method
from cyclebnn_dist.binary.layouts import at_least_fp32
from cyclebnn_dist.binary.methods.centred import CentredSign, filter_statistics, inner_dims
from cyclebnn_dist.binary.methods.ede import EDESign, ede_at, ede_saturation
from cyclebnn_dist.binary.product import Operands


@method("irnet")
class IRNet(Binarizer):
    """IR-Net: w1 = (w - mean) / std per filter, w_b = 2^s sign(w1), s = round(log2 mean|w1|); a_b = sign(a).

    Both signs have EDE's gradient k t (1 - tanh(t x)^2), t from 0.1 to 10 over the run (see ``ede_at``); it is exact
    through the standardization (unbiased deviation), and the scale counts as a constant. A constant filter, whose
    deviation is 0, is divided by 1 and scaled by 1 here; the authors' code gives NaN.

    Source: Qin et al., IR-Net (CVPR 2020). The authors' released code starts at t = 0.001;
    ``irnet_released`` is that.
    """

    LOWEST_T: ClassVar[float] = 0.1

    @classmethod
    def phase_at(cls, progress: float) -> tuple[float, ...]:
        return ede_at(progress, lowest_t=cls.LOWEST_T)

    @classmethod
    def operands_at(cls, progress: float) -> Operands:
        return "scaled_signs"

    def binarize_weight(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            mean, deviation = filter_statistics(weight)
            spread = (at_least_fp32(weight) - mean).abs().mean(inner_dims(weight), keepdim=True) / deviation
            scale = torch.exp2(torch.log2(spread).round())
            scale = torch.where(scale > 0.0, scale, torch.ones_like(scale))
        return CentredSign.apply(weight, mean, deviation, 1.0, scale, self.phase, "ede")

    def binarize_input(self, x: Tensor) -> Tensor:
        return EDESign.apply(x, self.phase)

    def input_saturation(self, x: Tensor) -> Tensor:
        return ede_saturation(x, self.phase)

    def weight_saturation(self, weight: Tensor) -> Tensor:
        mean, deviation = filter_statistics(weight)
        return ede_saturation((at_least_fp32(weight) - mean) / deviation, self.phase)


@method("irnet_released")
class IRNetReleased(IRNet):
    """IR-Net as its authors released it: t from 0.001 to 10."""

    LOWEST_T: ClassVar[float] = 0.001
