"""ZeRO: everything without a public name in DeepSpeed that this project touches, behind a check of its version and shape.

Nobody can give DeepSpeed a communication hook, so it is kept from reducing anything: backward passes only add to ``grad``,
and before an update every group of the optimizer is handed its averaged gradient in one flat tensor, which DeepSpeed has a
place for because its compiler passes fill it too (``GradPartitionBufferGroup``).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cyclebnn_dist.comm import Slot
from cyclebnn_dist.config import RecipeError

TESTED_VERSIONS = ("0.19.8",)
"""Versions of DeepSpeed this module has run with; others are refused, for what it touches may change in any of them."""

SIGNATURES = {
    "DeepSpeedZeroOptimizer._get_preflattened_grad_partition": ("self", "group_idx"),
    "DeepSpeedZeroOptimizer.process_gradients": ("self", "param", "i"),
    "GradPartitionBufferGroup.__init__": ("self", "grad_buffers", "flat_partition"),
}
"""Parameters of the methods that are called, or count on what is changed here."""

ENGINE_ATTRIBUTES = ("enable_backward_allreduce",)
CONFIG_ATTRIBUTES = ("torch_autocast_enabled", "torch_autocast_dtype")
OPTIMIZER_ATTRIBUTES = (
    "_coalesce_grad_reduction",
    "averaged_gradients",
    "bit16_groups",
    "parallel_partitioned_bit16_groups",
    "partition_size",
    "round_robin_bit16_offsets",
    "single_partition_of_fp32_groups",
)


@dataclass(frozen=True)
class PartitionedGroup:
    """A parameter group, one after the other in a flat tensor of which each rank updates an equal part.

    Attributes:
        parameters: in their order in the flat tensor, which is that of the group; the model's weights are views of it.
        offsets: of each parameter, in elements.
        partition: fp32 [partition_size]: the weights this rank updates, and the optimizer's only parameter of the group.
        weights: the same part of the model's own weights.
    """

    parameters: list[nn.Parameter]
    offsets: list[int]
    partition: torch.Tensor
    weights: torch.Tensor


def open_deepspeed(device: torch.device) -> Any:
    """The package, imported when first asked for, quiet, and with nothing left to compile on a CPU.

    Raises:
        RecipeError: where there is none, for a version this has not run with, or one in which a touched method is another.
    """
    try:
        check_version(importlib.metadata.version("deepspeed"))
    except ImportError as error:
        raise _refusal("DeepSpeed is not installed") from error
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    deepspeed = importlib.import_module("deepspeed")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    check_signatures()
    # DeepSpeed gathers weights under the name that torch 2.13 is about to change.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    # Its only use is DeepSpeed's own all-reduce on CPUs, and it takes a C++ compiler half a minute.
    importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def check_version(version: str) -> None:
    """Refuse versions that this module has not run with.

    Raises:
        RecipeError: naming those it has.
    """
    if version not in TESTED_VERSIONS:
        raise _refusal(f"DeepSpeed {version} is installed")


def check_signatures() -> None:
    """Refuse a DeepSpeed in which a method of ``SIGNATURES`` is missing or takes other parameters.

    Raises:
        RecipeError: naming the method.
    """
    stages = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
    owners = {
        "DeepSpeedZeroOptimizer": stages.DeepSpeedZeroOptimizer,
        "GradPartitionBufferGroup": getattr(stages, "GradPartitionBufferGroup", None),
    }
    for path, expected in SIGNATURES.items():
        owner, name = path.split(".")
        method = getattr(owners[owner], name, None)
        found = tuple(inspect.signature(method).parameters) if method else "missing"
        if found != expected:
            raise _refusal(f"DeepSpeed's {path} is {found} instead of {expected}")


def _refusal(problem: str) -> RecipeError:
    tested = " or ".join(TESTED_VERSIONS)
    return RecipeError(
        "engine.name",
        f"{problem}; the quantized reduction has been tested with {tested} alone",
        f"python -m pip install deepspeed=={TESTED_VERSIONS[-1]}, or use engine.name=ddp",
    )


@contextmanager
def in_existing_groups(deepspeed: Any, *, local_rank: int) -> Iterator[None]:
    """While DeepSpeed is initialized: it takes the default process group as it is, and makes none of its own."""
    comm: Any = importlib.import_module("deepspeed.comm.comm")
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    comm.cdb = None
    groups._release_process_group_references()
    groups._WORLD_GROUP = dist.group.WORLD
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(local_rank)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def autocast_forward(engine: Any, dtype: torch.dtype | None) -> None:
    """From now on forward passes compute in ``dtype`` under torch.autocast, and that is all that changes.

    Told of it before ``initialize``, DeepSpeed would also keep buckets apart by type and scale losses by itself.
    """
    settings = engine._config
    _check_attributes(settings, CONFIG_ATTRIBUTES)
    settings.torch_autocast_enabled, settings.torch_autocast_dtype = dtype is not None, dtype


def leave_reduction_to_caller(engine: Any) -> None:
    """Keep DeepSpeed from averaging anything: backward passes only add to ``grad``, at all stages."""
    _check_attributes(engine, ENGINE_ATTRIBUTES)
    engine.enable_backward_allreduce = False
    if engine.zero_optimization():
        _check_attributes(engine.optimizer, OPTIMIZER_ATTRIBUTES)
        engine.optimizer._coalesce_grad_reduction = True


def _check_attributes(owner: Any, names: Sequence[str]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise _refusal(f"DeepSpeed's {type(owner).__name__} has no {', '.join(missing)}")


def hand_over_gradients(engine: Any, gradients: Sequence[torch.Tensor]) -> None:
    """Let the next step apply these: of each group of the optimizer fp32 [partition_size], averaged, this rank's part."""
    stages: Any = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
    for index, gradient in enumerate(gradients):
        engine.optimizer.averaged_gradients[index] = stages.GradPartitionBufferGroup([gradient], gradient)


def partitioned_groups(engine: Any, *, rank: int) -> list[PartitionedGroup]:
    """What each parameter group of the optimizer became, in its order."""
    optimizer = engine.optimizer
    return [
        PartitionedGroup(
            parameters=list(parameters), offsets=list(offsets), partition=own, weights=parts[rank]
        )
        for parameters, offsets, own, parts in zip(
            optimizer.bit16_groups,
            optimizer.round_robin_bit16_offsets,
            optimizer.single_partition_of_fp32_groups,
            optimizer.parallel_partitioned_bit16_groups,
            strict=True,
        )
    ]


def check_slots(groups: Sequence[PartitionedGroup], slots: Sequence[Mapping[nn.Parameter, Slot]]) -> None:
    """Refuse a ZeRO that lays out the parameters of a group otherwise than was supposed when ranks' parts were agreed on.

    Raises:
        RecipeError: naming the group.
    """
    for number, (group, expected) in enumerate(zip(groups, slots, strict=True)):
        size = group.partition.numel()
        found = {p: Slot(number, o, size) for p, o in zip(group.parameters, group.offsets, strict=True)}
        if found != dict(expected):
            raise _refusal(
                f"DeepSpeed's partition of group {number} of the optimizer is not the expected one"
            )
