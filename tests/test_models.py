"""Models of recipes: built as asked, or refused with the key and the cure."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from cyclebnn_dist.binary import set_widths
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import (
    BinaryConfig,
    DataConfig,
    FirstPhaseConfig,
    ModelConfig,
    Recipe,
    TrainConfig,
)
from cyclebnn_dist.config.validate import validate
from cyclebnn_dist.models import build_model, summarize_recipe
from cyclebnn_dist.models.memory import activation_bytes
from cyclebnn_dist.models.summary import describe_recipe
from cyclebnn_dist.search.costs import count_costs

RESNET = ModelConfig(name="resnet18", num_classes=4)
REAL = BinaryConfig(method="none")


def build(model=RESNET, binary=REAL, *, image_size=32):
    torch.manual_seed(0)
    return build_model(model, binary, image_size=image_size)[0]


def refused(model, *, image_size=32, binary=REAL):
    with pytest.raises(RecipeError) as error:
        build_model(model, binary, image_size=image_size)
    return error.value


def test_unknown_model_is_refused_with_its_neighbours():
    error = refused(ModelConfig(name="resnet19"))
    assert error.key == "model.name"
    assert "resnet18" in error.cure or "resnet10" in error.cure


def test_unknown_weights_of_a_known_model_are_refused_with_those_there_are():
    error = refused(ModelConfig(name="resnet18.a9_in1k"))
    assert error.key == "model.name"
    assert "a1_in1k" in error.cure


def test_unknown_argument_is_refused_by_name():
    error = refused(replace(RESNET, kwargs={"drop_pth_rate": 0.1}))
    assert error.key == "model.kwargs.drop_pth_rate"


def test_model_for_one_size_is_built_for_the_recipes():
    """A vision transformer of 224 pixels trains at 64 without a word about img_size."""
    for name, side in (("vit_tiny_patch16_224", 64), ("levit_128s", 64)):
        model = build(ModelConfig(name=name, num_classes=4, kwargs={}), image_size=side)
        assert model.eval()(torch.randn(1, 3, side, side)).shape == (1, 4)


def test_images_a_model_cannot_take_are_refused():
    error = refused(ModelConfig(name="vit_tiny_patch16_224", num_classes=4), image_size=8)
    assert error.key == "data.image_size"
    assert "224" in error.cure


def test_models_come_in_training_mode_and_equal_for_equal_seeds():
    one, two = build(binary=BinaryConfig()), build(binary=BinaryConfig())
    assert all(module.training for module in one.modules())
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())


def test_real_weights_start_a_binary_model(tmp_path):
    """Their magnitudes are the scales its filters begin with."""
    trained = build()
    save_file(trained.state_dict(), tmp_path / "real.safetensors")
    torch.manual_seed(1)
    model, _ = build_model(
        replace(RESNET, weights=str(tmp_path / "real.safetensors")), BinaryConfig(), image_size=32
    )
    weight = trained.layer1[0].conv1.weight
    assert torch.equal(model.layer1[0].conv1.weight, weight)
    binarizer = model.layer1[0].conv1.binarizer
    torch.testing.assert_close(binarizer.alpha * binarizer.gain, weight.abs().mean((1, 2, 3)))


def test_a_checkpoint_folder_starts_the_model_it_holds(tmp_path):
    trained = build(binary=BinaryConfig())
    with torch.no_grad():
        trained.layer1[0].conv1.binarizer.alpha.mul_(3.0)
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(1)
    model, _ = build_model(replace(RESNET, weights=str(tmp_path)), BinaryConfig(), image_size=32)
    images = torch.randn(2, 3, 32, 32)
    for each in (trained, model):
        set_widths(each.eval(), forward_bits=4, backward_bits=32)
    assert torch.equal(trained(images), model(images))


@pytest.mark.parametrize("activation", ["prelu", "rprelu"])
def test_a_checkpoint_of_a_method_that_learns_nothing_itself_brings_what_its_activations_learned(
    tmp_path, activation
):
    """Its only keys beside a real model's are those of activations."""
    binary = BinaryConfig(method="bireal", activation=activation)
    trained = build(binary=binary)
    with torch.no_grad():
        for parameter in trained.layer1[0].act1.parameters():
            parameter += 0.5
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    model = build(replace(RESNET, weights=str(tmp_path)), binary)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in trained.state_dict().items())


def test_weights_for_other_classes_leave_the_classifier_new(tmp_path, caplog):
    trained = build(replace(RESNET, num_classes=7))
    save_file(trained.state_dict(), tmp_path / "real.safetensors")
    model = build(replace(RESNET, weights=str(tmp_path / "real.safetensors")))
    assert torch.equal(model.conv1.weight, trained.conv1.weight)
    assert model.fc.weight.shape == (4, 512)
    assert "classifier" in caplog.text


