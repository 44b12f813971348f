"""Without these, ranks could drift apart, or a run resumed with other buckets could become another run."""

import os
from contextlib import contextmanager

import pytest
import torch
from links import counted_bytes
from ranks import RankPool

from cyclebnn_dist.comm import Codec, MismatchError, Reducer, build_layout, build_reducer
from cyclebnn_dist.comm import reducer as reducer_module
from cyclebnn_dist.comm.levels import GAUSSIAN_DISTORTION
from cyclebnn_dist.comm.pieces import Pieces
from cyclebnn_dist.config.recipe import CommConfig

CPU = torch.device("cpu")
WIDTHS = [*range(1, 9), 16, 32]
SHAPES = {
    "stem": (16, 3, 3, 3),
    "conv": (40, 30, 3, 3),
    "bias": (40,),
    "odd": (37, 53),
    "scale": (1,),
    "wide": (64, 65),
    "empty": (0, 5),
}
GROUPINGS = {
    "one call": [list(SHAPES)],
    "a call each": [[name] for name in SHAPES],
    "other order": [["wide", "scale", "stem"], ["empty", "conv"], ["odd", "bias"]],
}


def gradients_of(rank, step):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def make_reducer(rank, n, *, shapes=SHAPES, ranks_per_node=1, **comm):
    named = [(name, torch.empty(shape)) for name, shape in shapes.items()]
    return build_reducer(
        CommConfig(**{"block_size": 64, **comm}),
        named,
        rank=rank,
        world_size=n,
        seed=9,
        device=CPU,
        ranks_per_node=ranks_per_node,
    )


def reduced(reducer, tensors, *, step, bits, grouping="one call"):
    futures = [
        reducer.reduce({name: tensors[name] for name in names}, step=step, bits=bits)
        for names in GROUPINGS[grouping]
    ]
    for future in futures:
        future.wait()
    return tensors


def octets(tensors):
    return b"".join(tensors[name].numpy().tobytes() for name in SHAPES)


def average_in_every_grouping(rank, n, comm):
    reducer = make_reducer(rank, n, **comm)
    results = {}
    for step, bits in enumerate(WIDTHS):
        for grouping in GROUPINGS:
            tensors = reduced(reducer, gradients_of(rank, step), step=step, bits=bits, grouping=grouping)
            results[bits, grouping] = octets(tensors)
        with chunks_of(1000):
            tensors = reduced(reducer, gradients_of(rank, step), step=step, bits=bits)
        results[bits, "several chunks"] = octets(tensors)
    reducer.close()
    return results


@contextmanager
def chunks_of(numel):
    """Within it, a reducer cuts buckets into chunks of at least so many elements."""
    usual, reducer_module.CHUNK_NUMEL = reducer_module.CHUNK_NUMEL, numel
    try:
        yield
    finally:
        reducer_module.CHUNK_NUMEL = usual


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "comm",
    [{}, {"second_phase_extra_bits": 2}, {"codec": "absmax", "small_bits": 16}, {"codec": "minmax"}],
    ids=["hadamard", "wider means", "absmax", "minmax"],
)
def test_the_result_is_the_same_on_all_ranks_and_in_all_buckets(ranks, n, comm):
    results = ranks(n, average_in_every_grouping, comm)
    for bits in WIDTHS:
        values = {result[bits, way] for result in results for way in (*GROUPINGS, "several chunks")}
        if n == 1:
            assert values == {octets(gradients_of(0, WIDTHS.index(bits)))}
        assert len(values) == 1, f"{bits} bits"


def average_plainly(rank, n):
    reducer = make_reducer(rank, n)
    full = reduced(reducer, gradients_of(rank, 0), step=0, bits=32)
    half = reduced(reducer, gradients_of(rank, 0), step=0, bits=16)
    small = reduced(reducer, gradients_of(rank, 0), step=0, bits=2)
    narrow = {name: g.to(torch.bfloat16) for name, g in gradients_of(rank, 0).items()}
    narrow = reduced(reducer, narrow, step=0, bits=32)
    reducer.close()
    return full, half, small, narrow


