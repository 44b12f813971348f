"""Teachers. Without these one would teach with weights, images or classes other than those it was trained with."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from cyclebnn_dist.binary import set_widths, using_real_weights
from cyclebnn_dist.checkpoint import layout
from cyclebnn_dist.config import RecipeError, save_recipe
from cyclebnn_dist.config.recipe import BinaryConfig, DataConfig, DistillConfig, ModelConfig, Recipe
from cyclebnn_dist.losses import Objective, Teachers
from cyclebnn_dist.models import build_model, load_teachers, summarize_recipe
from cyclebnn_dist.models.build import create_backbone
from cyclebnn_dist.precision import Widths
from cyclebnn_dist.preview.compute import measure_compute
from cyclebnn_dist.timm_import import timm

EFFICIENTNET, CONVNEXT = "test_efficientnet", "test_convnext"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def network(name, *, num_classes=10, seed=0):
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=num_classes)
    for module in model.modules():  # else its logits hardly depend on the images
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.01, 0.1)
    return model.eval()


@pytest.fixture
def files(tmp_path):
    """Weights of two models, by name."""
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in (EFFICIENTNET, CONVNEXT)}
    for name, path in paths.items():
        save_file(network(name).state_dict(), path)
    return paths


def recipe(teacher=EFFICIENTNET, *, num_classes=10, **distill):
    return Recipe(
        model=ModelConfig(num_classes=num_classes),
        data=DataConfig(image_size=32),
        distill=DistillConfig(teacher=teacher, **distill),
    )


def teachers_of(recipe, *, total_steps=10):
    return Teachers(
        recipe.distill,
        load_teachers(recipe),
        normalization=(recipe.data.mean, recipe.data.std),
        total_steps=total_steps,
        device=torch.device("cpu"),
    )


def refused(recipe):
    with pytest.raises(RecipeError) as error:
        load_teachers(recipe)
    return error.value


def pixels():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def normalized(images, mean, std):
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_each_sees_images_normalized_as_its_weights_want_them(files):
    """test_convnext wants a mean of 1/2; the recipe's is ImageNet's."""
    teachers = teachers_of(recipe(assistants=(CONVNEXT,), weights=files, amp="fp32"))
    images = normalized(pixels(), *IMAGENET)
    before = images.clone()
    said = teachers.logits(images, step=0)
    with torch.no_grad():
        expected = [
            network(CONVNEXT)(normalized(pixels(), (0.5,) * 3, (0.5,) * 3)),
            network(EFFICIENTNET)(images),
        ]
    torch.testing.assert_close(said, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(images, before), "the student's batch is its own"
    assert not said.requires_grad


def test_assistants_take_turns_and_one_that_is_the_teacher_too_works_once(files):
    teachers = teachers_of(recipe(assistants=(CONVNEXT, EFFICIENTNET), weights=files), total_steps=5)
    assert [teachers.names(step) for step in range(5)] == [(CONVNEXT, EFFICIENTNET)] * 3 + [
        (EFFICIENTNET, EFFICIENTNET)
    ] * 2
    assert [teachers.place(step)["assistant"] for step in range(5)] == [0, 0, 0, 1, 1]
    passes = []
    teachers._teachers[EFFICIENTNET].network.register_forward_hook(lambda *_: passes.append(1))
    images = normalized(pixels(), *IMAGENET)
    one, other = teachers.logits(images, step=4)
    assert torch.equal(one, other)
    assert len(passes) == 1
    assert not torch.equal(*teachers.logits(images, step=2))


def test_random_generators_and_batch_statistics_stay_as_they_were(files):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    loaded = recipe(assistants=(CONVNEXT,), weights=files)
    teachers = teachers_of(loaded)
    described = teachers.description
    for step in (0, 9):
        teachers.logits(pixels(), step=step)
    assert torch.equal(torch.get_rng_state(), state)
    statistics = teachers._teachers[EFFICIENTNET].network.state_dict()
    assert all(
        torch.equal(value, statistics[key]) for key, value in network(EFFICIENTNET).state_dict().items()
    )
    assert teachers_of(loaded).description == described


def test_other_weights_are_another_description(files, tmp_path):
    one = teachers_of(recipe(weights={EFFICIENTNET: files[EFFICIENTNET]}))
    weights = network(EFFICIENTNET).state_dict()
    next(value for key, value in weights.items() if key.endswith("running_mean"))[0] += 1e-3
    save_file(weights, tmp_path / "other.safetensors")
    other = teachers_of(recipe(weights={EFFICIENTNET: str(tmp_path / "other.safetensors")}))
    assert one.description.startswith(f"{EFFICIENTNET} ")
    assert other.description != one.description


def without_idle_branches(model):
    """timm begins with branches that add nothing: norms of weight 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    return model


