"""ZeRO: everything without a public name in DeepSpeed that this project touches, behind a check of its version and shape.

Nobody can give DeepSpeed a communication hook, so its bucket reduction is replaced where all its buckets pass:
``DeepSpeedZeroOptimizer.average_tensor``, which averages a flat bucket over ranks. What it leaves in the bucket is taken
for the mean; each rank keeps what falls into its partition.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cyclebnn_dist.config import RecipeError

TESTED_VERSIONS = ("0.19.8",)
"""Versions of DeepSpeed this module has run with; others are refused, for what it touches may change in any of them."""

SIGNATURES = {
    "DeepSpeedZeroOptimizer.average_tensor": ("self", "tensor", "communication_data_type"),
    "DeepSpeedZeroOptimizer.zero_grad": ("self", "set_to_none"),
    "DeepSpeedZeroOptimizer._release_preflattened_grad_buffers": ("self", "group_idx"),
    "DeepSpeedEngine._flush_coalesced_reduction_zero12": ("self", "optimizer"),
}
"""Parameters of the methods that are called or replaced."""

ENGINE_ATTRIBUTES = ("enable_backward_allreduce", "inside_no_sync_ctxt")
CONFIG_ATTRIBUTES = ("torch_autocast_enabled", "torch_autocast_dtype")
OPTIMIZER_ATTRIBUTES = (
    "_coalesce_grad_reduction",
    "all_grad_tensors",
    "averaged_gradients",
    "bit16_groups",
    "ipg_buckets",
    "parallel_partitioned_bit16_groups",
    "partition_size",
    "round_robin_bit16_offsets",
    "single_partition_of_fp32_groups",
)

Average = Callable[[torch.Tensor, Sequence[nn.Parameter]], None]
"""Average a flat bucket of the gradients of parameters, one after the other, over ranks, in place."""


@dataclass(frozen=True)
class PartitionedGroup:
    """A parameter group, one after the other in a flat tensor of which each rank updates an equal part.

    Attributes:
        parameters: in their order in the flat tensor; the model's weights are views of it.
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
    check_signatures(deepspeed)
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


def check_signatures(deepspeed: Any) -> None:
    """Refuse a DeepSpeed in which a method of ``SIGNATURES`` is missing or takes other parameters.

    Raises:
        RecipeError: naming the method.
    """
    stages = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")
    owners = {
        "DeepSpeedEngine": deepspeed.DeepSpeedEngine,
        "DeepSpeedZeroOptimizer": stages.DeepSpeedZeroOptimizer,
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


def leave_reduction_to_caller(engine: Any, *, average: Average) -> None:
    """Replace every average over ranks that DeepSpeed would take: at stage 0 by nothing, at 1 and 2 by ``average``."""
    _check_attributes(engine, ENGINE_ATTRIBUTES)
    if not engine.zero_optimization():
        engine.enable_backward_allreduce = False
        return
    optimizer = engine.optimizer
    _check_attributes(optimizer, OPTIMIZER_ATTRIBUTES)

    def average_tensor(tensor: torch.Tensor, communication_data_type: torch.dtype) -> None:
        bucket = optimizer.ipg_buckets[communication_data_type]
        parameters = [optimizer.bit16_groups[group][index] for group, index, _ in bucket.params]
        if parameters:
            average(tensor, parameters)

    optimizer.average_tensor = average_tensor


def _check_attributes(owner: Any, names: Sequence[str]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise _refusal(f"DeepSpeed's {type(owner).__name__} has no {', '.join(missing)}")


def hold_back_reduction(engine: Any) -> None:
    """From now on backward passes only add to ``grad``, at stages 1 and 2."""
    engine.inside_no_sync_ctxt = True
    engine.optimizer._coalesce_grad_reduction = True


def reduce_held_back(engine: Any) -> None:
    """Collective: every rank calls this. Reduce what has been held back, if anything has."""
    if not engine.inside_no_sync_ctxt:
        return
    engine.inside_no_sync_ctxt = False
    engine.optimizer._coalesce_grad_reduction = False
    engine.optimizer.set_gradient_accumulation_boundary(True)
    engine._flush_coalesced_reduction_zero12(engine.optimizer)


def own_gradients(engine: Any) -> list[torch.Tensor]:
    """The averaged gradients that fall into this rank's partitions, in pieces, which the next step applies."""
    return [piece for pieces in engine.optimizer.averaged_gradients.values() for piece in pieces]


def discard_gradients(engine: Any) -> None:
    """Forget the gradients of a step that is not applied."""
    optimizer = engine.optimizer
    optimizer.zero_grad(set_to_none=True)
    optimizer._release_preflattened_grad_buffers()
    for index in optimizer.averaged_gradients:
        optimizer.averaged_gradients[index] = None
        optimizer.all_grad_tensors[index] = None


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
