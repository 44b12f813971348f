"""The edges of a binary network, stem, classifier and gates: real layers whose operands may have 8 bits.

Weights are rounded to a multiple of max|w| / 127 of their filter, inputs to one of max|x| / 127 of their sample, so that a
product is one of 8-bit integers times two scales. There is nothing to learn and nothing to keep: what comes of an image
does not depend on the others of its batch, in evaluation as in training.

Source: the released code of BNext (Guo et al., TMLR 2023), whose published operations assume it. It has asymmetric ranges
(from the least to the greatest), and takes the images themselves as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cyclebnn_dist.binary.layouts import at_least_fp32
from cyclebnn_dist.config import RecipeError

NARROW_BITS = 8
HIGHEST_CODE = 2 ** (NARROW_BITS - 1) - 1


class RoundedRows(torch.autograd.Function):
    """Each row of x [n, ...] rounded to 255 levels, evenly spaced from -max|row| to max|row|; identity gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        values = at_least_fp32(x)
        step = values.abs().amax(list(range(1, x.dim())), keepdim=True) / HIGHEST_CODE
        step = torch.where(step > 0.0, step, 1.0)
        return ((values / step).round_() * step).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class NarrowConv2d(nn.Conv2d):
    """A convolution with 8-bit weights and inputs; ``weight`` is the real one they are rounded from."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(RoundedRows.apply(input), RoundedRows.apply(self.weight), self.bias)


class NarrowLinear(nn.Linear):
    """A linear layer with 8-bit weights and inputs [n, ..., features]; ``weight`` is the real one they are rounded from."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(RoundedRows.apply(input), RoundedRows.apply(self.weight), self.bias)


_NARROW: Mapping[str, type[nn.Conv2d] | type[nn.Linear]] = {
    "torch.nn.modules.conv.Conv2d": NarrowConv2d,
    "torch.nn.modules.linear.Linear": NarrowLinear,
    # It casts its parameters, and only when scripted.
    "timm.layers.linear.Linear": NarrowLinear,
}


def narrow_(layers: Mapping[str, nn.Module]) -> None:
    """Give real layers, by their qualified names, 8-bit operands, in place.

    Raises:
        RecipeError: one of them is of a kind that computes something else.
    """
    for name, layer in layers.items():
        kind = type(layer)
        narrow = _NARROW.get(f"{kind.__module__}.{kind.__name__}")
        if narrow is None:
            raise RecipeError(
                "binary.edge_bits",
                f"{NARROW_BITS} bits are not possible for '{name}', a {kind.__name__}",
                "set it to 32; plain convolutions and linear layers alone can have fewer",
            )
        layer.__class__ = narrow