@pytest.mark.parametrize("n", [2, 3])
def test_wide_steps_average_in_rank_order(ranks, n):
    full, half, narrow_step, narrow_gradient = ranks(n, average_plainly)[0]
    for name in SHAPES:
        total = torch.zeros(SHAPES[name])
        for rank in range(n):
            total += gradients_of(rank, 0)[name]
        assert torch.equal(full[name], total / n)
        torch.testing.assert_close(half[name], total / n, rtol=0.02, atol=0.02)
        if name in ("stem", "bias", "scale"):
            assert torch.equal(narrow_step[name], total / n)
        assert narrow_gradient[name].dtype == torch.bfloat16
        torch.testing.assert_close(narrow_gradient[name].float(), total / n, rtol=0.02, atol=0.02)


def noisy_gradient(rank, common):
    shared = torch.randn(512, 256, generator=torch.Generator().manual_seed(77))
    own = torch.randn(512, 256, generator=torch.Generator().manual_seed(rank))
    return common**0.5 * shared + (1 - common) ** 0.5 * own


def measure_error(rank, n, common):
    reducer = make_reducer(rank, n, shapes={"g": (512, 256)}, block_size=256)
    results = []
    for bits in range(1, 6):
        tensors = {"g": noisy_gradient(rank, common)}
        reducer.reduce(tensors, step=bits, bits=bits).wait()
        results.append(tensors["g"])
    reducer.close()
    return results if rank == 0 else None


@pytest.mark.parametrize(("n", "common"), [(4, 0.0), (3, 0.1), (2, 0.9)])
def test_the_error_of_the_mean_is_that_of_two_roundings(ranks, n, common):
    gradients = [noisy_gradient(rank, common) for rank in range(n)]
    mean = torch.stack(gradients).mean(dim=0)
    agreement = sum(float(g.square().sum()) for g in gradients) / n / float(mean.square().sum())
    for bits, result in zip(range(1, 6), ranks(n, measure_error, common)[0], strict=True):
        one = GAUSSIAN_DISTORTION[bits] / (1 - GAUSSIAN_DISTORTION[bits])
        first = one * agreement / n
        independent = first + one * (1 + first)
        found = float((result - mean).square().sum() / mean.square().sum())
        if bits == 1 or common > 0:
            # All ranks rotate alike and their sum is not rotated anew, so it is no Gaussian for the second rounding:
            # four 1-bit values often cancel exactly, which costs; ranks that agree add up to a level, which saves.
            assert found < 1.2 * independent, f"{bits} bits"
        else:
            assert found == pytest.approx(independent, rel=0.07), f"{bits} bits"


def average_with_wider_means(rank, n):
    reducer = make_reducer(rank, n, shapes={"g": (512, 256)}, block_size=256, second_phase_extra_bits=4)
    tensors = {"g": noisy_gradient(rank, 0.0)}
    reducer.reduce(tensors, step=0, bits=4).wait()
    reducer.close()
    return tensors["g"]


def test_wider_means_leave_the_error_of_the_first_phase_only(ranks):
    mean = torch.stack([noisy_gradient(rank, 0.0) for rank in range(4)]).mean(dim=0)
    error = float((ranks(4, average_with_wider_means)[0] - mean).square().sum() / mean.square().sum())
    assert error == pytest.approx(GAUSSIAN_DISTORTION[4] / (1 - GAUSSIAN_DISTORTION[4]), rel=0.07)


