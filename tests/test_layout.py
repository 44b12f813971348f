"""Without these, a gradient element could be sent twice, to nobody, or to different owners by different ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cyclebnn_dist.comm.codec import Codec
from cyclebnn_dist.comm.header import HEADER_BYTES
from cyclebnn_dist.comm.layout import build_layout
from cyclebnn_dist.comm.plan import build_plan, cut_in_chunks

CPU = torch.device("cpu")
SHAPES = [(), (1,), (3,), (64,), (33, 3), (32, 32), (17, 61), (40, 80), (1000,), (0,)]
shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6)


def form_of(shape_list, *, world_size, block_size=64, small_bits=32, small_numel=1024):
    named = [(f"p{i}", torch.empty(shape)) for i, shape in enumerate(shape_list)]
    return build_layout(
        named, world_size=world_size, block_size=block_size, small_bits=small_bits, small_numel=small_numel
    )


@given(shapes, st.integers(1, 9))
@settings(deadline=None)
def test_every_element_has_exactly_one_owner_and_shares_are_even(shape_list, world_size):
    for parameter in form_of(shape_list, world_size=world_size).parameters:
        owned = [element for rank in range(world_size) for element in parameter.owned_elements(rank)]
        assert sorted(owned) == list(range(parameter.numel))
        units = [len(parameter.owned_units(rank)) for rank in range(world_size)]
        assert max(units) - min(units) <= 1
        if not parameter.small:
            assert all(
                parameter.owned_elements(rank).start % 64 == 0 for rank in range(world_size) if units[rank]
            )


@given(
    shapes,
    st.integers(1, 5),
    st.sampled_from([1, 3, 7, 8, 16, 32]),
    st.sampled_from(["hadamard", "minmax"]),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=60)
def test_messages_hold_every_element_once_and_nothing_overlaps(shape_list, world_size, bits, codec, random):
    scale_bytes = Codec(codec).scale_bytes(bits)
    layout = form_of(shape_list, world_size=world_size, small_bits=16)
    indices = list(range(len(shape_list)))
    random.shuffle(indices)
    plan = build_plan(layout, indices, bits=bits, scale_bytes=scale_bytes, rank=0, device=CPU)
    sources: list[int] = []
    used: list[int] = []
    for pieces, width in ((plan.outgoing.small, plan.small_bits), (plan.outgoing.wide, bits)):
        for n in range(len(pieces)):
            count = int(pieces.count[n])
            sources += range(int(pieces.source[n]), int(pieces.source[n]) + count)
            nbytes = count * width // 8 if width >= 16 else 64 * width // 8
            used += range(int(pieces.codes_at[n]), int(pieces.codes_at[n]) + nbytes)
            if width >= 16:
                assert int(pieces.codes_at[n]) % (width // 8) == 0
            else:
                used += range(int(pieces.scale_at[n]), int(pieces.scale_at[n]) + scale_bytes)
    starts = [sum(plan.sizes[:owner]) for owner in range(world_size)]
    used += [start + byte for start in starts for byte in range(HEADER_BYTES)]
    assert sorted(sources) == list(range(plan.numel))
    assert len(used) == len(set(used))
    assert max(used) < sum(plan.sizes)
    assert sum(plan.sizes) - len(used) < 8 * world_size


def test_many_parameters_load_all_ranks_alike():
    layout = form_of([(33, 32)] * 64, world_size=4)
    plan = build_plan(layout, range(64), bits=4, scale_bytes=2, rank=0, device=CPU)
    assert max(plan.sizes) - min(plan.sizes) <= 64


@pytest.mark.parametrize(
    "other",
    [
        {"world_size": 3},
        {"block_size": 128},
        {"small_bits": 16},
        {"small_numel": 4000},
        {"shape_list": [(40, 81), (64,)]},
        {"shape_list": [(64,), (40, 80)]},
    ],
)
def test_the_digest_tells_layouts_apart(other):
    reference = {"shape_list": [(40, 80), (64,)], "world_size": 2}
    assert form_of(**reference).digest == form_of(**reference).digest
    assert form_of(**reference).digest != form_of(**(reference | other)).digest
    assert 0 <= form_of(**reference).digest < 2**63


def test_small_parameters_never_travel_narrower_than_the_step():
    assert [form_of([(3,)], world_size=2, small_bits=16).small_width(bits) for bits in (4, 16, 32)] == [
        16,
        16,
        32,
    ]
    assert [form_of([(3,)], world_size=2, small_bits=32).small_width(bits) for bits in (4, 16, 32)] == [
        32,
        32,
        32,
    ]


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_chunks_are_neighbours_and_none_is_needlessly_small(numels, least):
    chunks = cut_in_chunks(numels, least)
    assert [place for chunk in chunks for place in chunk] == list(range(len(numels)))
    assert all(chunks)
    held = [sum(numels[place] for place in chunk) for chunk in chunks]
    if len(chunks) > 1:
        assert min(held) >= least // 2
        assert min(held[:-1]) >= least
    for chunk in chunks[:-1]:
        assert sum(numels[place] for place in chunk[:-1]) < least, "one that could have been cut earlier"
