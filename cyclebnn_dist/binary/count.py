"""The counts of a model: operations, parameters and bits, for the whole and for each layer.

Conventions, those of Bi-Real Net's and ReActNet's tables unless another is asked for (see ``conventions``): an operation
is a multiply-accumulate; a binary one counts 1/64 in OPs; normalization, activations, biases, pooling and additions are
not counted, matrix products outside layers (attention) are, and so are XNOR-Net's magnitudes: one addition an input element
and one multiplication an output element of a layer. A binary weight takes 1 bit, a weight of an 8-bit layer 8 (and its filter
32 for a scale), every other parameter 32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cyclebnn_dist.binary.activations import Maxout
from cyclebnn_dist.binary.binarizer import Binarizer
from cyclebnn_dist.binary.conventions import CONVENTIONS
from cyclebnn_dist.binary.edges import NARROW_BITS, NarrowConv2d, NarrowLinear
from cyclebnn_dist.binary.layers import BinaryConv2d, BinaryLinear
from cyclebnn_dist.binary.parameters import parameter_kinds
from cyclebnn_dist.binary.rules import edge_names
from cyclebnn_dist.binary.trial import trial_forward

REAL_BITS = 32


@dataclass(frozen=True)
class LayerCount:
    """One convolution or linear layer."""

    name: str
    binary: bool
    bits: int
    """Of its weights, and of its inputs where they are fewer than 32: 1, 8 or 32."""
    scheduled: bool
    """Whether its operands have the schedule's widths in training."""
    macs: int
    params: int
    """Weight and bias, and what its binarization method adds."""
    output_shape: tuple[int, ...]
    """Of one image, without the batch dimension."""
    magnitudes: int = 0
    """Operations beside ``macs`` by which its method scales outputs with magnitudes of the inputs (XNOR-Net)."""


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
    edge_macs: int = 0
    """Of ``flops``, those in stem, classifier and gates, as far as these are layers."""
    elementwise: int = 0
    """Operations of normalizations, activations and additions of two tensors; not in ``flops``."""
    narrow_params: int = 0
    """Weights of 8 bits."""
    narrow_filters: int = 0
    """Filters these belong to."""
    convention: str = "bireal"
    """By which of ``CONVENTIONS`` OPs are added up."""

    @property
    def charged_flops(self) -> float:
        """What the convention charges for everything that is not binary; ``flops`` in the usual one."""
        rule = CONVENTIONS[self.convention]
        edges = self.edge_macs * rule.edge_share
        return self.flops - self.edge_macs + edges + (self.elementwise if rule.elementwise else 0)

    @property
    def ops(self) -> float:
        """BOPs / 64 + FLOPs, or what the convention says."""
        return self.bops * CONVENTIONS[self.convention].binary_share + self.charged_flops

    @property
    def size_bits(self) -> int:
        """1 bit a binary weight, 8 one of 8 bits, 32 any other parameter and the scale of a filter of 8-bit weights."""
        real = self.params - self.binary_params - self.narrow_params + self.narrow_filters
        return self.binary_params + NARROW_BITS * self.narrow_params + REAL_BITS * real

    @property
    def unscheduled_macs(self) -> int:
        """Multiply-accumulates that train at full cost."""
        return self.bops + self.flops - self.scheduled_macs


