"""The CPU kernels compute what the operators compute that run everywhere else."""

import pytest
import torch
from torch import nn

from cyclebnn_dist.binary import METHODS, BinaryConv2d, BinaryLinear, cpu_kernels, set_progress, set_widths
from cyclebnn_dist.binary.activations import Hardtanh
from cyclebnn_dist.binary.statistics import EPSILON, row_statistics


def run(method, kind, *, bits=4, layout=torch.contiguous_format):
    torch.manual_seed(0)
    if kind == "convolution":
        layer = BinaryConv2d.from_real(nn.Conv2d(6, 5, 3, padding=1), method=method)
        x = torch.randn(3, 6, 9, 7).contiguous(memory_format=layout)
    else:
        layer = BinaryLinear.from_real(nn.Linear(33, 5), method=method)
        x = torch.randn(3, 4, 33)
    for name, parameter in layer.binarizer.named_parameters():
        if "alpha" not in name:
            nn.init.normal_(parameter, std=0.3)
    set_widths(layer, forward_bits=bits, backward_bits=bits, step=5)
    set_progress(layer, 0.6)
    x.requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("bits", [2, 5, 32])
@pytest.mark.parametrize("kind", ["convolution", "linear"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_the_same_with_and_without_them(method, kind, bits, monkeypatch):
    found = run(method, kind, bits=bits)
    monkeypatch.setattr(cpu_kernels, "usable", lambda *tensors, **kwargs: False)
    expected = run(method, kind, bits=bits)
    assert torch.equal(found[0], expected[0])
    for value, right in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(value, right, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("method", ["cyclebnn", "reactnet"])
def test_they_know_the_channels_last_layout(method):
    plain, last = run(method, "convolution"), run(method, "convolution", layout=torch.channels_last)
    # The noise of stochastic rounding goes by the order of memory, so only the outputs are comparable.
    assert torch.equal(plain[0], last[0])


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 60), (1, 1)])
def test_tensors_of_other_layouts_are_left_to_the_operators(shape):
    assert cpu_kernels.usable(torch.randn(shape))
    assert not cpu_kernels.usable(torch.randn(shape).double())
    assert not cpu_kernels.usable(torch.randn(7, 5, 3).transpose(0, 1))
    assert not cpu_kernels.usable(torch.empty(0, 3))


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_statistics_of_rows_far_from_zero(offset, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(cpu_kernels, "usable", lambda *tensors, **kwargs: False)
    x = torch.randn(4, 5000) + offset
    mean, deviation, low, high = row_statistics(x)
    right = (x.double().var(1) + EPSILON).sqrt()
    torch.testing.assert_close(deviation.double(), right, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-6, atol=1e-6)
    assert torch.equal(low, x.amin(1))
    assert torch.equal(high, x.amax(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_number_that_is_not_finite_spoils_the_statistics_of_its_row_alone(kernels, bad, monkeypatch):
    if not kernels:
        monkeypatch.setattr(cpu_kernels, "usable", lambda *tensors, **kwargs: False)
    x = torch.randn(3, 3000)
    x[1, 2500] = bad
    _, deviation, _, _ = row_statistics(x)
    assert deviation.isfinite().tolist() == [True, False, True]


def test_a_batch_that_is_not_finite_leaves_no_trace_in_the_range():
    layer = BinaryConv2d.from_real(nn.Conv2d(3, 4, 3), method="cyclebnn")
    layer(torch.randn(2, 3, 6, 6))
    before = layer.binarizer.input_range.clone()
    layer(torch.full((2, 3, 6, 6), float("nan")))
    after = layer.binarizer.input_range
    assert after.isfinite().all()
    assert after[0] / after[2] == pytest.approx((before[0] / before[2]).item(), rel=0.2)


LAYOUTS = {
    "plain": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "half the channels, channels_last": lambda x: torch.cat([x, x], 1).contiguous(
        memory_format=torch.channels_last
    )[:, : x.shape[1]],
    "half the channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", [*sorted(METHODS), "hardtanh"])
def test_the_layout_of_an_input_changes_no_gradient(method, layout, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(cpu_kernels, "usable", lambda *tensors, **kwargs: False)
    torch.manual_seed(0)
    layer = Hardtanh()
    if method != "hardtanh":
        layer = BinaryConv2d.from_real(nn.Conv2d(4, 8, 3, padding=1), method=method)
        set_widths(layer, forward_bits=4, backward_bits=32)
    values = torch.randn(2, 4, 6, 6)
    results = []
    for x in (values, LAYOUTS[layout](values)):
        leaf = x.detach().requires_grad_()  # detached: strides stay
        y = layer(leaf)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
