"""CycleBNN: standardize, quantize to the width of the step, take the sign; quantize the output gradient."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from cyclebnn_dist.binary.binarizer import Binarizer, method
from cyclebnn_dist.binary.functions import ScaledOutput, StandardizedSign
from cyclebnn_dist.binary.layouts import as_rows, at_least_fp32, per_filter
from cyclebnn_dist.binary.statistics import row_statistics

NOISE_SIZE = 1 << 14
NOISE_SEED = 20241000


@method("cyclebnn")
class CycleBNN(Binarizer):
    """CycleBNN: standardize, quantize to the scheduled width b, take the sign; quantize the output gradient.

    - weights, per filter: w1 = w * 2 sqrt(2) / sqrt(var(w) + 1e-5) (ReCU's standardization without the mean);
      w_b = sign(Q_b(w1)), levels from min(w1) to max(w1) of the filter; identity straight-through.
    - inputs: a1 = a / sqrt(var(a) + 1e-5), variance per sample; a_b = sign(Q_b(a1)), levels from min to max of the
      tensor; identity straight-through at Q_b and Bi-Real's polynomial, taken at Q_b(a1), at the sign.
    - Q_b rounds to 2**b evenly spaced levels low + k * step (CPT's quantizer).
    - output: the product's gradient is quantized to the scheduled backward width with stochastic rounding, after the
      factor of a learned scale per filter. The scale is kept as alpha / sqrt(fan in), so that alpha is of order 1 and
      an optimizer's step is small beside it; alpha starts at mean|w| sqrt(fan in), the scale of the real layer.

    Evaluation does what training does, with the running mean of the levels' range (momentum 0.9, bias corrected). The
    authors' released code skips the standardization there although the range is that of standardized values;
    ``cyclebnn_released`` is that.

    Source: Fontana et al., CycleBNN (2410.00050) and its released layer; Fu et al., CPT (ICLR 2021); Xu et al., ReCU
    (ICCV 2021), without its optional clamp.
    """

    follows_schedule: ClassVar[bool] = True
    standardize_in_evaluation: ClassVar[bool] = True
    correct_range_bias: ClassVar[bool] = True

    RANGE_MOMENTUM: ClassVar[float] = 0.9
    WEIGHT_GAIN: ClassVar[float] = 2.0 * math.sqrt(2.0)

    noise: Tensor
    input_range: Tensor

    def __init__(self, weight: Tensor, *, channel_dim: int, groups: int = 1) -> None:
        super().__init__(weight, channel_dim=channel_dim, groups=groups)
        self.gain = weight[0].numel() ** -0.5
        magnitude = weight.detach().flatten(1).abs().mean(1) / self.gain
        self.alpha = nn.Parameter(torch.where(magnitude > 0.0, magnitude, torch.ones_like(magnitude)))
        # Exponential sums of low, high and 1: the running range is the first two divided by the third.
        self.register_buffer("input_range", torch.zeros(3, device=weight.device))
        generator = torch.Generator().manual_seed(NOISE_SEED)
        noise = torch.randint(-(1 << 31), 1 << 31, (NOISE_SIZE,), generator=generator).to(torch.int32)
        self.register_buffer("noise", noise.to(weight.device), persistent=False)

    def binarize_weight(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            mean, deviation, low, high = row_statistics(weight)
            offset, step = _sign_offset(low, high, self.widths[0], quantized=self.quantize_forward)
        statistics = (per_filter(value, weight) for value in (offset, mean, deviation))
        return StandardizedSign.apply(
            weight, *statistics, self.WEIGHT_GAIN, low, step, "identity", self.quantize_forward
        )

    def binarize_input(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean, deviation, low, high = row_statistics(x)
            if not self.training and not self.standardize_in_evaluation:
                deviation = torch.ones_like(deviation)
            low, high = (low / deviation).amin(), (high / deviation).amax()
            low, high = self._running_range(low, high)
            offset, step = _sign_offset(low, high, self.widths[0], quantized=self.quantize_forward)
            offset = offset * deviation
        statistics = (per_filter(value, x) for value in (offset, mean, deviation))
        return StandardizedSign.apply(x, *statistics, 1.0, low, step, "polynomial", self.quantize_forward)

    def scale_output(self, y: Tensor) -> Tensor:
        return ScaledOutput.apply(
            y,
            self.alpha * self.gain,
            self.channel_dim,
            self.widths[1],
            self.widths[2:],
            self.noise,
            self.quantize_backward,
        )

    def _running_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """In training: remember this batch's range and return it. In evaluation: the remembered one, where there is one."""
        current = torch.stack([low, high, torch.ones_like(low)]).to(self.input_range.dtype)
        if self.training:
            # A batch that is not finite leaves nothing behind.
            current = torch.where(current.isfinite().all(), current, self.input_range)
            self.input_range.lerp_(current, 1.0 - self.RANGE_MOMENTUM)
            return low, high
        weight = self.input_range[2] if self.correct_range_bias else torch.ones_like(low)
        remembered = torch.where(
            self.input_range[2] > 0.0, self.input_range / weight.clamp_min(1e-30), current
        )
        return remembered[0], remembered[1]

    def input_saturation(self, x: Tensor) -> Tensor:
        _, deviation, low, high = row_statistics(x)
        value = at_least_fp32(as_rows(x)) / deviation.unsqueeze(1)
        if self.quantize_forward:
            low, high = (low / deviation).amin(), (high / deviation).amax()
            _, step = _sign_offset(low, high, self.widths[0], quantized=True)
            value = ((value - low) / step).round_() * step + low
        return (value.abs() >= 1.0).mean(dtype=torch.float32)


@method("cyclebnn_released")
class CycleBNNReleased(CycleBNN):
    """CycleBNN evaluated as its authors' code does: inputs as they are, levels from the standardized training range."""

    standardize_in_evaluation: ClassVar[bool] = False
    correct_range_bias: ClassVar[bool] = False


def _sign_offset(low: Tensor, high: Tensor, bits: Tensor, *, quantized: bool) -> tuple[Tensor, Tensor]:
    """(offset, step): sign of a value quantized to 2**bits levels from low to high is the sign of value + offset.

    The level k = round((x - low) / step) is at or above 0 from k0 = ceil(-low / step) on, so from
    x = low + (k0 - 1/2) step on. Values outside the range are clipped to it.
    """
    if not quantized:
        return torch.zeros_like(low), torch.ones_like(low)
    levels = torch.exp2(bits.to(low.dtype)) - 1.0
    step = (high - low) / levels
    step = torch.where(step > 0.0, step, torch.ones_like(step))
    offset = -(low + (torch.ceil(-low / step) - 0.5) * step)
    infinity = torch.full_like(low, math.inf)
    return torch.where(low >= 0.0, infinity, torch.where(high < 0.0, -infinity, offset)), step
