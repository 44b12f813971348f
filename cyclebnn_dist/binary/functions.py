"""The differentiable operations binarizers are made of: signs with surrogate gradients, and quantized gradients.

Every sign is +1 at 0. Each function keeps for the backward pass its input and numbers per filter or sample only, and
recomputes the rest.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Surrogate = Literal["clip", "polynomial"]
"""clip: the gradient passes where |x| <= 1 (BNN). polynomial: it is scaled by max(0, 2 - 2|x|) (Bi-Real)."""

EPSILON = 1e-5
"""Added to variances before their root is taken (ReCU, CycleBNN)."""


def hard_sign(x: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """+1 where ``x + offset`` >= 0, else -1, in the dtype of ``x``."""
    # -0.0 + 0.0 is +0.0: an offset of positive zero gives negative zeros the sign +1.
    shifted = x + offset
    return torch.copysign(shifted.new_ones(()), shifted, out=shifted).to(x.dtype)


def surrogate_gradient(x: Tensor, surrogate: Surrogate) -> Tensor:
    """The factor a surrogate gives the gradient of sign at ``x``."""
    if surrogate == "clip":
        return x.abs().le_(1.0)
    return x.abs().mul_(-2.0).add_(2.0).clamp_min_(0.0)


class SignWithSurrogate(torch.autograd.Function):
    """sign(x), with the gradient of a surrogate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        return hard_sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return surrogate_gradient(x, ctx.surrogate).mul_(grad), None


