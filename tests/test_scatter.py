"""Without these a rank could update its part of the weights with a gradient that depends on how parts are cut, or lose some."""

import pytest
import torch

from cyclebnn_dist.comm import BlockKey, Codec, build_layout, build_reducer
from cyclebnn_dist.config.recipe import CommConfig
from cyclebnn_dist.engine.zero_groups import build_slots

CPU = torch.device("cpu")
SHAPES = {"conv": (40, 27), "bias": (40,), "odd": (37, 53), "few": (3,), "last": (70, 30)}
WIDE = ("conv", "odd", "last")
GROUPS = [["conv", "odd", "last"], ["bias", "few"]]
BITS = [32, 16, 8, 4, 3, 2, 1]
SEED, BLOCK = 9, 64


def gradients_of(rank, step):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def make_reducer(rank, n, *, bucket_mb, feedback=False):
    """Of an all-reduce where ``bucket_mb`` is None; else it says how groups, and so the parts of ranks, are cut."""
    named = [(name, torch.empty(shape)) for name, shape in SHAPES.items()]
    numels = {name: tensor.numel() for name, tensor in named}
    slots = None
    if bucket_mb:
        slots = build_slots(GROUPS, numels, bucket_mb=bucket_mb, world_size=n)
    comm = CommConfig(block_size=BLOCK, error_feedback=feedback)
    return build_reducer(comm, named, rank=rank, world_size=n, seed=SEED, device=CPU, slots=slots)


def reduced(reducer, rank, buckets, *, step, bits, dtype=torch.float32):
    """By parameter: the elements this rank has got, and their values."""
    reducer.begin_step(step, bits)
    found = {}
    for names in buckets:
        tensors = {name: gradients_of(rank, step)[name].to(dtype) for name in names}
        reducer.reduce(tensors, step=step, bits=bits).wait()
        for parameter in reducer.layout.parameters:
            if parameter.name in tensors:
                needed = parameter.needed_elements(rank)
                values = tensors[parameter.name].view(-1)[needed.start : needed.stop]
                found[parameter.name] = (needed.start, values.clone())
    reducer.finish_step()
    return found


def reduce_in_many_ways(rank, n):
    ways = {
        "all-reduce": (None, [tuple(SHAPES)], torch.float32),
        "one bucket": (25.0, [tuple(SHAPES)], torch.float32),
        "other buckets": (25.0, [("last", "few"), ("odd", "conv"), ("bias",)], torch.float32),
        "other parts": (0.006, [("last", "few", "odd"), ("bias", "conv")], torch.float32),
        "bf16": (0.006, [tuple(SHAPES)], torch.bfloat16),
    }
    results = {}
    for way, (bucket_mb, buckets, dtype) in ways.items():
        reducer = make_reducer(rank, n, bucket_mb=bucket_mb)
        for step, bits in enumerate(BITS):
            results[way, bits] = reduced(reducer, rank, buckets, step=step, bits=bits, dtype=dtype)
        reducer.close()
    return results


def put_together(found, way, bits):
    """Whole tensors, of which every element came from exactly one rank."""
    whole = {}
    for name, shape in SHAPES.items():
        parts = sorted(
            (result[way, bits][name] for result in found), key=lambda part: (part[0], len(part[1]))
        )
        whole[name] = torch.cat([values for _, values in parts]).view(shape)
    return whole


