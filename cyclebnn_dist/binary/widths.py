"""Widths of a model: the bits its binary layers use at this step, and how far the run is, held as tensors on the layers."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from cyclebnn_dist.binary.binarizer import OFF_BITS, Binarizer
from cyclebnn_dist.config.recipe import PrecisionConfig, WidthConfig


def binarizers(model: nn.Module) -> Iterator[tuple[str, Binarizer]]:
    """Every binarizer with its qualified name, in the model's own order."""
    for name, module in model.named_modules():
        if isinstance(module, Binarizer):
            yield name, module


def scheduled_precision(precision: PrecisionConfig, model: nn.Module) -> PrecisionConfig:
    """The recipe's widths with forward and backward off (32) where no layer of the model follows a schedule."""
    if any(binarizer.follows_schedule for _, binarizer in binarizers(model)):
        return precision
    off = WidthConfig(schedule="constant", low=OFF_BITS, high=OFF_BITS)
    return replace(precision, forward=off, backward=off)


def set_widths(
    model: nn.Module, *, forward_bits: int, backward_bits: int, step: int = 0, seed: int = 0
) -> None:
    """Give all binary layers the widths of this step, and the noise of their stochastic rounding.

    Called once a step, before the forward pass. The widths go into tensors, so a compiled model is not compiled again
    when they change; only turning a width off and on (32) is another graph. The noise of a layer is a pure function
    of (seed, step, position of the layer in the model, place in the tensor).

    Args:
        forward_bits: 2 to 16 for weights and activations before their sign is taken, or 32 for not quantized.
        backward_bits: 2 to 16 for the output gradient of binary layers, or 32 for not quantized.
        step: global step.
        seed: seed of the noise; ranks that shall round independently pass different ones.
    """
    for bits in (forward_bits, backward_bits):
        assert bits == OFF_BITS or 2 <= bits <= 16, bits
    by_device: dict[torch.device, list[tuple[torch.Tensor, list[int]]]] = {}
    for index, (_, binarizer) in enumerate(binarizers(model)):
        binarizer.quantize_forward = forward_bits < OFF_BITS
        binarizer.quantize_backward = backward_bits < OFF_BITS
        row = [forward_bits, backward_bits, *_noise_key(seed, step, index)]
        by_device.setdefault(binarizer.widths.device, []).append((binarizer.widths, row))
    for device, rows in by_device.items():
        values = torch.tensor([row for _, row in rows], dtype=torch.int32).to(device, non_blocking=True)
        torch._foreach_copy_([buffer for buffer, _ in rows], list(values.unbind(0)))


def set_progress(model: nn.Module, progress: float, *, real_weights: bool = False) -> None:
    """Tell all binary layers how far the run is, for methods whose gradient or weights change over it.

    Called once a step, before the forward pass; until then layers are as at the end of a run, and in evaluation they
    always are. The numbers go into tensors, so a compiled model is not compiled again (but once where a method's weights
    harden into signs, and once where they cease to be real).

    Args:
        progress: 0 at the first step, 1 at the end of the run.
        real_weights: whether layers multiply with their latent weights as they are, in training and in evaluation.
    """
    assert 0.0 <= progress <= 1.0, progress
    by_device: dict[torch.device, list[tuple[torch.Tensor, tuple[float, ...]]]] = {}
    for _, binarizer in binarizers(model):
        binarizer.scheduled_operands = binarizer.operands_at(progress)
        binarizer.real_weights = real_weights
        numbers = binarizer.phase_at(progress)
        if numbers:
            buffer = binarizer.scheduled_phase
            by_device.setdefault(buffer.device, []).append((buffer, numbers))
    for device, rows in by_device.items():
        flat = [number for _, numbers in rows for number in numbers]
        values = torch.tensor(flat, dtype=torch.float64).to(device, non_blocking=True)
        torch._foreach_copy_(
            [buffer for buffer, _ in rows], list(values.split([len(numbers) for _, numbers in rows]))
        )


@contextmanager
def using_real_weights(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Within, all binary layers multiply with their latent weights as they are, or with none such; afterwards as before."""
    found = [binarizer for _, binarizer in binarizers(model)]
    before = [binarizer.real_weights for binarizer in found]
    for binarizer in found:
        binarizer.real_weights = wanted
    try:
        yield
    finally:
        for binarizer, was in zip(found, before, strict=True):
            binarizer.real_weights = was


def _noise_key(seed: int, step: int, index: int) -> tuple[int, int]:
    """Two 32-bit integers, the first odd."""
    first, second = struct.unpack(
        "<ii", hashlib.blake2b(struct.pack("<3q", seed, step, index), digest_size=8).digest()
    )
    return first | 1, second
