"""Binary layers: a convolution and a linear layer that take over a real one's parameters and place."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional

from cyclebnn_dist.binary.binarizer import METHODS, Binarizer
from cyclebnn_dist.binary.product import Geometry, Keep, binary_product, multiply
from cyclebnn_dist.binary.rebuild import through
from cyclebnn_dist.timm_import import timm

Layer = TypeVar("Layer", bound=nn.Module)


class BinaryConv2d(nn.Conv2d):
    """A convolution of signs. ``weight`` [filters, channels / groups, kh, kw] is the latent real weight; make one with ``from_real``.

    Zero padding is of the signs, so a border element adds nothing.
    """

    binarizer: Binarizer
    keep: Keep = "nothing"
    """What may be kept of the product for whoever comes after (see ``product``)."""

    @classmethod
    def from_real(cls, real: nn.Conv2d, *, method: str) -> BinaryConv2d:
        """The binary layer in the place of ``real``, sharing its Parameters; ``real`` must not be used afterwards."""
        layer = _take_over(cls, real)
        layer.binarizer = METHODS[method](layer.weight, channel_dim=1, groups=layer.groups).train(
            real.training
        )
        return layer

    def forward(self, input: Tensor) -> Tensor:
        signs = self.binarizer.binarize_input(input)
        if self.padding_mode != "zeros":
            signs = functional.pad(signs, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        geometry = self._geometry(input.shape[-2], input.shape[-1])
        product = binary_product(
            signs,
            self.binarizer.weight_in_use(self.weight),
            geometry,
            operands=self.binarizer.operands,
            keep=self.keep,
        )
        magnitude = self.binarizer.input_magnitude(input)
        means = None if magnitude is None else self._window_means(magnitude, geometry)

        def finish(product: Tensor) -> Tensor:
            output = self.binarizer.scale_output(product)
            output = output if means is None else output * means.to(output.dtype)
            return output if self.bias is None else output + self.bias.view(-1, 1, 1).to(output.dtype)

        return through(finish, product, reads=[*self.binarizer.parameters(), self.bias])

    def _geometry(self, height: int, width: int) -> Geometry:
        """This convolution of an input of that size."""
        plain = Geometry(self.stride, (0, 0), self.dilation, self.groups)
        if self.padding_mode != "zeros":
            return plain
        if not isinstance(self.padding, str):
            return plain._replace(padding=self.padding)
        left, right, top, bottom = self._reversed_padding_repeated_twice
        if left == right and top == bottom:
            return plain._replace(padding=(top, left))
        return plain._replace(border=(left, right, top, bottom))

    def _window_means(self, values: Tensor, geometry: Geometry) -> Tensor:
        """Means of ``values`` [batch, groups, height, width] over the window of each output, one a filter; 0 beyond the border."""
        height, width = self.kernel_size
        if self.padding_mode != "zeros":
            values = functional.pad(values, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        window = values.new_full((self.groups, 1, height, width), 1.0 / (height * width))
        means = multiply(values, window, geometry)
        return means.repeat_interleave(self.out_channels // self.groups, dim=1) if self.groups > 1 else means


class BinaryConv2dSame(BinaryConv2d):
    """A convolution of signs in the place of timm's ``Conv2dSame``, which pads by its input's size as TensorFlow does."""

    def _geometry(self, height: int, width: int) -> Geometry:
        pads = []
        for axis, size in ((1, width), (0, height)):
            total = timm.layers.get_same_padding(
                size, self.kernel_size[axis], self.stride[axis], self.dilation[axis]
            )
            pads += [total // 2, total - total // 2]
        return Geometry(self.stride, (0, 0), self.dilation, self.groups, border=tuple(pads))


class BinaryLinear(nn.Linear):
    """A product of signs. ``weight`` [filters, features] is the latent real weight; make one with ``from_real``."""

    binarizer: Binarizer
    keep: Keep = "nothing"
    """What may be kept of the product for whoever comes after (see ``product``)."""

    @classmethod
    def from_real(cls, real: nn.Linear, *, method: str) -> BinaryLinear:
        """The binary layer in the place of ``real``, sharing its Parameters; ``real`` must not be used afterwards."""
        layer = _take_over(cls, real)
        layer.binarizer = METHODS[method](layer.weight, channel_dim=-1).train(real.training)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        product = binary_product(
            self.binarizer.binarize_input(input),
            self.binarizer.weight_in_use(self.weight),
            None,
            operands=self.binarizer.operands,
            keep=self.keep,
        )
        magnitude = self.binarizer.input_magnitude(input)

        def finish(product: Tensor) -> Tensor:
            output = self.binarizer.scale_output(product)
            output = output if magnitude is None else output * magnitude.to(output.dtype)
            return output if self.bias is None else output + self.bias.to(output.dtype)

        return through(finish, product, reads=[*self.binarizer.parameters(), self.bias])


def _take_over(cls: type[Layer], real: nn.Module) -> Layer:
    """An instance of ``cls`` with every attribute of ``real``: parameters, geometry, mode, hooks."""
    layer = cls.__new__(cls)
    layer.__dict__.update(real.__dict__)
    layer._modules = dict(real._modules)
    return layer