def test_weights_of_another_method_are_taken_with_a_word(tmp_path, caplog):
    trained = build(binary=BinaryConfig(method="cyclebnn"))
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    model = build(replace(RESNET, weights=str(tmp_path)), BinaryConfig(method="bireal"))
    assert torch.equal(model.layer1[0].conv1.weight, trained.layer1[0].conv1.weight)
    assert "another binarization method" in caplog.text


def test_weights_of_another_model_are_refused_with_what_differs(tmp_path):
    save_file(build(ModelConfig(name="resnet34", num_classes=4)).state_dict(), tmp_path / "real.safetensors")
    error = refused(replace(RESNET, weights=str(tmp_path / "real.safetensors")))
    assert error.key == "model.weights"
    assert "layer1.2." in error.problem
    assert "is not in the model" in error.problem


@pytest.mark.parametrize("content", [None, b"not a safetensors file"])
def test_weights_that_are_not_there_or_not_weights_are_refused(tmp_path, content):
    file = tmp_path / "x.safetensors"
    if content:
        file.write_bytes(content)
    assert refused(replace(RESNET, weights=str(file))).key == "model.weights"


RECIPE = replace(
    Recipe(),
    model=RESNET,
    data=replace(Recipe().data, image_size=32),
    train=replace(Recipe().train, epochs=1.0),
)


def test_summary_is_one_json_object_with_the_counts():
    summary = json.loads(summarize_recipe(RECIPE, as_json=True))
    assert summary["ops"] == summary["bops"] / 64 + summary["flops"]
    assert summary["params"] > summary["binary_params"] > 0
    assert summary["size_bits"] == summary["binary_params"] + 32 * (
        summary["params"] - summary["binary_params"]
    )
    assert summary["training_saving_binary_layers"] == pytest.approx(0.973, abs=1e-3)
    assert 0 < summary["training_saving"] < summary["training_saving_binary_layers"]
    assert len(summary["layers"]) == summary["num_layers"] == 21
    assert sum(layer["swapped"] for layer in summary["layers"]) == summary["num_swapped"] == 16


def test_a_first_phase_of_real_weights_saves_nothing():
    half = replace(RECIPE, first_phase=FirstPhaseConfig(epochs=RECIPE.train.epochs / 2))
    summary = json.loads(summarize_recipe(half, as_json=True))
    assert summary["training_saving_binary_layers"] == pytest.approx(0.973 / 2, abs=1e-2)


def test_summary_tells_people_what_is_binary_and_why_not():
    text = summarize_recipe(RECIPE)
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert lines["conv1"].endswith("real: stem")
    assert lines["layer1.0.conv1"].endswith("cyclebnn")
    assert "16 of 21 layers binary" in lines["model"]


def test_the_share_of_the_real_models_operations_is_what_budgets_are_shares_of():
    layers = {"layer1.0.conv1": "real", "layer4.1.conv2": "real"}
    recipe = replace(Recipe(), model=ModelConfig(num_classes=10), data=DataConfig(image_size=32))
    costs = count_costs(recipe)
    summary = describe_recipe(replace(recipe, binary=replace(recipe.binary, layers=layers)))
    assert summary["ops"] / summary["ops_real"] == pytest.approx(costs.share(set(costs.names) - set(layers)))


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_activation_memory_an_image_is_that_of_large_batches(amp):
    """What does not grow with the batch (copies of weights) is told by itself, not spread over two images."""
    recipe = replace(
        Recipe(),
        model=ModelConfig(num_classes=10),
        data=DataConfig(image_size=32),
        train=TrainConfig(amp=amp),
    )
    summary = describe_recipe(recipe)
    model, _ = build_model(recipe.model, recipe.binary, image_size=32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp == "bf16"):
        counted = activation_bytes(model, torch.randn(24, 3, 32, 32))
    assert counted == pytest.approx(
        24 * summary["activation_bytes"] + summary["activation_bytes_constant"], rel=1e-3
    )


def test_recomputing_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"binary\.recompute"):
        validate(replace(Recipe(), binary=BinaryConfig(method="none", recompute=True)))


def test_a_small_stem_keeps_the_resolution_of_small_images():
    """Images of 32 pixels would be down to 8 before the first block, and accuracy points lower than the papers'."""
    small = replace(RESNET, small_stem=True)
    model = build(small)
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    assert model.maxpool(model.conv1(torch.randn(1, 3, 32, 32))).shape == (1, 64, 32, 32)
    assert 0.9 < model.conv1.weight.std() / (2 / (64 * 9)) ** 0.5 < 1.1
    assert refused(replace(small, name="vit_tiny_patch16_224")).key == "model.small_stem"
    with pytest.raises(RecipeError, match="first convolution is another one"):
        validate(Recipe(model=replace(small, pretrained=True)))
