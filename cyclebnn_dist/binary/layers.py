"""Binary layers: a convolution and a linear layer that take over a real one's parameters and place."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional

from cyclebnn_dist.binary.quantizers import METHODS, Binarizer
from cyclebnn_dist.timm_import import timm

Layer = TypeVar("Layer", bound=nn.Module)


class BinaryConv2d(nn.Conv2d):
    """A convolution of signs. ``weight`` [filters, channels / groups, kh, kw] is the latent real weight; make one with ``from_real``.

    Zero padding is of the signs, so a border element adds nothing.
    """

    binarizer: Binarizer

    @classmethod
    def from_real(cls, real: nn.Conv2d, *, method: str) -> BinaryConv2d:
        """The binary layer in the place of ``real``, sharing its Parameters; ``real`` must not be used afterwards."""
        layer = _take_over(cls, real)
        layer.binarizer = METHODS[method](layer.weight, channel_dim=1, groups=layer.groups).train(
            real.training
        )
        return layer

    def forward(self, input: Tensor) -> Tensor:
        product = self._conv_forward(
            self.binarizer.binarize_input(input), self.binarizer.binarize_weight(self.weight), None
        )
        output = self.binarizer.scale_output(product)
        magnitude = self.binarizer.input_magnitude(input)
        if magnitude is not None:
            output = output * self._window_means(magnitude)
        return output if self.bias is None else output + self.bias.view(-1, 1, 1)

    def _window_means(self, values: Tensor) -> Tensor:
        """Means of ``values`` [batch, groups, height, width] over the window of each output, one a filter; 0 beyond the border."""
        height, width = self.kernel_size
        window = values.new_full((self.groups, 1, height, width), 1.0 / (height * width))
        means = self._conv_forward(values, window, None)
        return means.repeat_interleave(self.out_channels // self.groups, dim=1) if self.groups > 1 else means


class BinaryConv2dSame(BinaryConv2d):
    """A convolution of signs in the place of timm's ``Conv2dSame``, which pads by its input's size as TensorFlow does."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        geometry: dict[str, Any] = {
            "stride": self.stride,
            "dilation": self.dilation,
            "groups": self.groups,
        }
        return timm.layers.conv2d_same(input, weight, bias, **geometry)


class BinaryLinear(nn.Linear):
    """A product of signs. ``weight`` [filters, features] is the latent real weight; make one with ``from_real``."""

    binarizer: Binarizer

    @classmethod
    def from_real(cls, real: nn.Linear, *, method: str) -> BinaryLinear:
        """The binary layer in the place of ``real``, sharing its Parameters; ``real`` must not be used afterwards."""
        layer = _take_over(cls, real)
        layer.binarizer = METHODS[method](layer.weight, channel_dim=-1).train(real.training)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        product = functional.linear(
            self.binarizer.binarize_input(input), self.binarizer.binarize_weight(self.weight)
        )
        output = self.binarizer.scale_output(product)
        magnitude = self.binarizer.input_magnitude(input)
        if magnitude is not None:
            output = output * magnitude
        return output if self.bias is None else output + self.bias


def _take_over(cls: type[Layer], real: nn.Module) -> Layer:
    """An instance of ``cls`` with every attribute of ``real``: parameters, geometry, mode, hooks."""
    layer = cls.__new__(cls)
    layer.__dict__.update(real.__dict__)
    layer._modules = dict(real._modules)
    return layer
