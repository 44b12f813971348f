"""The product of binary layers: a convolution, or a matrix product, that keeps bits of its operands for the backward pass.

Plain autograd keeps both operands as they are. Here signs become one bit each, and where both operands are signs times a
scale per filter the product itself can be had again: from its integers, or by computing it once more.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cyclebnn_dist.binary.bits import Layout, layout_of, pack_bits, pack_signs, unpack_bits
from cyclebnn_dist.binary.layouts import per_filter
from cyclebnn_dist.binary.rebuild import Rebuild, offer, offered, saving_instead

Operands = Literal["signs", "scaled_signs", "two_valued", "real"]
"""signs: inputs and weights of +1 and -1. scaled_signs: the weights times a scale per filter. two_valued: any two values, of
the whole input and of each filter. real: inputs of +1 and -1, weights of any values."""

Keep = Literal["nothing", "integers", "recompute"]
"""How the product can be had again: not at all, from 16-bit integers, or by computing it once more."""

_INTEGER = ("signs", "scaled_signs")

LARGEST_INTEGER = 32767


class Geometry(NamedTuple):
    """A convolution; ``border`` is zero padding (left, right, top, bottom) beside the symmetric ``padding``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    border: tuple[int, ...] = (0, 0, 0, 0)


def binary_product(
    inputs: Tensor, weight: Tensor, geometry: Geometry | None, *, operands: Operands, keep: Keep = "nothing"
) -> Tensor:
    """Product of binarized ``inputs`` and ``weight``, differentiable in both.

    Of signs, scaled or not, it is computed as an integer and scaled afterwards, so it does not hang on the order of
    additions.

    Args:
        inputs: [batch, channels, height, width], or [..., features] where there is no geometry.
        weight: [filters, channels / groups, height, width], or [filters, features].
        operands: what values these have.
        keep: what whoever would keep the product keeps instead (see ``rebuild``).
    """
    rebuild = offered(weight)
    with nullcontext() if rebuild is None else saving_instead(weight, rebuild):
        product: Tensor = BinaryProduct.apply(inputs, weight, geometry, operands, keep)
    node = None if torch.compiler.is_compiling() else product.grad_fn
    if node is not None:
        if rebuild is not None and hasattr(node, "packed"):
            node.packed = (node.packed[0], rebuild)
        if keep == "recompute":
            offer(product, Rebuild(lambda: _recompute(node)))
        elif getattr(node, "integers", None) is not None:
            offer(product, Rebuild(lambda: _from_integers(node)))
    return product


