"""BNext against its equations. Without these a recipe that names it would train another network than the paper's."""

import json
from dataclasses import replace

import pytest
import torch
from equations import random_tensor
from launching import TINY_RECIPE
from networks import binary_conv, classified, halved, norm, prelu, real_downsample, tiny
from torch.nn import functional
from worlds import make_world

from cyclebnn_dist import evaluate, train
from cyclebnn_dist.binary import set_progress
from cyclebnn_dist.binary.methods import BNext
from cyclebnn_dist.config import RecipeError, load_recipe
from cyclebnn_dist.config.recipe import BinaryConfig, ModelConfig
from cyclebnn_dist.metrics import read_journal
from cyclebnn_dist.models import build_model
from cyclebnn_dist.models.bnext import Unit
from cyclebnn_dist.models.skeleton import halving, mobile_channels
from cyclebnn_dist.timm_import import timm

CHANNELS = [8, 16, 32, 32, 64]
"""Stem, and blocks that double, double and halve the image, stay, and double and halve it."""


def gate(x, p, at):
    mean = x.mean((2, 3), keepdim=True)
    middle = functional.conv2d(mean, p[f"{at}.reduce.weight"], p[f"{at}.reduce.bias"]).clamp(min=0)
    return 1 / (1 + torch.exp(-functional.conv2d(middle, p[f"{at}.expand.weight"], p[f"{at}.expand.bias"])))


def plain_unit(x, p, at, *, attention, pool=lambda x: x, stride=1, recouples_shortcut=False):
    """mix = s in + (1 - s) x1, x2 = gate(mix) x1; bn2(x2) + r for FFN, bn2(x2 r) + r with r = pool(prelu(in)) for ELM."""
    shift = p[f"{at}.shift"].view(-1, 1, 1)
    x1 = prelu(
        norm(binary_conv(x + shift, p[f"{at}.conv.weight"], stride=stride), p, f"{at}.norm1"),
        p[f"{at}.act.weight"],
    )
    r = pool(prelu(x, p[f"{at}.shortcut_act.weight"])) if attention else pool(x)
    s = p[f"{at}.share"].view(-1, 1, 1)
    mix = s * (r if recouples_shortcut else pool(x)) + (1 - s) * x1
    x2 = gate(mix, p, f"{at}.se") * x1
    return norm(x2 * r if attention else x2, p, f"{at}.norm2") + r


def test_bnext_is_what_the_paper_draws():
    """Stride 2 in the first block of a new width but the first; attention in blocks 2, 4, ...; doubled by two units."""
    model, report = tiny("bnext_t", method="bnext", channels=CHANNELS)
    p, x = model.state_dict(), random_tensor(2, 3, 32, 32)
    y = norm(functional.conv2d(x, p["conv1.weight"], stride=2, padding=1), p, "bn1")
    for block, (stride, units) in enumerate([(1, 2), (2, 2), (1, 1), (2, 2)]):
        at = f"blocks.{block}"
        pool = halved if stride == 2 else lambda x: x
        y = plain_unit(y, p, f"{at}.spatial", attention=block in (1, 3), pool=pool, stride=stride)
        outputs = [plain_unit(y, p, f"{at}.pointwise.{unit}", attention=False) for unit in range(units)]
        y = torch.cat(outputs, 1)
    assert y.shape == (2, 64, 4, 4)
    expected = classified(prelu(y, p["act.weight"]), p)
    torch.testing.assert_close(model.eval()(x), expected)
    kept = {row.name: row.reason for row in report.rows if not row.swapped}
    assert {kept.pop("conv1"), kept.pop("fc")} == {"stem", "classifier"}
    assert set(kept.values()) == {"gate"}
    assert report.num_swapped == 4 + 7
    assert report.activations == ()