def count(model: nn.Module, *, input_size: tuple[int, int, int], convention: str = "bireal") -> Counts:
    """Count ``model`` by running it on one image; it is afterwards as before.

    Args:
        input_size: channels, height and width of an image.
        convention: name of one of ``CONVENTIONS``.
    """
    macs: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
    }
    handles = []
    magnitudes: dict[str, int] = {}
    for name, layer in layers.items():

        def measure(layer: nn.Module, inputs: Any, output: torch.Tensor, name: str = name) -> None:
            transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
            elements = inputs[0].numel() if transposed else output.numel()
            macs[name] = macs.get(name, 0) + elements * _macs_per_element(layer)
            if _scales_by_input(layer):
                magnitudes[name] = magnitudes.get(name, 0) + inputs[0].numel() + output.numel()
            shapes[name] = tuple(output.shape[1:])

        handles.append(layer.register_forward_hook(measure))
    try:
        # As plain products: the counter does not know every fused attention kernel.
        with (
            sdpa_kernel(SDPBackend.MATH),
            ElementwiseCounter(model) as elementwise,
            FlopCounterMode(display=False) as counter,
        ):
            trial_forward(model, input_size=input_size)
    finally:
        for handle in handles:
            handle.remove()
    by_module = counter.get_flop_counts()

    def beside_product(name: str) -> int:
        """What a layer that scales by its input does beside its product: means over windows are convolutions, too."""
        if name not in magnitudes:
            return 0
        inside = sum(by_module[f"{type(model).__name__}.{name}"].values()) // 2
        return inside - macs[name] + magnitudes[name]

    rows = tuple(
        LayerCount(
            name=name,
            binary=isinstance(layer, BinaryConv2d | BinaryLinear),
            bits=_bits(layer),
            scheduled=isinstance(layer, BinaryConv2d | BinaryLinear) and layer.binarizer.follows_schedule,
            macs=macs.get(name, 0),
            params=sum(parameter.numel() for parameter in layer.parameters()),
            output_shape=shapes.get(name, ()),
            magnitudes=beside_product(name),
        )
        for name, layer in layers.items()
    )
    bops = sum(row.macs for row in rows if row.binary)
    edges = edge_names(model)
    narrow = [layer.weight for layer in layers.values() if isinstance(layer, NarrowConv2d | NarrowLinear)]
    kinds = parameter_kinds(model)
    numels = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return Counts(
        bops=bops,
        flops=counter.get_total_flops() // 2 - bops + sum(magnitudes.values()),
        params=sum(numels.values()),
        binary_params=sum(numel for name, numel in numels.items() if kinds[name] == "binary"),
        scheduled_macs=sum(row.macs for row in rows if row.scheduled),
        layers=rows,
        edge_macs=sum(row.macs for row in rows if not row.binary and row.name in edges),
        elementwise=elementwise.operations,
        narrow_params=sum(weight.numel() for weight in narrow),
        narrow_filters=sum(len(weight) for weight in narrow),
        convention=convention,
    )


class ElementwiseCounter(TorchDispatchMode):
    """Operations of normalizations (2 an element), activation modules (1) and additions of two tensors of one shape (1)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.operations = 0
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> ElementwiseCounter:
        for module in self._model.modules():
            cost = _elementwise_cost(module)
            if cost:

                def add(module: nn.Module, inputs: Any, output: torch.Tensor, cost: int = cost) -> None:
                    self.operations += cost * output.numel()

                self._handles.append(module.register_forward_hook(add))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            one, other = args[:2]
            # A broadcast operand is a bias or a threshold.
            if isinstance(other, torch.Tensor) and one.shape == other.shape and one.is_floating_point():
                self.operations += one.numel()
        return result


def _elementwise_cost(module: nn.Module) -> int:
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
        return 2
    homes = {
        "torch.nn.modules.activation",
        "timm.layers.activations",
        "timm.layers.activations_me",
        Maxout.__module__,
    }
    return int(type(module).__module__ in homes and not isinstance(module, nn.MultiheadAttention))


def _bits(layer: nn.Module) -> int:
    if isinstance(layer, BinaryConv2d | BinaryLinear):
        return 1
    return NARROW_BITS if isinstance(layer, NarrowConv2d | NarrowLinear) else REAL_BITS


def _scales_by_input(layer: nn.Module) -> bool:
    """Whether outputs are multiplied by magnitudes of the inputs (XNOR-Net), which no normalization takes up."""
    binarizer = getattr(layer, "binarizer", None)
    return binarizer is not None and type(binarizer).input_magnitude is not Binarizer.input_magnitude


def _macs_per_element(layer: nn.Module) -> int:
    """Multiply-accumulates of one output element (of one input element, for a transposed convolution)."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return math.prod(weight.shape[1:])
