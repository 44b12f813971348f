"""Counts against published tables and against plain arithmetic."""

import copy

import pytest
import torch
from torch import nn

from cyclebnn_dist.binary import binarize_, count, set_widths
from cyclebnn_dist.config.recipe import BinaryConfig
from cyclebnn_dist.timm_import import timm


def resnet18(method, *, side=224, **rules):
    model = timm.create_model("resnet18")
    if method != "none":
        binarize_(model, BinaryConfig(method=method, **rules), input_size=(3, side, side))
    return count(model, input_size=(3, side, side))


def test_bireal_18_costs_what_is_published():
    """BCDNet's table: 1.68e9 BOPs, 1.39e8 FLOPs, 1.63e8 OPs; recomputed 1.676e9, 1.378e8, 1.640e8."""
    counts = resnet18("bireal")
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
    """ReActNet's README: 1.67e8 OPs; downsample convolutions real."""
    assert resnet18("bnn").ops == pytest.approx(1.67e8, rel=0.02)


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
    count(model, input_size=(3, 32, 32))
    assert model.training
    assert not model.bn1.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
