"""The swap, on small models of many families."""

import copy
import pickle

import pytest
import torch
from torch import nn

from cyclebnn_dist.binary import (
    METHODS,
    BinaryConv2d,
    BinaryLinear,
    binarize_,
    binary_modules,
    parameter_kinds,
    set_widths,
)
from cyclebnn_dist.binary.activations import Hardtanh, Maxout, RPReLU
from cyclebnn_dist.binary.layers import BinaryConv2dSame
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import BinaryConfig
from cyclebnn_dist.timm_import import timm

FAMILIES = {
    "resnet18": {},
    "mobilenetv3_small_100": {},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
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
    "mobilenetv2_035": {},
    "mobilenetv4_conv_small_035": {},
    "ghostnet_050": {},
    "mnasnet_small": {},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "dla46_c": {},
    "hrnet_w18_small": {},
    "lcnet_035": {},
    "tinynet_e": {},
    "seresnet18": {},
    "skresnet18": {},
    "resnest14d": {},
    "darknet17": {},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "twins_svt_small": {"img_size": 64, "depths": (1, 1, 1, 1)},
    "visformer_tiny": {"img_size": 32},
    "levit_128s": {"img_size": 64},
    "xcit_nano_12_p16_224": {"img_size": 32, "depth": 2},
    "edgenext_xx_small": {},
    "mobilevit_xxs": {},
    "fastvit_t8": {},
    "mobileone_s0": {},
    "repghostnet_050": {},
    "starnet_s050": {},
    "inception_next_atto": {},
    "hgnetv2_b0": {},
    "efficientvit_b0": {},
    "efficientvit_m0": {"img_size": 64},
    "ese_vovnet19b_slim": {},
    "resnetv2_18": {},
    "tf_mobilenetv3_small_minimal_100": {},
    "coatnet_pico_rw_224": {"img_size": 64},
    "repvit_m0_9": {},
    "swiftformer_xs": {},
    "convit_tiny": {"img_size": 32, "depth": 2, "local_up_to_layer": 1},
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},
}


def build(name, *, method="cyclebnn", **rules):
    torch.manual_seed(0)
    kwargs = FAMILIES.get(name, {})
    # With 32 pixels the attention of PVT has a single key, and its queries no gradient.
    side = 64 if name == "pvt_v2_b0" else kwargs.get("img_size", 32)
    model = timm.create_model(name, num_classes=3, **kwargs)
    return model, (3, side, side), BinaryConfig(method=method, **rules)


def signs(x):
    return torch.where(x >= 0, 1.0, -1.0)


def swapped(report):
    return {row.name for row in report.rows if row.swapped}


def reasons(report):
    return {row.name: row.reason for row in report.rows if not row.swapped}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_family_is_swapped_trained_one_step_and_saved(name):
    model, input_size, rules = build(name)
    other = copy.deepcopy(model)
    with torch.no_grad():  # branches that begin at (nearly) zero give no gradient in the first step
        for key, parameter in model.named_parameters():
            if not key.endswith("bias") and parameter.abs().max() < 1e-3:
                parameter.copy_(0.1 * torch.randn_like(parameter) + 0.1)
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
    """A weight-standardized convolution would be another function as a sign of its plain weight."""
    model, input_size, rules = build("resnetv2_50x1_bit", exclude=())
    report_of_none = binarize_(copy.deepcopy(model), BinaryConfig(method="none"), input_size=input_size)
    assert {row.kind.split()[0] for row in report_of_none.rows} == {"StdConv2d", "Conv2d"}
    with pytest.raises(RecipeError, match="no layer"):
        binarize_(model, rules, input_size=input_size)
    model, input_size, rules = build("resnetv2_50x1_bit", keep_classifier=False)
    stays = reasons(binarize_(model, rules, input_size=input_size))
    assert stays.pop("stem.conv") == "stem"
    assert {reason for name, reason in stays.items() if "downsample" not in name} == {
        "a StdConv2d is not swapped"
    }


@pytest.mark.parametrize("side", [32, 33])
def test_tensorflow_padding_is_kept(side):
    """Its border depends on the image: another padding would shift what pretrained weights look at."""
    torch.manual_seed(0)
    real = timm.layers.Conv2dSame(4, 6, 3, stride=2)
    layer = BinaryConv2dSame.from_real(copy.deepcopy(real), method="bnn")
    x = torch.randn(2, 4, side, side)
    with torch.no_grad():
        real.weight.copy_(signs(real.weight))
        torch.testing.assert_close(layer(x), real(signs(x)))


def test_padding_like_tensorflow_is_swapped_in_a_model():
    model, input_size, rules = build("tf_mobilenetv3_small_minimal_100", keep_depthwise=False)
    report = binarize_(model, rules, input_size=input_size)
    assert any(row.swapped and row.kind.startswith("Conv2dSame") for row in report.rows)


def test_layers_can_have_methods_of_their_own():
    """The first pattern that matches counts; none leaves a layer real."""
    methods = {"layer4.1.*": "none", "layer4.*": "reactnet", "*.conv2": "bireal"}
    model, input_size, rules = build("resnet18", methods=methods)
    report = binarize_(model, rules, input_size=input_size)
    found = {row.name: row.method for row in report.rows}
    assert found["layer4.0.conv1"] == found["layer4.0.conv2"] == "reactnet"
    assert found["layer3.0.conv2"] == "bireal"
    assert found["layer3.0.conv1"] == "cyclebnn"
    assert found["layer4.1.conv1"] == ""
    assert reasons(report)["layer4.1.conv1"] == "method none by binary.methods"
    for name, layer in binary_modules(model):
        assert type(layer.binarizer) is METHODS[found[name]]
    assert "method bireal, cyclebnn, reactnet" in report.render()


