"""The product of binary layers: what plain autograd gives for it, and the same bits again when it is rebuilt."""

import pytest
import torch
from torch.nn import functional

from cyclebnn_dist.binary.product import Geometry, binary_product
from cyclebnn_dist.binary.rebuild import offered

CONVOLUTIONS = {
    "padded": Geometry((1, 1), (1, 1), (1, 1), 1),
    "strided": Geometry((2, 1), (0, 1), (1, 1), 1),
    "dilated, grouped": Geometry((1, 1), (2, 2), (2, 2), 2),
    "one-sided border": Geometry((2, 2), (0, 0), (1, 1), 1, border=(0, 1, 1, 2)),
    "linear": None,
}
OPERANDS = ["signs", "scaled_signs", "two_valued", "real", "two_valued_inputs"]


def operands(kind, geometry, *, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape):
        return torch.where(torch.randn(shape, generator=generator) >= 0.0, 1.0, -1.0)

    groups = geometry.groups if geometry else 1
    inputs = signs(2, 4, 9, 7) if geometry else signs(2, 5, 11)
    weight = signs(6, 4 // groups, 3, 3) if geometry else signs(6, 11)
    if kind == "scaled_signs":
        weight *= torch.rand(6, *[1] * (weight.dim() - 1), generator=generator) + 0.01
    if kind in ("two_valued", "two_valued_inputs"):
        inputs = 0.7 * inputs + 0.2
    if kind == "two_valued":
        weight = weight * 0.3 + torch.rand(6, *[1] * (weight.dim() - 1), generator=generator)
    if kind in ("real", "two_valued_inputs"):
        weight *= torch.rand(weight.shape, generator=generator)
    return inputs.requires_grad_(), weight.requires_grad_()


def plain(inputs, weight, geometry):
    if geometry is None:
        return inputs @ weight.t()
    padded = functional.pad(inputs, geometry.border)
    return functional.conv2d(
        padded, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("geometry", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_product_and_gradients_are_those_of_plain_autograd(geometry, kind, channels_last):
    inputs, weight = operands(kind, geometry)
    x = inputs.detach()
    if channels_last:
        x = (
            x.contiguous(memory_format=torch.channels_last)
            if geometry
            else x.transpose(0, 1).contiguous().transpose(0, 1)
        )
    x.requires_grad_()
    product = binary_product(x, weight, geometry, operands=kind)
    expected = plain(inputs, weight, geometry)
    torch.testing.assert_close(product, expected)
    grad = torch.randn_like(expected)
    found = torch.autograd.grad(product, (x, weight), grad)
    for each, right in zip(found, torch.autograd.grad(expected, (inputs, weight), grad), strict=True):
        torch.testing.assert_close(each, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["signs", "scaled_signs"])
@pytest.mark.parametrize("geometry", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_signs_multiply_to_exact_integers_times_the_scale(geometry, kind):
    inputs, weight = operands(kind, geometry)
    scale = weight.detach().flatten(1)[:, 0].abs()
    signs = weight.detach().sign()
    integers = plain(inputs.detach().double(), signs.double(), geometry)
    along = scale if geometry is None else scale.view(-1, 1, 1)
    product = binary_product(inputs, weight, geometry, operands=kind)
    assert torch.equal(product, integers.float() * along)


@pytest.mark.parametrize("keep", ["integers", "recompute"])
@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("geometry", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_rebuilt_product_is_the_product_bit_for_bit(geometry, kind, keep):
    inputs, weight = operands(kind, geometry)
    product = binary_product(inputs, weight, geometry, operands=kind, keep=keep)
    again = offered(product).promise().take()
    assert torch.equal(again, product)
    assert again.stride() == product.stride()
    integer = kind in ("signs", "scaled_signs")
    assert (again.data_ptr() != product.data_ptr()) == (keep == "recompute" or integer)


def test_a_filter_too_long_for_16_bit_integers_is_kept_as_it_is():
    inputs, weight = torch.ones(1, 40_000, requires_grad=True), torch.ones(2, 40_000)
    product = binary_product(inputs, weight, None, operands="signs", keep="integers")
    assert product.tolist() == [[40_000.0, 40_000.0]]
    assert offered(product).peek().data_ptr() == product.data_ptr()


def test_nothing_is_packed_where_nothing_will_be_differentiated():
    inputs, weight = operands("signs", None)
    with torch.no_grad():
        product = binary_product(inputs, weight, None, operands="signs", keep="recompute")
    assert product.grad_fn is None
    assert offered(product) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_have_half_precision_gradients(dtype):
    inputs, weight = operands("scaled_signs", CONVOLUTIONS["padded"])
    with torch.autocast("cpu", dtype=dtype):
        product = binary_product(inputs, weight, CONVOLUTIONS["padded"], operands="scaled_signs")
        expected = plain(inputs, weight, CONVOLUTIONS["padded"])
    assert product.dtype == dtype
    torch.testing.assert_close(product, expected, rtol=0.02, atol=0.02)
    found = torch.autograd.grad(product.float().square().sum(), (inputs, weight))
    for each, right in zip(
        found, torch.autograd.grad(expected.float().square().sum(), (inputs, weight)), strict=True
    ):
        assert each.dtype == torch.float32
        torch.testing.assert_close(each, right, rtol=0.1, atol=0.02 * right.abs().max().item())