def test_bnext_18_is_what_the_authors_release():
    """Attention and FFN by turns, which recouple with the shortcut itself; real convolutions where channels double."""
    model, report = tiny("bnext_18", method="bnext", channels=[8, 16])
    p, x = model.state_dict(), random_tensor(2, 3, 32, 32)
    y = norm(functional.conv2d(x, p["conv1.weight"], stride=2, padding=3), p, "bn1")
    y = functional.max_pool2d(y, 3, 2, 1)
    for unit in range(8):
        at = f"blocks.{unit}"
        down = {"pool": lambda x, at=at: real_downsample(x, p, f"{at}.downsample"), "stride": 2}
        y = plain_unit(
            y, p, at, attention=unit % 2 == 0, recouples_shortcut=True, **(down if unit == 4 else {})
        )
    expected = classified(prelu(y, p["act.weight"]), p)
    torch.testing.assert_close(model.eval()(x), expected)
    reasons = {row.name: row.reason for row in report.rows if not row.swapped}
    assert reasons["blocks.4.downsample.1"] == "downsample"
    assert report.num_swapped == 8


@pytest.mark.parametrize("attention", [True, False])
def test_a_share_is_kept_within_its_bounds_and_goes_on_learning_there(attention):
    """A clamp in the graph would end its gradient at the first step beyond the bound, for good."""
    torch.manual_seed(0)
    unit = Unit((32, 32), 3, stride=2, pool=halving(), attention=attention)
    x = torch.randn(2, 32, 6, 6)
    with torch.no_grad():
        unit.share.copy_(torch.tensor([-0.2, 1.3, 0.0, 1.0, 0.4, 0.5, 0.6, -0.0]).repeat(4))
    expected = unit.share.detach().clamp(0, 1)
    outputs = unit.eval()(x)
    assert unit.share.min() < 0, "an evaluation changes nothing"
    unit.train()(x).square().sum().backward()
    assert torch.equal(unit.share.detach(), expected)
    assert unit.share.grad[:2].abs().min() > 0
    unit.eval().norm1.reset_running_stats()
    unit.norm2.reset_running_stats()
    torch.testing.assert_close(unit(x), outputs)


@pytest.mark.parametrize("edge_bits", [8, 32])
@pytest.mark.parametrize("name", ["bnext_t", "bnext_18", "reactnet_a", "reactnet_18"])
def test_every_parameter_is_trained(name, edge_bits):
    """One without a gradient would stop DDP, which waits for all of them."""
    model, _ = build_model(
        ModelConfig(name=name, num_classes=5, kwargs={"channels": [8, 16, 32]}),
        BinaryConfig(method="bnext" if name.startswith("bnext") else "reactnet", edge_bits=edge_bits),
        image_size=32,
    )
    functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("side", [30, 33, 48])
def test_images_of_any_size_are_taken(side):
    for name in ("bnext_t", "bnext_18", "reactnet_a", "reactnet_18"):
        config = ModelConfig(name=name, num_classes=5, kwargs={"channels": [8, 8, 16, 32]})
        build_model(config, BinaryConfig(method="bnext"), image_size=side)


def test_names_are_those_of_any_timm_model():
    names = ["bnext_18", "bnext_l", "bnext_m", "bnext_s", "bnext_t", "reactnet_18", "reactnet_a"]
    assert sorted(timm.list_models("bnext_*") + timm.list_models("reactnet_*")) == names
    assert {timm.get_pretrained_cfg(name).classifier for name in names} == {"fc"}
    refusals = {
        "model.name": ModelConfig(name="bnext_tiny"),
        "model.pretrained": ModelConfig(name="bnext_t", pretrained=True),
        "model.kwargs.channels": ModelConfig(name="bnext_t", kwargs={"channels": [8, 16, 24]}),
    }
    for key, config in refusals.items():
        with pytest.raises(RecipeError) as error:
            build_model(config, BinaryConfig(method="bnext"), image_size=32)
        assert error.value.key == key
        assert key != "model.name" or "bnext_t" in error.value.cure


def test_sizes_are_the_published_lists_of_channels():
    assert mobile_channels(32, (2, 2, 6, 2)) == [32, 64, *[128] * 2, *[256] * 2, *[512] * 6, *[1024] * 2]
    assert mobile_channels(48, (4, 4, 8, 4)) == [48, 96, *[192] * 4, *[384] * 4, *[768] * 8, *[1536] * 4]
    with torch.device("meta"):
        blocks = {name: timm.create_model(f"bnext_{name}").blocks for name in "tsml"}
    assert {name: len(own) for name, own in blocks.items()} == {"t": 13, "s": 13, "m": 21, "l": 29}
    last = {name: own[-1].spatial.conv.in_channels for name, own in blocks.items()}
    assert last == {"t": 1024, "s": 1536, "m": 1536, "l": 2048}


