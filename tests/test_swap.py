"""The swap, on small models of many families."""

import copy

import pytest
import torch
from torch import nn

from cyclebnn_dist.binary import (
    BinaryConv2d,
    BinaryLinear,
    binarize_,
    binary_modules,
    parameter_kinds,
    set_widths,
)
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import BinaryConfig
from cyclebnn_dist.timm_import import timm

FAMILIES = {
    "resnet18": {},
    "mobilenetv3_small_100": {},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "efficientnet_b0": {},
    "regnetx_002": {},
    "repvgg_a0": {},
    "swin_tiny_patch4_window7_224": {
        "img_size": 56,
        "depths": (1, 1, 1, 1),
        "embed_dim": 32,
        "num_heads": (1, 1, 1, 1),
    },
    "swinv2_tiny_window8_256": {
        "img_size": 64,
        "depths": (1, 1, 1, 1),
        "embed_dim": 32,
        "num_heads": (1, 1, 1, 1),
    },
    "beit_base_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 96, "num_heads": 3},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 2},
}


def build(name, *, method="cyclebnn", **rules):
    torch.manual_seed(0)
    kwargs = FAMILIES.get(name, {})
    side = kwargs.get("img_size", 32)
    model = timm.create_model(name, num_classes=3, **kwargs)
    return model, (3, side, side), BinaryConfig(method=method, **rules)


def swapped(report):
    return {row.name for row in report.rows if row.swapped}


def reasons(report):
    return {row.name: row.reason for row in report.rows if not row.swapped}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_family_is_swapped_trained_one_step_and_saved(name):
    model, input_size, rules = build(name)
    other = copy.deepcopy(model)
    with torch.no_grad():  # branches that begin at zero give no gradient in the first step
        for key, parameter in model.named_parameters():
            if not key.endswith("bias"):
                parameter[...] = torch.where(parameter == 0, 0.1, parameter)
    parameters = dict(model.named_parameters())
    report = binarize_(model, rules, input_size=input_size)
    assert report.num_swapped == len(list(binary_modules(model))) > 0
    for key, parameter in model.named_parameters():
        assert ".binarizer." in key or parameter is parameters[key]

    model.train()
    set_widths(model, forward_bits=4, backward_bits=8, step=1)
    kinds = parameter_kinds(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    images = torch.randn(4, *input_size)
    nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0])).backward()
    latent = {key: parameter.grad for key, parameter in model.named_parameters() if kinds[key] == "binary"}
    assert all(grad is not None and grad.isfinite().all() for grad in latent.values())
    optimizer.step()
    moved = [key for key in latent if not torch.equal(before[key], model.get_parameter(key))]
    assert len(moved) == len(latent)

    binarize_(other, rules, input_size=input_size)
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        set_widths(each.eval(), forward_bits=4, backward_bits=32)
    with torch.no_grad():
        assert torch.equal(model(images), other(images))


def test_resnet_keeps_stem_classifier_and_downsample_real():
    model, input_size, rules = build("resnet18")
    report = binarize_(model, rules, input_size=input_size)
    assert reasons(report) == {
        "conv1": "stem",
        "layer2.0.downsample.0": "downsample",
        "layer3.0.downsample.0": "downsample",
        "layer4.0.downsample.0": "downsample",
        "fc": "classifier",
    }
    assert report.num_swapped == 16


@pytest.mark.parametrize(
    ("flag", "name", "layer"),
    [
        ("keep_stem", "resnet18", "conv1"),
        ("keep_classifier", "resnet18", "fc"),
        ("keep_downsample", "resnet18", "layer2.0.downsample.0"),
        ("keep_classifier", "mobilenetv3_small_100", "classifier"),
        ("keep_depthwise", "mobilenetv3_small_100", "blocks.1.0.conv_dw"),
        ("keep_squeeze_excite", "mobilenetv3_small_100", "blocks.0.0.se.conv_reduce"),
    ],
)
def test_each_flag_swaps_what_it_names(flag, name, layer):
    model, input_size, rules = build(name)
    assert layer not in swapped(binarize_(model, rules, input_size=input_size))
    model, input_size, rules = build(name, **{flag: False})
    assert layer in swapped(binarize_(model, rules, input_size=input_size))


def test_both_stem_convolutions_of_repvgg_stay_real():
    model, input_size, rules = build("repvgg_a0")
    stays = reasons(binarize_(model, rules, input_size=input_size))
    assert stays["stem.conv_kxk.conv"] == stays["stem.conv_1x1.conv"] == "stem"


def test_attention_is_swapped_but_gates_are_not():
    model, input_size, rules = build("vit_tiny_patch16_224")
    assert "blocks.0.attn.qkv" in swapped(binarize_(model, rules, input_size=input_size))
    model, input_size, rules = build("efficientnet_b0")
    stays = reasons(binarize_(model, rules, input_size=input_size))
    assert {reason for name, reason in stays.items() if ".se." in name} == {"gate"}


def test_layers_of_other_classes_are_reported_by_their_class():
    model, input_size, rules = build("tf_efficientnet_b0")
    report = binarize_(model, rules, input_size=input_size)
    same = {row.name: row for row in report.rows if row.kind.startswith("Conv2dSame")}
    assert same
    assert same.pop("conv_stem").reason == "stem"
    assert {row.reason for row in same.values()} == {"a Conv2dSame is not swapped"}


