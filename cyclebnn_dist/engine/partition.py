"""The partition: an optimizer's state in equal parts over ranks (ZeRO), and the same state by parameter name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from cyclebnn_dist.engine.zero import PartitionedGroup
from cyclebnn_dist.world import World

log = logging.getLogger(__name__)

STEP = "step"
"""The entry of an optimizer's state that counts updates; every other tensor has an element for each weight."""


def gather_state_by_name(
    optimizer: torch.optim.Optimizer, groups: Sequence[PartitionedGroup], *, world: World
) -> dict[str, dict[str, Any]]:
    """Collective: every rank calls this. State of every parameter under its name, as ``optimizer_state_by_name`` has it.

    Returns:
        copies on the CPU, on rank 0; nothing on the others. Rank 0 holds the state of all ranks until it is written.
    """
    found: dict[str, dict[str, Any]] = {}
    for settings, group in zip(optimizer.param_groups, groups, strict=True):
        state = optimizer.state.get(settings["params"][0], {})
        for key in sorted(state):
            if key == STEP or not isinstance(state[key], torch.Tensor):
                for name in settings["names"]:
                    found.setdefault(name, {})[key] = _copy(state[key])
                continue
            flat = _gather(state[key], world=world)
            if flat is None:
                continue
            for name, parameter, offset in zip(
                settings["names"], group.parameters, group.offsets, strict=True
            ):
                part = flat[offset : offset + parameter.numel()].view(parameter.shape)
                found.setdefault(name, {})[key] = part.clone()
    return found if world.is_main else {}


def load_state_by_name(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[PartitionedGroup],
    state: Mapping[str, Mapping[str, Any]],
    *,
    world: World,
) -> None:
    """Give this rank its part of what ``optimizer_state_by_name`` or ``gather_state_by_name`` gave, of any world size."""
    current = optimizer.state_dict()
    current["state"] = {
        index: _own_state(settings["names"], group, state, world=world)
        for index, (settings, group) in enumerate(zip(optimizer.param_groups, groups, strict=True))
        if any(name in state for name in settings["names"])
    }
    optimizer.load_state_dict(current)


def _own_state(
    names: Sequence[str], group: PartitionedGroup, state: Mapping[str, Mapping[str, Any]], *, world: World
) -> dict[str, Any]:
    absent = [name for name in names if name not in state]
    known = [state[name] for name in names if name in state]
    if absent and world.is_main:
        log.warning("no optimizer state of %s in the checkpoint: it starts from zero", ", ".join(absent))
    own: dict[str, Any] = {}
    for key in known[0]:
        values = [entries[key] for entries in known]
        if key == STEP or not isinstance(values[0], torch.Tensor):
            if any(value != values[0] for value in values) and world.is_main:
                log.warning(
                    "parameters of one group differ in the optimizer's '%s', which ZeRO counts once: the largest is kept",
                    key,
                )
            own[key] = _copy(max(values))
            continue
        size = group.partition.numel()
        flat = torch.zeros(size * world.size, dtype=values[0].dtype)
        for name, parameter, offset in zip(names, group.parameters, group.offsets, strict=True):
            if name in state:
                flat[offset : offset + parameter.numel()] = state[name][key].reshape(-1)
        own[key] = flat[world.rank * size : (world.rank + 1) * size].clone()
    return own


def _gather(part: torch.Tensor, *, world: World) -> torch.Tensor | None:
    """Collective: every rank calls this. Equal parts [n] of all ranks, one after the other, on rank 0."""
    own = part.detach().cpu()
    if world.size == 1:
        return own
    flat = torch.empty(world.size * own.numel(), dtype=own.dtype) if world.is_main else None
    parts = None if flat is None else list(flat.split(own.numel()))
    dist.gather(own, parts, dst=0, group=world.control)
    return flat


def _copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
