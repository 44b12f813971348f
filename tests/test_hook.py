"""Without these, whatever DDP does with its buckets could change the training or end it with a riddle."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cyclebnn_dist.comm import Reducer, build_reducer, register_hook
from cyclebnn_dist.config.recipe import CommConfig, EngineConfig
from cyclebnn_dist.engine import DDPEngine

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


def record_buckets(rank, n, options):
    """How many buckets each step has, and the number of elements of the first one."""
    recorded = []
    submit, begin = Reducer.reduce_flat, Reducer.begin_step

    def counted(self, flat, *, parameters):
        recorded[-1].append(flat.numel())
        return submit(self, flat, parameters=parameters)

    def begun(self, *args, **kwargs):
        recorded.append([])
        return begin(self, *args, **kwargs)

    Reducer.reduce_flat, Reducer.begin_step = counted, begun
    try:
        parameters, _ = train(rank, n, {"bucket_cap_mb": 0.01, **options}, steps=4, feedback=True)
    finally:
        Reducer.reduce_flat, Reducer.begin_step = submit, begin
    return parameters, recorded


@pytest.mark.parametrize(("options", "giant_steps"), [({}, 1), ({"static_graph": True}, 2)])
@pytest.mark.parametrize("views", [True, False])
def test_one_giant_bucket_comes_first_and_rebuilding_changes_nothing(ranks, options, giant_steps, views):
    uncut, _ = ranks(2, record_buckets, {"bucket_cap_mb": 25})[0]
    for parameters, steps in ranks(2, record_buckets, {**options, "gradient_as_bucket_view": views}):
        whole = sum(p.numel() for p in parameters.values())
        assert [step == [whole] for step in steps] == [index < giant_steps for index in range(4)]
        assert all(len(step) > 1 and sum(step) == whole for step in steps[giant_steps:])
        assert same(parameters, uncut), "residuals included: DDP's buckets are not the unit of anything"


def train_with_absent_parameters(rank, n, views):
    """A layer no rank uses, and gradients that are summed over two passes; beside it the same with DDP's own reduction."""
    options = {"find_unused_parameters": True, "gradient_as_bucket_view": views, "bucket_cap_mb": 0.01}
    ours, _ = train(rank, n, options, steps=3, bits=[32], accumulation=2)
    plain, _ = train(rank, n, options, steps=3, bits=[32], accumulation=2, hook=False)
    quantized, _ = train(rank, n, options, steps=3, bits=[4], accumulation=2, feedback=True)
    return ours, plain, quantized


@pytest.mark.parametrize("views", [True, False])
def test_layers_that_nobody_uses_stay_and_the_others_learn(ranks, views):
    results = ranks(3, train_with_absent_parameters, views)
    for ours, plain, quantized in results:
        for name, value in plain.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
        assert same(quantized, results[0][2])
        assert torch.equal(quantized["spare.weight"], plain["spare.weight"])


def train_with_loss_scale(rank, n, overflow):
    """Parameters, residuals and loss scale of mixed precision training in which one rank may overflow in one step."""
    torch.manual_seed(0)
    model = Net(spare=False)
    comm = CommConfig(block_size=64, small_numel=500, error_feedback=True)
    device = torch.device("cpu")
    reducer = build_reducer(comm, model.named_parameters(), rank=rank, world_size=n, seed=1, device=device)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr_scale": 1.0}], lr=0.1)
    engine = DDPEngine(model, optimizer, reducer, config=EngineConfig(), amp="bf16", device=device)
    engine._scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    data = torch.Generator().manual_seed(rank)
    history = []
    for step in range(5):
        engine.begin_step(step, lr=0.1, communication_bits=BITS[step])
        images, labels = torch.randn(8, 3, 9, 9, generator=data), torch.randint(40, (8,), generator=data)
        loss = nn.functional.cross_entropy(engine.forward(images), labels)
        engine.backward(loss * (1e38 if overflow and rank == 1 and step == 2 else 1.0))
        skip = not bool(torch.isfinite(engine.clip(0.0)))
        engine.step(skip=skip)
        residuals = {
            f"{phase}/{name}": error.clone()
            for phase, errors in reducer.state_dict()["residuals"].items()
            for name, error in errors.items()
        }
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        history.append((skip, engine._scaler.get_scale(), parameters, residuals))
    reducer.close()
    return history


def test_an_overflow_skips_the_step_on_all_ranks_and_leaves_no_trace_in_residuals(ranks):
    of_ranks = ranks(2, train_with_loss_scale, True)
    for history in of_ranks:
        assert [skip for skip, *_ in history] == [False, False, True, False, False]
        assert [scale for _, scale, *_ in history] == [256.0, 512.0, 256.0, 256.0, 512.0]
        assert same(history[1][2], history[2][2])
        assert same(history[1][3], history[2][3])
        assert not same(history[2][3], history[3][3])
        assert all(bool(torch.isfinite(error).all()) for error in history[-1][3].values())
    for (_, _, first, _), (_, _, second, _) in zip(*of_ranks, strict=True):
        assert same(first, second)


def reduce_a_tiny_model(rank, n, views):
    """Three elements over four ranks: most ranks own nothing of anything."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    comm = CommConfig(block_size=64, small_numel=0)
    reducer = build_reducer(
        comm, model.named_parameters(), rank=rank, world_size=n, seed=1, device=torch.device("cpu")
    )
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=views)
    register_hook(wrapped, reducer)
    found = {}
    for step, bits in enumerate([1, 4, 8, 16, 32]):
        reducer.begin_step(step, bits)
        wrapped.zero_grad()
        with reducer.reraising():
            wrapped(torch.tensor([[1.0 + rank, -2.0 * rank]])).sum().backward()
        found[bits] = model.weight.grad.clone(), model.bias.grad.clone()
    reducer.close()
    return found


@pytest.mark.parametrize("views", [True, False])
def test_fewer_elements_than_ranks_are_averaged_too(ranks, views):
    results = ranks(4, reduce_a_tiny_model, views)
    for found in results:
        for bits, (weight, bias) in found.items():
            assert torch.equal(weight, results[0][bits][0])
            assert torch.equal(bias, torch.ones(1)), "1-D, so it travels as it is"
            if bits >= 8:
                torch.testing.assert_close(weight, torch.tensor([[2.5, -3.0]]), rtol=0.1, atol=0.1)
        assert torch.equal(found[32][0], torch.tensor([[2.5, -3.0]]))


def join_with_uneven_data(rank, n):
    model = nn.Linear(40, 40)
    reducer = build_reducer(
        CommConfig(), model.named_parameters(), rank=rank, world_size=n, seed=1, device=torch.device("cpu")
    )
    wrapped = DistributedDataParallel(model)
    register_hook(wrapped, reducer)
    try:
        with wrapped.join():
            raise AssertionError("entered")
    except RuntimeError as error:
        return str(error)
    finally:
        reducer.close()


def test_join_is_refused_on_every_rank_before_it_begins(ranks):
    for message in ranks(2, join_with_uneven_data):
        assert "join is not supported" in message
        assert "equally many batches" in message


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
