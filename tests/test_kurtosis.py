"""Without these the regularizer could push weights elsewhere than its paper says, or cost something while off."""

import pytest
import torch
from torch import nn

from cyclebnn_dist.binary import BinaryConv2d, BinaryLinear
from cyclebnn_dist.losses import kurtosis, kurtosis_penalty


def plain_kurtosis(weight):
    return (((weight - weight.mean()) / weight.std(correction=0)) ** 4).mean()


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        BinaryConv2d.from_real(nn.Conv2d(4, 6, 3), method="bnn"),
        BinaryLinear.from_real(nn.Linear(6, 5), method="bireal"),
        nn.Linear(5, 2),
    )


def test_kurtosis_and_its_gradient_follow_the_definition():
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64) * 0.1 + 0.03
    one, other = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.testing.assert_close(kurtosis(one), plain_kurtosis(other))
    (found,) = torch.autograd.grad(kurtosis(one) * 3, one)
    (expected,) = torch.autograd.grad(plain_kurtosis(other) * 3, other)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.linspace(-1, 1, 100_001, dtype=torch.float64), 1.8),
        (torch.tensor([-1.0, 1.0]).repeat(50), 1.0),
        (torch.zeros(9), 0.0),
    ],
)
def test_kurtosis_of_known_distributions(values, expected):
    leaf = values.clone().requires_grad_()
    result = kurtosis(leaf)
    assert result.item() == pytest.approx(expected, abs=1e-3)
    assert torch.autograd.grad(result, leaf)[0].isfinite().all()


def test_penalty_is_the_mean_over_binary_layers_and_touches_no_other():
    network = model()
    loss = kurtosis_penalty(network, weight=0.5, target=1.8)
    terms = [(plain_kurtosis(network[index].weight) - 1.8) ** 2 for index in (1, 2)]
    torch.testing.assert_close(loss, 0.5 * sum(terms) / 2)
    loss.backward()
    assert [name for name, p in network.named_parameters() if p.grad is not None] == ["1.weight", "2.weight"]


def test_no_weight_or_no_binary_layer_is_no_penalty():
    for network, weight in ((model(), 0.0), (nn.Linear(3, 2), 1.0)):
        loss = kurtosis_penalty(network, weight=weight, target=1.8)
        assert loss.item() == 0
        assert not loss.requires_grad
        assert (loss + next(network.parameters()).sum()).requires_grad
