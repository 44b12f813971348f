"""Bits: tensors of two values, eight elements to a byte while they wait for the backward pass.

Packing and unpacking are operators of their own (``cyclebnn::...``), so that a compiled graph keeps the bytes and not what
they are made of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cyclebnn_dist.binary import cpu_kernels
from cyclebnn_dist.binary.layouts import dense, in_memory_order, is_channels_last

_GATHER = 0x0102040810204080
"""Eight bytes of 0 or 1 times this have the eight bits side by side in their highest byte, the first one lowest."""


class Form(NamedTuple):
    """What unpacking needs beside the bits."""

    shape: Sequence[int]
    channels_last: bool


def form_of(x: Tensor) -> Form:
    """The form that packing gives ``x``."""
    return Form(x.shape, is_channels_last(x))


@torch.library.custom_op("cyclebnn::pack_bits", mutates_args=())
def pack_bits(chosen: Tensor) -> Tensor:
    """Bits of a bool tensor of any shape: uint8 [ceil(numel / 8)], in the order of memory, the first element lowest.

    What is in neither the plain nor the channels-last layout is packed as if in the plain one.
    """
    flat = in_memory_order(chosen)
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    words = flat.view(torch.int64) * _GATHER
    # The shift carries the sign along; only the lowest byte of it stays.
    return words.bitwise_right_shift_(56).to(torch.uint8)


@torch.library.custom_op("cyclebnn::pack_within", mutates_args=())
def pack_within(x: Tensor, low: float, high: float) -> Tensor:
    """``pack_bits`` of low <= x <= high."""
    x = dense(x)
    if not cpu_kernels.usable(x):
        return pack_bits(x.ge(low).logical_and_(x.le(high)))
    bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
    arguments = cpu_kernels.arrays(in_memory_order(x), np.float32(low), np.float32(high), bits)
    cpu_kernels.pack_within(0, bits.numel(), *arguments)
    return bits


@torch.library.custom_op("cyclebnn::unpack_bits", mutates_args=())
def unpack_bits(
    bits: Tensor, shape: Sequence[int], channels_last: bool, low: float, high: float, dtype: torch.dtype
) -> Tensor:
    """``high`` where a bit is set, else ``low``, in the shape and memory layout of the packed tensor."""
    numel = math.prod(shape)
    if dtype == torch.float32 and cpu_kernels.usable(bits, dtype=torch.uint8):
        flat = torch.empty(numel)
        arguments = cpu_kernels.arrays(bits, np.float32(low), np.float32(high), flat)
        cpu_kernels.unpack(0, bits.numel(), *arguments)
    else:
        # Copying rows of eight values is faster than any arithmetic on single bits.
        table = _byte_values(low, high, dtype, bits.device)
        flat = table.index_select(0, bits.int()).view(-1)[:numel]
    if channels_last:
        batch, channels, height, width = shape
        return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(shape)


@torch.library.custom_op("cyclebnn::mask_by_bits", mutates_args=())
def mask_by_bits(x: Tensor, bits: Tensor, channels_last: bool) -> Tensor:
    """``x`` times 1 where a bit is set, else times 0, in the memory layout of the packed tensor."""
    x = x.contiguous(memory_format=_format(channels_last))
    if not cpu_kernels.usable(x):
        return unpack_bits(bits, x.shape, channels_last, 0.0, 1.0, x.dtype).mul_(x)
    result = torch.empty_like(x)
    arguments = cpu_kernels.arrays(bits, in_memory_order(x), in_memory_order(result))
    cpu_kernels.mask(0, bits.numel(), *arguments)
    return result


@pack_bits.register_fake
def _(chosen: Tensor) -> Tensor:
    return chosen.new_empty(((chosen.numel() + 7) // 8,), dtype=torch.uint8)


@pack_within.register_fake
def _(x: Tensor, low: float, high: float) -> Tensor:
    return x.new_empty(((x.numel() + 7) // 8,), dtype=torch.uint8)


@unpack_bits.register_fake
def _(
    bits: Tensor, shape: Sequence[int], channels_last: bool, low: float, high: float, dtype: torch.dtype
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=bits.device, memory_format=_format(channels_last))


@mask_by_bits.register_fake
def _(x: Tensor, bits: Tensor, channels_last: bool) -> Tensor:
    return torch.empty_like(x, memory_format=_format(channels_last))


def pack_signs(x: Tensor) -> Tensor:
    """Bits of x >= 0."""
    return pack_within(x, 0.0, math.inf)


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


@lru_cache(maxsize=64)
def _byte_values(low: float, high: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: the eight values each byte stands for."""
    chosen = torch.arange(256).unsqueeze(1).bitwise_right_shift(torch.arange(8)).bitwise_and(1).bool()
    return torch.where(chosen, high, low).to(device=device, dtype=dtype)