def mean_of_decoded(name, *, n, step, bits):
    """The mean of what ranks' messages say, from the codec's plain interface."""
    index = list(SHAPES).index(name)
    total = torch.zeros(SHAPES[name])
    for rank in range(n):
        gradient = gradients_of(rank, step)[name]
        if bits == 16 and name in WIDE:
            gradient = gradient.bfloat16().float()
        elif bits < 16 and name in WIDE:
            num_blocks = -(-gradient.numel() // BLOCK)
            rows = torch.zeros(num_blocks, BLOCK)
            rows.view(-1)[: gradient.numel()] = gradient.view(-1)
            blocks = torch.arange(num_blocks)
            key = BlockKey(SEED, step, torch.full_like(blocks, index), blocks)
            codec = Codec("hadamard", block_size=BLOCK, backend="torch")
            scales, codes = codec.encode(rows, bits, key)
            gradient = codec.decode(scales, codes, bits, key).view(-1)[: gradient.numel()].view_as(gradient)
        total += gradient
    return total / n


@pytest.mark.parametrize("n", [2, 3])
def test_each_rank_gets_the_mean_of_what_ranks_sent_whatever_the_buckets_and_the_borders(ranks, n):
    found = ranks(n, reduce_in_many_ways)
    for step, bits in enumerate(BITS):
        results = {
            way: put_together(found, way, bits) for way in ("one bucket", "other buckets", "other parts")
        }
        everywhere = {
            name: values.view(SHAPES[name]) for name, (_, values) in found[0]["all-reduce", bits].items()
        }
        for name in SHAPES:
            result = results["one bucket"][name]
            assert torch.equal(result, results["other buckets"][name])
            assert torch.equal(result, results["other parts"][name])
            expected = mean_of_decoded(name, n=n, step=step, bits=bits)
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
            if bits == 32 or name not in WIDE:
                assert torch.equal(result, everywhere[name]), "nothing is rounded twice"
                continue
            true = sum(gradients_of(rank, step)[name] for rank in range(n)) / n
            assert (result - true).square().sum() < (everywhere[name] - true).square().sum()
            rounded = put_together(found, "bf16", bits)[name]
            assert rounded.dtype == torch.bfloat16
            assert (
                torch.nn.functional.cosine_similarity(rounded.float().view(-1), result.view(-1), dim=0) > 0.9
            )


def owe_and_pay(rank, n):
    """Three steps of an all-reduce and three of a reduce-scatter that takes over its residuals; and back again."""
    sums, residuals = {}, None
    for bucket_mb in (None, 25.0, 0.006, None):
        reducer = make_reducer(rank, n, bucket_mb=bucket_mb, feedback=True)
        if residuals:
            reducer.load_state_dict(residuals)
        for step in range(3):
            for name, (start, values) in reduced(reducer, rank, [tuple(SHAPES)], step=step, bits=2).items():
                total = sums.setdefault(name, torch.zeros(SHAPES[name], dtype=torch.float64)).view(-1)
                if not bucket_mb:
                    values = values / n  # everyone has all of it
                total[start : start + len(values)] += values.double().view(-1)
        residuals = reducer.state_dict()
        reducer.close()
    return sums, residuals["residuals"]


@pytest.mark.parametrize("n", [2, 3])
def test_what_is_owed_is_paid_also_when_the_reduction_changes(ranks, n):
    """Averages of all steps = true means - what is owed in the end."""
    found = ranks(n, owe_and_pay)
    for name in WIDE:
        paid = sum(sums[name] for sums, _ in found)
        true = sum(4 * gradients_of(rank, step)[name].double() for rank in range(n) for step in range(3)) / n
        owed = sum(residuals["gradient"][name].double() for _, residuals in found) / n
        last = make_layout(n)
        for rank, (_, residuals) in enumerate(found):
            owned = last[name].owned_elements(rank)
            owed.view(-1)[owned.start : owned.stop] += residuals["mean"][name].double()
        assert owed.abs().max() > 0.01, "two bits lose something"
        torch.testing.assert_close(paid, true - owed.view(SHAPES[name]), rtol=0, atol=1e-4)


def make_layout(n):
    comm = CommConfig(block_size=BLOCK)
    layout = build_layout(
        [(name, torch.empty(shape)) for name, shape in SHAPES.items()],
        world_size=n,
        block_size=BLOCK,
        small_bits=comm.small_bits,
        small_numel=comm.small_numel,
    )
    return {parameter.name: parameter for parameter in layout.parameters}