def test_globs_choose_layers_and_exclude_wins():
    model, input_size, rules = build("resnet18", include=("layer3.*", "layer4.*"), exclude=("*.conv2",))
    assert swapped(binarize_(model, rules, input_size=input_size)) == {
        f"layer{stage}.{block}.conv1" for stage in (3, 4) for block in (0, 1)
    }


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_with_its_neighbours(key):
    model, input_size, rules = build("resnet18", **{key: ("layers4.*",)})
    with pytest.raises(RecipeError, match=r"layers4.*matches no layer[\s\S]*layer4\.") as error:
        binarize_(model, rules, input_size=input_size)
    assert error.value.key == f"binary.{key}"


def test_nothing_left_to_swap_is_refused():
    model, input_size, rules = build("resnet18", exclude=("*",))
    with pytest.raises(RecipeError, match="no layer"):
        binarize_(model, rules, input_size=input_size)


def test_method_none_only_reports():
    model, input_size, rules = build("resnet18", method="none")
    report = binarize_(model, rules, input_size=input_size)
    assert report.num_swapped == 0
    assert len(report.rows) == 21
    assert isinstance(model.act1, nn.ReLU)
    assert type(model.layer1[0].conv1) is nn.Conv2d


class Bypassing(nn.Module):
    """Reads the weight of one of its layers itself."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.inner = nn.Linear(4, 4)
        self.qkv = nn.Linear(4, 4)

    def forward(self, x):
        x = self.inner(self.stem(x).mean((2, 3)))
        return nn.functional.linear(x, self.qkv.weight, self.qkv.bias)


def test_a_layer_that_does_not_run_is_named():
    """Its weight would train as a real one under a binary layer's name."""
    rules = BinaryConfig(method="bnn")
    with pytest.raises(RecipeError, match="never runs these swapped layers: qkv"):
        binarize_(Bypassing(), rules, input_size=(3, 8, 8))
    report = binarize_(Bypassing(), BinaryConfig(method="bnn", exclude=("qkv",)), input_size=(3, 8, 8))
    assert swapped(report) == {"inner"}


@pytest.mark.parametrize(
    "name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"]
)
def test_attention_that_reads_its_weight_is_made_to_run_its_layer(name):
    model, input_size, rules = build(name, method="bnn")
    real = copy.deepcopy(model).eval()
    separate = copy.deepcopy(real)
    for module in separate.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
    image = torch.randn(1, *input_size)
    with torch.no_grad():
        torch.testing.assert_close(separate(image), real(image))
    assert any(name.endswith("qkv") for name in swapped(binarize_(model, rules, input_size=input_size)))


def test_activations_that_are_never_negative_are_replaced_everywhere_but_in_gates():
    model, input_size, rules = build("mobilenetv3_small_100")
    report = binarize_(model, rules, input_size=input_size)
    left = {name for name, module in model.named_modules() if isinstance(module, nn.ReLU | nn.Hardswish)}
    assert left
    assert all(".se." in name for name in left)
    assert report.activations
    assert report.one_sided_inputs == ()
    assert any(isinstance(module, nn.Hardsigmoid) for module in model.modules())


@pytest.mark.parametrize(
    ("activation", "kind"), [("hardtanh", nn.Hardtanh), ("prelu", nn.PReLU), ("identity", nn.Identity)]
)
def test_activation_is_the_one_asked_for(activation, kind):
    model, input_size, rules = build("resnet18", activation=activation)
    binarize_(model, rules, input_size=input_size)
    assert type(model.layer1[0].act1) is kind


def test_inputs_that_are_never_negative_are_told(caplog):
    """Behind a ReLU every sign is +1: the layer sees nothing."""
    model, input_size, rules = build("resnet18", activation="keep")
    report = binarize_(model, rules, input_size=input_size)
    assert "layer1.0.conv2" in report.one_sided_inputs
    assert "never negative" in caplog.text
    assert "layer1.0.conv2" in report.render().splitlines()[-1]


def test_a_layer_that_hangs_in_two_places_is_swapped_in_both():
    shared = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Sequential(shared), nn.Flatten(), nn.Linear(16, 2))
    binarize_(model, BinaryConfig(method="bnn", exclude=("4",)), input_size=(3, 2, 2))
    assert model[1] is model[2][0]
    assert isinstance(model[1], BinaryConv2d)


def test_swapping_leaves_mode_statistics_and_random_state_alone():
    model, input_size, rules = build("resnet18")
    model.train()
    model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    binarize_(model, rules, input_size=input_size)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.layer1[0].conv1.training
    assert not model.bn1.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_report_shows_a_line_a_layer():
    model, input_size, rules = build("vit_tiny_patch16_224")
    report = binarize_(model, rules, input_size=input_size)
    lines = report.render().splitlines()
    assert len(report.rows) + 1 == next(index for index, line in enumerate(lines) if not line)
    assert any("patch_embed.proj" in line and "stem" in line for line in lines)
    assert any(isinstance(module, BinaryLinear) for _, module in binary_modules(model))
