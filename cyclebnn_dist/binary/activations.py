"""Activations for binary layers, and their place in a model: what stands where nothing negative would come through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cyclebnn_dist.binary.trial import trial_forward
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
        x = x.movedim(self.channel_dim, 1)
        shape = (-1, *[1] * (x.dim() - 2))
        y = functional.prelu(x + self.shift_in.view(shape).to(x.dtype), self.slope.to(x.dtype))
        return (y + self.shift_out.view(shape).to(x.dtype)).movedim(1, self.channel_dim)


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
        dims = [dim for dim in range(x.dim()) if dim != ctx.channel_dim % x.dim()]
        product = grad * x
        above = (product * (x > 0.0)).sum(dims, dtype=positive.dtype)
        below = product.sum(dims, dtype=positive.dtype) - above
        return grad * _slopes(x, positive, negative, ctx.channel_dim), above, below, None


def _slopes(x: Tensor, positive: Tensor, negative: Tensor, channel_dim: int) -> Tensor:
    shape = (-1, *[1] * (x.dim() - 2)) if channel_dim == 1 else (-1,)
    return torch.where(x > 0.0, positive.view(shape), negative.view(shape)).to(x.dtype)


def make_activation(kind: str, *, like: nn.Module, channels: Channels | None) -> nn.Module:
    """The activation a recipe calls ``kind``, in the mode of ``like``; ``channels`` for those of ``PER_CHANNEL``."""
    match kind:
        case "hardtanh":
            module: nn.Module = nn.Hardtanh(inplace=bool(getattr(like, "inplace", False)))
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

        def remember(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            dim = 1 if inputs[0].dim() == 4 and not behind_linear else -1
            channels = Channels(inputs[0].shape[dim], dim)
            if found.setdefault(name, channels) != channels:
                raise RecipeError(
                    "binary.activation",
                    f"'{name}' is used for {found[name].number} and for {channels.number} channels",
                    "choose prelu or hardtanh, which do not learn for each channel",
                )

        handles.append(model.get_submodule(name).register_forward_pre_hook(remember))
    try:
        trial_forward(model, input_size=input_size)
    finally:
        for handle in handles:
            handle.remove()
    return found