class BinaryProduct(torch.autograd.Function):
    """``binary_product`` without the offer to rebuild it."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, geometry: Geometry | None, operands: Operands, keep: Keep
    ) -> Tensor:
        ctx.geometry, ctx.operands = geometry, operands
        ctx.input_layout, ctx.weight_layout = layout_of(inputs), layout_of(weight)
        needed = any(ctx.needs_input_grad)
        if needed:
            packed = _packed(inputs, weight, operands)
            ctx.save_for_backward(*packed)
            if keep != "nothing" and not torch.compiler.is_compiling():
                # Rebuilding must not take what the backward pass itself is to have once.
                ctx.packed = packed
        scale = None
        if operands == "scaled_signs":
            scale = _scale(weight)
            weight = torch.copysign(scale.new_ones(()), weight)
        product = multiply(inputs, weight, geometry)
        ctx.dtype = product.dtype
        if operands in _INTEGER:
            if product.is_cuda:
                # Some algorithms of cuDNN compute integers only nearly.
                product.round_()
            narrower = product.element_size() > 2 and weight[0].numel() <= LARGEST_INTEGER
            if needed and keep == "integers" and narrower:
                ctx.integers = product.to(torch.int16)
        return product if scale is None else product.mul_(_per_output(scale, product, geometry))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        geometry: Geometry | None = ctx.geometry
        inputs, weight = _operands(ctx, ctx.saved_tensors, grad.dtype)
        need_input, need_weight = ctx.needs_input_grad[:2]
        if geometry is None:
            input_grad = grad @ weight if need_input else None
            weight_grad = grad.flatten(0, -2).t() @ inputs.flatten(0, -2) if need_weight else None
            return input_grad, weight_grad, None, None, None
        if any(geometry.border):
            inputs = functional.pad(inputs, geometry.border)
        input_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
            grad,
            inputs,
            weight,
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            False,
            (0, 0),
            geometry.groups,
            (need_input, need_weight, False),
        )
        if any(geometry.border) and input_grad is not None:
            input_grad = functional.pad(input_grad, [-width for width in geometry.border])
        return input_grad, weight_grad, None, None, None


def multiply(inputs: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
    """The plain product, differentiable by autograd."""
    if geometry is None:
        return functional.linear(inputs, weight)
    if any(geometry.border):
        inputs = functional.pad(inputs, geometry.border)
    return functional.conv2d(
        inputs,
        weight,
        None,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )


def _packed(inputs: Tensor, weight: Tensor, operands: Operands) -> tuple[Tensor, ...]:
    """What ``_operands`` needs."""
    if operands == "two_valued":
        input_values, weight_values = inputs.aminmax(), weight.flatten(1).aminmax(dim=1)
        input_bits = pack_bits(inputs > input_values.min)
        weight_bits = pack_bits(weight > per_filter(weight_values.min, weight))
        return input_bits, weight_bits, *input_values, *weight_values
    input_bits = pack_signs(inputs)
    if operands == "real":
        return input_bits, weight
    weight_bits = pack_signs(weight)
    return (input_bits, weight_bits) if operands == "signs" else (input_bits, weight_bits, _scale(weight))


def _operands(
    ctx: Any, packed: tuple[Any, ...], dtype: torch.dtype, *, scaled: bool = True
) -> tuple[Tensor, Tensor]:
    """Inputs and weight of a product as they were, in ``dtype``; signs without their scale if not ``scaled``."""
    input_bits, saved, *numbers = packed
    saved = saved.peek() if isinstance(saved, Rebuild) else saved
    if ctx.operands == "two_valued":
        input_low, input_high, weight_low, weight_high = numbers
        inputs = torch.where(_unpack_mask(input_bits, ctx.input_layout), input_high, input_low)
        mask = _unpack_mask(saved, ctx.weight_layout)
        weight = torch.where(mask, per_filter(weight_high, mask), per_filter(weight_low, mask))
        return inputs.to(dtype), weight.to(dtype)
    inputs = unpack_bits(input_bits, *ctx.input_layout, -1.0, 1.0, dtype)
    if ctx.operands == "real":
        return inputs, saved.to(dtype)
    weight = unpack_bits(saved, *ctx.weight_layout, -1.0, 1.0, dtype)
    if ctx.operands == "scaled_signs" and scaled:
        weight.mul_(per_filter(numbers[0], weight))
    return inputs, weight


def _unpack_mask(bits: Tensor, layout: Layout) -> Tensor:
    return unpack_bits(bits, *layout, 0.0, 1.0, torch.bool)


def _from_integers(node: Any) -> Tensor:
    """The product of this node of the graph, bit for bit."""
    return _scaled(node.integers.to(node.dtype), node)


def _recompute(node: Any) -> Tensor:
    """The product of this node of the graph, computed once more."""
    product = multiply(*_operands(node, node.packed, node.dtype, scaled=False), node.geometry)
    if node.operands in _INTEGER and product.is_cuda:
        product.round_()
    return _scaled(product, node)


def _scaled(product: Tensor, node: Any) -> Tensor:
    if node.operands != "scaled_signs":
        return product
    return product.mul_(_per_output(node.packed[2], product, node.geometry))


def _scale(weight: Tensor) -> Tensor:
    """[filters]: the magnitude that all weights of a filter have."""
    return weight.flatten(1)[:, 0].abs()


def _per_output(scale: Tensor, product: Tensor, geometry: Geometry | None) -> Tensor:
    """``scale`` [filters], to be broadcast against a product."""
    scale = scale.to(product.dtype)
    return scale if geometry is None else scale.view(-1, 1, 1)
