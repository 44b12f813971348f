"""Bytes without sending any. Without these, plans for a thousand ranks would count what no rank sends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cyclebnn_dist.comm import build_layout
from cyclebnn_dist.comm.codec import scale_bytes
from cyclebnn_dist.comm.plan import build_plan
from cyclebnn_dist.comm.traffic import assumed_buckets, bucket_loads, message_sizes, sent_bytes

CPU = torch.device("cpu")
SHAPES = [(), (1,), (3,), (33, 3), (32, 32), (17, 61), (40, 80), (1000,), (0, 5), (1024, 7)]
shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=7)


def layout_of(shape_list, *, world_size, small_bits=32):
    named = [(f"p{i}", torch.empty(shape)) for i, shape in enumerate(shape_list)]
    return build_layout(named, world_size=world_size, block_size=64, small_bits=small_bits, small_numel=500)


@given(
    shapes,
    st.integers(1, 9),
    st.sampled_from([1, 2, 3, 7, 8, 16, 32]),
    st.sampled_from([16, 32]),
    st.sampled_from(["hadamard", "minmax"]),
    st.randoms(),
)
@settings(deadline=None, max_examples=80)
def test_messages_are_as_long_as_the_reducers_plan_says(
    shape_list, world_size, bits, small_bits, codec, random
):
    layout = layout_of(shape_list, world_size=world_size, small_bits=small_bits)
    indices = random.sample(range(len(shape_list)), k=len(shape_list))
    plan = build_plan(layout, indices, bits=bits, scale_bytes=scale_bytes(codec, bits), rank=0, device=CPU)
    assert tuple(message_sizes(layout, indices, bits=bits, codec=codec)) == plan.sizes
    rank = random.randrange(world_size)
    sent = sum(plan.sizes) - plan.sizes[rank] + (world_size - 1) * plan.padded_size
    assert sent_bytes(layout, indices, bits=bits, codec=codec, rank=rank) == sent


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
