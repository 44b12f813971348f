"""Without these, whatever DDP does with its buckets could change the training or end it with a riddle."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cyclebnn_dist.comm import build_reducer, register_hook
from cyclebnn_dist.config.recipe import CommConfig

BITS = [4, 2, 8, 16, 1, 32, 3]


class Net(nn.Module):
    def __init__(self, *, spare):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 32, 3)
        self.head = nn.Linear(32, 40)
        self.spare = nn.Linear(40, 40) if spare else None

    def forward(self, x):
        x = torch.tanh(self.body(torch.relu(self.norm(self.stem(x)))))
        return self.head(x.mean(dim=(2, 3)))


def train(rank, n, options=None, *, steps=7, bits=BITS, hook=True, accumulation=1, feedback=False):
    """All parameters after training, and the bytes sent until the end of each step."""
    options = dict(options or {})
    memory_format = options.pop("memory_format", torch.contiguous_format)
    torch.manual_seed(0)
    model = Net(spare=options.get("find_unused_parameters", False)).to(memory_format=memory_format)
    comm = CommConfig(block_size=64, small_numel=500, error_feedback=feedback)
    reducer = build_reducer(
        comm, model.named_parameters(), rank=rank, world_size=n, seed=1, device=torch.device("cpu")
    )
    wrapped = DistributedDataParallel(model, broadcast_buffers=False, **options)
    if hook:
        register_hook(wrapped, reducer)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    data = torch.Generator().manual_seed(rank)
    sent = []
    for step in range(steps):
        reducer.begin_step(step, bits[step % len(bits)])
        optimizer.zero_grad()
        for micro_step in range(accumulation):
            last = micro_step == accumulation - 1
            with nullcontext() if last else wrapped.no_sync():
                images, labels = (
                    torch.randn(8, 3, 9, 9, generator=data),
                    torch.randint(40, (8,), generator=data),
                )
                loss = nn.functional.cross_entropy(wrapped(images), labels) / accumulation
                with reducer.reraising():
                    loss.backward()
        optimizer.step()
        sent.append(reducer.counters.sent_bytes)
    reducer.close()
    parameters = {name: p.detach().clone().contiguous() for name, p in model.named_parameters()}
    return parameters, sent


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def train_in_many_ways(rank, n):
    small = {"bucket_cap_mb": 0.01}
    ways = {
        "one bucket": {},
        "small buckets": small,
        "views": {**small, "gradient_as_bucket_view": True},
        "static graph": {**small, "static_graph": True},
    }
    return {way: train(rank, n, options)[0] for way, options in ways.items()}


@pytest.mark.parametrize("n", [2, 4])
def test_training_does_not_depend_on_how_ddp_cuts_its_buckets(ranks, n):
    results = ranks(n, train_in_many_ways)
    reference = results[0]["one bucket"]
    for rank, ways in enumerate(results):
        for way, parameters in ways.items():
            assert same(parameters, reference), f"{way} on rank {rank}"


def train_accumulating(rank, n, options):
    return train(rank, n, {"bucket_cap_mb": 0.01, "gradient_as_bucket_view": True, **options}, accumulation=3)


@pytest.mark.parametrize(
    "options",
    [{}, {"find_unused_parameters": True}, {"memory_format": torch.channels_last}],
    ids=["plain", "unused parameters", "channels last"],
)
def test_gradients_accumulate_locally_and_ranks_stay_equal(ranks, options):
    (first, sent), (second, _) = ranks(2, train_accumulating, options)
    assert same(first, second)
    once_a_step = dict(zip(BITS, (b - a for a, b in pairwise([0, *sent])), strict=True))
    assert sorted(once_a_step, key=once_a_step.__getitem__) == sorted(BITS)
    numel = sum(p.numel() for p in first.values())
    assert once_a_step[32] == pytest.approx(4 * numel, rel=0.05), (
        "32 bits, 2 ranks: each element once, 4 bytes"
    )


def train_with_and_without(rank, n):
    wide = {"steps": 4, "bits": [32]}
    return train(rank, n, **wide)[0], train(rank, n, hook=False, **wide)[0]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_at_32_bits_the_hook_trains_like_ddp_itself(ranks, n):
    for ours, plain in ranks(n, train_with_and_without):
        for name in ours:
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-5)


def train_alone(rank, n):
    return train(rank, n, bits=[1], steps=3), train(rank, n, bits=[32], steps=3, hook=False)


def test_a_world_of_one_sends_nothing_and_loses_nothing(ranks):
    (quantized, sent), (plain, _) = ranks(1, train_alone)[0]
    assert same(quantized, plain)
    assert sent == [0, 0, 0]


def train_with_feedback(rank, n):
    return [train(rank, n, {"bucket_cap_mb": mb}, feedback=True)[0] for mb in (25, 0.01)]


def test_error_feedback_does_not_depend_on_buckets_either(ranks):
    results = [parameters for pair in ranks(2, train_with_feedback) for parameters in pair]
    assert all(same(parameters, results[0]) for parameters in results)


def fall_out_of_step(rank, n):
    try:
        train(rank, n, steps=1, bits=[4])
        model = nn.Linear(40, 40)
        reducer = build_reducer(
            CommConfig(),
            model.named_parameters(),
            rank=rank,
            world_size=n,
            seed=1,
            device=torch.device("cpu"),
        )
        wrapped = DistributedDataParallel(model)
        register_hook(wrapped, reducer)
        reducer.begin_step(5 + rank, 4)
        with reducer.reraising():
            wrapped(torch.ones(2, 40)).sum().backward()
    except RuntimeError as error:
        return type(error).__name__, str(error)


def test_a_rank_out_of_step_ends_the_backward_pass_with_its_name(ranks):
    kind, message = ranks(2, fall_out_of_step)[0]
    assert kind == "MismatchError"
    assert "rank 1 sent step 6 instead of 5" in message
