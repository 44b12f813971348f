"""The CycleBNN layer composed of ordinary operations, as one would write it down from the publication.

Each step of the method is an operation of its own, with a straight-through function where the method has one, and plain
autograd keeps what each of them needs. It is what ``binary.layers`` is measured against; nothing trains with it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class ComposedCycleBNNConv2d(nn.Conv2d):
    """Standardize, clamp and quantize, take the sign, convolve, scale; the output gradient quantized stochastically.

    Source: Fontana et al., CycleBNN (2410.00050) and its released layer, without ReCU's clamp (which that leaves out).
    """

    input_range: Tensor

    def __init__(self, channels: int, *, forward_bits: int, backward_bits: int) -> None:
        super().__init__(channels, channels, kernel_size=3, padding=1, bias=False)
        self.forward_bits, self.backward_bits = forward_bits, backward_bits
        self.alpha = nn.Parameter(torch.rand(self.out_channels))
        self.register_buffer("input_range", torch.zeros(2))

    def forward(self, input: Tensor) -> Tensor:
        w = self.weight
        w1 = w / (torch.sqrt(w.flatten(1).var(1) + 1e-5).view(-1, 1, 1, 1) / (2.0 * math.sqrt(2.0)))
        rows = w1.detach().flatten(1)
        low, high = rows.amin(1).view(-1, 1, 1, 1), rows.amax(1).view(-1, 1, 1, 1)
        wb = SignIdentity.apply(fake_quantize(w1, low, high, self.forward_bits))
        a1 = input / torch.sqrt(input.flatten(1).var(1) + 1e-5).view(-1, 1, 1, 1)
        low, high = a1.detach().min(), a1.detach().max()
        self.input_range.mul_(0.9).add_(torch.stack([low, high]), alpha=0.1)
        ab = SignPolynomial.apply(fake_quantize(a1, low, high, self.forward_bits))
        y = functional.conv2d(ab, wb, None, self.stride, self.padding, self.dilation, self.groups)
        return self.alpha.view(-1, 1, 1) * QuantizeGradient.apply(y, self.backward_bits)


def fake_quantize(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """``x`` rounded to 2**bits levels from ``low`` to ``high``; identity gradient within them."""
    step = (high - low) / (2**bits - 1)
    return RoundIdentity.apply((torch.clamp(x, low, high) - low) / step) * step + low


class RoundIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class SignIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.where(x >= 0.0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class SignPolynomial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0.0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (2.0 - torch.abs(2.0 * x)).clamp(min=0.0) * grad


class QuantizeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        low, high = grad.min(), grad.max()
        step = (high - low) / (2**ctx.bits - 1)
        noise = torch.rand_like(grad) - 0.5
        return torch.round((grad - low) / step + noise) * step + low, None
