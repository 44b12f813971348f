"""The signs of binary weights: taken at one width whatever the schedule says, kept at a bit each, compared."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cyclebnn_dist.binary.bits import pack_bits
from cyclebnn_dist.binary.layers import BinaryConv2d, BinaryLinear
from cyclebnn_dist.binary.trial import evaluating


@torch.no_grad()
def binary_signs(module: BinaryConv2d | BinaryLinear) -> Tensor:
    """Which of its filter's two values each weight takes in evaluation with quantization off; bool, True for the upper.

    Quantizing before the sign moves the threshold with the width, and with the range of the filter. Without it the
    threshold is the method's own, so that signs of two steps differ only by what training did to the latent weights.
    """
    binarizer = module.binarizer
    quantized = binarizer.quantize_forward
    binarizer.quantize_forward = False
    try:
        with evaluating(binarizer):
            return binarizer.weight_signs(module.weight)
    finally:
        binarizer.quantize_forward = quantized


def packed_signs(layers: Mapping[str, BinaryConv2d | BinaryLinear]) -> dict[str, Tensor]:
    """``binary_signs`` of every layer by name, packed."""
    return {name: pack_bits(binary_signs(module)) for name, module in layers.items()}


def count_differences(packed: Tensor, other: Tensor) -> Tensor:
    """Number of elements at which two packed tensors of one length differ, an integer scalar."""
    places = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8, device=packed.device)
    return (packed ^ other).unsqueeze(1).bitwise_and(places).count_nonzero()
