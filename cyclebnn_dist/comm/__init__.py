"""Gradient communication: the quantized all-reduce, its first half alone, and its hook for DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cyclebnn_dist.comm.codec import BlockKey, Codec
from cyclebnn_dist.comm.counters import Counters
from cyclebnn_dist.comm.header import MismatchError
from cyclebnn_dist.comm.hierarchy import HierarchicalReducer, build_nodes
from cyclebnn_dist.comm.hook import register_hook
from cyclebnn_dist.comm.layout import Layout, Slot, build_layout
from cyclebnn_dist.comm.reducer import Reducer
from cyclebnn_dist.comm.scatter import ScatterReducer
from cyclebnn_dist.config.recipe import CommConfig

__all__ = [
    "BlockKey",
    "Codec",
    "Counters",
    "Layout",
    "MismatchError",
    "Reducer",
    "Slot",
    "build_layout",
    "build_reducer",
    "register_hook",
]


def build_reducer(
    comm: CommConfig,
    named_parameters: Iterable[tuple[str, torch.Tensor]],
    *,
    rank: int,
    world_size: int,
    seed: int,
    device: torch.device,
    timeout_seconds: float | None = None,
    ranks_per_node: int = 1,
    slots: Mapping[str, Slot] | None = None,
) -> Reducer:
    """Collective: every rank calls this. The reducer a recipe asks for, in a process group of its own.

    Compiles the CPU kernels it needs, so that the first step does not have to.

    Args:
        named_parameters: of the model, in model order; gradients arrive with the same shapes.
        seed: of the codec's randomness; the same on all ranks.
        device: of the gradients: NCCL carries those of a GPU, Gloo those of a CPU.
        ranks_per_node: for ``comm.hierarchical``; ranks n * ranks_per_node and following are node n.
        timeout_seconds: after which a collective fails; None for torch's default.
        slots: by parameter name, where a rank needs the mean of its parts alone: a reduce-scatter instead of an
            all-reduce. Never with ``comm.hierarchical``.
    """
    layout = build_layout(
        named_parameters,
        world_size=world_size,
        block_size=comm.block_size,
        small_bits=comm.small_bits,
        small_numel=comm.small_numel,
        second_phase_extra_bits=comm.second_phase_extra_bits,
        ranks_per_node=ranks_per_node if comm.hierarchical else 1,
        slots=slots,
    )
    codec = Codec(comm.codec, block_size=comm.block_size, unbiased=not comm.error_feedback)
    place: dict[str, Any] = {"rank": rank, "seed": seed, "device": device}
    if world_size == 1:
        return Reducer(layout, codec, group=None, **place)
    codec.warm_up(device, rotating=comm.error_feedback or layout.scattered)
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    group = dist.new_group(backend=backend, timeout=timeout)
    if layout.ranks_per_node > 1:
        nodes = build_nodes(layout, rank=rank, backend=backend, timeout=timeout)
        return HierarchicalReducer(layout, codec, group=group, nodes=nodes, **place)
    kind = ScatterReducer if layout.scattered else Reducer
    return kind(layout, codec, group=group, error_feedback=comm.error_feedback, **place)
