"""Activations against their equations: a wrong slope or shift would train another network than the paper's."""

import pytest
import torch

from cyclebnn_dist.binary.activations import Channels, Maxout, RPReLU

SHAPES = [((2, 5, 3, 4), 1), ((2, 3, 4, 5), -1), ((2, 3, 5), -1), ((7, 5), -1)]


def parameters(count, seed):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(module, reference, values, shape, channel_dim):
    """Output and all gradients of ``module`` with ``values`` for parameters are those of ``reference``."""
    for parameter, value in zip(module.parameters(), values, strict=True):
        parameter.data = value.clone()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x.requires_grad_()
    leaves = [value.clone().requires_grad_() for value in values]
    view = [leaf.view(-1, 1, 1) if channel_dim == 1 else leaf for leaf in leaves]
    expected, found = reference(x, *view), module(x)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, (x, *module.parameters()), grad),
        torch.autograd.grad(expected, (x, *leaves), grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
def test_rprelu_shifts_bends_and_shifts_each_channel(shape, channel_dim):
    def reference(x, shift_in, slope, shift_out):
        shifted = x + shift_in
        return torch.where(shifted > 0, shifted, slope * shifted) + shift_out

    module = RPReLU(Channels(5, channel_dim)).double()
    compare(module, reference, [parameters(5, seed) for seed in range(3)], shape, channel_dim)


@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
def test_maxout_has_a_slope_for_each_side_of_each_channel(shape, channel_dim):
    def reference(x, positive, negative):
        return positive * torch.relu(x) - negative * torch.relu(-x)

    module = Maxout(Channels(5, channel_dim)).double()
    compare(module, reference, [parameters(5, seed) for seed in range(2)], shape, channel_dim)


def test_activations_start_as_published():
    x = torch.tensor([[-2.0, 0.0, 3.0]])
    for module in (RPReLU(Channels(3, -1)), Maxout(Channels(3, -1))):
        assert module(x).tolist() == [[-0.5, 0.0, 3.0]]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(x.bfloat16()).dtype == torch.bfloat16


def test_maxout_at_zero_has_the_slope_of_its_negative_side():
    x = torch.zeros(1, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(Maxout(Channels(2, -1))(x).sum(), x)
    assert grad.tolist() == [[0.25, 0.25]]
