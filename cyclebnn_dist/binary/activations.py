"""Activations for binary layers, and their place in a model: what stands where nothing negative would come through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cyclebnn_dist.binary.bits import mask_by_bits, pack_within
from cyclebnn_dist.binary.layouts import all_but, along_channels, is_channels_last
from cyclebnn_dist.binary.trial import first_input, trial_forward
from cyclebnn_dist.config import RecipeError

ONE_SIDED_ACTIVATIONS = frozenset(
    {
        "GELU",
        "GELUTanh",
        "HardMish",
        "HardSwish",
        "Hardswish",
        "LeakyReLU",
        "Mish",
        "QuickGELU",
        "ReLU",
        "ReLU6",
    }
    | {"SiLU", "SquaredReLU", "Swish"}
)
"""Classes, of torch and timm, whose results are (nearly) never below 0: their signs would say nothing."""

PER_CHANNEL = frozenset({"rprelu", "maxout"})
"""Activations that learn something for every channel."""


class Channels(NamedTuple):
    """The channels of a tensor: how many, and which dimension (1 or -1)."""

    number: int
    dim: int


class Hardtanh(nn.Hardtanh):
    """clamp(x, -1, 1), with gradient 1 where |x| < 1, else 0; one bit an element is kept for it."""

    def forward(self, input: Tensor) -> Tensor:
        return ClampToOne.apply(input, self.inplace)


class ClampToOne(torch.autograd.Function):
    """clamp(x, -1, 1), in place if asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        ctx.channels_last = is_channels_last(x)
        if ctx.needs_input_grad[0]:
            below_one = 1.0 - 0.5 * torch.finfo(x.dtype).eps
            ctx.save_for_backward(pack_within(x, -below_one, below_one))
        if not inplace:
            return x.clamp(-1.0, 1.0)
        ctx.mark_dirty(x)
        return x.clamp_(-1.0, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (bits,) = ctx.saved_tensors
        return mask_by_bits(grad, bits, ctx.channels_last), None


class RPReLU(nn.Module):
    """PReLU(x - gamma) + zeta, with gamma, zeta and the slope of each channel learned.

    gamma and zeta start at 0, the slope at 0.25; ``shift_in`` is -gamma, ``shift_out`` is zeta.

    Source: Liu et al., ReActNet (ECCV 2020), RPReLU.
    """

    def __init__(self, channels: Channels) -> None:
        super().__init__()
        self.channel_dim = channels.dim
        self.shift_in = nn.Parameter(torch.zeros(channels.number))
        self.slope = nn.Parameter(torch.full((channels.number,), 0.25))
        self.shift_out = nn.Parameter(torch.zeros(channels.number))

    def forward(self, x: Tensor) -> Tensor:
        return ShiftedSlope.apply(x, self.shift_in, self.slope, self.shift_out, self.channel_dim)


class ShiftedSlope(torch.autograd.Function):
    """u + shift_out where u = x + shift_in > 0, else slope u + shift_out; saves x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift_in: Tensor, slope: Tensor, shift_out: Tensor, channel_dim: int
    ) -> Tensor:
        ctx.save_for_backward(x, shift_in, slope)
        ctx.channel_dim = channel_dim
        u = x + along_channels(shift_in, x, channel_dim)
        u = torch.where(u > 0.0, u, u * along_channels(slope, x, channel_dim))
        return u.add_(along_channels(shift_out, x, channel_dim))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shift_in, slope = ctx.saved_tensors
        dims = all_but(ctx.channel_dim, x)
        u = x + along_channels(shift_in, x, ctx.channel_dim)
        above = u > 0.0
        slope_grad = (u.clamp_max_(0.0).mul_(grad)).sum(dims, dtype=slope.dtype)
        x_grad = torch.where(above, grad, grad * along_channels(slope, x, ctx.channel_dim))
        shift_in_grad = x_grad.sum(dims, dtype=slope.dtype)
        return x_grad, shift_in_grad, slope_grad, grad.sum(dims, dtype=slope.dtype), None


class Maxout(nn.Module):
    """positive relu(x) - negative relu(-x), with both slopes of each channel learned, started at 1 and 0.25.

    The gradient at 0 is that of the negative side (like PReLU's), where the authors' code gives 0.

    Source: Tu et al., AdaBin (ECCV 2022), Maxout.
    """

    def __init__(self, channels: Channels) -> None:
        super().__init__()
        self.channel_dim = channels.dim
        self.positive = nn.Parameter(torch.ones(channels.number))
        self.negative = nn.Parameter(torch.full((channels.number,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return TwoSlopes.apply(x, self.positive, self.negative, self.channel_dim)


class TwoSlopes(torch.autograd.Function):
    """x times ``positive`` where x > 0, else times ``negative``, both [channels]; saves x and the slopes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positive: Tensor, negative: Tensor, channel_dim: int) -> Tensor:
        ctx.save_for_backward(x, positive, negative)
        ctx.channel_dim = channel_dim
        return x * _slopes(x, positive, negative, channel_dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, positive, negative = ctx.saved_tensors
        dims = all_but(ctx.channel_dim, x)
        product = grad * x
        above = (product * (x > 0.0)).sum(dims, dtype=positive.dtype)
        below = product.sum(dims, dtype=positive.dtype) - above
        return grad * _slopes(x, positive, negative, ctx.channel_dim), above, below, None


def _slopes(x: Tensor, positive: Tensor, negative: Tensor, channel_dim: int) -> Tensor:
    above, below = (along_channels(slope, x, channel_dim) for slope in (positive, negative))
    return torch.where(x > 0.0, above, below)


def make_activation(kind: str, *, like: nn.Module, channels: Channels | None) -> nn.Module:
    """The activation a recipe calls ``kind``, in the mode of ``like``; ``channels`` for those of ``PER_CHANNEL``."""
    match kind:
        case "hardtanh":
            module: nn.Module = Hardtanh(inplace=bool(getattr(like, "inplace", False)))
        case "prelu":
            module = nn.PReLU()
        case "identity":
            module = nn.Identity()
        case "rprelu":
            assert channels is not None
            module = RPReLU(channels)
        case "maxout":
            assert channels is not None
            module = Maxout(channels)
        case _:
            raise AssertionError(kind)
    return module.train(like.training)


def find_channels(
    model: nn.Module, names: Sequence[str], *, input_size: tuple[int, int, int]
) -> Mapping[str, Channels]:
    """Channels of what reaches the modules called ``names``, by one trial forward; those that do not run are left out.

    Tensors of four dimensions have them at 1 behind a convolution, at the end behind a linear layer; others at the end.

    Raises:
        RecipeError: one of the modules sees different numbers of channels, so there is no one number to learn for.
    """
    found: dict[str, Channels] = {}
    behind_linear = False
    handles = []

    def pass_layer(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal behind_linear
        behind_linear = isinstance(layer, nn.Linear)

    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            handles.append(module.register_forward_hook(pass_layer))
    for name in names:

        def remember(
            module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], name: str = name
        ) -> None:
            x = first_input(inputs, named)
            dim = 1 if x.dim() == 4 and not behind_linear else -1
            channels = Channels(x.shape[dim], dim)
            if found.setdefault(name, channels) != channels:
                raise RecipeError(
                    "binary.activation",
                    f"'{name}' is used for {found[name].number} and for {channels.number} channels",
                    "choose prelu or hardtanh, which do not learn for each channel",
                )

        handles.append(model.get_submodule(name).register_forward_pre_hook(remember, with_kwargs=True))
    try:
        trial_forward(model, input_size=input_size)
    finally:
        for handle in handles:
            handle.remove()
    return found
