"""Teachers: the models a recipe distils from, with their weights, in evaluation mode; and which of them teach at a step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cyclebnn_dist.agreement import hash_tensors
from cyclebnn_dist.binary import set_widths
from cyclebnn_dist.checkpoint import read_meta
from cyclebnn_dist.config import SAVED_NAME, RecipeError, load_saved
from cyclebnn_dist.config.recipe import BinaryConfig, DistillConfig, ModelConfig, Recipe
from cyclebnn_dist.losses.distillation import assistant_index
from cyclebnn_dist.models.build import CHECKPOINT_WEIGHTS, build_model, load_weights, read_weights
from cyclebnn_dist.timm_import import timm

log = logging.getLogger(__name__)

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


class Teachers:
    """The teachers of a run; those that a step needs are on the device, others in main memory.

    Who teaches is a function of the step: nothing here is part of a checkpoint.
    """

    def __init__(
        self,
        config: DistillConfig,
        teachers: Mapping[str, Teacher],
        *,
        normalization: Normalization,
        total_steps: int,
        device: torch.device,
        channels_last: bool = False,
    ) -> None:
        """
        Args:
            teachers: by name, as ``load_teachers`` gives them.
            normalization: that of the images the teachers will be given.
            total_steps: of the run, which the assistants share out among them.
        """
        self._config = config
        self._teachers = teachers
        self._total_steps = total_steps
        self._device = device
        self._dtype = {"bf16": torch.bfloat16, "fp32": None}[config.amp]
        self._teaching: tuple[str, ...] = ()
        self._affine = {
            name: _affine(normalization, teacher.normalization, device) for name, teacher in teachers.items()
        }
        for name, teacher in teachers.items():
            if self._affine[name] is not None:
                log.info("the teacher %s gets images of mean %s, deviation %s", name, *teacher.normalization)
            if channels_last:
                teacher.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def names(self, step: int) -> tuple[str, ...]:
        """Who teaches at ``step``: the assistant whose turn it is, if there are any, and the teacher."""
        assistants = self._config.assistants
        return (*assistants[self._index(step) : self._index(step) + 1], self._config.teacher)

    def place(self, step: int) -> dict[str, float]:
        """What a row of the metrics says about the place in the list of assistants, counted from 0; maybe nothing."""
        return {"assistant": self._index(step)} if self._config.assistants else {}

    @torch.no_grad()
    def logits(self, images: Tensor, *, step: int) -> Tensor:
        """What those who teach at ``step`` say: float32 [n, B, C], in the order of ``names``.

        Args:
            images: [B, 3, S, S] on the device, normalized for the model that learns.
        """
        names = self.names(step)
        if names != self._teaching:
            self._change_to(names, step)
        images = images.float()
        said = {}
        for name in dict.fromkeys(names):
            affine = self._affine[name]
            own_images = images if affine is None else images * affine[0] + affine[1]
            with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None):
                said[name] = self._teachers[name].network(own_images).float()
        return torch.stack([said[name] for name in names])

    @property
    def description(self) -> str:
        """Names and digests of the weights of all teachers; the same text means the same teachers."""
        return ", ".join(f"{name} {teacher.digest[:12]}" for name, teacher in self._teachers.items())

    def _index(self, step: int) -> int:
        return assistant_index(
            step, total_steps=self._total_steps, num_assistants=max(1, len(self._config.assistants))
        )

    def _change_to(self, names: tuple[str, ...], step: int) -> None:
        for name in set(self._teaching) - set(names):
            self._teachers[name].network.to("cpu")
        for name in names:
            self._teachers[name].network.to(self._device)
        self._teaching = names
        log.info("taught from step %d on by %s", step, " and ".join(dict.fromkeys(names)))


def load_teachers(recipe: Recipe) -> dict[str, Teacher]:
    """The teachers of a recipe by name, on the CPU; random generators are afterwards as before.

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
                    teachers[name] = _load(name, config.weights.get(name, ""), recipe=recipe)
                except RecipeError as error:
                    raise _about_teacher(error, name, key=key) from error
    return teachers


def _load(name: str, weights: str, *, recipe: Recipe) -> Teacher:
    num_classes, side = recipe.model.num_classes, recipe.data.image_size
    if not weights:
        return _published(name, num_classes=num_classes, image_size=side)
    path = Path(weights)
    folder = path.parent if path.name == CHECKPOINT_WEIGHTS else path
    if (folder / SAVED_NAME).is_file():
        return _of_checkpoint(name, folder, num_classes=num_classes, image_size=side)
    model = ModelConfig(name=name, num_classes=num_classes)
    network, _ = build_model(model, BinaryConfig(method="none"), image_size=side)
    _load_all(network, path, num_classes=num_classes)
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
    """A model that this project has trained, at the forward width it was evaluated at."""
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
    except (OSError, ValueError) as error:
        raise RecipeError("model.weights", f"{folder} is no checkpoint: {error}", "name another") from error
    model = ModelConfig(
        name=name,
        num_classes=num_classes,
        small_stem=saved.model.small_stem,
        kwargs=saved.model.kwargs,
    )
    network, _ = build_model(model, saved.binary, image_size=image_size)
    _load_all(network, folder, num_classes=num_classes)
    set_widths(network, forward_bits=forward_bits, backward_bits=32)
    return _finished(network, (saved.data.mean, saved.data.std))


def _load_all(network: nn.Module, path: Path, *, num_classes: int) -> None:
    """Load every weight; unlike a start for training, a teacher keeps its classifier."""
    weights, own = read_weights(path), network.state_dict()
    other = [key for key, value in weights.items() if key in own and own[key].shape != value.shape]
    if other:
        shapes = f"{other[0]} is {list(weights[other[0]].shape)}, not {list(own[other[0]].shape)}"
        raise RecipeError(
            "model.weights",
            f"{path} is of another model, or of other classes than the {num_classes} to be learned: {shapes}",
            "a teacher must know the same classes: name other weights, or another teacher",
        )
    load_weights(network, weights, source=str(path))


def _finished(network: nn.Module, normalization: Normalization) -> Teacher:
    network.eval().requires_grad_(False)
    return Teacher(network, normalization, digest=hash_tensors(network.state_dict().values()))


def _own_normalization(network: nn.Module) -> Normalization:
    """That of timm's weights for this model."""
    cfg = vars(network).get("pretrained_cfg") or vars(timm.models.PretrainedCfg())
    return tuple(cfg["mean"]), tuple(cfg["std"])


def _affine(
    given: Normalization, wanted: Normalization, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Scale and shift, [3, 1, 1] each, from images normalized one way to the other; None where they are the same."""
    if tuple(map(tuple, given)) == tuple(map(tuple, wanted)):
        return None
    (mean, std), (other_mean, other_std) = (
        [torch.tensor(values, dtype=torch.float64)[:, None, None] for values in pair]
        for pair in (given, wanted)
    )
    return tuple(each.float().to(device) for each in (std / other_std, (mean - other_mean) / other_std))  # type: ignore[return-value]


def _about_teacher(error: RecipeError, name: str, *, key: str) -> RecipeError:
    """The refusal of a model as one of a teacher: by the key of ``distill`` that names it."""
    if error.key == "model.weights":
        return RecipeError(f"distill.weights.{name}", error.problem, error.cure)
    problem = error.problem if name in error.problem else f"{name}: {error.problem}"
    cure = error.cure.replace("model.weights takes a file", f"distill.weights={{{name}: FILE}} takes a file")
    return RecipeError(key, problem, cure)