def checkpoint_folder(path, saved, model, **facts):
    path.mkdir(parents=True)
    save_recipe(saved, path / "recipe.yaml")
    save_file(model.state_dict(), path / "model.safetensors")
    meta = {"format": layout.FORMAT, "eval_forward_bits": 3, **facts}
    layout.write_meta(path, meta)
    return str(path)


@pytest.mark.parametrize("method", ["none", "cyclebnn"])
def test_a_run_of_this_project_teaches_as_it_was_evaluated(tmp_path, method):
    """With its own stem, keyword arguments, width and normalization, none of which a file of weights tells."""
    saved = Recipe(
        model=ModelConfig(
            name="resnet18", num_classes=10, small_stem=True, kwargs={"channels": [8, 8, 16, 16]}
        ),
        binary=BinaryConfig(method=method),
        data=DataConfig(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)),
    )
    torch.manual_seed(0)
    trained = without_idle_branches(build_model(saved.model, saved.binary, image_size=32)[0])
    folder = checkpoint_folder(tmp_path / "step", saved, trained)
    set_widths(trained.eval(), forward_bits=3, backward_bits=32)
    with torch.no_grad():
        expected = trained(normalized(pixels(), (0.5,) * 3, (0.2,) * 3))
    for named in (folder, f"{folder}/model.safetensors"):
        teachers = teachers_of(recipe("resnet18", weights={"resnet18": named}, amp="fp32"))
        said = teachers.logits(normalized(pixels(), *IMAGENET), step=0)[0]
        torch.testing.assert_close(said, expected, rtol=1e-3, atol=1e-3)
    error = refused(recipe("resnet34", weights={"resnet34": folder}))
    assert error.key == "distill.weights.resnet34"
    assert "holds a resnet18" in error.problem
    error = refused(recipe("resnet18", num_classes=4, weights={"resnet18": folder}))
    assert error.key == "distill.weights.resnet18"
    assert "tells 10 classes apart; the model that learns has 4" in error.problem


@pytest.mark.parametrize("weights", ["real", "binary"])
def test_a_checkpoint_teaches_with_the_weights_of_its_phase(tmp_path, weights):
    """Signs of latent weights that were trained as they are know little."""
    saved = Recipe(
        model=ModelConfig(name="resnet18", num_classes=10, kwargs={"channels": [8, 8, 16, 16]}),
        binary=BinaryConfig(method="reactnet"),
        data=DataConfig(image_size=32),
    )
    torch.manual_seed(0)
    trained = without_idle_branches(build_model(saved.model, saved.binary, image_size=32)[0])
    folder = checkpoint_folder(tmp_path / "step", saved, trained, weights=weights)
    with torch.no_grad(), using_real_weights(trained.eval(), weights == "real"):
        expected = trained(pixels())
    teachers = teachers_of(recipe("resnet18", weights={"resnet18": folder}, amp="fp32"))
    torch.testing.assert_close(teachers.logits(pixels(), step=0)[0], expected)


@pytest.mark.parametrize("named", [".", "checkpoints"])
def test_a_run_folder_in_the_place_of_a_checkpoint_is_told_which_to_name(tmp_path, named):
    saved = Recipe(model=ModelConfig(name=EFFICIENTNET, num_classes=10), binary=BinaryConfig(method="none"))
    save_recipe(saved, tmp_path / "recipe.yaml")
    folder = checkpoint_folder(tmp_path / "checkpoints" / "step_000000004", saved, network(EFFICIENTNET))
    error = refused(recipe(weights={EFFICIENTNET: str(tmp_path / named)}))
    assert error.key == f"distill.weights.{EFFICIENTNET}"
    assert folder in error.cure
    load_teachers(recipe(weights={EFFICIENTNET: folder}))


def test_a_teacher_that_is_not_there_is_refused_by_the_key_that_names_it(files, tmp_path):
    error = refused(recipe("efficientnet_b9"))
    assert error.key == "distill.teacher"
    assert "efficientnet_b8" in error.cure
    error = refused(recipe(assistants=(CONVNEXT, "resnet19"), weights=files))
    assert error.key == "distill.assistants[1]"
    error = refused(recipe(weights={EFFICIENTNET: str(tmp_path / "gone.safetensors")}))
    assert error.key == f"distill.weights.{EFFICIENTNET}"
    assert "gone.safetensors" in error.problem
    error = refused(recipe(weights={EFFICIENTNET: files[CONVNEXT]}))
    assert error.key == f"distill.weights.{EFFICIENTNET}"
    error = refused(recipe("test_vit3", weights={"test_vit3": files[CONVNEXT]}))
    assert error.key == "distill.weights.test_vit3", "a model for 160 pixels is built for the recipe's 32"


