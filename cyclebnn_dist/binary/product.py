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

from cyclebnn_dist.binary.bits import Form, form_of, pack_bits, pack_signs, unpack_bits
from cyclebnn_dist.binary.layouts import dense, per_filter
from cyclebnn_dist.binary.rebuild import Kept, Rebuild, offer, offered, saving_instead

Operands = Literal["signs", "scaled_signs", "two_valued", "real", "two_valued_inputs"]
"""signs: inputs and weights of +1 and -1. scaled_signs: the weights times a scale per filter. two_valued: any two values, of
the whole input and of each filter. real: inputs of +1 and -1, weights of any values. two_valued_inputs: any two values of the
whole input, weights of any values."""

Keep = Literal["nothing", "integers", "recompute"]
"""How the product can be had again: not at all; from 16-bit integers, where it is wider and integer, else from itself (so
that only what is made of it is not kept); or by computing it once more."""

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
    node: Any = None if torch.compiler.is_compiling() else product.grad_fn
    if node is None or keep == "nothing":
        return product
    # Handed over, so that it goes when those who saved the product let go of it.
    about, packed, integers = node.about, node.packed, node.integers
    node.packed = node.integers = None
    if keep == "recompute":
        packed = packed if rebuild is None else (packed[0], rebuild, *packed[2:])
        offer(product, Rebuild(lambda: _recompute(about, packed)))
    elif integers is None:
        offer(product, Rebuild(Kept(product.detach()).take))
    else:
        scale = packed[2] if operands == "scaled_signs" else None
        offer(product, Rebuild(lambda: _scaled(integers.to(about.dtype), scale, geometry)))
    return product


class About(NamedTuple):
    """A product: what must be known of it beside the values."""

    geometry: Geometry | None
    operands: Operands
    input_form: Form
    weight_form: Form
    dtype: torch.dtype


class BinaryProduct(torch.autograd.Function):
    """``binary_product`` without the offer to rebuild it."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, geometry: Geometry | None, operands: Operands, keep: Keep
    ) -> Tensor:
        inputs, weight = dense(inputs), dense(weight)
        forms = form_of(inputs), form_of(weight)
        needed = any(ctx.needs_input_grad)
        packed = _packed(inputs, weight, operands) if needed else ()
        ctx.save_for_backward(*packed)
        scale = None
        if operands == "scaled_signs":
            scale = _scale(weight)
            weight = torch.copysign(scale.new_ones(()), weight)
        product = multiply(inputs, weight, geometry)
        if operands in _INTEGER and product.is_cuda:
            # Some algorithms of cuDNN compute integers only nearly.
            product.round_()
        ctx.about = About(geometry, operands, *forms, product.dtype)
        if needed and keep != "nothing" and not torch.compiler.is_compiling():
            # Beside what autograd saves, for that can be had only once where blocks are checkpointed.
            ctx.packed, ctx.integers = packed, None
            short = operands in _INTEGER and weight[0].numel() <= LARGEST_INTEGER
            if keep == "integers" and short and product.element_size() > 2:
                ctx.integers = product.to(torch.int16)
        return _scaled(product, scale, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        geometry: Geometry | None = ctx.about.geometry
        inputs, weight = _operands(ctx.about, ctx.saved_tensors, grad.dtype)
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
    if operands in ("two_valued", "two_valued_inputs"):
        input_values = inputs.aminmax()
        input_bits = pack_bits(inputs > input_values.min)
        if operands == "two_valued_inputs":
            return input_bits, weight, *input_values
        weight_values = weight.flatten(1).aminmax(dim=1)
        weight_bits = pack_bits(weight > per_filter(weight_values.min, weight))
        return input_bits, weight_bits, *input_values, *weight_values
    input_bits = pack_signs(inputs)
    if operands == "real":
        return input_bits, weight
    weight_bits = pack_signs(weight)
    return (input_bits, weight_bits) if operands == "signs" else (input_bits, weight_bits, _scale(weight))


def _operands(
    about: About, packed: tuple[Any, ...], dtype: torch.dtype, *, scaled: bool = True
) -> tuple[Tensor, Tensor]:
    """Inputs and weight of a product as they were, in ``dtype``; signs without their scale if not ``scaled``."""
    input_bits, saved, *numbers = packed
    saved = saved.peek() if isinstance(saved, Rebuild) else saved
    if about.operands in ("two_valued", "two_valued_inputs"):
        input_low, input_high, *weight_values = numbers
        inputs = torch.where(_unpack_mask(input_bits, about.input_form), input_high, input_low)
        if about.operands == "two_valued_inputs":
            return inputs.to(dtype), saved.to(dtype)
        weight_low, weight_high = weight_values
        mask = _unpack_mask(saved, about.weight_form)
        weight = torch.where(mask, per_filter(weight_high, mask), per_filter(weight_low, mask))
        return inputs.to(dtype), weight.to(dtype)
    inputs = unpack_bits(input_bits, *about.input_form, -1.0, 1.0, dtype)
    if about.operands == "real":
        return inputs, saved.to(dtype)
    weight = unpack_bits(saved, *about.weight_form, -1.0, 1.0, dtype)
    if about.operands == "scaled_signs" and scaled:
        weight.mul_(per_filter(numbers[0], weight))
    return inputs, weight


def _unpack_mask(bits: Tensor, form: Form) -> Tensor:
    return unpack_bits(bits, *form, 0.0, 1.0, torch.bool)


def _recompute(about: About, packed: tuple[Any, ...]) -> Tensor:
    """The product, computed once more."""
    product = multiply(*_operands(about, packed, about.dtype, scaled=False), about.geometry)
    if about.operands in _INTEGER and product.is_cuda:
        product.round_()
    return _scaled(product, packed[2] if about.operands == "scaled_signs" else None, about.geometry)


def _scaled(product: Tensor, scale: Tensor | None, geometry: Geometry | None) -> Tensor:
    """The product times ``scale`` [filters], in place."""
    if scale is None:
        return product
    scale = scale.to(product.dtype)
    return product.mul_(scale if geometry is None else scale.view(-1, 1, 1))


def _scale(weight: Tensor) -> Tensor:
    """[filters]: the magnitude that all weights of a filter have."""
    return weight.flatten(1)[:, 0].abs()
