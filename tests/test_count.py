"""Counts against published tables and against plain arithmetic."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn

from cyclebnn_dist.binary import CONVENTIONS, binarize_, count, set_widths
from cyclebnn_dist.config.recipe import BinaryConfig
from cyclebnn_dist.models import bnext as bnext  # whose models timm knows then
from cyclebnn_dist.models import reactnet as reactnet
from cyclebnn_dist.timm_import import timm


@functools.cache
def counted(name, method):
    model = timm.create_model(name)
    # Swapped by a small image, which takes less time.
    binarize_(model, BinaryConfig(method=method), input_size=(3, 32, 32))
    return count(model, input_size=(3, 224, 224))


def test_reactnet_a_costs_what_is_published():
    """4.82e9 BOPs, 0.12e8 FLOPs, 0.87e8 OPs; with normalization and activation 0.31e8 FLOPs, 1.06e8 OPs."""
    counts = counted("reactnet_a", "reactnet")
    assert counts.bops == pytest.approx(4.817e9, rel=1e-3)
    assert counts.flops == pytest.approx(0.1186e8, rel=1e-3)
    assert counts.ops == pytest.approx(0.871e8, rel=1e-3)
    counts = dataclasses.replace(counts, convention="elementwise")
    assert counts.charged_flops == pytest.approx(0.31e8, rel=0.02)
    assert counts.ops == pytest.approx(1.06e8, rel=0.01)


@pytest.mark.parametrize(
    ("name", "ops", "full_ops", "degree", "bops", "binary_params", "other_params", "size_mib"),
    [
        ("bnext_t", 0.077e9, 88.6e6, 0.9781, 4.817e9, 28.25e6, 2.61e6, 13.4),
        ("bnext_s", 0.172e9, 190.5e6, 0.9847, 1.084e10, 63.57e6, 5.02e6, 26.7),
    ],
    ids=["T", "S"],
)
def test_bnext_costs_what_is_published(
    name, ops, full_ops, degree, bops, binary_params, other_params, size_mib
):
    """Its table charges stem, classifier and squeeze-and-excitation at 8 bits: without that no row can be met."""
    usual = counted(name, "bnext")
    assert usual.ops == pytest.approx(full_ops, rel=0.01)
    counts = dataclasses.replace(usual, convention="bnext")
    assert counts.ops == pytest.approx(ops, rel=0.01)
    assert counts.bops / 64 / counts.ops == pytest.approx(degree, abs=5e-4)
    assert counts.bops == pytest.approx(bops, rel=1e-3)
    assert counts.binary_params == pytest.approx(binary_params, rel=1e-3)
    assert counts.params - counts.binary_params == pytest.approx(other_params, rel=0.01)
    assert counts.size_bits / 8 / 2**20 == pytest.approx(size_mib, rel=0.01)


def test_residual_networks_for_binary_layers_cost_what_bireal_18_does():
    """BNext-18 has gates beside; ReActNet-18 is Bi-Real-18 but for its activations."""
    bireal, react, gated = (
        resnet18("bireal"),
        counted("reactnet_18", "reactnet"),
        counted("bnext_18", "bnext"),
    )
    assert react.bops == gated.bops == bireal.bops
    assert react.flops == bireal.flops
    gates = 4 * sum(2 * width * (width // 8) for width in (64, 128, 256, 512))
    assert gated.flops == bireal.flops + gates


def test_conventions_differ_in_what_they_charge():
    counts = resnet18("bnn", side=64)
    by_name = {name: dataclasses.replace(counts, convention=name) for name in CONVENTIONS}
    assert by_name["bireal"].ops == counts.bops / 64 + counts.flops == counts.ops
    assert by_name["fvbitcore"].ops == counts.bops / 32 + counts.flops
    ends = 3 * 49 * 64 * 32 * 32 + 512 * 1000
    assert counts.edge_macs == ends
    assert by_name["bnext"].ops == pytest.approx(counts.ops - ends * 7 / 8)


def test_elementwise_operations_are_counted_where_they_run():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.PReLU()

        def forward(self, x):
            return self.act(self.norm(self.conv(x)) + x) + 1.0

    counts = count(Small(), input_size=(3, 4, 5), convention="elementwise")
    assert counts.elementwise == (2 + 1 + 1) * 60
    assert counts.ops == 9 * 20 + 4 * 60


def resnet18(method, *, side=224, **rules):
    model = timm.create_model("resnet18")
    if method != "none":
        binarize_(model, BinaryConfig(method=method, **rules), input_size=(3, side, side))
    return count(model, input_size=(3, side, side))


@pytest.mark.parametrize("shortcut", ["block", "convolution"])
def test_bireal_18_costs_what_is_published(shortcut):
    """BCDNet's table: 1.68e9 BOPs, 1.39e8 FLOPs, 1.63e8 OPs; recomputed 1.676e9, 1.378e8, 1.640e8."""
    counts = resnet18("bireal", shortcut=shortcut)
    assert counts.bops == pytest.approx(1.676e9, rel=1e-3)
    assert counts.flops == pytest.approx(1.378e8, rel=1e-3)
    assert counts.ops == pytest.approx(1.640e8, rel=1e-3)
    for counted, published in ((counts.bops, 1.68e9), (counts.flops, 1.39e8), (counts.ops, 1.63e8)):
        assert counted == pytest.approx(published, rel=0.01)


