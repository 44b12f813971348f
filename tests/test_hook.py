import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cyclebnn_dist.comm import build_reducer, register_hook
from cyclebnn_dist.config.recipe import CommConfig


def train(rank, world_size, steps):
    torch.manual_seed(0)
    m = nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 50),
    )
    red = build_reducer(
        CommConfig(),
        m.named_parameters(),
        rank=rank,
        world_size=world_size,
        seed=1,
        device=torch.device("cpu"),
    )
    d = DistributedDataParallel(m, gradient_as_bucket_view=True, broadcast_buffers=False, bucket_cap_mb=0.02)
    register_hook(d, red)
    o = torch.optim.SGD(d.parameters(), lr=0.1)
    g = torch.Generator().manual_seed(rank)
    for s in range(steps):
        red.begin_step(s, [4, 2, 8, 16, 32, 1][s % 6])
        o.zero_grad()
        with red.reraising():
            d(torch.randn(8, 3, 12, 12, generator=g)).square().mean().backward()
        o.step()
    out = torch.cat([p.detach().view(-1) for p in m.parameters()]).numpy().tobytes()
    red.close()
    return out, red.counters


def test_t(ranks):
    for n in (2, 4, 1):
        r = ranks(n, train, 8)
        print(r[0][1])
        assert all(x[0] == r[0][0] for x in r)
