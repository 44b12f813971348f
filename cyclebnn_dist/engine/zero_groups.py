"""The ZeRO groups: which rank needs which elements of a gradient at stages 1 and 2, known before there is any ZeRO.

ZeRO lays the parameters of each group of the optimizer one after the other in a flat tensor and gives every rank an equal
cut of it. With a flat tensor for a whole model, a bucket of neighbouring parameters would be one rank's almost as a whole:
all others would send to it alone, and most links would be idle. So groups that are larger than a bucket are split by
bucket first. Every bucket is then needed in equal parts by all ranks, and settings, which the parts of a group share, and
results, which depend on no rank's part, stay what they were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cyclebnn_dist.comm.layout import Slot
from cyclebnn_dist.comm.traffic import cut_in_buckets
from cyclebnn_dist.config.recipe import EngineConfig

ALIGNMENT = 2
"""Elements that ZeRO makes each part a multiple of."""

WEIGHT_BYTES = 4
"""Of an updated weight, which travels in fp32."""


def scatters(config: EngineConfig) -> bool:
    """Whether gradients are reduce-scattered instead of all-reduced."""
    return config.name == "deepspeed" and config.zero_stage > 0 and config.reduce_scatter


def slots_of_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, bucket_mb: float, world_size: int
) -> dict[str, Slot]:
    """Where ZeRO will have each parameter, by name, for an optimizer that is still to be split."""
    groups = [group["names"] for group in optimizer.param_groups]
    return build_slots(groups, numels_of(model), bucket_mb=bucket_mb, world_size=world_size)


def numels_of(model: nn.Module) -> dict[str, int]:
    """Elements of all parameters by name, in model order."""
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def split_names(
    groups: Iterable[Sequence[str]], numels: Mapping[str, int], *, bucket_mb: float
) -> list[list[list[str]]]:
    """How each group of parameter names is split: into groups of names, in their order.

    Args:
        numels: elements of all parameters of the model, by name, in model order.
        bucket_mb: ``engine.bucket_mb``.
    """
    names = list(numels)
    buckets = cut_in_buckets(list(numels.values()), bucket_mb=bucket_mb)
    bucket_of = {names[index]: number for number, bucket in enumerate(buckets) for index in bucket}
    limit = bucket_mb * 2**20 / 4
    split = []
    for group in groups:
        if sum(numels[name] for name in group) <= limit:
            split.append([list(group)])
            continue
        parts: dict[int, list[str]] = {}
        for name in group:
            parts.setdefault(bucket_of[name], []).append(name)
        split.append(list(parts.values()))
    return split


def build_slots(
    groups: Iterable[Sequence[str]], numels: Mapping[str, int], *, bucket_mb: float, world_size: int
) -> dict[str, Slot]:
    """Where ZeRO has each parameter that is trained, by name; arguments as of ``split_names``."""
    slots = {}
    split = [part for parts in split_names(groups, numels, bucket_mb=bucket_mb) for part in parts]
    for number, part in enumerate(split):
        part_numel = ALIGNMENT * -(-sum(numels[name] for name in part) // (ALIGNMENT * world_size))
        offset = 0
        for name in part:
            slots[name] = Slot(number, offset, part_numel)
            offset += numels[name]
    return slots


def split_groups(optimizer: torch.optim.Optimizer, numels: Mapping[str, int], *, bucket_mb: float) -> None:
    """Split the groups of an optimizer that has made no step, as ``build_slots`` supposes."""
    split = split_names([group["names"] for group in optimizer.param_groups], numels, bucket_mb=bucket_mb)
    groups: list[dict[str, Any]] = []
    for group, parts in zip(optimizer.param_groups, split, strict=True):
        parameters = dict(zip(group["names"], group["params"], strict=True))
        groups += [{**group, "params": [parameters[name] for name in part], "names": part} for part in parts]
    optimizer.param_groups[:] = groups


def weight_bytes(slots: Collection[Slot], *, world_size: int) -> int:
    """What a rank sends of its updated weights, in fp32, to all others at the end of a step of stage 1 or 2."""
    parts = {slot.group: slot.part_numel for slot in slots}
    return WEIGHT_BYTES * (world_size - 1) * sum(parts.values())
