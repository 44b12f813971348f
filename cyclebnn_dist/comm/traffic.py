"""The traffic: how many bytes the all-reduce of a model's gradients hands to the network, without sending any.

A bucket counts as one message to each rank, as a GPU sends it. Chunks, into which a CPU cuts it, have a header of 32 bytes each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch

from cyclebnn_dist.comm.breakeven import Load
from cyclebnn_dist.comm.codec import scale_bytes
from cyclebnn_dist.comm.coding import CodecName
from cyclebnn_dist.comm.counters import Counters
from cyclebnn_dist.comm.header import HEADER_BYTES
from cyclebnn_dist.comm.hierarchy import build_hierarchical_plan, near_width
from cyclebnn_dist.comm.layout import Layout, ParameterLayout
from cyclebnn_dist.comm.pieces import CAST_BYTES
from cyclebnn_dist.comm.plan import CHUNK_NUMEL, cut_in_chunks

FIRST_BUCKET_BYTES = 2**20
"""DDP lets the first gradients leave early."""


def message_sizes(layout: Layout, indices: Sequence[int], *, bits: int, codec: CodecName) -> np.ndarray:
    """Bytes of the message for each owner, int64 ``[ranks]``: those of the plan that the reducer follows.

    They are counted without laying out a single block, so that thousands of ranks take no time.
    """
    size = layout.block_size
    small_bytes = CAST_BYTES[layout.small_width(bits)]
    total = np.full(layout.world_size, HEADER_BYTES, dtype=np.int64)
    for index in indices:
        parameter = layout.parameters[index]
        if parameter.small:
            total += small_bytes * _units(parameter)
        elif bits in CAST_BYTES:
            total += CAST_BYTES[bits] * _elements(parameter)
        else:
            total += (size * bits // 8 + scale_bytes(codec, bits)) * _units(parameter)
    return -(-total // 8) * 8


def sent_bytes(layout: Layout, indices: Sequence[int], *, bits: int, codec: CodecName, rank: int = 0) -> int:
    """What ``rank`` hands to the network for one bucket.

    In the first phase it keeps its own message, in the second one it sends the largest owner's size to every other rank;
    see ``transport``. A scattered layout has no second phase.
    """
    sizes = message_sizes(layout, indices, bits=bits, codec=codec)
    if layout.scattered:
        return int(sizes.sum() - sizes[rank])
    answers = message_sizes(layout, indices, bits=layout.mean_width(bits), codec=codec)
    return int(sizes.sum() - sizes[rank] + (layout.world_size - 1) * answers.max())


def count_step(
    layout: Layout,
    buckets: Iterable[Sequence[int]],
    *,
    bits: int,
    codec: CodecName,
    rank: int = 0,
    steps: int = 1,
) -> Counters:
    """What the counters of ``rank`` gain in ``steps`` steps of ``bits`` bits; their seconds stay 0.

    Args:
        buckets: indices of the parameters that travel together, as DDP groups them.
    """
    counters = Counters()
    if layout.world_size == 1:
        return counters
    for indices in buckets:
        numel = sum(layout.parameters[index].numel for index in indices)
        if layout.ranks_per_node > 1:
            sent, far = _hierarchical_bytes(layout, indices, bits=bits, codec=codec, rank=rank)
        else:
            sent, far = sent_bytes(layout, indices, bits=bits, codec=codec, rank=rank), 0
        counters.add_exchange(
            sent_bytes=steps * sent,
            far_bytes=steps * far,
            numel=steps * numel,
            world_size=layout.world_size,
            phases=1 if layout.scattered else 2,
        )
    return counters


def sent_bytes_of_step(
    layout: Layout,
    *,
    bits: int,
    codec: CodecName,
    bucket_mb: float,
    trained: Collection[str] | None = None,
    rank: int = 0,
) -> int:
    """What ``rank`` hands to the network for the gradients of a step under DeepSpeed, at any stage of ZeRO.

    Which stage is in the layout: one with ``slots`` (see ``engine.zero_groups``) has the reduce-scatter of stages 1
    and 2. The updated weights, which these stages send as well, are ``zero_groups.weight_bytes``.

    Args:
        bucket_mb: ``engine.bucket_mb``.
        trained: names of the parameters that have gradients; None for all.
    """
    buckets = trained_buckets(layout, bucket_mb=bucket_mb, trained=trained)
    return count_step(layout, buckets, bits=bits, codec=codec, rank=rank).sent_bytes


def trained_buckets(
    layout: Layout, *, bucket_mb: float, trained: Collection[str] | None = None
) -> tuple[tuple[int, ...], ...]:
    """The buckets of the DeepSpeed engine, in the order in which they leave: ``assumed_buckets`` without what has no gradient."""
    buckets = assumed_buckets(layout, bucket_mb=bucket_mb)
    if trained is None:
        return buckets
    kept = (tuple(i for i in bucket if layout.parameters[i].name in trained) for bucket in buckets)
    return tuple(bucket for bucket in kept if bucket)


def bucket_loads(
    layout: Layout, buckets: Iterable[Sequence[int]], *, bits: int, codec: CodecName
) -> list[Load]:
    """What each bucket is to codec and link in a step of ``bits`` bits; bytes are those of rank 0."""
    loads = []
    for indices in buckets:
        parameters = [layout.parameters[index] for index in indices]
        small = sum(parameter.numel for parameter in parameters if parameter.small)
        elements = {bits: sum(parameter.numel for parameter in parameters) - small}
        small_bits = layout.small_width(bits)
        elements[small_bits] = elements.get(small_bits, 0) + small
        sent = sent_bytes(layout, indices, bits=bits, codec=codec) if layout.world_size > 1 else 0
        chunks = len(cut_in_chunks([parameter.numel for parameter in parameters], CHUNK_NUMEL))
        loads.append(Load(elements=elements, sent_bytes=sent, chunks=chunks))
    return loads


def assumed_buckets(layout: Layout, *, bucket_mb: float) -> tuple[tuple[int, ...], ...]:
    """The buckets DDP would make if gradients came in reverse model order, before it has seen in which they come.

    Args:
        bucket_mb: ``engine.bucket_mb``, in MiB of fp32 gradients.
    """
    return cut_in_buckets([parameter.numel for parameter in layout.parameters], bucket_mb=bucket_mb)


def cut_in_buckets(numels: Sequence[int], *, bucket_mb: float) -> tuple[tuple[int, ...], ...]:
    """Places in ``numels``, the elements of parameters in model order, by bucket: ``assumed_buckets``."""
    limit = int(bucket_mb * 2**20)
    buckets: list[tuple[int, ...]] = []
    current: list[int] = []
    held = 0
    for index in reversed(range(len(numels))):
        current.append(index)
        held += 4 * numels[index]
        if held >= (limit if buckets else min(limit, FIRST_BUCKET_BYTES)):
            buckets.append(tuple(current))
            current, held = [], 0
    if current:
        buckets.append(tuple(current))
    return tuple(buckets)


def _units(parameter: ParameterLayout) -> np.ndarray:
    """``len(parameter.owned_units(rank))`` of every rank."""
    if parameter.slot:
        first, end = _slot_units(parameter)
        return end - first
    share, extra = divmod(parameter.num_units, parameter.world_size)
    places = (np.arange(parameter.world_size) - parameter.index) % parameter.world_size
    return share + (places < extra)


def _elements(parameter: ParameterLayout) -> np.ndarray:
    """``len(parameter.owned_elements(rank))`` of every rank, of a parameter that is not small.

    Every unit is a whole block but the last, which the last rank that owns any has.
    """
    size, world_size = parameter.block_size, parameter.world_size
    if parameter.slot:
        first, end = _slot_units(parameter)
        return np.minimum(end * size, parameter.numel) - np.minimum(first * size, parameter.numel)
    elements = size * _units(parameter)
    if parameter.num_units:
        last = (min(parameter.num_units, world_size) - 1 + parameter.index) % world_size
        elements[last] -= parameter.num_units * size - parameter.numel
    return elements


def _slot_units(parameter: ParameterLayout) -> tuple[np.ndarray, np.ndarray]:
    """First and end of ``parameter.owned_units(rank)`` of every rank, of a parameter with a slot."""
    assert parameter.slot
    _, offset, part_numel = parameter.slot
    size = 1 if parameter.small else parameter.block_size
    borders = np.arange(parameter.world_size + 1) * part_numel - offset
    borders = borders.clip(0, parameter.numel)
    first, end = borders[:-1], borders[1:]
    return first // size, np.where(end > first, -(-end // size), first // size)


def _hierarchical_bytes(
    layout: Layout, indices: Sequence[int], *, bits: int, codec: CodecName, rank: int
) -> tuple[int, int]:
    """Bytes that ``rank`` sends in all and to other nodes; see ``hierarchy``."""
    plan = build_hierarchical_plan(
        layout,
        indices,
        bits=bits,
        scale_bytes={
            width: scale_bytes(codec, width) for width in (bits, near_width(bits), layout.mean_width(bits))
        },
        rank=rank,
        rotated=False,
        device=torch.device("cpu"),
    )
    node, place = divmod(rank, layout.ranks_per_node)
    num_nodes = layout.world_size // layout.ranks_per_node
    far = sum(plan.far_sizes) - plan.far_sizes[node] + (num_nodes - 1) * plan.padded_size
    near = sum(plan.near_sizes) - plan.near_sizes[place]
    return near + far + (layout.ranks_per_node - 1) * num_nodes * plan.padded_size, far
