"""Binarizers: how a layer's weights and inputs become signs, one class per published method.

A binarizer is a module owned by its layer. To add a method, subclass ``Binarizer`` and decorate it with ``@method``.
Further methods are in ``cyclebnn_dist.binary.methods``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from cyclebnn_dist.binary import cpu_kernels
from cyclebnn_dist.binary.functions import (
    EPSILON,
    BoxSign,
    ScaledOutput,
    ScaledSign,
    SignWithSurrogate,
    StandardizedSign,
)
from cyclebnn_dist.binary.layouts import as_rows, at_least_fp32, per_filter
from cyclebnn_dist.binary.product import Operands

OFF_BITS = 32
"""The width that means not quantized."""

NOISE_SIZE = 1 << 14
NOISE_SEED = 20241000

METHODS: dict[str, type[Binarizer]] = {}
"""Binarizers by the name a recipe calls them."""


def method(name: str) -> Callable[[type[Binarizer]], type[Binarizer]]:
    """Register a binarizer under ``name``."""

    def register(binarizer: type[Binarizer]) -> type[Binarizer]:
        assert name not in METHODS, name
        METHODS[name] = binarizer
        return binarizer

    return register


class Binarizer(nn.Module):
    """One layer's rule: real weights and inputs in, two-valued ones out, and back.

    The layer computes ``scale_output(product(binarize_input(x), binarize_weight(w))) + bias``.

    Args:
        weight: the layer's latent weight [filters, channels / groups, ...]; read to size and initialize parameters, not
            kept.
        channel_dim: dimension of the channels in inputs and outputs: 1 for convolutions, -1 for linear layers.
        groups: groups of a convolution.
    """

    follows_schedule: ClassVar[bool] = False
    """Whether operands and gradients have the schedule's widths; others compute in full precision in training."""

    widths: Tensor
    scheduled_phase: Tensor
    final_phase: Tensor

    def __init__(self, weight: Tensor, *, channel_dim: int, groups: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.num_channels = weight.shape[1] * groups
        self.quantize_forward = False
        self.quantize_backward = False
        self.scheduled_operands = self.operands_at(1.0)
        widths = torch.tensor([OFF_BITS, OFF_BITS, 1, 0], dtype=torch.int32, device=weight.device)
        self.register_buffer("widths", widths, persistent=False)
        final = torch.tensor(self.phase_at(1.0), device=weight.device)
        self.register_buffer("scheduled_phase", final.clone(), persistent=False)
        self.register_buffer("final_phase", final, persistent=False)

    @classmethod
    def phase_at(cls, progress: float) -> tuple[float, ...]:
        """The method's numbers that change over a run: a pure function of its progress, 0 at the start and 1 at the end."""
        return ()

    @classmethod
    def operands_at(cls, progress: float) -> Operands:
        """What values ``binarize_input`` and ``binarize_weight`` give at this progress of a run."""
        return "signs"

    @property
    def operands(self) -> Operands:
        """``operands_at`` this step's progress in training, at the end of the run in evaluation."""
        return self.scheduled_operands if self.training else self.operands_at(1.0)

    @property
    def phase(self) -> Tensor:
        """``phase_at`` this step's progress (see ``set_progress``) in training, at the end of the run in evaluation."""
        return self.scheduled_phase if self.training else self.final_phase

    def binarize_weight(self, weight: Tensor) -> Tensor:
        """Two values a filter, in the shape of ``weight``."""
        raise NotImplementedError

    def binarize_input(self, x: Tensor) -> Tensor:
        """Signs, in the shape of ``x``."""
        raise NotImplementedError

    def scale_output(self, y: Tensor) -> Tensor:
        """What the method does to the product before the bias is added."""
        return y

    def input_magnitude(self, x: Tensor) -> Tensor | None:
        """Magnitudes whose mean over each window multiplies the output, or None for none.

        [batch, groups, ...] for a convolution with as many groups, [..., 1] for a linear layer.
        """
        return None

    def input_saturation(self, x: Tensor) -> Tensor | None:
        """Share of the elements of ``x`` at which the gradient of the sign is 0 in training, a scalar; None: not known."""
        return None

    def weight_saturation(self, weight: Tensor) -> Tensor | None:
        """The same share of the latent weights, or None where the method passes some gradient everywhere."""
        return None

    def weight_signs(self, weight: Tensor) -> Tensor:
        """Which of its filter's two values each weight takes: True for the upper one."""
        return self.binarize_weight(weight) > 0.0


@method("bnn")
class BNN(Binarizer):
    """Plain signs: w_b = sign(w), a_b = sign(a); both gradients pass where |x| <= 1.

    Source: Courbariaux, Hubara et al., Binarized Neural Networks (2016), equations 1 and 4 (straight-through with hard
    tanh). Weights are not clipped to [-1, 1] here: outside the box their gradient is 0.
    """

    def binarize_weight(self, weight: Tensor) -> Tensor:
        return SignWithSurrogate.apply(weight, "clip")

    def binarize_input(self, x: Tensor) -> Tensor:
        return BoxSign.apply(x, 1.0)

    def input_saturation(self, x: Tensor) -> Tensor:
        return (x.abs() > 1.0).mean(dtype=torch.float32)

    def weight_saturation(self, weight: Tensor) -> Tensor:
        return (weight.abs() > 1.0).mean(dtype=torch.float32)


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


def row_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, root of the unbiased variance plus epsilon, lowest and highest value of each row of ``x`` [n, ...]; all [n]."""
    rows = at_least_fp32(as_rows(x.detach()))
    if cpu_kernels.usable(rows):
        statistics = torch.empty(4, len(x))
        arguments = cpu_kernels.arrays(
            rows, rows.view(torch.int32), EPSILON, statistics, statistics.view(torch.int32)
        )
        cpu_kernels.in_threads(cpu_kernels.row_statistics, len(x), *arguments)
        mean, deviation, low, high = statistics.unbind(0)
        return mean, deviation, low, high
    variance, mean = torch.var_mean(rows, 1, correction=min(1, rows.shape[1] - 1))
    return mean, (variance + EPSILON).sqrt(), rows.amin(1), rows.amax(1)


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
