"""Layouts: tensors as rows, by filters, along channels, in the order of memory."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """``x`` itself where it is in the plain or the channels-last layout without gaps, else a plain copy."""
    return x if is_channels_last(x) else x.contiguous()


def in_memory_order(x: Tensor) -> Tensor:
    """``x`` as one row, its elements in the order of memory (where that is the plain or the channels-last one)."""
    return (x.permute(0, 2, 3, 1) if is_channels_last(x) else x).reshape(-1)


def as_rows(x: Tensor) -> Tensor:
    """``x`` [n, ...] as a matrix of n rows, whose elements are in the order of memory."""
    return (x.permute(0, 2, 3, 1) if is_channels_last(x) else x).flatten(1)


def per_filter(values: Tensor, like: Tensor) -> Tensor:
    """``values`` of shape [n] as [n, 1, ...], to be broadcast against ``like`` of shape [n, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))


def along_channels(values: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """``values`` [channels] in the dtype of ``x``, to be broadcast against it with its channels at ``channel_dim`` (1 or -1)."""
    values = values.to(x.dtype)
    return values.view(-1, *[1] * (x.dim() - 2)) if channel_dim == 1 else values


def all_but(channel_dim: int, x: Tensor) -> list[int]:
    """Every dimension of ``x`` but that of its channels."""
    return [dim for dim in range(x.dim()) if dim != channel_dim % x.dim()]


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` itself, or in fp32 if its dtype is a narrower one."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