def test_real_resnet18_costs_what_is_published():
    counts = resnet18("none")
    assert counts.flops == pytest.approx(18.14e8, rel=1e-3)
    assert (counts.bops, counts.ops, counts.binary_params) == (0, counts.flops, 0)
    assert counts.size_bits == 32 * counts.params


def test_xnor_net_resnet18_costs_what_is_published():
    """ReActNet's README: 1.67e8 OPs; downsample convolutions real.

    Beside Bi-Real's 1.640e8 these are an addition for each of 1,680,896 inputs of binary layers, a multiplication for each
    of their 1,505,280 outputs, and the means over 3x3 windows.
    """
    counts = resnet18("xnor")
    assert counts.ops == pytest.approx(1.67e8, rel=0.005)
    windows = 9 * (4 * 56**2 + 4 * 28**2 + 4 * 14**2 + 4 * 7**2)
    assert counts.flops == resnet18("bireal").flops + 1_680_896 + 1_505_280 + windows


def test_resnet18_size_is_one_bit_a_binary_weight():
    """10.985 M binary weights; convolutions and classifier together 33.2 Mbit."""
    counts = resnet18("bnn", side=64)
    assert counts.binary_params == pytest.approx(10.985e6, rel=1e-3)
    norms = sum(p.numel() for name, p in timm.create_model("resnet18").named_parameters() if "bn" in name)
    norms += sum(p.numel() for p in timm.create_model("resnet18").layer2[0].downsample[1].parameters()) * (
        1 + 2 + 4
    )
    assert counts.size_bits - 32 * norms == pytest.approx(33.2e6, rel=0.01)
    assert counts.size_bits == counts.binary_params + 32 * (counts.params - counts.binary_params)


def test_layers_add_up_to_the_totals():
    counts = resnet18("cyclebnn", side=64)
    assert sum(layer.macs for layer in counts.layers if layer.binary) == counts.bops == counts.scheduled_macs
    assert (
        sum(layer.macs for layer in counts.layers if not layer.binary)
        == counts.flops
        == counts.unscheduled_macs
    )
    first = counts.layers[0]
    assert (first.name, first.macs, first.output_shape) == ("conv1", 3 * 49 * 64 * 32 * 32, (64, 32, 32))
    assert first.params == 3 * 49 * 64


def test_only_methods_that_follow_the_schedule_are_credited_with_it():
    assert resnet18("bnn", side=32).scheduled_macs == 0
    assert resnet18("cyclebnn", side=32).scheduled_macs > 0


def test_products_outside_layers_are_counted():
    """Attention is part of what a transformer costs: q times k and attention times v."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    counts = count(model, input_size=(3, 32, 32))
    tokens, width, depth = 5, 192, 2
    layers = sum(layer.macs for layer in counts.layers)
    assert counts.flops - layers == depth * 2 * tokens * tokens * width
    assert layers == 4 * 768 * width + depth * tokens * 12 * width * width + width * 3


def test_a_layer_used_twice_costs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    assert count(Twice(), input_size=(3, 4, 4)).flops == 2 * 9 * 16


def test_a_compiled_model_is_counted_like_a_plain_one():
    """Inside compiled code no layer would be seen to run."""
    model = timm.create_model("resnet18", num_classes=4)
    plain = count(model, input_size=(3, 32, 32))
    model.compile(backend="aot_eager")
    assert count(model, input_size=(3, 32, 32)) == plain


def test_counting_changes_nothing():
    """It may run in the middle of training."""
    model = timm.create_model("resnet18", num_classes=4)
    binarize_(model, BinaryConfig(method="cyclebnn"), input_size=(3, 32, 32))
    set_widths(model, forward_bits=3, backward_bits=8, step=1)
    model.train()
    model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    count(model, input_size=(3, 32, 32))
    assert model.training
    assert not model.bn1.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    # The model's own hooks stay, those of the count do not.
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_transposed_convolutions_multiply_once_an_input_element():
    model = torch.nn.Sequential(
        torch.nn.ConvTranspose2d(3, 4, 2, stride=2), torch.nn.Flatten(), torch.nn.Linear(256, 2)
    )
    counts = count(model, input_size=(3, 4, 4))
    assert counts.layers[0].macs == 3 * 16 * 4 * 4
    assert counts.flops == sum(layer.macs for layer in counts.layers)