class ScaledSign(torch.autograd.Function):
    """sign(w) times mean|w| of its filter; the gradient passes where |w| <= 1, times that mean if ``magnitude_aware``.

    A filter of zeros alone counts as one of magnitude 1.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, magnitude_aware: bool) -> Tensor:
        scale = per_filter(as_rows(weight).abs().mean(1), weight)
        scale = torch.where(scale > 0.0, scale, torch.ones_like(scale))
        ctx.save_for_backward(weight, scale)
        ctx.magnitude_aware = magnitude_aware
        return torch.copysign(scale, weight + 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight, scale = ctx.saved_tensors
        grad = surrogate_gradient(weight, "clip").mul_(grad)
        return grad.mul_(scale) if ctx.magnitude_aware else grad, None


class StandardizedSign(torch.autograd.Function):
    """sign(quantize(standardize(x))) row by row, the step of CycleBNN; shared by its weights and its activations.

    Standardizing divides row i (a filter, or a sample) by s_i = sqrt(var_i + eps) / gain, with the unbiased variance and
    no mean. Quantizing rounds to the levels low + k * step. Both keep the order of values, so the sign is one
    comparison: ``x + offset`` >= 0 with an offset per row.

    The gradient is exact through the standardization, identity through the quantizer, and at the sign either identity
    or Bi-Real's polynomial at the *quantized* value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        offset: Tensor,
        mean: Tensor,
        deviation: Tensor,
        gain: float,
        low: Tensor,
        step: Tensor,
        surrogate: Literal["identity", "polynomial"],
        quantized: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, mean, deviation, low, step)
        ctx.gain, ctx.surrogate, ctx.quantized = gain, surrogate, quantized
        return hard_sign(x, offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, deviation, low, step = ctx.saved_tensors
        x, grad = at_least_fp32(x), at_least_fp32(grad)
        factor = ctx.gain / deviation
        if ctx.surrogate == "polynomial":
            if ctx.quantized:
                value = (x * (factor / step)).sub_(low / step).round_().mul_(step).add_(low)
            else:
                value = x * factor
            grad = value.abs_().mul_(-2.0).add_(2.0).clamp_min_(0.0).mul_(grad)
        numel = x[0].numel()
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        inner = torch.linalg.vecdot(as_rows(grad), as_rows(x)).view_as(mean)
        pull = inner * factor / ((numel - 1) * deviation.square())
        # (grad - (x - mean) * inner / ((n - 1) deviation^2)) * factor
        result = (grad * factor).addcmul_(x, -pull).add_(mean * pull)
        return result.to(ctx.saved_tensors[0].dtype), None, None, None, None, None, None, None, None


class ScaledOutput(torch.autograd.Function):
    """y times a scale per channel; the gradient of y is then quantized to 2**bits levels, rounding stochastically.

    Args of ``apply``: y [batch, channels, ...] or [..., channels] by ``channel_dim`` (1 or -1), scale [channels], the
    tensors ``bits``, ``key`` and ``noise`` of ``quantize_stochastically``, and whether to quantize at all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        scale: Tensor,
        channel_dim: int,
        bits: Tensor,
        key: Tensor,
        noise: Tensor,
        quantized: bool,
    ) -> Tensor:
        ctx.save_for_backward(y, scale, bits, key, noise)
        ctx.channel_dim, ctx.quantized = channel_dim, quantized
        return y * _per_channel(scale, y, channel_dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, scale, bits, key, noise = ctx.saved_tensors
        dims = [dim for dim in range(y.dim()) if dim != ctx.channel_dim % y.dim()]
        scale_grad = (grad * y).sum(dims, dtype=scale.dtype)
        y_grad = grad * _per_channel(scale, y, ctx.channel_dim)
        if ctx.quantized:
            y_grad = quantize_stochastically(y_grad, bits, key=key, noise=noise)
        return y_grad, scale_grad, None, None, None, None, None


def _per_channel(scale: Tensor, y: Tensor, channel_dim: int) -> Tensor:
    scale = scale.to(y.dtype)
    return scale.view(-1, *[1] * (y.dim() - 2)) if channel_dim == 1 else scale


def quantize_stochastically(x: Tensor, bits: Tensor, *, key: Tensor, noise: Tensor) -> Tensor:
    """Round ``x`` at random to one of its two neighbours among 2**bits evenly spaced levels from min(x) to max(x).

    Args:
        x: any shape and floating dtype; the arithmetic is at least fp32.
        bits: integer scalar, 2 to 16.
        key: two int32 numbers, the first odd: the noise is a pure function of them and the place in the tensor.
        noise: fixed int32 numbers, uniform over 32 bits.
    """
    values = at_least_fp32(x)
    low, high = values.amin(), values.amax()
    levels = torch.exp2(bits.float()) - 1.0
    # A hair wider than (high - low) / levels, so that no rounding error reaches a level above the last.
    step = (high - low) / levels * (1.0 + 1e-6)
    step = torch.where(step > 0.0, step, torch.ones_like(step))
    uniform = uniform_like(values, key=key, noise=noise)
    result = (values - low).div_(step).add_(uniform).floor_().mul_(step).add_(low)
    return result.to(x.dtype)


def uniform_like(x: Tensor, *, key: Tensor, noise: Tensor) -> Tensor:
    """fp32 numbers uniform over [0, 1), multiples of 2**-24, in the shape and memory layout of ``x``.

    Row r of the flattened result is the fixed table ``noise`` rotated by r * key[0] + key[1], modulo 2**24: over the
    keys every element is uniform, and elements are pairwise independent.
    """
    numel, width = x.numel(), noise.numel()
    num_rows = -(-numel // width)
    if num_rows == 1:
        integers = noise[:numel] + key[1]
    else:
        rotation = torch.arange(num_rows, dtype=torch.int32, device=x.device) * key[0] + key[1]
        integers = (noise + rotation.unsqueeze(1)).flatten()[:numel]
    uniform = integers.bitwise_and_((1 << 24) - 1).float().mul_(2.0**-24)
    if _is_channels_last(x):
        batch, channels, height, width = x.shape
        return uniform.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return uniform.view(x.shape)


def as_rows(x: Tensor) -> Tensor:
    """``x`` [n, ...] as a matrix of n rows, whose elements are in the order of memory."""
    return (x.permute(0, 2, 3, 1) if _is_channels_last(x) else x).flatten(1)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` itself, or in fp32 if its dtype is a narrower one."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_filter(values: Tensor, like: Tensor) -> Tensor:
    """``values`` of shape [n] as [n, 1, ...], to be broadcast against ``like`` of shape [n, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))