def test_latent_weights_start_small_and_of_both_signs():
    weight = timm.create_model("bnext_t", channels=[32, 64]).blocks[0].spatial.conv.weight
    assert weight.std().item() == pytest.approx(1e-3, rel=0.05)
    assert abs((weight > 0).float().mean() - 0.5) < 0.05


def test_a_small_stem_keeps_the_resolution_of_small_images():
    config = ModelConfig(name="bnext_t", num_classes=5, small_stem=True, kwargs={"channels": CHANNELS})
    model, _ = build_model(config, BinaryConfig(method="bnext"), image_size=32)
    seen = []
    model.blocks.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert seen == [(1, 8, 32, 32)]


def train_and_watch(rank, size, path):
    """How many values weights had at most: in training, and in evaluation."""
    torch.use_deterministic_algorithms(True)
    most = {True: 0, False: 0}
    binarize = BNext.binarize_weight

    def watched(self, weight):
        result = binarize(self, weight)
        most[self.training] = max(most[self.training], max(len(row.unique()) for row in result.flatten(1)))
        return result

    BNext.binarize_weight = watched
    try:
        status = train.run_recipe(load_recipe(path), make_world(rank, size))
    finally:
        BNext.binarize_weight = binarize
    return status, most[True], most[False]


def evaluated(rank, size, run_dir):
    return evaluate.evaluate_checkpoint(run_dir, make_world(rank, size))


@pytest.mark.parametrize("epochs", [0.2, 1.0])
def test_a_run_of_any_length_evaluates_binary_weights(ranks, tmp_path, tiny_data, epochs):
    """The authors' code needs 153 epochs until its weights are binary; before that it reports something else's accuracy."""
    path = tmp_path / "bnext.yaml"
    text = TINY_RECIPE.format(run_dir=tmp_path / "run", data=tiny_data)
    for old, new in [
        (
            "{name: resnet18, num_classes: 10, kwargs: {channels: [16, 32, 32, 64]}}",
            "{name: bnext_t, num_classes: 10, kwargs: {channels: [8, 16, 32]}}\n"
            "binary: {method: bnext, edge_bits: 8}",
        ),
        ("epochs: 2.0", f"epochs: {epochs}"),
        ("every_epochs: 1.0", "every_epochs: 0.2"),
        ("mode: offline", "mode: disabled"),
    ]:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    for status, in_training, in_evaluation in ranks(2, train_and_watch, path):
        assert status == 0
        assert in_training > 2, "weights are soft at the start"
        assert in_evaluation == 2
    run_dir = tmp_path / "run"
    evaluations = [row for row in read_journal(run_dir) if row["event"] == "eval"]
    assert len(evaluations) == round(5 * epochs)
    summary = json.loads((run_dir / "summary.json").read_text())
    (result,) = ranks(1, evaluated, run_dir)
    assert (result["top1"], result["images"]) == (summary["eval_top1"], 30)


def one_step(model, images):
    model.zero_grad()
    model(images).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["bnext_t", "reactnet_a"])
def test_compiled_it_is_one_graph_and_recomputed_it_learns_the_same(name):
    """In one graph nothing waits for the device to say a number."""
    config = ModelConfig(name=name, num_classes=5, kwargs={"channels": [8, 8, 16]})
    rules = BinaryConfig(method="bnext" if name == "bnext_t" else "reactnet", edge_bits=8)
    models = []
    for recompute in (False, True):
        torch.manual_seed(0)
        models.append(build_model(config, replace(rules, recompute=recompute), image_size=32)[0])
        set_progress(models[-1], 0.05)
    images = torch.randn(4, 3, 32, 32)
    expected, recomputed = (one_step(model, images) for model in models)
    models[0].compile(backend="eager", fullgraph=True)
    for found in (recomputed, one_step(models[0], images)):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
