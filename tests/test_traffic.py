"""Bytes without sending any. Without these, plans for a thousand ranks would count what no rank sends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cyclebnn_dist.comm import build_layout
from cyclebnn_dist.comm.codec import scale_bytes
from cyclebnn_dist.comm.plan import build_plan
from cyclebnn_dist.comm.traffic import (
    assumed_buckets,
    bucket_loads,
    message_sizes,
    sent_bytes,
    sent_bytes_of_step,
    trained_buckets,
)
from cyclebnn_dist.engine.zero_groups import build_slots, weight_bytes

CPU = torch.device("cpu")
SHAPES = [(), (1,), (3,), (33, 3), (32, 32), (17, 61), (40, 80), (1000,), (0, 5), (1024, 7)]
shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=7)


def layout_of(shape_list, *, world_size, small_bits=32, slots=None):
    named = [(f"p{i}", torch.empty(shape)) for i, shape in enumerate(shape_list)]
    return build_layout(
        named, world_size=world_size, block_size=64, small_bits=small_bits, small_numel=500, slots=slots
    )


def slots_of(shape_list, *, world_size, bucket_mb):
    """Two groups, of what is at even places and of what is at odd ones."""
    numels = {f"p{i}": torch.empty(shape).numel() for i, shape in enumerate(shape_list)}
    groups = [[name for i, name in enumerate(numels) if i % 2 == kind] for kind in (0, 1)]
    groups = [group for group in groups if group]
    return build_slots(groups, numels, bucket_mb=bucket_mb, world_size=world_size)


@given(
    shapes,
    st.integers(1, 9),
    st.sampled_from([1, 2, 3, 7, 8, 16, 32]),
    st.sampled_from([16, 32]),
    st.sampled_from(["hadamard", "minmax"]),
    st.booleans(),
    st.randoms(),
)
@settings(deadline=None, max_examples=120)
def test_messages_are_as_long_as_the_reducers_plan_says(
    shape_list, world_size, bits, small_bits, codec, scattered, random
):
    slots = slots_of(shape_list, world_size=world_size, bucket_mb=0.01) if scattered else None
    layout = layout_of(shape_list, world_size=world_size, small_bits=small_bits, slots=slots)
    indices = random.sample(range(len(shape_list)), k=len(shape_list))
    plan = build_plan(layout, indices, bits=bits, scale_bytes=scale_bytes(codec, bits), rank=0, device=CPU)
    assert tuple(message_sizes(layout, indices, bits=bits, codec=codec)) == plan.sizes
    rank = random.randrange(world_size)
    sent = sum(plan.sizes) - plan.sizes[rank] + (0 if scattered else (world_size - 1) * plan.padded_size)
    assert sent_bytes(layout, indices, bits=bits, codec=codec, rank=rank) == sent


@given(shapes, st.integers(1, 9), st.sampled_from([0.001, 0.01, 25.0]))
def test_the_parts_of_ranks_hold_every_element_once_and_are_owned_in_whole_blocks(
    shape_list, world_size, bucket_mb
):
    layout = layout_of(
        shape_list,
        world_size=world_size,
        slots=slots_of(shape_list, world_size=world_size, bucket_mb=bucket_mb),
    )
    parts: dict[tuple[int, int], list[int]] = {}
    for parameter in layout.parameters:
        needed = [parameter.needed_elements(rank) for rank in range(world_size)]
        assert [e for part in needed for e in part] == list(range(parameter.numel))
        for rank, part in enumerate(needed):
            owned = parameter.owned_elements(rank)
            parts.setdefault((parameter.slot.group, rank), []).extend(part)
            if parameter.small or not part:
                assert list(owned) == list(part)
                continue
            assert owned.start % 64 == 0
            assert owned.start <= part.start < owned.start + 64
            assert owned.stop == min(-(-part.stop // 64) * 64, parameter.numel)
    for group in {group for group, _ in parts}:
        counts = [len(parts[group, rank]) for rank in range(world_size)]
        size = 2 * math.ceil(sum(counts) / (2 * world_size))
        assert counts == [min(max(sum(counts) - rank * size, 0), size) for rank in range(world_size)]


def test_half_the_bytes_of_an_all_reduce_leave_at_stages_1_and_2_and_every_bucket_to_all_ranks():
    shape_list = [(512, 512), (512,)] * 12
    numels = [512 * 512, 512] * 12
    settings = {"bits": 4, "codec": "hadamard", "bucket_mb": 4.0}
    for world_size in (2, 4, 8):
        whole = layout_of(shape_list, world_size=world_size)
        slots = slots_of(shape_list, world_size=world_size, bucket_mb=4.0)
        layout = layout_of(shape_list, world_size=world_size, slots=slots)
        sent = [sent_bytes_of_step(layout, **settings, rank=rank) for rank in range(world_size)]
        assert max(sent) == pytest.approx(sent_bytes_of_step(whole, **settings) / 2, rel=0.02)
        assert weight_bytes(slots.values(), world_size=world_size) == pytest.approx(
            4 * sum(numels) * (world_size - 1) / world_size, rel=0.001
        )
        for bucket in trained_buckets(layout, bucket_mb=4.0):
            sizes = message_sizes(layout, bucket, bits=4, codec="hadamard")
            assert max(sizes) <= 1.2 * min(sizes)


def test_what_is_frozen_is_in_no_bucket():
    layout = layout_of([(32, 32), (40, 80), (1000,)], world_size=2)
    assert trained_buckets(layout, bucket_mb=0.01, trained={"p0", "p2"}) == ((2,), (0,))


@given(shapes, st.sampled_from([0.001, 0.01, 25.0]))
def test_assumed_buckets_hold_every_parameter_once_in_reverse_order(shape_list, bucket_mb):
    layout = layout_of(shape_list, world_size=2)
    buckets = assumed_buckets(layout, bucket_mb=bucket_mb)
    assert [index for bucket in buckets for index in bucket] == list(reversed(range(len(shape_list))))
    for bucket in buckets:
        held = [4 * layout.parameters[index].numel for index in bucket]
        assert sum(held[:-1]) < bucket_mb * 2**20, "a bucket is full as soon as it holds its size"


def test_the_load_of_a_bucket_has_each_element_at_its_own_width():
    layout = layout_of([(40, 80), (1000,), (33, 3)], world_size=4)
    by_bits = {
        bits: bucket_loads(layout, [(0, 1), (2,)], bits=bits, codec="hadamard") for bits in (4, 16, 32)
    }
    assert [load.elements for load in by_bits[4]] == [{4: 3200, 32: 1000}, {4: 0, 32: 99}]
    assert [load.elements for load in by_bits[16]] == [{16: 3200, 32: 1000}, {16: 0, 32: 99}]
    assert [load.elements for load in by_bits[32]] == [{32: 4200}, {32: 99}]
    assert by_bits[4][0].sent_bytes == sent_bytes(layout, (0, 1), bits=4, codec="hadamard")
    assert by_bits[4][0].sent_bytes == pytest.approx(6 / 4 * (3200 * (0.5 + 2 / 64) + 4000), rel=0.06)
