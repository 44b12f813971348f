"""The counts of a model: operations, parameters and bits, for the whole and for each layer.

Conventions, those of Bi-Real Net's and ReActNet's tables: an operation is a multiply-accumulate; a binary one counts
1/64 in OPs; normalization, activations, biases, pooling and additions are not counted, matrix products outside
layers (attention) are. A binary weight takes 1 bit, every other parameter 32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cyclebnn_dist.binary.layers import BinaryConv2d, BinaryLinear
from cyclebnn_dist.binary.parameters import parameter_kinds
from cyclebnn_dist.binary.trial import trial_forward

BINARY_OPERATIONS_PER_OPERATION = 64
REAL_BITS = 32


@dataclass(frozen=True)
class LayerCount:
    """One convolution or linear layer."""

    name: str
    binary: bool
    scheduled: bool
    """Whether its operands have the schedule's widths in training."""
    macs: int
    params: int
    """Weight and bias, and what its binarization method adds."""
    output_shape: tuple[int, ...]
    """Of one image, without the batch dimension."""


@dataclass(frozen=True)
class Counts:
    """One forward pass of one image, and the parameters."""

    bops: int
    """Multiply-accumulates of binary layers."""
    flops: int
    """Multiply-accumulates of everything else."""
    params: int
    binary_params: int
    """Weights that take 1 bit once trained."""
    scheduled_macs: int
    """Multiply-accumulates in layers whose operands have the schedule's widths in training."""
    layers: tuple[LayerCount, ...]

    @property
    def ops(self) -> float:
        """BOPs / 64 + FLOPs."""
        return self.bops / BINARY_OPERATIONS_PER_OPERATION + self.flops

    @property
    def size_bits(self) -> int:
        """1 bit a binary weight, 32 any other parameter."""
        return self.binary_params + REAL_BITS * (self.params - self.binary_params)

    @property
    def unscheduled_macs(self) -> int:
        """Multiply-accumulates that train at full cost."""
        return self.bops + self.flops - self.scheduled_macs


def count(model: nn.Module, *, input_size: tuple[int, int, int]) -> Counts:
    """Count ``model`` by running it on one image; it is afterwards as before.

    Args:
        input_size: channels, height and width of an image.
    """
    macs: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
    }
    handles = []
    for name, layer in layers.items():

        def measure(layer: nn.Module, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            macs[name] = macs.get(name, 0) + output.numel() * _macs_per_output(layer)
            shapes[name] = tuple(output.shape[1:])

        handles.append(layer.register_forward_hook(measure))
    try:
        # As plain products: the counter does not know every fused attention kernel.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            trial_forward(model, input_size=input_size)
    finally:
        for handle in handles:
            handle.remove()
    rows = tuple(
        LayerCount(
            name=name,
            binary=isinstance(layer, BinaryConv2d | BinaryLinear),
            scheduled=isinstance(layer, BinaryConv2d | BinaryLinear) and layer.binarizer.follows_schedule,
            macs=macs.get(name, 0),
            params=sum(parameter.numel() for parameter in layer.parameters()),
            output_shape=shapes.get(name, ()),
        )
        for name, layer in layers.items()
    )
    bops = sum(row.macs for row in rows if row.binary)
    kinds = parameter_kinds(model)
    numels = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Counts(
        bops=bops,
        flops=counter.get_total_flops() // 2 - bops,
        params=sum(numels.values()),
        binary_params=sum(numel for name, numel in numels.items() if kinds[name] == "binary"),
        scheduled_macs=sum(row.macs for row in rows if row.scheduled),
        layers=rows,
    )


def _macs_per_output(layer: nn.Module) -> int:
    """Multiply-accumulates of one output element (of one input element, for a transposed convolution)."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return math.prod(weight.shape[1:])
