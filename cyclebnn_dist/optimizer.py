"""The optimizer: its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from cyclebnn_dist.binary.parameters import ParameterKind
from cyclebnn_dist.config import RecipeError
from cyclebnn_dist.config.recipe import OptimConfig
from cyclebnn_dist.timm_import import timm

FUSED = ("sgd", "adam", "adamw")
"""Optimizers that torch can run as one kernel over all parameters, with nothing to compile."""


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, kinds: Mapping[str, ParameterKind]
) -> torch.optim.Optimizer:
    """An optimizer with a group each for latent binary weights, real weights, the rest, and what has a decay of its own.

    On GPUs it is torch's fused one, where there is one: an update is then one kernel, and state is the same as elsewhere.

    Args:
        kinds: kind of every parameter by qualified name, as ``binary.parameter_kinds`` gives it.

    Raises:
        RecipeError: a pattern of ``optim.weight_decay_of`` matches no parameter.
    """
    decays = {
        "binary": config.binary_weight_decay,
        "real": config.weight_decay,
        "other": config.other_weight_decay,
    }
    lr_scales = {"binary": config.binary_lr_scale, "real": 1.0, "other": config.other_lr_scale}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _check_patterns(config, trained)
    by_setting: dict[tuple[str, float], list[str]] = {}
    for kind, usual in decays.items():
        by_setting[kind, usual] = []
        for name in trained:
            if kinds[name] == kind:
                by_setting.setdefault((kind, _decay_of(name, config, usual=usual)), []).append(name)
    groups: list[dict[str, Any]] = [
        {
            "params": [trained[name] for name in names],
            "names": names,
            "weight_decay": decay,
            "lr_scale": lr_scales[kind],
        }
        for (kind, decay), names in by_setting.items()
        if names
    ]
    options: dict[str, Any] = {}
    if config.name == "sgd":
        options["momentum"] = config.momentum
    else:
        options["betas"] = tuple(config.betas)
    if runs_fused(config.name, trained.values()):
        options["fused"] = True
    return timm.optim.create_optimizer_v2(groups, opt=config.name, lr=config.lr, **options)


def runs_fused(name: str, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether an optimizer of these parameters is to be torch's fused one."""
    return name in FUSED and all(parameter.is_cuda for parameter in parameters)


def _decay_of(name: str, config: OptimConfig, *, usual: float) -> float:
    """Decay of the first pattern this parameter matches, else the usual one of its kind."""
    for pattern, decay in config.weight_decay_of.items():
        if fnmatchcase(name, pattern):
            return decay
    return usual


def _check_patterns(config: OptimConfig, names: Collection[str]) -> None:
    for pattern in config.weight_decay_of:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.3) or list(names)[:4]
            raise RecipeError(
                "optim.weight_decay_of",
                f"'{pattern}' matches no parameter of this model",
                f"near it: {', '.join(near)}",
            )


def learning_rate(step: int, config: OptimConfig, *, total_steps: int, steps_per_epoch: int) -> float:
    """Learning rate of ``step``: linear warm-up, then the configured shape; a pure function of its arguments."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "cosine":
        return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1.0 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return config.lr + (config.min_lr - config.lr) * progress
    if config.schedule == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return config.lr * config.gamma**passed
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group ``lr`` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def optimizer_state_by_name(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """State of every parameter under its qualified name, so that it outlives a change of engine or grouping."""
    return {
        name: dict(optimizer.state[parameter])
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if parameter in optimizer.state
    }


def load_optimizer_state_by_name(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Restore what ``optimizer_state_by_name`` gave; the groups' settings stay those of the recipe."""
    current = optimizer.state_dict()
    names = [name for group in optimizer.param_groups for name in group["names"]]
    current["state"] = {index: dict(state[name]) for index, name in enumerate(names) if name in state}
    optimizer.load_state_dict(current)
