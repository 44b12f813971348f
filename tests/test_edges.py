"""Edges of 8 bits. Without these the operations that a summary charges for them would be those of another network."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cyclebnn_dist.binary import binarize_, count
from cyclebnn_dist.binary.edges import NarrowConv2d, NarrowLinear, RoundedRows
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import BinaryConfig, DataConfig, ModelConfig, Recipe
from cyclebnn_dist.config.validate import validate
from cyclebnn_dist.models import build_model, summarize_recipe
from cyclebnn_dist.models.summary import describe_recipe

TINY = ModelConfig(name="bnext_t", num_classes=5, kwargs={"channels": [8, 16, 32]})
NARROW = BinaryConfig(method="bnext", edge_bits=8)


@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 2**31),
    st.floats(1e-6, 1e6),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_rows_have_at_most_255_levels_and_their_greatest_number(rows, columns, seed, magnitude, dtype):
    x = magnitude * torch.randn(
        rows, columns, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    x[0, 0] = 0.0
    x = x.to(dtype).requires_grad_()
    y = RoundedRows.apply(x)
    greatest = x.abs().amax((1, 2), keepdim=True)
    codes = y / greatest.clamp(min=1e-30) * 127
    assert y.dtype == dtype
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.abs().max() <= 127 + 1e-4
    assert ((x - y).abs() <= greatest / 127 * 0.5001).all()
    y.backward(torch.full_like(x, 3.0))
    assert torch.equal(x.grad, torch.full_like(x, 3.0))


def test_a_row_of_zeros_stays_one():
    assert torch.equal(RoundedRows.apply(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_layer_is_a_product_of_integers_times_two_scales(kind):
    torch.manual_seed(0)
    if kind == "conv":
        layer: nn.Module = nn.Conv2d(3, 4, 3, stride=2, padding=1).double()
        x, product = torch.randn(2, 3, 9, 9).double(), lambda a, b: nn.functional.conv2d(a, b, None, 2, 1)
    else:
        layer = nn.Linear(6, 4).double()
        x, product = torch.randn(2, 5, 6).double(), lambda a, b: a @ b.T
    bias = layer.bias.detach().clone()
    layer.__class__ = NarrowConv2d if kind == "conv" else NarrowLinear

    def codes(values):
        step = values.abs().flatten(1).amax(1) / 127
        return torch.round(values / step.view(-1, *[1] * (values.dim() - 1))), step

    (x_codes, x_step), (w_codes, w_step) = codes(x), codes(layer.weight.detach())
    channels = (-1, 1, 1) if kind == "conv" else (-1,)
    expected = product(x_codes, w_codes) * x_step.view(-1, *[1] * (x.dim() - 1)) * w_step.view(channels)
    torch.testing.assert_close(layer(x), expected + bias.view(channels))


def test_edges_alone_are_narrow_and_their_weights_stay_the_same_parameters():
    torch.manual_seed(0)
    wide, _ = build_model(TINY, BinaryConfig(method="bnext"), image_size=32)
    torch.manual_seed(0)
    model, report = build_model(TINY, NARROW, image_size=32)
    assert model.state_dict().keys() == wide.state_dict().keys()
    found = {name for name, m in model.named_modules() if isinstance(m, NarrowConv2d | NarrowLinear)}
    assert found == set(report.narrow) == {row.name for row in report.rows if not row.swapped}
    assert {"conv1", "fc", "blocks.1.pointwise.0.se.reduce"} <= found
    assert f"{len(found)} layers real, with operands of 8 bits" in report.render()
    x = torch.randn(4, 3, 32, 32)
    difference = model.eval()(x) - wide.eval()(x)
    assert difference.abs().max() > 0


def test_what_comes_of_an_image_does_not_depend_on_its_batch():
    """A range over the batch would have an accuracy depend on eval.batch_size."""
    model, _ = build_model(TINY, NARROW, image_size=32)
    model = copy.deepcopy(model).double().eval()
    images = torch.randn(3, 3, 32, 32).double() * torch.tensor([1.0, 10.0, 0.1]).view(-1, 1, 1, 1)
    together = model(images)
    for index, image in enumerate(images):
        torch.testing.assert_close(model(image[None])[0], together[index])


def test_their_cost_is_counted():
    wide, narrow = (
        build_model(TINY, rules, image_size=32)[0] for rules in (BinaryConfig(method="bnext"), NARROW)
    )
    counts, before = (count(model, input_size=(3, 32, 32)) for model in (narrow, wide))
    weights = [m.weight for m in narrow.modules() if isinstance(m, NarrowConv2d | NarrowLinear)]
    numel = sum(weight.numel() for weight in weights)
    assert (counts.bops, counts.flops, counts.params) == (before.bops, before.flops, before.params)
    assert before.size_bits - counts.size_bits == 24 * numel - 32 * sum(map(len, weights))
    assert {row.bits for row in counts.layers} == {1, 8}
    assert {row.bits for row in before.layers} == {1, 32}


def test_a_summary_charges_them_as_they_are():
    recipe = Recipe(model=TINY, binary=NARROW, data=DataConfig(image_size=32))
    narrow, wide = (
        describe_recipe(Recipe(model=TINY, binary=rules, data=recipe.data))
        for rules in (NARROW, BinaryConfig(method="bnext"))
    )
    assert (narrow["convention"], wide["convention"]) == ("bnext", "bireal")
    edges = sum(layer["macs"] for layer in narrow["layers"] if layer["bits"] == 8)
    assert wide["ops"] - narrow["ops"] == pytest.approx(edges * 7 / 8)
    assert "8 bits: classifier" in summarize_recipe(recipe)
    assumed = summarize_recipe(
        Recipe(model=TINY, binary=BinaryConfig(method="bnext"), data=recipe.data), convention="bnext"
    )
    assert "count 1/8 (BNext); here they have 32" in assumed


def test_what_cannot_have_8_bits_is_refused():
    class Standardized(nn.Conv2d):
        pass

    model = nn.Sequential(Standardized(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(RecipeError, match="'0', a Standardized") as error:
        binarize_(model, BinaryConfig(method="bnn", edge_bits=8), input_size=(3, 8, 8))
    assert error.value.key == "binary.edge_bits"
    with pytest.raises(RecipeError, match=r"binary\.edge_bits"):
        validate(Recipe(binary=BinaryConfig(method="none", edge_bits=8)))
    validate(Recipe(binary=BinaryConfig(method="none", methods={"layer4.*": "bnn"}, edge_bits=8)))