def test_a_teacher_of_other_classes_is_refused_before_anything_is_fetched(files):
    """timm would give it a classifier that knows nothing, and the student would learn noise."""
    error = refused(recipe("efficientnet_b0"))
    assert error.key == "distill.teacher"
    assert "1000 classes" in error.problem
    assert "has 10" in error.problem
    error = refused(recipe(num_classes=7, weights=files))
    assert error.key == f"distill.weights.{EFFICIENTNET}"
    assert "than the 7 to be learned: classifier.bias is [10], not [7]" in error.problem


def test_a_teacher_that_cannot_take_the_images_is_refused(files):
    small = replace(recipe(weights=files), data=DataConfig(image_size=8))
    vit = replace(
        small, distill=DistillConfig(teacher="vit_tiny_patch16_224", weights={"vit_tiny_patch16_224": "x"})
    )
    error = refused(vit)
    assert error.key == "distill.teacher"
    assert "cannot take images of 8 pixels" in error.problem


def test_published_weights_are_those_of_the_cache(tmp_path, monkeypatch):
    """On a node without a network; and the files of every rank are the same."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    named = ModelConfig(name=EFFICIENTNET, num_classes=1000, pretrained=True)
    with pytest.raises(RecipeError) as error:
        create_backbone(named, image_size=32)
    assert "HF_HUB_OFFLINE is set" in error.value.problem
    assert "hf download timm/test_efficientnet.r160_in1k" in error.value.cure
    error = refused(recipe(num_classes=1000))
    assert error.key == "distill.teacher"
    assert f"distill.weights={{{EFFICIENTNET}: FILE}}" in error.cure

    repository = tmp_path / "models--timm--test_efficientnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    published = network(EFFICIENTNET, num_classes=1000, seed=5)
    save_file(published.state_dict(), repository / "snapshots" / "abc" / "model.safetensors")
    found = create_backbone(named, image_size=32)
    assert torch.equal(found.conv_stem.weight, published.conv_stem.weight)
    said = teachers_of(recipe(num_classes=1000, amp="fp32")).logits(pixels(), step=0)
    with torch.no_grad():
        torch.testing.assert_close(said[0], published(pixels()), rtol=1e-4, atol=1e-5)


def test_a_student_learns_what_a_teacher_says_without_a_label(tmp_path):
    """The labels it is given are all wrong."""
    teaching = network(EFFICIENTNET)
    with torch.no_grad():
        teaching.classifier.weight.mul_(20.0)
    save_file(teaching.state_dict(), tmp_path / "teacher.safetensors")
    made = recipe(weights={EFFICIENTNET: str(tmp_path / "teacher.safetensors")})
    objective = Objective(made, teachers=teachers_of(made))
    images = normalized(torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(2)), *IMAGENET)
    images = images * torch.linspace(0.1, 3.0, 32)[:, None, None, None]
    with torch.no_grad():
        told = teaching(images).argmax(dim=1)
    torch.manual_seed(0)
    student = ModelConfig(name="resnet18", num_classes=10, kwargs={"channels": [16, 16, 32, 32]})
    model, _ = build_model(student, BinaryConfig(method="bireal"), image_size=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        objective(model, images, model(images), (told + 1) % 10, step=0).backward()
        optimizer.step()
    agreeing = (model(images).argmax(dim=1) == told).float().mean()
    assert agreeing > 0.8
    assert told.bincount().max() < 16, "one answer for all would be no lesson"


def test_the_summary_counts_teachers_that_it_need_not_fetch(files):
    named = replace(recipe(assistants=(CONVNEXT,)), model=ModelConfig(name="resnet18", num_classes=10))
    summary = json.loads(summarize_recipe(named, as_json=True))["teachers"]
    assert list(summary) == [CONVNEXT, EFFICIENTNET]
    for name, found in summary.items():
        assert found["params"] == sum(parameter.numel() for parameter in network(name).parameters())
        assert found["bops"] == 0 < found["flops"]
    assert f"{EFFICIENTNET} {summary[EFFICIENTNET]['flops']:.4g} MACs an image" in summarize_recipe(named)


def test_a_plan_measures_the_teachers_passes_too(monkeypatch):
    """Their share of a step of BNext-T is the larger one; and a login node has no weights to read."""
    asked = []
    logits = Teachers.logits
    monkeypatch.setattr(
        Teachers, "logits", lambda self, *given, **named: asked.append(1) or logits(self, *given, **named)
    )
    made = recipe(weights={EFFICIENTNET: "not/here.safetensors"})
    model, _ = build_model(ModelConfig(name=EFFICIENTNET, num_classes=10), made.binary, image_size=32)
    widths = Widths(forward_bits=2, backward_bits=8, communication_bits=8)
    cpu = torch.device("cpu")
    seconds = measure_compute(model, made, batch=2, widths=widths, device=cpu)
    assert seconds > 0
    assert len(asked) >= 2
