"""The differentiable operations binarizers are made of: signs with surrogate gradients, and quantized gradients.

Every sign is +1 at 0. Where the gradient is a box a function keeps one bit an element for the backward pass; else its
input, and numbers per filter or sample.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cyclebnn_dist.binary import cpu_kernels
from cyclebnn_dist.binary.bits import mask_by_bits, pack_within
from cyclebnn_dist.binary.layouts import (
    all_but,
    along_channels,
    as_rows,
    at_least_fp32,
    dense,
    in_memory_order,
    is_channels_last,
    per_filter,
)

Surrogate = Literal["clip", "polynomial"]
"""clip: the gradient passes where |x| <= 1 (BNN). polynomial: it is scaled by max(0, 2 - 2|x|) (Bi-Real)."""


def hard_sign(x: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """+1 where ``x + offset`` >= 0, else -1, in the dtype of ``x``.

    Args:
        offset: a number, or a tensor [n, 1, ...] of numbers for the rows of ``x`` [n, ...], or any that broadcasts.
    """
    offsets = torch.full((1,), offset) if isinstance(offset, float) else offset
    by_rows = offsets.numel() == 1 or offsets.shape == (x.shape[0], *[1] * (x.dim() - 1))
    if by_rows and x.dim() > 1 and cpu_kernels.usable(x, offsets):
        signs = torch.empty_like(x)
        arguments = cpu_kernels.arrays(as_rows(x), offsets.flatten(), as_rows(signs))
        cpu_kernels.sign_rows(0, x.shape[0], *arguments)
        return signs
    # -0.0 + 0.0 is +0.0: an offset of positive zero gives negative zeros the sign +1.
    shifted = x + offset
    return torch.copysign(shifted.new_ones(()), shifted, out=shifted).to(x.dtype)


def surrogate_gradient(x: Tensor, surrogate: Surrogate) -> Tensor:
    """The factor a surrogate gives the gradient of sign at ``x``."""
    if surrogate == "clip":
        return x.abs().le_(1.0)
    return x.abs().mul_(-2.0).add_(2.0).clamp_min_(0.0)


def surrogate_times(x: Tensor, surrogate: Surrogate, grad: Tensor) -> Tensor:
    """``surrogate_gradient`` times ``grad``, a new tensor."""
    if x.stride() != grad.stride() or not cpu_kernels.usable(x, grad):
        return surrogate_gradient(x, surrogate).mul_(grad)
    result = torch.empty_like(x)
    x, grad, flat = in_memory_order(x), in_memory_order(grad), in_memory_order(result)
    arguments = cpu_kernels.arrays(x, grad, surrogate == "polynomial", flat)
    cpu_kernels.surrogate_times(0, x.numel(), *arguments)
    return result


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
        return surrogate_times(x, ctx.surrogate, grad), None


class BoxSign(torch.autograd.Function):
    """sign(x); the gradient passes where |x| <= ``bound``. ``SignWithSurrogate`` for inputs, which nobody else keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.channels_last = is_channels_last(x)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(pack_within(x, -bound, bound))
        return hard_sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (bits,) = ctx.saved_tensors
        return mask_by_bits(grad, bits, ctx.channels_last), None


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
        grad = surrogate_times(weight, "clip", grad)
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
        saved, mean, deviation, low, step = ctx.saved_tensors
        x, grad = dense(at_least_fp32(saved)), at_least_fp32(grad)
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        if cpu_kernels.usable(x, grad):
            result = torch.empty_like(x)
            cpu_kernels.standardized_gradient(
                0,
                x.shape[0],
                *cpu_kernels.arrays(as_rows(x), as_rows(grad), mean.flatten(), deviation.flatten()),
                *cpu_kernels.arrays(low.flatten(), step.flatten(), np.float32(ctx.gain)),
                ctx.surrogate == "polynomial",
                ctx.quantized,
                *cpu_kernels.arrays(as_rows(result)),
            )
            return result.to(saved.dtype), *[None] * 8
        factor = ctx.gain / deviation
        if ctx.surrogate == "polynomial":
            if ctx.quantized:
                value = (x * (factor / step)).sub_(low / step).round_().mul_(step).add_(low)
            else:
                value = x * factor
            grad = value.abs_().mul_(-2.0).add_(2.0).clamp_min_(0.0).mul_(grad)
        numel = x[0].numel()
        inner = torch.linalg.vecdot(as_rows(grad), as_rows(x)).view_as(mean)
        pull = inner * factor / (max(1, numel - 1) * deviation.square())
        # (grad - (x - mean) * inner / ((n - 1) deviation^2)) * factor
        result = (grad * factor).addcmul_(x, -pull).add_(mean * pull)
        return result.to(saved.dtype), *[None] * 8


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
        return y * along_channels(scale, y, channel_dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, scale, bits, key, noise = ctx.saved_tensors
        dims = all_but(ctx.channel_dim, y)
        dense = ctx.channel_dim == 1 and y.is_contiguous() and grad.is_contiguous()
        if dense and cpu_kernels.usable(grad, y, scale):
            scale_grad = _channel_products(grad, y).to(scale.dtype)
            if ctx.quantized:
                return _scale_and_quantize(grad, scale, bits, key=key, noise=noise), scale_grad, *[None] * 5
        else:
            scale_grad = (grad * y).sum(dims, dtype=scale.dtype)
        y_grad = grad * along_channels(scale, y, ctx.channel_dim)
        if ctx.quantized:
            y_grad = quantize_stochastically(y_grad, bits, key=key, noise=noise)
        return y_grad, scale_grad, *[None] * 5


def _channel_products(x: Tensor, y: Tensor) -> Tensor:
    """The sum of x times y over all but the channels of [batch, channels, ...], in fp64 [channels], on the CPU."""
    batch, channels = x.shape[:2]
    products = torch.empty(batch * channels, dtype=torch.float64)
    arguments = cpu_kernels.arrays(x.reshape(len(products), -1), y.reshape(len(products), -1), products)
    cpu_kernels.row_products(0, len(products), *arguments)
    return products.view(batch, channels).sum(0)


def _scale_and_quantize(grad: Tensor, scale: Tensor, bits: Tensor, *, key: Tensor, noise: Tensor) -> Tensor:
    """``quantize_stochastically`` of grad [batch, channels, ...] times scale [channels], on the CPU."""
    rows = grad.reshape(-1, grad.shape[2:].numel())
    row_scale = scale.repeat(grad.shape[0])
    ends = torch.stack([rows.amin(1) * row_scale, rows.amax(1) * row_scale])
    low, step = _levels(ends.amin(), ends.amax(), bits)
    result = torch.empty_like(grad)
    arguments = cpu_kernels.arrays(
        rows, scale, np.float32(low), np.float32(step), key, noise, result.view_as(rows)
    )
    cpu_kernels.quantize_scaled(0, len(rows), *arguments)
    return result


def quantize_stochastically(x: Tensor, bits: Tensor, *, key: Tensor, noise: Tensor) -> Tensor:
    """Round ``x`` at random to one of its two neighbours among 2**bits evenly spaced levels from min(x) to max(x).

    Args:
        x: any shape and floating dtype; the arithmetic is at least fp32.
        bits: integer scalar, 2 to 16.
        key: two int32 numbers, the first odd: the noise is a pure function of them and the place in the tensor.
        noise: fixed int32 numbers, uniform over 32 bits.
    """
    values = at_least_fp32(x)
    low, step = _levels(values.amin(), values.amax(), bits)
    uniform = uniform_like(values, key=key, noise=noise)
    result = (values - low).div_(step).add_(uniform).floor_().mul_(step).add_(low)
    return result.to(x.dtype)


def _levels(low: Tensor, high: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest of 2**bits levels from low to high, and their distance."""
    levels = torch.exp2(bits.float()) - 1.0
    # A hair wider than (high - low) / levels, so that no rounding error reaches a level above the last.
    step = (high - low) / levels * (1.0 + 1e-6)
    return low, torch.where(step > 0.0, step, torch.ones_like(step))


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
    if is_channels_last(x):
        batch, channels, height, width = x.shape
        return uniform.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return uniform.view(x.shape)
