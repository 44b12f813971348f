"""The gradients that ``bench comm`` averages: shaped and bucketed like those of a ResNet-50, with heavy tails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

RESNET50_NUMEL = 25_557_032
LEAST_NUMEL = 10_000
DISTINCT_RANKS = 8
"""Ranks beyond the eighth repeat the gradients of the first ones, so that the exact mean of many ranks stays cheap."""

FIRST_BUCKET_MB = 1.0
"""DDP closes its first bucket early, to begin sending."""

CHUNK = 1 << 20


def resnet50_shapes() -> Iterator[tuple[int, ...]]:
    """Shapes of a ResNet-50's parameters, in model order (He et al. 2016; 1000 classes)."""

    def convolution(channels: int, inputs: int, side: int) -> Iterator[tuple[int, ...]]:
        yield (channels, inputs, side, side)
        yield from ((channels,), (channels,))  # its normalization

    yield from convolution(64, 3, 7)
    inputs = 64
    for width, num_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(num_blocks):
            yield from convolution(width, inputs, 1)
            yield from convolution(width, width, 3)
            yield from convolution(4 * width, width, 1)
            if block == 0:
                yield from convolution(4 * width, inputs, 1)
            inputs = 4 * width
    yield from ((1000, inputs), (1000,))


def named_parameters(numel: int) -> list[tuple[str, torch.Tensor]]:
    """A ResNet-50's parameters, every one scaled in size alike so that there are ``numel`` elements; without storage."""
    assert numel >= LEAST_NUMEL, numel
    shapes = list(resnet50_shapes())
    sizes = [max(1, torch.Size(shape).numel() * numel // RESNET50_NUMEL) for shape in shapes]
    sizes[-2] += numel - sum(sizes)  # the classifier takes what rounding leaves
    return [
        (f"parameter{index}", torch.empty((size, 1) if len(shape) > 1 else (size,), device="meta"))
        for index, (shape, size) in enumerate(zip(shapes, sizes, strict=True))
    ]


def group_in_buckets(sizes: Sequence[int], *, bucket_mb: float) -> list[tuple[int, ...]]:
    """Indices of parameters that travel together, as DDP groups fp32 gradients: last first, closed once full."""
    buckets: list[tuple[int, ...]] = []
    bucket: list[int] = []
    limit = min(FIRST_BUCKET_MB, bucket_mb) * 2**20
    for index in reversed(range(len(sizes))):
        bucket.append(index)
        if 4 * sum(sizes[each] for each in bucket) >= limit:
            buckets.append(tuple(bucket))
            bucket, limit = [], bucket_mb * 2**20
    return [*buckets, tuple(bucket)] if bucket else buckets


def gradient_of(rank: int, numel: int) -> torch.Tensor:
    """The flat fp32 gradient of a rank: Student-t with 4 degrees of freedom, whose tails are those of real gradients."""
    generator = torch.Generator().manual_seed(4000 + rank % DISTINCT_RANKS)
    flat = torch.empty(numel)
    for part in flat.split(CHUNK):
        part.normal_(generator=generator)
        uniform = torch.rand(2, len(part), generator=generator).clamp_(min=1e-12)
        part.div_((-uniform.prod(dim=0).log_() / 2).sqrt_())  # the root of a chi-squared of 4 degrees, over 4
    return flat.mul_(1e-3)


def exact_mean(world_size: int, numel: int) -> torch.Tensor:
    """Mean of the gradients of all ranks: fp64, flat."""
    total = torch.zeros(numel, dtype=torch.float64)
    for rank in range(min(world_size, DISTINCT_RANKS)):
        repeated = len(range(rank, world_size, DISTINCT_RANKS))
        total.add_(gradient_of(rank, numel), alpha=repeated)
    return total.div_(world_size)


def relative_error(result: torch.Tensor, mean: torch.Tensor) -> float:
    """Squared error of a flat result relative to the square of the mean (NMSE)."""
    error = square = 0.0
    for part, exact in zip(result.split(CHUNK), mean.split(CHUNK), strict=True):
        error += float((part.double() - exact).square().sum())
        square += float(exact.square().sum())
    return error / square
