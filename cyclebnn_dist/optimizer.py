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
from cyclebnn_dist.config.recipe import FirstPhaseConfig, OptimConfig
from cyclebnn_dist.timm_import import timm

DECAYS = "weight_decay_by_phase"
"""Of a group whose weight decay changes: that of the first phase, and the later one."""
GROUP_STEP, STORED_GROUP_STEP = "step", "group_step"
"""Where timm's LAMB counts updates: in the group, and not in the state of each parameter; and its name in stored state."""
FUSED = ("sgd", "adam", "adamw")
"""Optimizers that torch can run as one kernel over all parameters, with nothing to compile."""


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    *,
    kinds: Mapping[str, ParameterKind],
    first_phase: FirstPhaseConfig | None = None,
) -> torch.optim.Optimizer:
    """An optimizer with a group each for latent binary weights, real weights, the rest, and what has a decay of its own.

    On GPUs it is torch's fused one, where there is one: an update is then one kernel, and state is the same as elsewhere.

    Args:
        kinds: kind of every parameter by qualified name, as ``binary.parameter_kinds`` gives it.
        first_phase: what decays otherwise in the first phase of training, if there is one (see ``set_weight_decay``).

    Raises:
        RecipeError: a pattern of ``optim.weight_decay_of`` or ``first_phase.weight_decay_of`` matches no parameter.
    """
    first = first_phase or FirstPhaseConfig()
    decays = {
        "binary": config.binary_weight_decay,
        "real": config.weight_decay,
        "other": config.other_weight_decay,
    }
    first_decays = {
        "binary": _either(first.binary_weight_decay, config.binary_weight_decay),
        "real": _either(first.weight_decay, config.weight_decay),
        "other": _either(first.other_weight_decay, config.other_weight_decay),
    }
    patterns = list(config.weight_decay_of.items())
    first_patterns = [*first.weight_decay_of.items(), *patterns]
    lr_scales = {"binary": config.binary_lr_scale, "real": 1.0, "other": config.other_lr_scale}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _check_patterns("optim.weight_decay_of", config.weight_decay_of, trained)
    _check_patterns("first_phase.weight_decay_of", first.weight_decay_of, trained)
    by_setting: dict[tuple[str, float, float], list[str]] = {}
    for kind, usual in decays.items():
        by_setting[kind, usual, first_decays[kind]] = []
        for name in trained:
            if kinds[name] == kind:
                decay = _decay_of(name, patterns, usual=usual)
                at_first = _decay_of(name, first_patterns, usual=first_decays[kind])
                by_setting.setdefault((kind, decay, at_first), []).append(name)
    groups: list[dict[str, Any]] = [
        {
            "params": [trained[name] for name in names],
            "names": names,
            "weight_decay": decay,
            "lr_scale": lr_scales[kind],
            **({DECAYS: (at_first, decay)} if at_first != decay else {}),
        }
        for (kind, decay, at_first), names in by_setting.items()
        if names
    ]
    options: dict[str, Any] = {}
    if config.name == "sgd":
        options["momentum"] = config.momentum
    else:
        options["betas"] = tuple(config.betas)
    if runs_fused(config.name, trained.values()):
        options["fused"] = True
    plain = config.name == "sgd" and not config.nesterov
    name = "momentum" if plain else config.name  # timm's name for SGD without Nesterov's momentum
    return timm.optim.create_optimizer_v2(groups, opt=name, lr=config.lr, **options)


def runs_fused(name: str, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether an optimizer of these parameters is to be torch's fused one."""
    return name in FUSED and all(parameter.is_cuda for parameter in parameters)


def _either(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _decay_of(name: str, patterns: Iterable[tuple[str, float]], *, usual: float) -> float:
    """Decay of the first pattern this parameter matches, else the usual one of its kind."""
    for pattern, decay in patterns:
        if fnmatchcase(name, pattern):
            return decay
    return usual


def _check_patterns(key: str, patterns: Mapping[str, float], names: Collection[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.3) or list(names)[:4]
            raise RecipeError(
                key,
                f"'{pattern}' matches no parameter of this model",
                f"near it: {', '.join(near)}",
            )


def learning_rate(step: int, config: OptimConfig, *, total_steps: int, steps_per_epoch: int) -> float:
    """Learning rate of ``step``: linear warm-up, then the configured shape; a pure function of its arguments."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        if config.warmup_lr is None:
            return config.lr * (step + 1) / warmup
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup
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


def set_weight_decay(optimizer: torch.optim.Optimizer, *, first_phase: bool) -> None:
    """Give the groups whose decay is another in the first phase of training that of the phase."""
    for group in optimizer.param_groups:
        if DECAYS in group:
            group["weight_decay"] = group[DECAYS][0 if first_phase else 1]


def forget_updates(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer as new: moments and counts of updates go, settings stay."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop(GROUP_STEP, None)


def optimizer_state_by_name(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """State of every parameter under its qualified name, so that it outlives a change of engine or grouping."""
    return {
        name: {
            **optimizer.state[parameter],
            **({STORED_GROUP_STEP: group[GROUP_STEP]} if GROUP_STEP in group else {}),
        }
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
    known = {index: dict(state[name]) for index, name in enumerate(names) if name in state}
    steps = {names[index]: own.pop(STORED_GROUP_STEP, None) for index, own in known.items()}
    current["state"] = known
    optimizer.load_state_dict(current)
    for group in optimizer.param_groups:
        counted = [step for name in group["names"] if (step := steps.get(name)) is not None]
        if counted:
            group[GROUP_STEP] = counted[0].clone() if isinstance(counted[0], torch.Tensor) else counted[0]