def test_single_layers_of_a_real_model_can_be_binary():
    model, input_size, rules = build("resnet18", method="none", methods={"layer4.*.conv?": "bnn"})
    assert swapped(binarize_(model, rules, input_size=input_size)) == {
        f"layer4.{block}.conv{conv}" for block in (0, 1) for conv in (1, 2)
    }


def test_all_layers_of_a_deep_stem_can_stay_real():
    model, input_size, rules = build("resnet50d")
    assert {"conv1.3", "conv1.6"} <= swapped(binarize_(model, rules, input_size=input_size))
    model, input_size, rules = build("resnet50d", keep_deep_stem=True)
    stays = reasons(binarize_(model, rules, input_size=input_size))
    assert {name for name, reason in stays.items() if reason == "stem"} == {"conv1.0", "conv1.3", "conv1.6"}


def test_a_deep_stem_is_not_most_of_the_model():
    """VGG keeps all its convolutions in one child: leaving that real would leave nothing to swap."""
    model = nn.Sequential(
        nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(5))), nn.Flatten(), nn.Linear(12, 2)
    )
    rules = BinaryConfig(method="bnn", keep_deep_stem=True, exclude=("2",), activation="keep")
    assert reasons(binarize_(model, rules, input_size=(3, 2, 2))) == {"0.0": "stem", "2": "excluded by 2"}


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "vit_tiny_patch16_224"])
@pytest.mark.parametrize(("activation", "kind"), [("rprelu", RPReLU), ("maxout", Maxout)])
def test_activations_that_learn_for_every_channel_find_their_channels(name, activation, kind):
    model, input_size, rules = build(name, activation=activation)
    report = binarize_(model, rules, input_size=input_size)
    made = [module for module in model.modules() if isinstance(module, kind)]
    assert len(made) == len(report.activations) > 0
    assert {module.channel_dim for module in made} == ({1} if name == "resnet18" else {-1})
    model(torch.randn(2, *input_size)).sum().backward()
    assert all(p.grad is not None for module in made for p in module.parameters())


def test_one_activation_for_many_widths_cannot_learn_for_every_channel():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.act = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.ReLU()

        def forward(self, x):
            return self.act(self.two(self.act(self.one(x)))).mean((2, 3))

    with pytest.raises(RecipeError, match="'act' is used for 4 and for 5 channels"):
        binarize_(Shared(), BinaryConfig(method="bnn", activation="rprelu"), input_size=(3, 4, 4))


def test_every_convolution_of_a_block_can_have_a_shortcut():
    """Bi-Real Net: real values pass by each sign, not by each second one."""
    model, input_size, rules = build("resnet18", method="bireal", shortcut="convolution")
    keys = list(model.state_dict())
    report = binarize_(model, rules, input_size=input_size)
    assert len(report.shortcuts) == 8
    assert "8 blocks with a shortcut around each convolution" in report.render()
    assert list(model.state_dict()) == keys
    for block, side in ((model.layer1[0], 8), (model.layer2[0], 8)):
        block.eval()
        with torch.no_grad():
            x = torch.randn(2, 64, side, side)
            shortcut = x if block.downsample is None else block.downsample(x)
            middle = nn.functional.hardtanh(block.bn1(block.conv1(x)) + shortcut)
            expected = nn.functional.hardtanh(block.bn2(block.conv2(middle)) + middle)
            torch.testing.assert_close(block(x), expected)


def test_blocks_with_shortcuts_are_copied_saved_and_compiled_like_others():
    model, input_size, rules = build("resnet18", method="bireal", shortcut="convolution")
    binarize_(model, rules, input_size=input_size)
    average = copy.deepcopy(model).eval()
    loaded = pickle.loads(pickle.dumps(model)).eval()
    image = torch.randn(2, *input_size)
    with torch.no_grad():
        assert torch.equal(average(image), loaded(image))
        assert torch.equal(average(image), model.eval()(image))


def test_shortcuts_no_block_can_take_are_refused():
    for name in ("resnet50d", "vit_tiny_patch16_224"):
        model, input_size, rules = build(name, shortcut="convolution")
        with pytest.raises(RecipeError) as error:
            binarize_(model, rules, input_size=input_size)
        assert error.value.key == "binary.shortcut"


def test_the_pool_behind_the_stem_is_the_one_asked_for():
    image = torch.randn(2, 64, 16, 16)
    for kind, expected in (
        ("keep", nn.functional.max_pool2d(image, 3, 2, 1)),
        ("average", nn.functional.avg_pool2d(image, 3, 2, 1, count_include_pad=False)),
        ("none", image),
    ):
        model, input_size, rules = build("resnet18", stem_pool=kind)
        binarize_(model, rules, input_size=input_size)
        assert torch.equal(model.maxpool(image), expected)
    model, input_size, rules = build("vit_tiny_patch16_224", stem_pool="none")
    with pytest.raises(RecipeError) as error:
        binarize_(model, rules, input_size=input_size)
    assert error.value.key == "binary.stem_pool"


def test_globs_choose_layers_and_exclude_wins():
    model, input_size, rules = build("resnet18", include=("layer3.*", "layer4.*"), exclude=("*.conv2",))
    assert swapped(binarize_(model, rules, input_size=input_size)) == {
        f"layer{stage}.{block}.conv1" for stage in (3, 4) for block in (0, 1)
    }


@pytest.mark.parametrize("key", ["include", "exclude", "methods"])
def test_a_pattern_that_matches_nothing_is_refused_with_its_neighbours(key):
    patterns = {"layers4.*": "bnn"} if key == "methods" else ("layers4.*",)
    model, input_size, rules = build("resnet18", **{key: patterns})
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
    ("activation", "kind"), [("hardtanh", Hardtanh), ("prelu", nn.PReLU), ("identity", nn.Identity)]
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
