"""The CPU kernels compute what the operators compute that run everywhere else."""

import pytest
import torch
from torch import nn

from cyclebnn_dist.binary import METHODS, BinaryConv2d, BinaryLinear, cpu_kernels, set_progress, set_widths


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


@pytest.mark.parametrize("method", ["bnn", "cyclebnn"])
def test_their_number_of_threads_changes_no_bit(method, monkeypatch):
    results = []
    for num_threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
        results.append(run(method, "convolution"))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 60), (1, 1)])
def test_tensors_of_other_layouts_are_left_to_the_operators(shape):
    assert cpu_kernels.usable(torch.randn(shape))
    assert not cpu_kernels.usable(torch.randn(shape).double())
    assert not cpu_kernels.usable(torch.randn(7, 5, 3).transpose(0, 1))
    assert not cpu_kernels.usable(torch.empty(0, 3))