def error_of_many_ranks(num_ranks, noise, bits):
    """Relative error of the mean of gradients ``signal + noise``, computed in one process with the codec of both phases."""
    size, num_blocks = 256, 64
    codec, index = Codec(block_size=size), torch.arange(num_blocks)

    def message(width):
        codes_at = 2 * num_blocks + index * (size * width // 8)
        pieces = Pieces(index * size, torch.full_like(index, size), 0 * index, index, 2 * index, codes_at)
        return pieces, torch.zeros(num_blocks * (2 + size * width // 8), dtype=torch.uint8)

    generator = torch.Generator().manual_seed(3)
    signal = torch.randn(num_blocks * size, generator=generator)
    rows, mean = torch.zeros(num_blocks, size), torch.zeros(num_blocks * size)
    pieces, sent = message(bits[0])
    for _ in range(num_ranks):
        gradient = signal + noise**0.5 * torch.randn(num_blocks * size, generator=generator)
        mean += gradient / num_ranks
        codec.encode_pieces(gradient, pieces, sent, bits=bits[0], words=(5, 6), phase=1)
        codec.add_pieces(sent, pieces, rows, bits=bits[0])
    pieces, sent = message(bits[1])
    rows /= num_ranks
    codec.encode_pieces(rows.view(-1), pieces, sent, bits=bits[1], words=(5, 6), phase=2, rotated=True)
    result = torch.empty_like(mean)
    codec.decode_pieces(sent, pieces, result, bits=bits[1], words=(5, 6))
    return float((result - mean).square().sum() / mean.square().sum())


@pytest.mark.parametrize(("num_ranks", "noise", "pays"), [(128, 10.0, True), (8, 20.0, False)])
def test_a_wider_second_phase_pays_with_many_ranks_and_not_with_few(num_ranks, noise, pays):
    """At the same bytes, as Layout.mean_width says: R/N is 0.08 here and 0.75 there."""
    even, split = (error_of_many_ranks(num_ranks, noise, bits) for bits in ((3, 3), (2, 4)))
    assert split < 0.7 * even if pays else split > 1.5 * even


def average_incomplete_blocks(rank, n, codec):
    """Relative error of the mean of parameters that are shorter than a block, at each width."""
    shapes = {f"p{i}": (i % 13 + 1, 3) for i in range(300)}
    reducer = make_reducer(rank, n, shapes=shapes, block_size=64, small_numel=0, codec=codec)
    errors = {}
    for bits in range(1, 9):
        tensors = {
            name: torch.randn(shape, generator=torch.Generator().manual_seed(i))
            for i, (name, shape) in enumerate(shapes.items())
        }
        mean = {name: tensor.clone() for name, tensor in tensors.items()}
        reducer.reduce(tensors, step=bits, bits=bits).wait()
        lost = sum(float((tensors[name] - mean[name]).square().sum()) for name in shapes)
        errors[bits] = lost / sum(float(g.square().sum()) for g in mean.values())
    reducer.close()
    return errors


@pytest.mark.parametrize("codec", ["hadamard", "absmax", "minmax"])
def test_blocks_that_are_mostly_padding_arrive_as_well_as_full_ones(ranks, codec):
    """Ranks agree here, so that each of the two roundings adds its whole error."""
    errors = ranks(2, average_incomplete_blocks, codec)[0]
    for bits, error in errors.items():
        if codec != "hadamard":
            assert error < {1: 9, 2: 1.0, 3: 0.1}.get(bits, 0.02), f"{bits} bits"
        elif bits <= 5:
            one = GAUSSIAN_DISTORTION[bits] / (1 - GAUSSIAN_DISTORTION[bits])
            assert error < 1.25 * (one + one * (1 + one)), f"{bits} bits"
        else:
            assert error < 2 * 1.1 * 0.25 ** (bits - 6) * 7.86e-4, f"{bits} bits"


def count_independently(rank, n):
    with counted_bytes() as counted:
        reducer = make_reducer(rank, n, shapes={"g": (1024, 256)}, block_size=256)
        rows = []
        for bits in WIDTHS:
            before = reducer.counters.sent_bytes
            reducer.reduce({"g": torch.ones(1024, 256)}, step=0, bits=bits).wait()
            rows.append(reducer.counters.sent_bytes - before)
        reducer.close()
    return sum(counted.values()), rows, reducer.counters


@pytest.mark.parametrize("n", [2, 4])
def test_the_bytes_reported_are_the_bytes_sent(ranks, n):
    numel = 1024 * 256
    for counted, rows, counters in ranks(n, count_independently):
        assert counters.sent_bytes == counted == sum(rows)
        for bits, sent in zip(WIDTHS, rows, strict=True):
            per_element = bits / 8 + (2 / 256 if bits <= 8 else 0)
            assert sent == pytest.approx(2 * (n - 1) / n * numel * per_element, rel=0.01)
        assert counters.fp32_bytes == pytest.approx(len(WIDTHS) * 2 * (n - 1) / n * numel * 4)
        assert counters.bf16_bytes == counters.fp32_bytes / 2
        assert min(counters.encode_seconds, counters.wire_seconds, counters.decode_seconds) > 0


def reduce_a_bad_value(rank, n):
    reducer = make_reducer(rank, n)
    results = []
    for bits in WIDTHS:
        tensors = gradients_of(rank, 0)
        if rank == n - 1:
            tensors["conv"].view(-1)[70] = float("inf")
        results.append(reduced(reducer, tensors, step=0, bits=bits))
    reducer.close()
    return results


def test_a_bad_value_on_one_rank_reaches_all_ranks_and_no_other_block(ranks):
    for results in ranks(3, reduce_a_bad_value):
        for bits, tensors in zip(WIDTHS, results, strict=True):
            bad = ~torch.isfinite(tensors["conv"].view(-1))
            assert bad.nonzero().view(-1).tolist() == (list(range(64, 128)) if bits <= 8 else [70])
            assert all(bool(torch.isfinite(tensors[name]).all()) for name in SHAPES if name != "conv")


def disagree(rank, n, what):
    name, step = "conv", 7
    if rank == 1 and what == "step":
        step = 8
    if rank == 1 and what == "layout":
        name = "other"
    reducer = make_reducer(rank, n, shapes={name: SHAPES["conv"]})
    messages = []
    for attempt in (
        lambda: reducer.reduce({name: torch.ones(SHAPES["conv"])}, step=step, bits=4).wait(),
        reducer.check,
        lambda: reducer.begin_step(9, 4),
        lambda: reducer.reduce_flat(torch.ones(10800), parameters=[0]).wait(),
    ):
        try:
            attempt()
        except RuntimeError as error:
            messages.append((isinstance(error, MismatchError), str(error)))
    return messages


@pytest.mark.parametrize(("what", "said"), [("step", "step 8 instead of 7"), ("layout", "layout_and_codec")])
def test_gradients_of_another_step_or_model_are_refused_by_name(ranks, what, said):
    per_rank = ranks(2, disagree, what)
    assert [len(messages) for messages in per_rank] == [4, 4]
    is_mismatch, message = per_rank[0][1]
    assert is_mismatch
    assert "rank 0 at step 7" in message
    assert f"rank 1 sent {said}" in message


def lose_a_peer(rank, n):
    reducer = make_reducer(rank, n)
    reduced(reducer, gradients_of(rank, 0), step=0, bits=4)
    if rank == 1:
        os._exit(1)
    try:
        reduced(reducer, gradients_of(rank, 1), step=1, bits=4)
    except RuntimeError as error:
        first = str(error)
    with pytest.raises(RuntimeError) as caught:
        reducer.check()
    return first, str(caught.value)


def test_a_lost_peer_ends_the_step_with_a_message(ranks):
    outcomes = ranks.outcomes(2, lose_a_peer, timeout_seconds=60)
    assert outcomes[1] == ("lost", "the process ended")
    kind, messages = outcomes[0]
    assert kind == "result", messages
    for message in messages:
        assert "rank 0 of 2: averaging gradients at step 1 (4 bits) failed" in message
        assert "If a peer has ended, its own log says why" in message


def many_in_flight(rank, n):
    reducer = make_reducer(rank, n, shapes={f"g{i}": (100, 20) for i in range(12)})
    reducer.begin_step(0, 32)
    flats = [torch.full((2000,), float(10 * i + rank)) for i in range(12)]
    futures = [reducer.reduce_flat(flat, parameters=[i]) for i, flat in enumerate(flats)]
    values = [float(future.wait()[0]) for future in futures]
    state = reducer.state_dict()
    reducer.close()
    other = make_reducer(rank, n)
    other.load_state_dict(state)
    same = other.counters == reducer.counters
    other.close()
    return values, same


def test_many_buckets_are_under_way_at_once(ranks):
    for values, same in ranks(2, many_in_flight):
        assert values == [10 * i + 0.5 for i in range(12)]
        assert same, "a resumed run would forget what it sent"


def test_a_width_that_does_not_exist_is_refused():
    layout = build_layout([("g", torch.empty(3))], world_size=1, block_size=64, small_bits=32, small_numel=1)
    reducer = Reducer(layout, Codec(block_size=64), group=None, rank=0, seed=0, device=CPU)
    with pytest.raises(ValueError, match="9 bits does not exist"):
        reducer.begin_step(0, 9)


def fail_in_rank_1(rank, n):
    if rank == 1:
        raise KeyError("what went wrong")
    return rank


def test_the_pool_reports_failures_of_ranks_and_goes_on(ranks: RankPool):
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2.*what went wrong") as caught:
        ranks(2, fail_in_rank_1)
    assert "fail_in_rank_1" in str(caught.value)
    assert ranks(1, fail_in_rank_1) == [0]
