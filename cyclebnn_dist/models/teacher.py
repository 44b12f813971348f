"""The teacher: a trained model that another one learns from, with its weights and the images it wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cyclebnn_dist.agreement import hash_tensors
from cyclebnn_dist.binary import set_progress, set_widths
from cyclebnn_dist.checkpoint import has_real_weights, read_meta
from cyclebnn_dist.config import SAVED_NAME, RecipeError, load_saved
from cyclebnn_dist.config.recipe import BinaryConfig, ModelConfig, Recipe
from cyclebnn_dist.models.build import CHECKPOINT_WEIGHTS, build_model, load_weights, read_weights
from cyclebnn_dist.timm_import import timm

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, of images in [0, 1]."""


@dataclass(frozen=True)
class Teacher:
    """One trained model and how it wants its images."""

    network: nn.Module
    """In evaluation mode, without gradients."""
    normalization: Normalization
    digest: str
    """Of all its tensors."""


def load_teachers(recipe: Recipe, *, trained: bool = True) -> dict[str, Teacher]:
    """The teachers of a recipe by name, on the CPU; random generators are afterwards as before.

    Args:
        trained: false for the same models with new weights, to count and time: nothing is fetched.

    Raises:
        RecipeError: one is unknown, has no weights that can be had, or cannot take the images or tell the classes apart.
    """
    config = recipe.distill
    teachers: dict[str, Teacher] = {}
    with torch.random.fork_rng(devices=[]):
        for key, name in [
            *((f"distill.assistants[{index}]", name) for index, name in enumerate(config.assistants)),
            ("distill.teacher", config.teacher),
        ]:
            if name and name not in teachers:
                try:
                    weights = config.weights.get(name, "")
                    teachers[name] = _load(name, weights, recipe=recipe, trained=trained)
                except RecipeError as error:
                    raise _about_teacher(error, name, key=key) from error
    return teachers


def _load(name: str, weights: str, *, recipe: Recipe, trained: bool) -> Teacher:
    num_classes, side = recipe.model.num_classes, recipe.data.image_size
    if trained and not weights:
        return _published(name, num_classes=num_classes, image_size=side)
    path = Path(weights)
    folder = path.parent if path.name == CHECKPOINT_WEIGHTS else path
    if weights and (folder / SAVED_NAME).is_file():
        return _of_checkpoint(name, folder, num_classes=num_classes, image_size=side)
    model = ModelConfig(name=name, num_classes=num_classes)
    network, _ = build_model(model, BinaryConfig(method="none"), image_size=side)
    if trained:
        _load_all(network, read_weights(path), source=str(path), num_classes=num_classes)
    return _finished(network, _own_normalization(network))


def _published(name: str, *, num_classes: int, image_size: int) -> Teacher:
    known = timm.models.is_model_pretrained(name)
    _check_classes(name, vars(timm.get_pretrained_cfg(name)) if known else {}, num_classes=num_classes)
    model = ModelConfig(name=name, num_classes=num_classes, pretrained=True)
    network, _ = build_model(model, BinaryConfig(method="none"), image_size=image_size)
    _check_classes(name, vars(network).get("pretrained_cfg", {}), num_classes=num_classes)
    return _finished(network, _own_normalization(network))


def _check_classes(name: str, cfg: Mapping[str, Any], *, num_classes: int) -> None:
    """timm gives a model for other classes a classifier that knows nothing, without a word."""
    own = cfg.get("num_classes", num_classes)
    if own != num_classes:
        raise RecipeError(
            "model.num_classes",
            f"the published weights of {name} tell {own} classes apart; the model that learns has {num_classes}",
            "a teacher must know the same classes: choose another, or its weights by distill.weights",
        )


def _of_checkpoint(name: str, folder: Path, *, num_classes: int, image_size: int) -> Teacher:
    """A model that this project has trained, with the weights and at the forward width it was evaluated with."""
    weights = read_weights(folder)
    saved = load_saved(folder / SAVED_NAME)
    if saved.model.name != name:
        raise RecipeError(
            "model.weights",
            f"{folder} holds a {saved.model.name}",
            f"name the teacher {saved.model.name}, or another folder",
        )
    if saved.model.num_classes != num_classes:
        raise RecipeError(
            "model.weights",
            f"{folder} tells {saved.model.num_classes} classes apart; the model that learns has {num_classes}",
            "a teacher must know the same classes: name another",
        )
    try:
        forward_bits = saved.eval.forward_bits or int(read_meta(folder)["eval_forward_bits"])
        real_weights = has_real_weights(folder)
    except (OSError, ValueError) as error:
        raise RecipeError("model.weights", f"{folder} is no checkpoint: {error}", "name another") from error
    model = ModelConfig(
        name=name,
        num_classes=num_classes,
        small_stem=saved.model.small_stem,
        kwargs=saved.model.kwargs,
    )
    network, _ = build_model(model, saved.binary, image_size=image_size)
    _load_all(network, weights, source=str(folder), num_classes=num_classes)
    set_progress(network, 1.0, real_weights=real_weights)
    set_widths(network, forward_bits=forward_bits, backward_bits=32)
    return _finished(network, (saved.data.mean, saved.data.std))


def _load_all(
    network: nn.Module, weights: Mapping[str, torch.Tensor], *, source: str, num_classes: int
) -> None:
    """Load every weight; unlike a start for training, a teacher keeps its classifier."""
    own = network.state_dict()
    other = [key for key, value in weights.items() if key in own and own[key].shape != value.shape]
    if other:
        shapes = f"{other[0]} is {list(weights[other[0]].shape)}, not {list(own[other[0]].shape)}"
        raise RecipeError(
            "model.weights",
            f"{source} is of another model, or of other classes than the {num_classes} to be learned: {shapes}",
            "a teacher must know the same classes: name other weights, or another teacher",
        )
    load_weights(network, weights, source=source)


def _finished(network: nn.Module, normalization: Normalization) -> Teacher:
    network.eval().requires_grad_(False)
    return Teacher(network, normalization, digest=hash_tensors(network.state_dict().values()))


def _own_normalization(network: nn.Module) -> Normalization:
    """That of timm's weights for this model."""
    cfg = vars(network).get("pretrained_cfg") or vars(timm.models.PretrainedCfg())
    return tuple(cfg["mean"]), tuple(cfg["std"])


def _about_teacher(error: RecipeError, name: str, *, key: str) -> RecipeError:
    """The refusal of a model as one of a teacher: by the key of ``distill`` that names it."""
    if error.key == "model.weights":
        return RecipeError(f"distill.weights.{name}", error.problem, error.cure)
    problem = error.problem if name in error.problem else f"{name}: {error.problem}"
    cure = error.cure.replace("model.weights takes a file", f"distill.weights={{{name}: FILE}} takes a file")
    return RecipeError(key, problem, cure)
