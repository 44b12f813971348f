"""In live ranks. Without these a run could train otherwise under DeepSpeed than under DDP, or not go on from it."""

from contextlib import nullcontext

import pytest
import torch
from test_hook import Net, same
from torch import nn
from worlds import make_world

from cyclebnn_dist.comm import build_reducer
from cyclebnn_dist.config.recipe import CommConfig, EngineConfig
from cyclebnn_dist.engine import DDPEngine
from cyclebnn_dist.engine.deepspeed import DeepSpeedEngine

BITS = [4, 2, 8, 16, 1, 32, 3]
STAGES = [0, 1, 2]


def build(rank, n, stage, *, optimizer="adamw", amp="fp32", feedback=False, bucket_mb=0.01):
    """Engine and reducer of a small net; ``stage`` None is DDP."""
    torch.manual_seed(0)
    model = Net(spare=False)
    comm = CommConfig(block_size=64, small_numel=500, error_feedback=feedback)
    world = make_world(rank, n)
    reducer = build_reducer(
        comm, model.named_parameters(), rank=rank, world_size=n, seed=1, device=world.device
    )
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    others = {name: p for name, p in model.named_parameters() if p.ndim <= 1}
    groups = [
        {"params": list(g.values()), "names": list(g), "lr_scale": scale, "weight_decay": decay}
        for g, scale, decay in [(weights, 1.0, 0.05), (others, 0.5, 0.0)]
    ]
    if optimizer == "sgd":
        made = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    else:
        made = torch.optim.AdamW(groups, lr=0.1)
    if stage is None:
        engine = DDPEngine(
            model, made, reducer, config=EngineConfig(bucket_mb=bucket_mb), amp=amp, device=world.device
        )
    else:
        config = EngineConfig(name="deepspeed", zero_stage=stage, bucket_mb=bucket_mb)
        engine = DeepSpeedEngine(model, made, reducer, config=config, amp=amp, world=world)
    return engine, reducer


def train(engine, reducer, rank, *, steps, bits=BITS, accumulation=1, clip=0.0, lr=0.01, overflow=None):
    """Of each step: norm, bytes sent so far, copies of the parameters. What ranks see depends on rank and step alone."""
    history = []
    for step in steps:
        data = torch.Generator().manual_seed(100 * step + rank)
        engine.begin_step(step, lr=lr, communication_bits=bits[step % len(bits)])
        for micro_step in range(accumulation):
            with nullcontext() if micro_step == accumulation - 1 else engine.accumulating():
                images = torch.randn(8, 3, 9, 9, generator=data)
                labels = torch.randint(40, (8,), generator=data)
                loss = nn.functional.cross_entropy(engine.forward(images), labels) / accumulation
                engine.backward(loss * (float("inf") if overflow == step and rank == 1 else 1.0))
        norm = engine.clip(clip)
        engine.step(skip=not bool(torch.isfinite(norm)))
        parameters = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        history.append((norm.item(), reducer.counters.sent_bytes, parameters))
    return history


def train_all_engines(rank, n, options, training, stages):
    results = {}
    for stage in [None, *stages]:
        engine, reducer = build(rank, n, stage, **options)
        results[stage] = train(engine, reducer, rank, **training)
        reducer.close()
    return results


WAYS = {
    "fp32": ({}, {"bits": [32]}),
    "fp32, sgd": ({"optimizer": "sgd"}, {"bits": [32]}),
    "4 bits": ({}, {"bits": [4]}),
    "cyclic, clipped, feedback": ({"feedback": True}, {"clip": 0.5}),
    "accumulating, clipped": ({"feedback": True}, {"accumulation": 3, "clip": 0.5}),
    "bf16": ({"amp": "bf16"}, {}),
    "one bucket": ({"bucket_mb": 25.0}, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_stage_trains_as_ddp_to_the_last_bit(ranks, way):
    """The reduced gradient is DDP's, element for element, and what optimizers do with it is elementwise."""
    options, training = WAYS[way]
    for results in ranks(2, train_all_engines, options, {"steps": range(20), **training}, STAGES):
        norms = [norm for norm, _, _ in results[None]]
        for stage in STAGES:
            assert [norm for norm, _, _ in results[stage]] == norms
            for (_, _, expected), (_, _, found) in zip(results[None], results[stage], strict=True):
                assert same(expected, found), stage
