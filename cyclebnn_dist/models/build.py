"""The model of a recipe: a timm backbone with its layers swapped."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cyclebnn_dist.binary import SwapReport, binarize_
from cyclebnn_dist.binary.rules import classifier_names
from cyclebnn_dist.binary.trial import trial_forward
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import BinaryConfig, ModelConfig
from cyclebnn_dist.models import bnext as bnext  # whose models timm knows from here on
from cyclebnn_dist.models import hub
from cyclebnn_dist.models import reactnet as reactnet
from cyclebnn_dist.timm_import import timm

log = logging.getLogger(__name__)

CHECKPOINT_WEIGHTS = "model.safetensors"


def build_model(model: ModelConfig, binary: BinaryConfig, *, image_size: int) -> tuple[nn.Module, SwapReport]:
    """A timm model with its layers swapped, on the CPU, in training mode.

    New weights come from torch's global generator: seed it first, alike on all ranks.

    Args:
        image_size: side of the square images in pixels; given to models that are built for one size.

    Raises:
        RecipeError: unknown model, keyword argument or weights, or a model that cannot take the images.
    """
    network = create_backbone(model, image_size=image_size)
    if model.small_stem:
        replace_stem_(network, model)
    input_size = (3, image_size, image_size)
    _check_images(network, model, input_size=input_size)
    weights = read_weights(Path(model.weights)) if model.weights else {}
    of_swapped = not weights.keys() <= network.state_dict().keys()
    if weights and not of_swapped:
        load_weights(network, weights, source=model.weights)
    report = binarize_(network, binary, input_size=input_size)
    if of_swapped:
        load_weights(network, weights, source=model.weights)
    return network.train(), report


def create_backbone(model: ModelConfig, *, image_size: int) -> nn.Module:
    """The timm model as it is, before any layer is swapped.

    Raises:
        RecipeError: as ``build_model``.
    """
    name, _, tag = model.name.partition(".")
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.4)
        raise RecipeError(
            "model.name",
            f"timm has no model '{model.name}'",
            f"near it: {', '.join(near)}"
            if near
            else "`python -c 'from cyclebnn_dist.timm_import import timm; print(timm.list_models())'` lists them",
        )
    if tag and ":" not in name:
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
        if tag not in tags:
            problem = f"timm has no weights '{tag}' of {name}"
            raise RecipeError("model.name", problem, f"it has: {', '.join(tags) or 'none'}")
    arguments = {"pretrained": model.pretrained, "num_classes": model.num_classes, **model.kwargs}
    pretrained_cfg = timm.get_pretrained_cfg(name, allow_unregistered=True) if ":" not in name else None
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        arguments["img_size"] = image_size
    if model.pretrained and not arguments.keys() & {"pretrained_cfg", "pretrained_cfg_overlay"}:
        file = hub.cached_weights(model.name)
        if file is not None:
            arguments["pretrained_cfg_overlay"] = {"file": str(file)}
        elif reason := hub.why_unreachable(model.name):
            raise _no_published_weights(model, f"they are not in the hub's cache, and {reason}")
    try:
        return timm.create_model(model.name, **arguments)
    except TypeError as error:
        if "'img_size'" in str(error):
            del arguments["img_size"]
            return timm.create_model(model.name, **arguments)
        unknown = [key for key in model.kwargs if f"'{key}'" in str(error)]
        if unknown:
            problem = f"{model.name} takes no such argument"
            cure = "kwargs are those of timm.create_model and of the model's class"
            raise RecipeError(f"model.kwargs.{unknown[0]}", problem, cure) from error
        if model.kwargs:
            raise RecipeError(
                "model.kwargs", f"{model.name}: {error}", "see the model's class in timm"
            ) from error
        raise
    except Exception as error:
        if model.pretrained:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise _no_published_weights(model, reason) from error
        if "img_size" in arguments:
            raise _cannot_take(model, image_size, error) from error
        raise


def replace_stem_(network: nn.Module, model: ModelConfig) -> None:
    """Replace a stem, in place, by that of papers on images of 32 pixels: a 3x3 convolution of stride 1, no pooling.

    For ResNets, and for this project's own models.

    Raises:
        RecipeError: the model has no such stem.
    """
    stem = getattr(network, "conv1", None)
    if not isinstance(stem, nn.Conv2d) or not isinstance(getattr(network, "maxpool", None), nn.Module):
        raise RecipeError(
            "model.small_stem",
            f"{model.name} does not begin with a convolution 'conv1' and a pool 'maxpool'",
            "set it to false; it is for resnet18, resnet34, resnet50 and their kin, bnext_t and reactnet_a and theirs",
        )
    convolution = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=stem.bias is not None)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    network.conv1, network.maxpool = convolution, nn.Identity()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a .safetensors file, or in a checkpoint folder of this project.

    Raises:
        RecipeError: there is none.
    """
    file = path / CHECKPOINT_WEIGHTS if path.is_dir() else path
    if not file.is_file():
        cure = f"name a .safetensors file, or a checkpoint folder (it holds {CHECKPOINT_WEIGHTS})"
        checkpoints = sorted((path if path.name == "checkpoints" else path / "checkpoints").glob("step_*"))
        if checkpoints:
            cure = f"name one of the checkpoints in it, e.g. {checkpoints[-1]}"
        raise RecipeError("model.weights", f"there is no file {file}", cure)
    try:
        return load_file(str(file))
    except SafetensorError as error:
        raise RecipeError(
            "model.weights", f"{file} is no safetensors file: {error}", "convert it first"
        ) from error


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Load a state dict; a classifier for other classes stays new, and so does what another method lacks.

    Raises:
        RecipeError: the weights are of another model.
    """
    own = model.state_dict()
    classifier = tuple(f"{name}." for name in classifier_names(model))
    other_classes = [
        key
        for key, value in weights.items()
        if key.startswith(classifier) and key in own and own[key].shape != value.shape
    ]
    fitting = {
        key: value
        for key, value in weights.items()
        if key not in other_classes and (key in own or not _of_binarizer(key))
    }
    problems = [f"{key} is not in the model" for key in fitting if key not in own]
    problems += [
        f"{key} is {list(value.shape)}, not {list(own[key].shape)}"
        for key, value in fitting.items()
        if key in own and own[key].shape != value.shape
    ]
    missing = [key for key in own if key not in weights and not _of_binarizer(key)]
    problems += [f"{key} is missing" for key in missing]
    if problems:
        shown = "\n  ".join(problems[:4]) + (f"\n  and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise RecipeError(
            "model.weights",
            f"{source} does not fit the model\n  {shown}",
            "check model.name and kwargs, and binary.activation and binary.shortcut",
        )
    if other_classes:
        log.warning("%s was trained on other classes: the classifier starts anew", source)
    if _is_binary(weights) and set(filter(_of_binarizer, weights)) != set(filter(_of_binarizer, own)):
        log.warning(
            "%s is of another binarization method: what that learned beside the weights is left out", source
        )
    model.load_state_dict(fitting, strict=False)


def _of_binarizer(key: str) -> bool:
    return ".binarizer." in f".{key}"


def _is_binary(weights: Mapping[str, Any]) -> bool:
    return any(map(_of_binarizer, weights))


def _check_images(network: nn.Module, model: ModelConfig, *, input_size: tuple[int, int, int]) -> None:
    """One image through the model: it must take its size and give one row of logits."""
    try:
        logits = trial_forward(network, input_size=input_size)
    except Exception as error:
        raise _cannot_take(model, input_size[1], error) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, model.num_classes):
        shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise RecipeError(
            "model.name",
            f"{model.name} gives {shape} for one image, not [1, {model.num_classes}]",
            "only image classifiers can be trained",
        )


def _no_published_weights(model: ModelConfig, reason: str) -> RecipeError:
    fetch = hub.fetch_command(model.name)
    return RecipeError(
        "model.pretrained",
        f"no published weights of {model.name}: {reason}",
        (f"where there is a network, `{fetch}` fills the cache; " if fetch else "")
        + "model.weights takes a file",
    )


def _cannot_take(model: ModelConfig, image_size: int, error: Exception) -> RecipeError:
    cfg = timm.get_pretrained_cfg(model.name.partition(".")[0], allow_unregistered=True)
    own_size = f"it is made for {cfg.input_size[1]}" if cfg is not None else "try a multiple of 32"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return RecipeError(
        "data.image_size", f"{model.name} cannot take images of {image_size} pixels: {reason}", own_size
    )
