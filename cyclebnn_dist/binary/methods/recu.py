"""ReCU: standardized weights whose far tails, the dead weights, get no gradient."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from cyclebnn_dist.binary.binarizer import Binarizer, method
from cyclebnn_dist.binary.functions import ScaledOutput, StandardizedSign
from cyclebnn_dist.binary.layouts import as_rows, at_least_fp32, per_filter
from cyclebnn_dist.binary.methods.centred import CentredSign, filter_statistics
from cyclebnn_dist.binary.statistics import EPSILON, row_statistics


@method("recu")
class ReCU(Binarizer):
    """ReCU: rectified clamp, then signs, times a learned scale per filter.

    - weights, per filter: w1 = 2 sqrt(2) (w - mean(w)) / sqrt(var(w) + 1e-5); w2 = clamp(w1, -Q, Q) with the tau-quantile
      of a Laplace distribution, Q = -mean|w1| ln(2 - 2 tau), one number a layer that counts as a constant;
      w_b = sign(w2), identity straight-through: clamped weights get no gradient of their own.
    - tau rises from 0.85 to 0.99 over the run, as A e^progress + B.
    - inputs: sign(a / sqrt(var(a) + 1e-5)), variance per sample, Bi-Real's polynomial gradient. Evaluation does the same;
      the authors' leaves the division out there, which changes no sign.
    - output: times a learned scale per filter, kept as alpha / sqrt(fan in) and started at mean|w|.

    Source: Xu et al., ReCU: Reviving the Dead Weights in Binary Neural Networks (ICCV 2021), and the
    authors' released layer (one Q a layer is its choice; it starts alpha at random).
    """

    TAU: ClassVar[tuple[float, float]] = (0.85, 0.99)
    WEIGHT_GAIN: ClassVar[float] = 2.0 * math.sqrt(2.0)

    def __init__(self, weight: Tensor, *, channel_dim: int, groups: int = 1) -> None:
        super().__init__(weight, channel_dim=channel_dim, groups=groups)
        self.gain = weight[0].numel() ** -0.5
        magnitude = weight.detach().flatten(1).abs().mean(1) / self.gain
        self.alpha = nn.Parameter(torch.where(magnitude > 0.0, magnitude, torch.ones_like(magnitude)))

    @classmethod
    def phase_at(cls, progress: float) -> tuple[float, ...]:
        low, high = cls.TAU
        return (low + (high - low) * math.expm1(progress) / math.expm1(1.0),)

    def binarize_weight(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            mean, deviation = filter_statistics(weight, epsilon=EPSILON)
            magnitude = ((at_least_fp32(weight) - mean).abs() * (self.WEIGHT_GAIN / deviation)).mean()
            bound = -magnitude * torch.log(2.0 - 2.0 * self.phase)
        return CentredSign.apply(weight, mean, deviation, self.WEIGHT_GAIN, None, bound, "box")

    def binarize_input(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean, deviation, _, _ = row_statistics(x)
        mean, deviation = per_filter(mean, x), per_filter(deviation, x)
        zero, low, step = mean.new_zeros(()), mean.new_zeros(()), mean.new_ones(())
        return StandardizedSign.apply(x, zero, mean, deviation, 1.0, low, step, "polynomial", False)

    def scale_output(self, y: Tensor) -> Tensor:
        unused = (self.widths[1], self.widths[2:], self.widths[:1])
        return ScaledOutput.apply(y, self.alpha * self.gain, self.channel_dim, *unused, False)

    def input_saturation(self, x: Tensor) -> Tensor:
        _, deviation, _, _ = row_statistics(x)
        return (at_least_fp32(as_rows(x)).abs() >= deviation.unsqueeze(1)).mean(dtype=torch.float32)

    def weight_saturation(self, weight: Tensor) -> Tensor:
        mean, deviation = filter_statistics(weight, epsilon=EPSILON)
        magnitude = (at_least_fp32(weight) - mean).abs() * (self.WEIGHT_GAIN / deviation)
        bound = -magnitude.mean() * torch.log(2.0 - 2.0 * self.phase)
        return (magnitude > bound).mean(dtype=torch.float32)
